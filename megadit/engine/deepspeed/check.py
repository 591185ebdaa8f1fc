"""DeepSpeed's own opinion of a merged ds_config, asked before anything starts and told in one sentence."""

from __future__ import annotations

import copy
import json
import os
from typing import Any

from megadit.config.deepspeed.file import is_known_valid
from megadit.errors import UserError


def check_ds_config(ds_config: dict[str, Any], *, dry: bool = False) -> None:
    """Let DeepSpeed parse the configuration, as ``deepspeed.initialize`` will.

    ``dry``: nothing will be trained, so that DeepSpeed is imported only if there is something that it alone can judge.

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

    alone = copy.deepcopy(ds_config)
    if not deepspeed.comm.is_initialized():
        # No process group yet: DeepSpeed would take these sizes for one process, where they must multiply up too.
        alone["train_batch_size"] = alone["train_micro_batch_size_per_gpu"] * alone["gradient_accumulation_steps"]
    try:
        deepspeed.DeepSpeedConfig(alone)
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
