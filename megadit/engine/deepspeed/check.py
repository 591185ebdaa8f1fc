"""Validation of a merged ds_config by DeepSpeed itself, before anything starts."""

from __future__ import annotations

import copy
import json
import os
from typing import Any

from megadit.config.deepspeed.file import is_known_valid
from megadit.errors import UserError


def check_ds_config(ds_config: dict[str, Any], *, dry: bool = False) -> None:
    """Let DeepSpeed parse the configuration, as ``deepspeed.initialize`` will.

    dry: nothing will be trained, so that DeepSpeed is imported only for keys that megadit does not check itself.

    Raises:
        UserError: an unknown key of a block, or a value that DeepSpeed cannot take.
    """
    if dry and is_known_valid(ds_config):
        return
    import torch
    from pydantic import ValidationError

    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    os.environ.setdefault("DEEPSPEED_LOG_LEVEL", "error")
    import deepspeed

    checked = copy.deepcopy(ds_config)
    if not deepspeed.comm.is_initialized():
        # Without a process group DeepSpeed assumes one process, for which the batch size must be the product, too.
        checked["train_batch_size"] = checked["train_micro_batch_size_per_gpu"] * checked["gradient_accumulation_steps"]
    try:
        deepspeed.DeepSpeedConfig(checked)
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(str(part) for part in first["loc"]) or "the block"
        raise UserError(
            f"--ds_config: DeepSpeed does not take {key}: {json.dumps(first['input'], default=str)} "
            f"({error.title}: {_one_line(first['msg'])}); correct it or take it out"
        ) from error
    except Exception as error:  # it has no error class of its own for values out of range
        raise UserError(
            f"--ds_config: DeepSpeed does not take it ({_one_line(str(error)) or type(error).__name__}); correct it"
        ) from error


def _one_line(text: str) -> str:
    return " ".join(text.split()).rstrip(".")
