"""Files of weights for fuzz tests, and one that would leave a mark if what it holds were run."""

from __future__ import annotations

import io
import pickle
from pathlib import Path
from typing import Any

import torch

from megadit.convert.contents import Contents, ValueCheck
from megadit.convert.conversion import reader_and_writer
from megadit.convert.request import Request

STATE = {
    "blocks.0.weight": torch.arange(12.0).reshape(3, 4),
    "blocks.0.bias": torch.ones(3, dtype=torch.bfloat16),
    "head.weight": torch.zeros(2, 3, dtype=torch.float16),
    "steps": torch.tensor(5),
}
HEADER_WORDS = (
    b'"F32"',
    b'"F8_E4M3"',
    b'"BOOL"',
    b'"data_offsets":[0,0]',
    b'"data_offsets":[0,18446744073709551615]',
    b'"shape":[]',
    b'"shape":[9223372036854775807,2]',
    b'"__metadata__":{"megadit_config":"{}"}',
    b"\xff\xff\xff\xff\xff\xff\xff\x7f",
)


class Runs:
    """What runs when it is unpickled: it leaves a file."""

    def __init__(self, path: str) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (Path(self.path),)


def torch_files(mark: Path) -> list[bytes]:
    """Files as torch writes and wrote them, with what trainers put into them, and one that would leave ``mark``."""
    contents: list[Any] = [
        STATE,
        {"model": STATE, "ema": STATE, "epoch": 3, "args": [1, "a", None]},
        {"a": Runs(str(mark))},
    ]
    files = []
    for values in contents:
        for new in (True, False):
            buffer = io.BytesIO()
            torch.save(values, buffer, _use_new_zipfile_serialization=new)
            files.append(buffer.getvalue())
    return [*files, pickle.dumps({"a": Runs(str(mark))}), pickle.dumps(STATE, protocol=2)]


def converted(kind: str, path: Path, request: Request | None = None) -> Contents:
    """All that a conversion from the format ``kind`` would read of ``path``."""
    check = ValueCheck()
    contents = reader_and_writer(kind)[0](path, request or Request(), check)
    for name, shape in contents.shapes.items():
        for part in contents.kinds:
            assert contents.tensor(part, name).shape == torch.Size(shape)
    check.notes(allowed=True)
    return contents
