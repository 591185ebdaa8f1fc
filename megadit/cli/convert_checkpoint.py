"""Convert a checkpoint: other programs' into megadit's, to sample from or to go on with, or the other way.

IN is a folder or file of the first format, OUT a new one of the second:

megadit                a run directory, or one checkpoint of it
safetensors            whole float32 weights: one file, or a folder of shards
fp32-state-dict        the same as zero_to_fp32 writes them
deepspeed              what engine.save_checkpoint writes
deepspeed-universal    what ds_to_universal writes
official-dit, …        the authors' own files (.pt, .pth, .safetensors); official-mmdit is Stable Diffusion 3's
diffusers              a pipeline folder, or in IN the folder of its transformer alone

Optimizer state and step travel wherever both formats hold them. A diffusers class that does not compute what the model
here does is compared with it on random inputs and refused without --allow-inexact. Weights that are NaN or infinite are
named, and refused without --allow-nonfinite. See docs/convert.md.

--hint gives what official weights do not contain: heads, input_size, and for weights trained under muP, whose
readout is multiplied in the forward pass, parametrization=mup, base_width and output_mult (dit, pixart). What no
weights contain (data, objective, …) is taken from --config, or is a default that key.sub=value changes.

python tools/convert_checkpoint.py --from deepspeed --to megadit ckpts runs/continued --config my.yaml
python tools/convert_checkpoint.py --from megadit --to safetensors runs/emoji model.safetensors --ema 0.9999
python tools/convert_checkpoint.py --from official-dit --to megadit DiT-XL-2-256x256.pt runs/dit data.vae.path=vae
python tools/convert_checkpoint.py --from official-pixart --to megadit PixArt.pth runs/pixart --ema state_dict_ema
python tools/convert_checkpoint.py --from megadit --to diffusers runs/pixart out
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megadit.cli import add_plugins, import_plugins
from megadit.convert import formats
from megadit.errors import EXIT_OK, UserError
from megadit.streams import result_is_saved


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("source", type=Path, metavar="IN", help="folder or file to read")
    p.add_argument("target", type=Path, metavar="OUT", help="folder or file to make; must not exist")
    p.add_argument("overrides", nargs="*", metavar="key.sub=value", help="change a config key, e.g. train.steps=1000")
    p.add_argument("--from", dest="source_format", required=True, choices=formats(), help="format of IN")
    p.add_argument("--to", dest="target_format", required=True, choices=formats(), help="format of OUT")
    p.add_argument("--config", metavar="FILE", help="run configuration (YAML), where IN does not describe the model")
    add_plugins(p)
    p.add_argument(
        "--ema",
        metavar="NAME",
        help="take this moving average: a name of megadit's; of other files a key, a prefix or a file",
    )
    p.add_argument("--hint", action="append", default=[], metavar="KEY=VALUE", help="e.g. heads=16, input_size=32")
    p.add_argument("--allow-inexact", action="store_true", help="convert although diffusers' class computes otherwise")
    p.add_argument(
        "--allow-nonfinite", action="store_true", help="convert weights that are NaN, infinite or beyond float32"
    )
    p.add_argument("--json", action="store_true", help="print one object instead of the sentences")
    return p


def main(argv: Sequence[str] | None = None) -> int:
    """Convert, and print what was read and written."""
    args = parser().parse_intermixed_args(argv)
    from megadit.parallel.environment import refuse_ranks

    refuse_ranks("tools/convert_checkpoint.py")
    model_is_told = args.source_format.startswith("official-") or args.source_format == "diffusers"
    if args.overrides and args.config is None and not model_is_told:
        raise UserError(f"{args.overrides[0]}: changes a config, but there is no --config; give one, or leave it out")
    if args.allow_inexact and "diffusers" not in (args.source_format, args.target_format):
        raise UserError("--allow-inexact: is about classes of diffusers, and neither format is that; leave it out")
    import_plugins(args)
    from megadit.config import load_config
    from megadit.convert.request import Request, check_request

    config = None if args.config is None else load_config(args.config, args.overrides)
    hints = dict(map(_hint, args.hint))
    # Refused before torch is imported.
    check_request(args.source_format, args.target_format, args.source, args.target, Request(config, args.ema, hints))
    from megadit.convert.conversion import convert

    result = convert(
        args.source_format,
        args.target_format,
        args.source,
        args.target,
        config,
        args.ema,
        hints=hints,
        overrides=args.overrides if config is None else (),
        allow_inexact=args.allow_inexact,
        allow_nonfinite=args.allow_nonfinite,
    )
    result_is_saved(as_json=args.json)
    if args.json:
        print(json.dumps(result.to_json()))
    else:
        print(f"read     {result.source}: {', '.join(result.kinds)}; step {result.step}")
        print(f"written  {result.target}: {result.parameters} parameters, {result.elements} elements")
    for note in result.notes:
        print(f"note: {note}", file=sys.stderr)
    return EXIT_OK


def _hint(text: str) -> tuple[str, Any]:
    """``heads=16`` as a name and a value, which is read as YAML reads it."""
    from megadit.config.schema.values import resolve_scalars
    from megadit.files.yaml_text import YamlError, parse_yaml

    name, equals, value = text.partition("=")
    if not (name and equals and value):
        raise UserError(f"--hint: {text!r} is not KEY=VALUE; write it like heads=16")
    try:
        return name, resolve_scalars(parse_yaml(value, comments=False))
    except YamlError as error:
        raise UserError(f"--hint {name}: {value!r} cannot be read; write it like heads=16") from error
