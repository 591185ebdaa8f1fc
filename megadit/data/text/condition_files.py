"""Conditions kept in a file, and the texts they belong to: a run's null text and its prompts."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from megadit.conditioning import Conditioning
from megadit.errors import UserError
from megadit.files.file_kind import file_instead
from megadit.files.json_text import parse_json
from megadit.files.paths import save_tensors

NULL_TEXT_FILE, PROMPTS_FILE = "null_text.safetensors", "prompts.safetensors"


def save_conditions(path: Path, cond: Conditioning, texts: Sequence[str] = ("",)) -> None:
    """Write text, text_mask and pooled of ``texts``, as far as they are given."""
    given = {name: getattr(cond, name) for name in ("text", "text_mask", "pooled")}
    tensors = {name: value.cpu().contiguous() for name, value in given.items() if value is not None}
    save_tensors(path, tensors, {"texts": json.dumps(list(texts))})


def load_conditions(path: Path) -> tuple[Conditioning, list[str]]:
    """What ``save_conditions`` wrote. Raises UserError if the file is missing or something else."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(str(path), "pt") as file:
            names = set(file.keys()) & {"text", "text_mask", "pooled"}
            texts = parse_json((file.metadata() or {})["texts"])
            if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
                raise ValueError("its texts are no list of texts")
            cond = Conditioning(**{name: file.get_tensor(name) for name in names})
    except (SafetensorError, OSError, ValueError, KeyError) as error:
        other = file_instead(path, "safetensors")
        if other is not None:
            raise UserError(f"'{path}' cannot be read: {other}") from error
        raise UserError(
            f"'{path}' is missing or damaged ({' '.join(str(error).split())[:120]}); start the run's training command "
            "again, which writes it"
        ) from error
    return cond, texts
