"""The model families, written once as stages over one carrier; plain single-device torch in reading."""

from megadit.conditioning import Conditioning
from megadit.models.registry import build_model, count_parameters
from megadit.models.stages import Carrier, Stage, StagedModel

__all__ = ["Carrier", "Conditioning", "Stage", "StagedModel", "build_model", "count_parameters"]
