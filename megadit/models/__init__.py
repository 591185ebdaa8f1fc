"""The model families, each written once, as a list of stages that reads as plain single-device torch.

A family is one folder: ``family`` (its ``FamilySpec``), ``model``, ``presets``, ``init``, ``convert``. Importing this
package loads no torch.
"""

from collections.abc import Mapping
from typing import TYPE_CHECKING

from megadit.lazy import lazy_exports

if TYPE_CHECKING:
    from megadit.conditioning import Conditioning
    from megadit.models.build import build_model, count_parameters
    from megadit.models.stages import Stage, StagedModel, StageIO

__all__ = ["FAMILIES", "Conditioning", "Stage", "StageIO", "StagedModel", "build_model", "count_parameters"]

# Lazy path of each ``FamilySpec``, by ``model.family``.
FAMILIES: Mapping[str, str] = {
    "dit": "megadit.models.dit.family:FAMILY",
    "pixart": "megadit.models.pixart.family:FAMILY",
    "uvit": "megadit.models.uvit.family:FAMILY",
    "mmdit": "megadit.models.mmdit.family:FAMILY",
}

__getattr__ = lazy_exports(
    __name__,
    {
        **dict.fromkeys(("build_model", "count_parameters"), "build"),
        **dict.fromkeys(("StageIO", "Conditioning", "Stage", "StagedModel"), "stages"),
    },
)
