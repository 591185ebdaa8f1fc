"""Names of random streams as 64-bit keys, for ``megadit.rng`` and for whoever needs no torch."""

from __future__ import annotations

import hashlib


def stream_key(seed: int, *parts: str | int) -> int:
    """A 64-bit key for the stream named by ``parts`` under ``seed`` (signed, fits an int64 tensor)."""
    text = "\x1f".join([str(int(seed)), *(str(part) for part in parts)])
    digest = hashlib.blake2b(text.encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little", signed=True)
