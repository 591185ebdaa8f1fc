"""Print the JSON schema of configuration files, which editors use for completion and checking.

python tools/config_schema.py --out run.schema.json     then, at the top of a YAML file:
                                                        # yaml-language-server: $schema=run.schema.json
python tools/config_schema.py --docs docs/config.md     renew the reference tables in docs/config.md
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

from megadit.errors import EXIT_OK, UserError
from megadit.streams import result_is_saved

BEGIN, END = "<!-- reference: made by tools/config_schema.py --docs -->", "<!-- end of reference -->"


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--out", metavar="FILE", help="write the schema there instead of to stdout")
    p.add_argument("--docs", metavar="FILE", help="renew the reference tables in this Markdown file instead")
    p.add_argument("--json", action="store_true", help="no effect: the schema is JSON anyway")
    return p


def with_reference(text: str, source: str) -> str:
    """``text`` with fresh tables between the two marks. Raises UserError if it lacks them."""
    from megadit.config.schema.json_schema import reference

    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise UserError(f"--docs: {source} has no reference marks; add the lines {BEGIN} and {END}")
    return f"{before}{BEGIN}\n\n{reference()}\n{END}{after}"


def main(argv: Sequence[str] | None = None) -> int:
    """Write the schema, or the reference."""
    args = parser().parse_args(argv)
    from megadit.parallel.environment import refuse_ranks

    refuse_ranks("tools/config_schema.py")
    if args.docs and args.out:
        raise UserError(f"--out: {args.out} beside --docs, which renews {args.docs} in place; give one of the two")
    from megadit.config.schema.json_schema import file_schema
    from megadit.files.paths import check_output

    if args.docs:
        target, text = Path(args.docs), with_reference(_read(Path(args.docs)), args.docs)
    else:
        text = json.dumps(file_schema(), indent=2) + "\n"
        if not args.out:
            print(text, end="")
            return EXIT_OK
        target = Path(args.out)
        check_output(target, "--out", "JSON schema", (b'"$schema"',))
    try:
        target.write_text(text, encoding="utf-8")
    except OSError as error:
        raise UserError(f"--out: {target} cannot be written ({error.strerror}); choose another place") from None
    result_is_saved()
    print(f"{target}: {'reference tables renewed' if args.docs else 'JSON schema of configuration files'}")
    return EXIT_OK


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except OSError as error:
        raise UserError(f"--docs: {path} cannot be read ({error.strerror}); give docs/config.md") from None
