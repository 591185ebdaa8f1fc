"""Checkpoints of other formats: in, to go on with megadit, and out, to go on elsewhere. See docs/convert.md.

For programs there are ``from_official``, ``to_official``, ``from_diffusers`` and ``to_diffusers``, from state dicts to
state dicts; ``conversion.convert`` does files.

==================  ============================================================
conversion          ``convert``: from one format to another, checked on the way
request             what a conversion was asked for, and the place of what it makes
contents            what a checkpoint of any format holds, named and lazily read; values that are NaN or infinite
family_adapters     the four functions for programs, by family (megadit/models/FAMILY/convert.py)
defaults            the run configuration of a model that came without one
run_checkpoints     megadit's own, of runs (docs/checkpoints.md)
state_dicts         whole weights: safetensors and torch files, sharded or not
official            torch files and safetensors of the families' own code
weight_sets         which weights of what a trainer saved are the model's: the file of a folder, the set of a file
parameter_names     the model's own names, without those of wrappers and trainers
foreign_names       weights that are no whole model, recognized by their names
deepspeed/          DeepSpeed's own: native (ZeRO 1 to 3), plain (stage 0), universal; files: what they have in common
diffusers/          pipeline folders, where their parts lie (index), their schedulers as objectives of a run and back
                    (scheduler_keys: which keys concern training), difference to the model here
torch_files/        read without running what they hold (safe_load, placeholders), written tensor by tensor
safetensors_file    safetensors, header by header and tensor by tensor
deferred            tensors that are read when their values are needed
==================  ============================================================
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from megadit.extensions import FAMILIES
from megadit.lazy import lazy_exports

if TYPE_CHECKING:
    from megadit.convert.family_adapters import from_diffusers, from_official, to_diffusers, to_official

__all__ = ["formats", "from_diffusers", "from_official", "to_diffusers", "to_official"]

__getattr__ = lazy_exports(
    __name__, dict.fromkeys(("from_diffusers", "from_official", "to_diffusers", "to_official"), "family_adapters")
)


def formats() -> tuple[str, ...]:
    """Names of checkpoint formats; each has a reader and a writer. The files of authors' code go by their family."""
    official = (f"official-{family}" for family in FAMILIES.names())
    return ("megadit", "safetensors", "fp32-state-dict", "deepspeed", "deepspeed-universal", *official, "diffusers")
