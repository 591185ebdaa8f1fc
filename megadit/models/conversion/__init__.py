"""Conversion of a family's models: ``Conversion``, which each family's ``convert.py`` defines, and look-ups of it.

``key_maps`` and ``diffusers_class`` are shared by these files. All of it maps configurations and state dicts;
``megadit.convert`` reads and writes the files.
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

    class_name, defaults: ``_class_name`` of its config.json, and defaults of the keys that may be missing in it.
    to_diffusers: (config, weights) -> (config.json, weights).
    from_diffusers: (config.json, weights, where=…) -> (config, weights); for a family with a null caption also with
        ``max_length=``, tokens of a text or None.
    mismatch: (config.json, where) -> why the class computes something else than the model here; None: it does not.
    arguments: (timesteps in [0, 1000], conditioning) -> the keyword arguments of its forward beside the image.
    pipeline, components: the pipeline class, and the classes of the components that megadit does not write, as in
        ``model_index.json``.
    ddpm_scheduler: class of the scheduler that samples a model of ``objective.kind`` ddpm.
    supports_flow: whether the pipeline can run a flow's scheduler, which has neither scale_model_input nor
        init_noise_sigma.
    null_label: the label that stands for no class; None: the pipeline has none.
    attends_to_padding: whether image tokens attend to the padding of a text.
    """

    class_name: str
    defaults: Mapping[str, Any]
    to_diffusers: Callable[[ModelConfig, _State], tuple[dict[str, Any], dict[str, Tensor]]]
    from_diffusers: Callable[..., tuple[ModelConfig, dict[str, Tensor]]]
    arguments: Callable[[Tensor, Conditioning], dict[str, Any]]
    pipeline: str
    components: Mapping[str, list[str]] = field(default_factory=dict)
    ddpm_scheduler: str = "DPMSolverMultistepScheduler"
    supports_flow: bool = False
    null_label: int | None = None
    attends_to_padding: bool = False
    mismatch: Callable[[Mapping[str, Any], str], str | None] = lambda config_json, where: None


@dataclass(frozen=True)
class Conversion:
    """A family's models in the files of its authors' code, and in diffusers.

    from_official: (weights, **hints) -> (config, weights); to_official: (config, weights) -> weights.
    anchor: a parameter that every model of the family has; what stands before its name is the prefix of all names.
    name_prefix: how parameter names of this family, and of no other, begin.
    defaults: sections of the run of a model that came without a config: objective and guidance of the originals.
    hints: the hints that ``from_official`` takes, which say what the weights cannot tell.
    weights_key: the key below which the authors' loader looks for the weights.
    notes: differences between a run here and the originals, logged with every conversion.
    comparable_keys: (config, its dump) -> the dump without what the weights leave open.
    """

    from_official: Callable[..., tuple[ModelConfig, dict[str, Tensor]]]
    to_official: Callable[[ModelConfig, _State], dict[str, Tensor]]
    anchor: str
    name_prefix: str
    defaults: Callable[[ModelConfig], dict[str, dict[str, Any]]]
    hints: tuple[str, ...] = ()
    weights_key: str | None = None
    notes: tuple[str, ...] = ()
    comparable_keys: Callable[[ModelConfig, dict[str, Any]], dict[str, Any]] = lambda config, keys: keys
    diffusers: DiffusersModel | None = None


def conversion_of(family: str) -> Conversion:
    """The ``Conversion`` of a family. Raises UserError for an unknown family, and one that no other program has."""
    if family not in FAMILIES:
        raise UserError(f"family: {family!r} is not known; known are {', '.join(FAMILIES.names())}")
    conversion = conversions().get(family)
    if conversion is None:
        raise UserError(f"model.family: {family} has no official form; use --to safetensors")
    return conversion


def diffusers_of(family: str) -> DiffusersModel:
    """The class of a family in diffusers. Raises UserError where there is none."""
    conversion = conversions().get(family)
    if conversion is None or conversion.diffusers is None:
        raise UserError(f"model.family: {family} has no class in diffusers; use --to safetensors")
    return conversion.diffusers


def conversions() -> dict[str, Conversion]:
    """The ``Conversion`` of every family that has one, by the family's name."""
    return {spec.name: load_object(spec.conversion) for spec in families() if spec.conversion is not None}


def diffusers_classes() -> dict[str, str]:
    """Name of the family by name of its class in diffusers."""
    return {c.diffusers.class_name: name for name, c in conversions().items() if c.diffusers is not None}
