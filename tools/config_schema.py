#!/usr/bin/env python
"""``python -m megadit config_schema`` without installing: see megadit/cli/config_schema.py."""

import sys
from pathlib import Path

sys.path[:0] = [str(Path(__file__).resolve().parents[1] / part) for part in ("", "kernels")]

from megadit.cli.main import run  # noqa: E402

if __name__ == "__main__":
    run("config_schema")
