"""``TextTable``: features of many texts, computed once on a host and kept in a file.

States are packed, only the tokens that there are, and held in float16: its 11 bits are finer than the differences
between precisions of the encoder, and a caption of T5-XXL's 120 tokens takes 1 MB instead of 2. Where a value is beyond
float16's range the whole table is float32. Pooled features are always float32.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import logging
import os
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor

from megadit.conditioning import Conditioning
from megadit.data.text.encoders import TextEncoder, pad
from megadit.errors import UserError, one_line
from megadit.files.paths import check_folder, refuse_unwritable, save_tensors, user_cache

_FORMAT = "megadit-text-1"
_PROGRESS_S = 5.0  # between lines of progress
_REMEDY = "give a folder that can"


class TextTable:
    """Text features by text. The file is memory-mapped, so that the processes of a host share its pages."""

    def __init__(self, texts: Sequence[str], tensors: dict[str, Tensor], max_length: int) -> None:
        """texts: in the order of the rows.  tensors: states (tokens, D), ends int64 (N,), pooled float32 (N, P)."""
        self.max_length = max_length
        self._rows = {text: row for row, text in enumerate(texts)}
        self._states, self._pooled = tensors["states"], tensors["pooled"]
        self._ends = [0, *tensors["ends"].tolist()]

    def __len__(self) -> int:
        return len(self._rows)

    def __contains__(self, text: str) -> bool:
        return text in self._rows

    def of(self, texts: Sequence[str]) -> Conditioning:
        """text float32 (B, max_length, D), text_mask, pooled (None without). Raises KeyError for a text not in it."""
        rows = [self._rows[text] for text in texts]
        states = [self._states[self._ends[row] : self._ends[row + 1]].float() for row in rows]
        return pad([(state, self._pooled[row]) for state, row in zip(states, rows, strict=True)], self.max_length)


def cache_folder(path: str | None) -> Path:
    """``data.text.cache``, or ``megadit/text`` in the user's cache folder ($XDG_CACHE_HOME, ~/.cache)."""
    if path is not None:
        return Path(path)
    return user_cache() / "text"


def build_table(encoder: TextEncoder, texts: Sequence[str], max_length: int, folder: Path) -> TextTable:
    """The table of these texts (each once), read from ``folder`` or computed and written there.

    Of the processes of a host one computes while the others wait for it. Texts of more than ``max_length`` tokens are
    cut; one warning counts them. Raises UserError where the folder cannot be written or the encoder does not load.
    """
    texts = sorted(set(texts))
    path = folder / f"{_key(encoder, texts, max_length)}.safetensors"
    tensors = _read(path, len(texts)) if path.is_file() else None
    if tensors is None:
        with _locked(path):
            # another process may have written it while this one waited
            tensors = _read(path, len(texts), warn=True) if path.is_file() else None
            if tensors is None:
                _write(path, encoder, texts, max_length)
                tensors = _read(path, len(texts))
    if tensors is None:
        raise UserError(f"data.text.cache: '{path}' cannot be read back after it was written; choose another folder")
    cut = int(tensors["cut"])
    if cut and os.environ.get("LOCAL_RANK", "0") == "0":
        warning = "model.text.max_length: %d of %d captions have more than %d tokens and are cut"
        logging.getLogger(__name__).warning(warning, cut, len(texts), max_length)
    return TextTable(texts, tensors, max_length)


def _key(encoder: TextEncoder, texts: Sequence[str], max_length: int) -> str:
    facts = [_FORMAT, encoder.identity, encoder.dim, encoder.pooled_dim, max_length, list(texts)]
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:32]


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    """A lock among the processes that would write ``path``; the kernel releases it when its holder dies.

    Where the file system has no such locks every process computes the table, and the file still appears whole.
    """
    check_folder(path.parent, "data.text.cache")
    with refuse_unwritable("data.text.cache", path.parent, _REMEDY):
        path.parent.mkdir(parents=True, exist_ok=True)
        file = os.open(path.with_suffix(".lock"), os.O_RDWR | os.O_CREAT, 0o666)
    try:
        with contextlib.suppress(OSError):
            fcntl.flock(file, fcntl.LOCK_EX)
        yield
    finally:
        os.close(file)


def _read(path: Path, count: int, *, warn: bool = False) -> dict[str, Tensor] | None:
    """The tensors of the file, mapped; None if it is not such a file or does not hold ``count`` texts."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(str(path), "pt") as file:
            tensors = {name: file.get_tensor(name) for name in ("states", "ends", "pooled", "cut")}
        complete = len(tensors["ends"]) == len(tensors["pooled"]) == count
        if complete and len(tensors["states"]) == int(tensors["ends"][-1]) and bool((tensors["ends"].diff() > 0).all()):
            return tensors
        reason = "its sizes do not fit together"
    except (SafetensorError, OSError, ValueError) as error:
        reason = one_line(error, 120)
    if warn:
        print(f"data.text.cache: '{path}' is damaged ({reason}); it is computed again", file=sys.stderr)
    return None


def _write(path: Path, encoder: TextEncoder, texts: Sequence[str], max_length: int) -> None:
    begin = last_line = time.monotonic()

    def progress(done: int, total: int) -> None:
        nonlocal last_line
        if time.monotonic() - last_line > _PROGRESS_S:
            last_line = time.monotonic()
            print(f"text features: {done} of {total} captions", file=sys.stderr, flush=True)

    cut = sum(len(ids) > max_length for ids in encoder.token_ids(texts))
    features = list(encoder.features(texts, max_length, progress))
    states = torch.cat([state for state, _ in features])
    narrow = states.half()
    tensors = {
        "states": narrow if bool(narrow.isfinite().all()) else states,
        "ends": torch.tensor([len(state) for state, _ in features]).cumsum(0),
        "pooled": torch.stack([vector for _, vector in features]),
        "cut": torch.tensor(cut),
    }
    with refuse_unwritable("data.text.cache", path.parent, _REMEDY):
        save_tensors(path, tensors, {"encoder": encoder.identity}, sync=True)
    seconds = time.monotonic() - begin
    print(f"text features: {len(texts)} captions in {seconds:.1f} s, kept in {path}", file=sys.stderr, flush=True)
