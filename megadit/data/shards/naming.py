"""The names of a set of tars: members, shards and the files beside them.

A sample is the members of one tar that share everything before the first dot of their file name (WebDataset's rule).
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import PurePosixPath

MANIFEST = "manifest.json"
INDEX = "index.safetensors"
NULL_TEXT = "null_text.safetensors"
RECIPE = ".recipe.json"  # the settings of an unfinished set, so that only the same command resumes it

# extensions of members
IMAGES = ("png", "jpg", "jpeg", "webp")
LATENT, LATENT_MIRRORED = "latent.npy", "latent_mirrored.npy"
TEXT, POOLED = "text.npy", "pooled.npy"
FEATURES, FEATURES_MIRRORED = "features.npy", "features_mirrored.npy"
JSON, LABEL, CAPTION = "json", "cls", "txt"
ARRAYS = (LATENT, LATENT_MIRRORED, TEXT, POOLED, FEATURES, FEATURES_MIRRORED)
KNOWN = (*IMAGES, *ARRAYS, JSON, LABEL, CAPTION)
PICKLED = frozenset({"pkl", "pickle", "pyd", "pth", "pt", "ckpt", "bin", "joblib"})  # what loaders would unpickle

_SHOWN = 120  # characters of a name in a sentence


@dataclass(frozen=True)
class Sharding:
    """How a set is cut into tars. prefix: of their names.  per_shard: most samples.  max_bytes: None for no limit."""

    prefix: str
    per_shard: int
    max_bytes: int | None = None


def split_member(name: str) -> tuple[str, str]:
    """(key, extension) of a member's name: a/b.latent.npy -> (a/b, latent.npy); no extension: empty."""
    path = PurePosixPath(name)
    stem, _, extension = path.name.partition(".")
    key = stem if path.parent == PurePosixPath(".") else f"{path.parent}/{stem}"
    return key, extension.lower()


def shard_name(prefix: str, number: int) -> str:
    """The file name of a shard, as WebDataset's patterns expect it."""
    return f"{prefix}-{number:06d}.tar"


def shown_name(name: str) -> str:
    """The name of a member for messages: on one line, with escapes, cut where it is long."""
    if len(name) > _SHOWN:
        name = f"{name[: _SHOWN // 2]}…{name[-_SHOWN // 2 :]}"
    return name if name.isprintable() else "".join(map(_escaped, name))


def _escaped(sign: str) -> str:
    if sign.isprintable():
        return sign
    if "\udc80" <= sign <= "\udcff":  # a byte that is no UTF-8
        return f"\\x{ord(sign) - 0xDC00:02x}"
    return sign.encode("unicode_escape").decode()
