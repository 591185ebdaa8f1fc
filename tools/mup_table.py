#!/usr/bin/env python
"""``python -m megadit mup_table`` without installing: see megadit/cli/mup_table.py."""

import sys
from pathlib import Path

sys.path[:0] = [str(Path(__file__).resolve().parents[1] / part) for part in ("", "kernels")]

from megadit.cli.main import run  # noqa: E402

if __name__ == "__main__":
    run("mup_table")
