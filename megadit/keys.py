"""Names of random streams as 64-bit keys, for ``megadit.rng`` and for whoever needs no torch."""

from __future__ import annotations

import hashlib

from megadit.files.text import name_bytes


def stream_key(seed: int, *parts: str | int) -> int:
    """A 64-bit key for the stream named by ``parts`` under ``seed`` (signed, fits an int64 tensor).

    A part that is the name of a file counts by its bytes, whether or not they are UTF-8.
    """
    text = "\x1f".join([str(int(seed)), *(str(part) for part in parts)])
    digest = hashlib.blake2b(name_bytes(text), digest_size=8).digest()
    return int.from_bytes(digest, "little", signed=True)
