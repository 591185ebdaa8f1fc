"""What the commands that write tars share: their options' meaning, a progress bar, what they tell at the end."""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megadit.data.shards.layout import Progress, Sharding
from megadit.errors import UserError

if TYPE_CHECKING:
    from megadit.config.schema.data import DataConfig
    from megadit.data.shards.manifest import Manifest


def sharding_of(name: str | None, out: Path, samples: int, max_mb: float | None) -> Sharding:
    """How tars are cut, from --name, --out, --samples and --max_mb. Raises UserError for values that cannot be."""
    prefix = name or out.absolute().name
    if not prefix or prefix.startswith(".") or any(sign in prefix for sign in "/\\{}"):
        raise UserError(f"--name: '{prefix}' cannot begin the names of tars; give a plain word")
    in_range("--samples", samples, 1, None)
    if max_mb is not None and not 0 < max_mb < math.inf:
        raise UserError(f"--max_mb: {max_mb:g} is not above 0, or has no end; give the megabytes of a tar")
    return Sharding(prefix, samples, None if max_mb is None else int(max_mb * 1e6))


def in_range(option: str, value: int, lowest: int, highest: int | None) -> int:
    """``value`` if it lies in the range. Raises UserError that names ``option`` if not."""
    if value < lowest or (highest is not None and value > highest):
        upto = f"at least {lowest}" if highest is None else f"from {lowest} to {highest}"
        raise UserError(f"{option}: {value} is not {upto}; choose another value")
    return value


def device_of(name: str) -> str:
    """--device as torch names it. Raises UserError where it is not there."""
    import torch

    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if name.partition(":")[0] not in ("cpu", "cuda"):
        raise UserError(f"--device: {name} is not one of auto, cpu, cuda")
    if name.startswith("cuda") and not torch.cuda.is_available():
        raise UserError(f"--device: {name} is not available here; use cpu")
    return name


@contextmanager
def progress_bar(unit: str) -> Iterator[Progress]:
    """A bar on stderr, silent where that is no terminal; what is given takes (done, total)."""
    from tqdm import tqdm

    with tqdm(unit=f" {unit}", file=sys.stderr, disable=not sys.stderr.isatty(), dynamic_ncols=True) as bar:

        def show(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)

        yield show


def summary(manifest: Manifest, out: Path) -> dict[str, Any]:
    """What was written, for --json."""
    return {
        "out": str(out),
        "name": manifest.name,
        "samples": manifest.samples,
        "shards": len(manifest.shards),
        "bytes": sum(shard.bytes for shard in manifest.shards),
        "classes": len(manifest.classes),
        "holds": holds(manifest),
    }


def holds(manifest: Manifest) -> list[str]:
    """What is in the tars, in words."""
    stored = manifest.stored
    if stored is None:
        return [f"images of {manifest.image_size} pixels"]
    found = [f"images of {manifest.image_size} pixels"] if not stored.channels else []
    if stored.channels:
        kind = "posteriors of latents" if stored.moments else "latents"
        found.append(f"{kind}, {stored.channels}x{stored.size}x{stored.size}, scale {stored.scale:g}, {stored.codec}")
    if stored.text_dim:
        pooled = f" and pooled {stored.pooled_dim}" if stored.pooled_dim else ""
        found.append(f"text of up to {stored.text_length} tokens x {stored.text_dim}{pooled}, {stored.text_encoder}")
    if stored.feature_dim:
        found.append(f"features of {stored.feature_dim} channels, {stored.feature_encoder}")
    return [*found, "all of mirrored images too"] if stored.mirrored else found


def sentences(manifest: Manifest, out: Path) -> str:
    """What was written, for people."""
    size = sum(shard.bytes for shard in manifest.shards) / 1e6
    first = f"{out}: {manifest.samples} samples of {manifest.name} in {len(manifest.shards)} tars, {size:.1f} MB"
    return "\n  ".join([first, *holds(manifest), f"train on them with data.name=webdataset data.path={out}"])


def check_encode_options(config: DataConfig, posterior: str | None, seed: int | None, max_length: int | None) -> None:
    """Raise UserError for an option of ``tools/encode.py`` (None: not given) that nothing reads for ``config``."""
    from megadit.data.codecs.folder import VAE_CLASS, codec_facts

    if seed is not None and posterior != "sample":
        raise UserError(f"--seed: {seed} is not read without --posterior sample, the one that draws; leave it out")
    if posterior is not None and (config.vae is None or codec_facts(config.vae).name != VAE_CLASS):
        raise UserError(f"--posterior: {posterior} is of an AutoencoderKL, and data.vae gives none; leave it out")
    if max_length is not None and config.condition != "text":
        raise UserError(
            f"--max_length: {max_length} is of texts, and data.condition is {config.condition}; leave it out, or set "
            "data.condition=text"
        )
