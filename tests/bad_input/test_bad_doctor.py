"""tools/doctor.py refuses bad input in one sentence."""

from helpers.bad_input import Case, case, each

CASES = [
    case("an option of none", "--fix", "--fix"),
    case("a word too much", "please", "please"),
]


@each(CASES)
def test_refused(refused, bad: Case) -> None:
    refused("tools/doctor.py", bad)
