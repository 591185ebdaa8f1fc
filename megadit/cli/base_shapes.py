"""Write a model's base shapes as a .bsh file, which mup.set_base_shapes(model, FILE) of the mup package reads.

python tools/base_shapes.py --config configs/dit/xl-2-mup.yaml --out dit.bsh
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

from megadit.cli import add_plugins, import_plugins
from megadit.errors import EXIT_OK, UserError
from megadit.streams import result_is_saved


def main(argv: Sequence[str] | None = None) -> int:
    """Build the model without memory and write the file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("overrides", nargs="*", metavar="key.sub=value", help="change a config key")
    parser.add_argument("--config", metavar="FILE", help="run configuration (YAML); default: the quickstart")
    add_plugins(parser)
    parser.add_argument("--out", metavar="X.bsh", type=Path, required=True, help="file to write")
    parser.add_argument("--json", action="store_true", help="one JSON object: path, base_width, parameters (a count)")
    args = parser.parse_intermixed_args(argv)
    from megadit.parallel.environment import refuse_ranks

    refuse_ranks("tools/base_shapes.py")
    import_plugins(args)
    from megadit.config import load_config

    config = load_config(args.config, args.overrides).model  # refused before torch is imported
    from megadit.models.build import build_model, parametrization
    from megadit.mup import param_specs
    from megadit.mup.interop import is_base_shapes, save_base_shapes

    model = build_model(config, device="meta")
    try:
        if args.out.is_file() and not is_base_shapes(args.out):
            raise UserError(f"--out: '{args.out}' holds no base shapes and would be replaced; choose another path")
        save_base_shapes(model, args.out)
    except OSError as error:
        raise UserError(f"--out {args.out}: cannot be written ({error.strerror}); choose another path") from error
    count, base = len(param_specs(model)), parametrization(config).base_width
    result_is_saved(as_json=args.json)
    if args.json:
        print(json.dumps({"path": str(args.out), "base_width": base, "parameters": count}))
    else:
        print(f"{args.out}: base shapes of {count} parameters at base width {base}")
    return EXIT_OK
