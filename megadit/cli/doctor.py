"""Tell what is installed here, which backends work and, for those that do not, why and what would help.

Exit code 0 if training is possible, 1 if not. Runs with any Python, also before `make setup`.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence

from megadit.errors import EXIT_FAILURE, EXIT_OK


def main(argv: Sequence[str] | None = None) -> int:
    """Exit code 0 if this machine can train, 1 if something that is needed is missing or broken."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="one JSON object: ready, verdict, checks")
    args = parser.parse_args(argv)
    from megadit.doctor import examine, format_report

    print("examining this machine: about ten seconds", file=sys.stderr)
    report = examine()
    print(json.dumps(report.as_json()) if args.json else format_report(report))
    return EXIT_OK if report.ready else EXIT_FAILURE
