"""tools/transfer.py refuses bad input in one sentence."""

from helpers.bad_input import Case, case, each

TABLE = "verify --table t.csv --scale width --hp lr --score loss"
GOOD = "width,lr,loss\n64,0.1,1\n64,0.2,.9\n64,.4,1.1\n128,.1,.9\n128,.2,.8\n128,.4,1.0\n"

CASES = [
    case("no action", "", "verify|apply"),
    case("nothing to judge", "verify", "name a study, or --table"),
    case("no such study", "verify nowhere", "no file nowhere.yaml"),
    case("a folder that is no study", "verify here", "'here' has no study.yaml", files={"here": None}),
    case("no such table", TABLE, "no file t.csv"),
    case("a folder as table", TABLE, "t.csv cannot be read as CSV", files={"t.csv": None}),
    case("an empty table", TABLE, "has no column width; it has none", files={"t.csv": ""}),
    case("a header alone", TABLE, "no rows below its header", files={"t.csv": "width,lr,loss\n"}),
    case(
        "a table that is not text",
        TABLE,
        "is not a text file (line 2 has",
        files={"t.csv": b"width,lr,loss\n\xff\xfe,1,2\n"},
    ),
    case("a score that is no number", TABLE, "loss in line 2 is 'x'", files={"t.csv": "width,lr,loss\n64,.1,x\n"}),
    case(
        "a line that was cut",
        TABLE,
        "line 3 of t.csv has 2 cells under 3",
        files={"t.csv": "width,lr,loss\n64,.1,1\n64,.2\n"},
    ),
    case(
        "a line with too much",
        TABLE,
        "line 2 of t.csv has 4 cells under 3",
        files={"t.csv": "width,lr,loss\n64,.1,1,2\n"},
    ),
    case("a column twice", TABLE, "2 columns width", files={"t.csv": "width,lr,loss,width\n1,2,3,4\n"}),
    case("a rate below zero", TABLE, "lr in line 2 is -0.1", files={"t.csv": "width,lr,loss\n64,-0.1,1\n"}),
    case("a column that is not there", TABLE.replace("width", "widht"), "did you mean width?", files={"t.csv": GOOD}),
    case("one column for two things", TABLE.replace("lr", "width"), "asked for twice", files={"t.csv": GOOD}),
    case("no score", "verify --table t.csv --scale width --hp lr", "--score: is missing", files={"t.csv": GOOD}),
    case("a proxy that is not there", f"{TABLE} --proxy 99", "--proxy: 99", "64, 128", files={"t.csv": GOOD}),
    case("a tolerance of nan", f"{TABLE} --max-drift nan", "--max-drift: nan", files={"t.csv": GOOD}),
    case("a table beside a study", f"{TABLE} here", "given beside the study here", files={"t.csv": GOOD, "here": None}),
    case("a picture nowhere", f"{TABLE} --plot no/x.png", "--plot no/x.png", files={"t.csv": GOOD}),
    case("apply without a target", "apply here", "--target", files={"here": None}),
    case("apply of no study", "apply here --target quickstart/digits.yaml", "no study.yaml", files={"here": None}),
]


@each(CASES)
def test_refused(refused, bad: Case) -> None:
    refused("tools/transfer.py", bad)
