"""Print what the parametrization gives every parameter: role, init std, forward multiplier, LR, weight decay, epsilon.

Rows are ordered by role, and those that differ only in the number of their block are one, with their count.

python tools/mup_table.py --config configs/dit/xl-2-mup.yaml optim.lr=2e-3
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence

from megadit.cli import add_plugins, import_plugins
from megadit.errors import EXIT_OK


def main(argv: Sequence[str] | None = None) -> int:
    """Build the model without memory and print its table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("overrides", nargs="*", metavar="key.sub=value", help="change a config key, e.g. optim.lr=2e-3")
    parser.add_argument("--config", metavar="FILE", help="run configuration (YAML); default: the quickstart")
    add_plugins(parser)
    parser.add_argument("--full", action="store_true", help="one row per parameter, in the model's order")
    parser.add_argument("--json", action="store_true", help="one JSON object: parameters, a list of one row each")
    args = parser.parse_intermixed_args(argv)
    from megadit.parallel.environment import refuse_ranks

    refuse_ranks("tools/mup_table.py")
    import_plugins(args)
    from megadit.config import load_config

    config = load_config(args.config, args.overrides)  # refused before torch is imported
    from megadit.models import build_model
    from megadit.mup.table import by_role, format_rows, rows

    table = rows(build_model(config.model, device="meta"), config.optim)
    print(json.dumps({"parameters": table}) if args.json else format_rows(table if args.full else by_role(table)))
    return EXIT_OK
