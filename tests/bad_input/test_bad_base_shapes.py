"""tools/base_shapes.py refuses bad input in one sentence."""

from helpers.bad_input import Case, case, each

DIGITS = "--config quickstart/digits.yaml"

CASES = [
    case("shapes into nothing", DIGITS, "--out"),
    case("shapes into a folder", f"{DIGITS} --out x", "--out x", files={"x": None}),
    case("shapes over a letter", f"{DIGITS} --out x", "'x' holds no base shapes", files={"x": "dear"}),
    case("shapes into no folder", f"{DIGITS} --out no/x.bsh", "--out no/x.bsh"),
]


@each(CASES)
def test_refused(refused, bad: Case) -> None:
    refused("tools/base_shapes.py", bad)
