"""The commands: one file each, with parser() and main(argv)."""

from __future__ import annotations

import argparse


def add_plugins(parser: argparse.ArgumentParser) -> None:
    """Add ``--plugins``, which every command has that reads a configuration, a run or a checkpoint."""
    parser.add_argument(
        "--plugins",
        action="append",
        default=[],
        metavar="MODULE[,…]",
        help="plugins to import first (docs/extending.md); may be repeated",
    )


def import_plugins(args: argparse.Namespace) -> None:
    """Import what ``--plugins`` names. Raises UserError."""
    from megadit.plugins import load_plugins, plugin_names

    load_plugins(plugin_names(args.plugins))
