"""tools/mup_table.py refuses bad input in one sentence."""

from helpers.bad_input import Case, case, each

DIGITS = "--config quickstart/digits.yaml"

CASES = [
    case("table of no config", "--config nowhere.yaml", "no file nowhere.yaml"),
    case("table of a wrong value", f"{DIGITS} model.width=x", "model.width: 'x' is not a whole number"),
    case("table of what is no config", "--config x.yaml", "x.yaml", files={"x.yaml": "hello"}),
]


@each(CASES)
def test_refused(refused, bad: Case) -> None:
    refused("tools/mup_table.py", bad)
