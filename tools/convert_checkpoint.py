#!/usr/bin/env python
"""Convert a checkpoint: DeepSpeed's own and plain weights into megadit's, to go on here, or the other way.

IN is a folder or file of the first format, OUT a new one of the second. The formats are megadit (a run directory, or
one checkpoint of it), safetensors and fp32-state-dict (whole float32 weights: one file, or a folder of shards; the
latter as zero_to_fp32 writes them), deepspeed (what engine.save_checkpoint writes) and deepspeed-universal (what
ds_to_universal writes). Optimizer state and step travel wherever both formats hold them. docs/convert.md tells more.

python tools/convert_checkpoint.py --from deepspeed --to megadit ckpts runs/continued --config my.yaml
python tools/convert_checkpoint.py --from megadit --to safetensors runs/emoji model.safetensors --ema 0.9999
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path[:0] = [str(Path(__file__).resolve().parents[1] / part) for part in ("", "kernels")]

from megadit.convert import FORMATS  # noqa: E402
from megadit.errors import EXIT_OK, UserError, run_command  # noqa: E402


def parser() -> argparse.ArgumentParser:
    """The command line."""
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("source", type=Path, metavar="IN", help="folder or file to read")
    p.add_argument("target", type=Path, metavar="OUT", help="folder or file to make; must not exist")
    p.add_argument("overrides", nargs="*", metavar="key.sub=value", help="change a config key, e.g. train.steps=1000")
    p.add_argument("--from", dest="source_format", required=True, choices=FORMATS, help="format of IN")
    p.add_argument("--to", dest="target_format", required=True, choices=FORMATS, help="format of OUT")
    p.add_argument("--config", metavar="FILE", help="run configuration (YAML); needed for --to megadit")
    p.add_argument("--ema", metavar="NAME", help="write this moving average of a megadit checkpoint as the weights")
    p.add_argument("--json", action="store_true", help="print one object instead of the sentences")
    return p


def main(argv: Sequence[str] | None = None) -> int:
    """Convert, and tell what was done."""
    args = parser().parse_intermixed_args(argv)
    if args.overrides and args.config is None:
        raise UserError(f"{args.overrides[0]}: changes a config, but there is no --config; give one, or leave it out")
    from megadit.config import load_config
    from megadit.convert.conversion import convert

    config = None if args.config is None else load_config(args.config, args.overrides)
    outcome = convert(args.source_format, args.target_format, args.source, args.target, config, args.ema)
    if args.json:
        print(json.dumps(outcome.to_json()))
    else:
        print(f"read     {outcome.source}: {', '.join(outcome.kinds)}; step {outcome.step}")
        print(f"written  {outcome.target}: {outcome.parameters} parameters, {outcome.elements} elements")
    for note in outcome.notes:
        print(f"note: {note}", file=sys.stderr)
    return EXIT_OK


if __name__ == "__main__":
    run_command(main)
