"""A family's models in other programs: what its ``convert.py`` says, and which families say it.

``key_maps`` and ``diffusers_class`` are what such files are made of. Configurations and state dicts go in and out:
nothing here reads or writes a file, which is ``megadit.convert``'s.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from megadit.config.family import families
from megadit.config.schema.model import ModelConfig
from megadit.errors import UserError
from megadit.extensions import FAMILIES
from megadit.registry import load_object

if TYPE_CHECKING:
    from torch import Tensor

    from megadit.conditioning import Conditioning

    _State = Mapping[str, Tensor]

LATENT_CHANNELS = (4, 16)  # of the autoencoders that these models are trained on


@dataclass(frozen=True)
class DiffusersModel:
    """A family's class in diffusers, and its pipeline.

    class_name, defaults: ``_class_name`` of its config.json, and what the keys stand for that are left out of it.
    to_diffusers: (config, weights) -> (config.json, weights).
    from_diffusers: (config.json, weights, where=…) -> (config, weights); of a family with a null caption also with
        ``max_length=``, tokens of a text or None.
    gap: (config.json, where) -> why the class computes something else than the model here; None: it does not.
    arguments: (timesteps in [0, 1000], conditioning) -> what its forward takes by name beside the image.
    pipeline, components: its class, and those of its parts that are not written here, as in ``model_index.json``.
    of_betas: the class of the scheduler by which it draws from a model that is not a flow.
    runs_flows: whether it can draw by a flow's scheduler; others lack scale_model_input and init_noise_sigma for it.
    null_label: the label that it takes as the null one; None: it takes none.
    sees_padding: whether images see the padding of a text there.
    """

    class_name: str
    defaults: Mapping[str, Any]
    to_diffusers: Callable[[ModelConfig, _State], tuple[dict[str, Any], dict[str, Tensor]]]
    from_diffusers: Callable[..., tuple[ModelConfig, dict[str, Tensor]]]
    arguments: Callable[[Tensor, Conditioning], dict[str, Any]]
    pipeline: str
    components: Mapping[str, list[str]] = field(default_factory=dict)
    of_betas: str = "DPMSolverMultistepScheduler"
    runs_flows: bool = False
    null_label: int | None = None
    sees_padding: bool = False
    gap: Callable[[Mapping[str, Any], str], str | None] = lambda config_json, where: None


@dataclass(frozen=True)
class Conversion:
    """A family's models in the files of its authors' code, and in diffusers.

    from_official: (weights, **hints) -> (config, weights); to_official: (config, weights) -> weights.
    anchor: the parameter whose name ends alike wherever the model stands in a file.
    sign: how names begin that no other family has.
    defaults: sections of the run of a model that came without one: the objective and guidance of its originals.
    hints: names of those that ``from_official`` takes: what the weights cannot tell.
    wrapped_in: the key below which the authors' loader looks for the weights.
    notes: what a run here does otherwise than the originals without saying so.
    told: the dumped keys of a model without what its weights leave open.
    """

    from_official: Callable[..., tuple[ModelConfig, dict[str, Tensor]]]
    to_official: Callable[[ModelConfig, _State], dict[str, Tensor]]
    anchor: str
    sign: str
    defaults: Callable[[ModelConfig], dict[str, dict[str, Any]]]
    hints: tuple[str, ...] = ()
    wrapped_in: str | None = None
    notes: tuple[str, ...] = ()
    told: Callable[[ModelConfig, dict[str, Any]], dict[str, Any]] = lambda config, keys: keys
    diffusers: DiffusersModel | None = None


def conversion_of(family: str) -> Conversion:
    """That of a family. Raises UserError where no other program knows its models, or there is no such family."""
    if family not in FAMILIES:
        raise UserError(f"family: {family!r} is not known; known are {', '.join(FAMILIES.names())}")
    found = conversions().get(family)
    if found is None:
        raise UserError(f"model.family: {family} has no official form; use --to safetensors")
    return found


def diffusers_of(family: str) -> DiffusersModel:
    """The class of a family in diffusers. Raises UserError where there is none."""
    found = conversions().get(family)
    if found is None or found.diffusers is None:
        raise UserError(f"model.family: {family} has no class in diffusers; use --to safetensors")
    return found.diffusers


def conversions() -> dict[str, Conversion]:
    """Those of all families that have one, by the family's name."""
    return {spec.name: load_object(spec.conversion) for spec in families() if spec.conversion is not None}


def diffusers_classes() -> dict[str, str]:
    """The families whose models diffusers has, by the class's name."""
    return {c.diffusers.class_name: name for name, c in conversions().items() if c.diffusers is not None}
