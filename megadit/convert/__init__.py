"""Checkpoints of other formats: in, to go on with megadit, and out, to go on elsewhere. See docs/convert.md.

For programs there are ``from_official``, ``to_official``, ``from_diffusers`` and ``to_diffusers``, from state dicts to
state dicts; ``conversion.convert`` does files.

======================  ============================================================
dispatch                the four functions for programs, by family (megadit/models/FAMILY/convert.py)
contents                what a checkpoint of any format holds, named and lazily read
formats                 their names
request                 what a conversion was asked for
conversion              ``convert``: from one format to another, checked on the way
defaults                the run configuration of a model that came without one
run_checkpoints         megadit's own (DESIGN: one logical format for every layout)
official                torch files and safetensors of the families' own code
wrappings               where the weights stand in what a trainer saved, by names
weight_folders          which file of a trainer's folder holds them
foreign_names           what is no whole model, by its names
pipeline_folders        pipeline folders of diffusers
pipeline_index          where their parts lie
pipeline_schedulers     their schedulers, as objectives of a run, and back
scheduler_keys          which keys of schedulers say how a model was trained
difference              how far a model and its copy in diffusers differ
deepspeed_files         what DeepSpeed's formats have in common
deepspeed_native        what ``engine.save_checkpoint`` writes under ZeRO 1 to 3, read
deepspeed_plain         the same at stage 0, read and written
deepspeed_universal     DeepSpeed's universal checkpoints, read and written
deferred                tensors that are read when their values are needed
nonfinite               values that are NaN or infinite, found while they pass
safetensors_file        safetensors, header by header and tensor by tensor
torch_file              torch files, written tensor by tensor
state_dicts             whole weights: safetensors and torch files, sharded or not
safe_load               torch files without running what they hold
stand_ins               what has the place of the classes that they name
======================  ============================================================
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from megadit.convert.formats import FORMATS
from megadit.lazy import exports

if TYPE_CHECKING:
    from megadit.convert.dispatch import from_diffusers, from_official, to_diffusers, to_official

__all__ = ["FORMATS", "from_diffusers", "from_official", "to_diffusers", "to_official"]

__getattr__ = exports(
    __name__, dict.fromkeys(("from_diffusers", "from_official", "to_diffusers", "to_official"), "dispatch")
)
