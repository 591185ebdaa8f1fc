"""Write images, captions and labels as WebDataset tars: NAME-000000.tar, NAME-000001.tar, ... and a manifest.

The whole data set of a configuration is written, with base names, by which training splits it. Train on the folder with
data.name=webdataset data.path=OUT. An interrupted command, given again, resumes after the last finished tar.

python tools/make_shards.py --out shards/emoji data.name=emoji data.image_size=64
python tools/make_shards.py --out shards/birds data.name=image-folder data.path=birds data.image_size=256 --image jpg
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megadit.cli import add_plugins, import_plugins
from megadit.errors import EXIT_OK, UserError
from megadit.streams import result_is_saved

if TYPE_CHECKING:
    from megadit.data.dataset import ProgressCallback
    from megadit.data.shards.manifest import Manifest
    from megadit.data.shards.naming import Sharding


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("overrides", nargs="*", metavar="data.key=value", help="what to write, e.g. data.name=digits")
    p.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder to make; must be empty or unfinished")
    p.add_argument("--config", metavar="FILE", help="run configuration (YAML) whose data section to start from")
    add_plugins(p)
    add_sharding(p)
    p.add_argument("--image", choices=("png", "jpg"), default="png", help="png (exact; default) or jpg")
    p.add_argument("--quality", type=int, metavar="1-100", help="of --image jpg; default 95")
    p.add_argument("--json", action="store_true", help="print one JSON object: samples, shards, bytes, out")
    return p


def main(argv: Sequence[str] | None = None) -> int:
    """Write the tars, and print a summary."""
    args = parser().parse_intermixed_args(argv)
    from megadit.parallel.environment import refuse_ranks

    refuse_ranks("tools/make_shards.py")
    import_plugins(args)
    from megadit.config.loading.loader import load_data
    from megadit.extensions import DATA_SOURCES

    sharding = sharding_of(args.name, args.out, args.samples, args.max_mb)
    quality = in_range("--quality", 95 if args.quality is None else args.quality, 1, 100)
    if args.quality is not None and args.image != "jpg":
        raise UserError(f"--quality: {args.quality} is not read where --image is {args.image}; add --image jpg")
    config = load_data(args.config, args.overrides)
    DATA_SOURCES.get(config.name).check(config)
    from megadit.data.shards.writing import make_shards

    with progress_bar("images") as progress:
        manifest = make_shards(config, args.out, sharding, args.image, quality, progress)
    print_set(manifest, args.out, as_json=args.json)
    return EXIT_OK


def add_sharding(p: argparse.ArgumentParser) -> None:
    """Add the options that ``sharding_of`` takes."""
    p.add_argument("--name", metavar="NAME", help="what the tars' names begin with; default: the folder's name")
    p.add_argument("--samples", type=int, default=10_000, metavar="N", help="most samples of a tar; default 10000")
    p.add_argument("--max_mb", type=float, metavar="MB", help="most megabytes (10^6) of a tar; default: no limit")


def sharding_of(name: str | None, out: Path, samples: int, max_mb: float | None) -> Sharding:
    """The ``Sharding`` of --name, --out, --samples and --max_mb. Raises UserError for values out of range."""
    from megadit.data.shards.naming import Sharding

    prefix = name or out.absolute().name
    if not prefix or prefix.startswith(".") or any(sign in prefix for sign in "/\\{}"):
        raise UserError(f"--name: '{prefix}' cannot begin the names of tars; give a plain word")
    in_range("--samples", samples, 1, None)
    if max_mb is not None and not 0 < max_mb < math.inf:
        raise UserError(f"--max_mb: {max_mb:g} is not above 0, or has no end; give the megabytes of a tar")
    return Sharding(prefix, samples, None if max_mb is None else int(max_mb * 1e6))


def in_range(option: str, value: int, lowest: int, highest: int | None) -> int:
    """``value`` if it is in the range. Raises UserError that names ``option`` if not."""
    if value < lowest or (highest is not None and value > highest):
        limits = f"at least {lowest}" if highest is None else f"from {lowest} to {highest}"
        raise UserError(f"{option}: {value} is not {limits}; choose another value")
    return value


@contextmanager
def progress_bar(unit: str) -> Iterator[ProgressCallback]:
    """The callback of a progress bar on stderr, which is shown only in a terminal."""
    from tqdm import tqdm

    with tqdm(unit=f" {unit}", file=sys.stderr, disable=not sys.stderr.isatty(), dynamic_ncols=True) as bar:

        def show(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)

        yield show


def print_set(manifest: Manifest, out: Path, *, as_json: bool) -> None:
    """Print what was written, as a JSON object or as text."""
    result_is_saved(as_json=as_json)
    print(json.dumps(summary(manifest, out)) if as_json else summary_text(manifest, out))


def summary(manifest: Manifest, out: Path) -> dict[str, Any]:
    """What was written, for --json."""
    return {
        "out": str(out),
        "name": manifest.name,
        "samples": manifest.samples,
        "shards": len(manifest.shards),
        "bytes": sum(shard.bytes for shard in manifest.shards),
        "classes": len(manifest.classes),
        "holds": contents(manifest),
    }


def contents(manifest: Manifest) -> list[str]:
    """What the tars hold: images or latents, text features, target features."""
    stored = manifest.stored
    if stored is None or not stored.channels:
        parts = [f"images of {manifest.image_size} pixels"]
    else:
        kind = "posteriors of latents" if stored.moments else "latents"
        parts = [f"{kind}, {stored.channels}x{stored.size}x{stored.size}, scale {stored.scale:g}, {stored.codec}"]
    if stored is None:
        return parts
    if stored.text_dim:
        pooled = f" and pooled {stored.pooled_dim}" if stored.pooled_dim else ""
        parts.append(f"text of up to {stored.text_length} tokens x {stored.text_dim}{pooled}, {stored.text_encoder}")
    if stored.feature_dim:
        parts.append(f"features of {stored.feature_dim} channels, {stored.feature_encoder}")
    return [*parts, "all of mirrored images too"] if stored.mirrored else parts


def summary_text(manifest: Manifest, out: Path) -> str:
    """What was written, a line for each thing."""
    size = sum(shard.bytes for shard in manifest.shards) / 1e6
    first = f"{out}: {manifest.samples} samples of {manifest.name} in {len(manifest.shards)} tars, {size:.1f} MB"
    return "\n  ".join([first, *contents(manifest), f"train on them with data.name=webdataset data.path={out}"])
