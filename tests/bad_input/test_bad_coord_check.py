"""tools/coord_check.py refuses bad input in one sentence."""

from helpers.bad_input import Case, case, each

DIGITS = "--config quickstart/digits.yaml"
COORD = f"--out c {DIGITS}"

CASES = [
    case("check into nothing", DIGITS, "--out"),
    case("one width", f"{COORD} --widths 64", "three different widths"),
    case("one width three times", f"{COORD} --widths 64,64,64", "three different widths"),
    case("words for widths", f"{COORD} --widths a,b,c", "not whole numbers"),
    case("no width", f"{COORD} --widths 0,64,128", "--widths 0"),
    case("widths that no head divides", f"{COORD} --widths 63,64,65", "--widths 63: not a multiple"),
    case("too few steps", f"{COORD} --steps 2", "take at least 5"),
    case("no seed", f"{COORD} --seeds 0", "--seeds 0"),
    case("no batch", f"{COORD} --batch 0", "--batch 0"),
    case("a word for a rate", f"{COORD} --lr fast", "--lr fast: not a learning rate"),
    case("ranks that heads do not share", f"{COORD} --widths 32,64,128 --tp 3", "--tp 3: does not divide"),
    case("no rank", f"{COORD} --tp 0", "--tp 0"),
    case("check over a table", COORD, "'c/coords.csv' is no table", files={"c/coords.csv": "a,b\n1,2\n"}),
    case("check over a verdict", COORD, "'c/verdict.json' is no verdict", files={"c/verdict.json": "{}"}),
    case("check over a picture", COORD, "'c/coord_check.png' is no PNG", files={"c/coord_check.png": "dear"}),
    case("a file as folder", COORD, "--out: 'c'", files={"c": "dear"}),
]


@each(CASES)
def test_refused(refused, bad: Case) -> None:
    refused("tools/coord_check.py", bad)
