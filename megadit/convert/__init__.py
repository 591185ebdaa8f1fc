"""Checkpoints of other formats: in, to go on with megadit, and out, to go on elsewhere. See docs/convert.md.

For programs there are ``from_official``, ``to_official``, ``from_diffusers`` and ``to_diffusers``, from state dicts to
state dicts; ``conversion.convert`` does files.

==================  ====================================================="""

from __future__ import annotations

from typing import TYPE_CHECKING

from megadit.extensions import FAMILIES
from megadit.lazy import exports

if TYPE_CHECKING:
    from megadit.convert.dispatch import from_diffusers, from_official, to_diffusers, to_official

__all__ = ["formats", "from_diffusers", "from_official", "to_diffusers", "to_official"]

__getattr__ = exports(
    __name__, dict.fromkeys(("from_diffusers", "from_official", "to_diffusers", "to_official"), "dispatch")
)


def formats() -> tuple[str, ...]:
    """Names of checkpoint formats; each has a reader and a writer. The files of authors' code go by their family."""
    official = (f"official-{family}" for family in FAMILIES.names())
    return ("megadit", "safetensors", "fp32-state-dict", "deepspeed", "deepspeed-universal", *official, "diffusers")
