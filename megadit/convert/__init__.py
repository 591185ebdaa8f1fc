"""Checkpoints of other formats: in, to go on with megadit, and out, to go on elsewhere. See docs/convert.md.

======================  ============================================================
contents                what a checkpoint of any format holds, named and lazily read
conversion              ``convert``: from one format to another, checked on the way
run_checkpoints         megadit's own (DESIGN: one logical format for every layout)
deepspeed_native        what ``engine.save_checkpoint`` writes under ZeRO 1 to 3, read
deepspeed_plain         the same at stage 0, read and written
deepspeed_universal     DeepSpeed's universal checkpoints, read and written
state_dicts             whole weights: safetensors and torch files, sharded or not
safe_load               torch files without running what they hold
======================  ============================================================
"""

from __future__ import annotations

# What tools/convert_checkpoint.py offers; megadit.convert.conversion has a reader and a writer for each.
FORMATS = ("megadit", "safetensors", "fp32-state-dict", "deepspeed", "deepspeed-universal")
