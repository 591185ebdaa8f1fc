"""Write images, captions and labels as WebDataset tars: NAME-000000.tar, NAME-000001.tar, ... and a manifest.

Any data set of a configuration is taken whole; nothing is held out, since base names travel along and the split is made
at training. Train on the folder with data.name=webdataset data.path=OUT. A command that was cut off goes on with the
finished tars when it is given again.

python tools/make_shards.py --out shards/emoji data.name=emoji data.image_size=64
python tools/make_shards.py --out shards/birds data.name=image-folder data.path=birds data.image_size=256 --image jpg
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

from megadit.cli import add_plugins, import_plugins
from megadit.errors import EXIT_OK, UserError
from megadit.streams import result_is_saved


def parser() -> argparse.ArgumentParser:
    """The command line."""
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("overrides", nargs="*", metavar="data.key=value", help="what to write, e.g. data.name=digits")
    p.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder to make; must be empty or unfinished")
    p.add_argument("--config", metavar="FILE", help="run configuration (YAML) whose data section to start from")
    add_plugins(p)
    p.add_argument("--name", metavar="NAME", help="what the tars' names begin with; default: the folder's name")
    p.add_argument("--samples", type=int, default=10_000, metavar="N", help="most samples of a tar; default 10000")
    p.add_argument("--max_mb", type=float, metavar="MB", help="most megabytes (10^6) of a tar; default: no limit")
    p.add_argument("--image", choices=("png", "jpg"), default="png", help="png (exact; default) or jpg")
    p.add_argument("--quality", type=int, metavar="1-100", help="of --image jpg; default 95")
    p.add_argument("--json", action="store_true", help="print one JSON object: samples, shards, bytes, out")
    return p


def main(argv: Sequence[str] | None = None) -> int:
    """Write the tars, and say what they hold."""
    args = parser().parse_intermixed_args(argv)
    from megadit.parallel.environment import refuse_ranks

    refuse_ranks("tools/make_shards.py")
    import_plugins(args)
    from megadit.config.loading.loader import load_data
    from megadit.data.shards import options as telling
    from megadit.extensions import DATA_SOURCES

    sharding = telling.sharding_of(args.name, args.out, args.samples, args.max_mb)
    quality = telling.in_range("--quality", 95 if args.quality is None else args.quality, 1, 100)
    if args.quality is not None and args.image != "jpg":
        raise UserError(f"--quality: {args.quality} is not read where --image is {args.image}; add --image jpg")
    config = load_data(args.config, args.overrides)
    DATA_SOURCES.get(config.name).check(config)
    from megadit.data.shards.making import make_shards

    with telling.progress_bar("images") as progress:
        manifest = make_shards(config, args.out, sharding, args.image, quality, progress)
    told = telling.summary(manifest, args.out)
    result_is_saved(as_json=args.json)
    print(json.dumps(told) if args.json else telling.sentences(manifest, args.out))
    return EXIT_OK
