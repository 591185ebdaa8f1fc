"""``FamilySpec``: the description of a family of models, without importing the model or torch.

A family is one folder, ``megadit/models/NAME``, or one module of a plugin (docs/adding-a-family.md). Code outside of it
reads the spec and never tests for a family's name.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from operator import attrgetter
from typing import Any, Literal

from megadit.config.options import Scalar
from megadit.extensions import FAMILIES

Condition = Literal["classes", "text", "either"]
Layout = Literal["tensor", "sequence", "pipeline"]

# Callables of a spec take a ModelConfig, whose module imports this one.
_Config = Any


@dataclass(frozen=True)
class FamilySpec:
    """One family. Lazy paths are written ``module:attribute`` and imported when they are needed.

    name: its ``model.family``.
    model: lazy path of the class, a ``megadit.models.StagedModel`` built from (ModelConfig, Parametrization).
    init: lazy path of each scheme of initial values by its ``model.init``, a mapping from purposes to ``InitRule``;
        ``original`` must be among them, ``fan_in`` is every family's.
    presets: the keys of ``model.*`` that each named architecture sets, without the family.
    conversion: lazy path of a ``megadit.models.conversion.Conversion``; None: no other program knows such models.

    condition: "classes": classes or none; "text": always text; "either": classes, text or none.
    pooled_text: whether it can take a pooled text feature, too.
    text_keys: how tokens attend to a text without positions, whose padding can be left out by lengths: "joint", in one
        attention with all tokens, "cross", in one of its own that ``attention_precision`` does not concern, or "": not.
    null_caption: name of the buffer with the features of the null caption, (max_length, dim), which is part of each
        trained model; "" of families that use the encoder's features of an empty text.
    keys: the keys among ``OF_SOME_FAMILIES`` (config/schema/model.py) that it reads.
    options: names and defaults of its ``model.options``; values must have the types of the defaults.
    layouts: the keys of ``parallel.*`` that it supports.

    blocks: number of Transformer blocks.
    check: raises ValueError ("key: what is wrong; remedy") for a configuration that the family does not support.
    drawn_roles: the roles among vector, output and finite with randomly initialised weights, REPA's projector aside.
    """

    name: str
    model: str
    init: Mapping[str, str]
    presets: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    conversion: str | None = None

    condition: Condition = "classes"
    pooled_text: bool = False
    text_keys: Literal["", "joint", "cross"] = ""
    null_caption: str = ""
    keys: tuple[str, ...] = ()
    options: Mapping[str, Scalar] = field(default_factory=dict)
    layouts: tuple[Layout, ...] = ("pipeline",)

    blocks: Callable[[_Config], int] = attrgetter("depth")
    check: Callable[[_Config], None] = lambda config: None
    drawn_roles: Callable[[_Config], Collection[str]] = lambda config: ()


def family_spec(name: str) -> FamilySpec:
    """The family called ``name``. Raises UserError where there is none."""
    spec: FamilySpec = FAMILIES.get(name)
    return spec


def families() -> tuple[FamilySpec, ...]:
    """All families, megadit's first, in the order of the registry."""
    return tuple(map(family_spec, FAMILIES.names()))
