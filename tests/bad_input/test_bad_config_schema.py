"""tools/config_schema.py refuses bad input in one sentence."""

from helpers.bad_input import Case, case, each

CASES = [
    case("schema into no folder", "--out no/x.json", "--out: no/x.json"),
    case("schema over a letter", "--out x.json", "'x.json' is no JSON schema", files={"x.json": "{}"}),
    case("reference of no file", "--docs nowhere.md", "--docs: nowhere.md"),
    case("reference of another file", "--docs x.md", "has no reference marks", files={"x.md": "# A page\n"}),
]


@each(CASES)
def test_refused(refused, bad: Case) -> None:
    refused("tools/config_schema.py", bad)
