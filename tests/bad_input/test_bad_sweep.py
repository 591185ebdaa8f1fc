"""launch/sweep.py refuses bad input in one sentence."""

from helpers.bad_input import Case, case, each

MINI = "run --config dit-width-mini"

CASES = [
    case("no action", "", "run|worker|status|report|stop"),
    case("no such action", "go", "'go'"),
    case("no study", "run", "--config: is missing"),
    case("no such study", "run --config nowhere.yaml", "no file nowhere.yaml"),
    case("a run's configuration", "run --config quickstart/digits.yaml", "is a run's configuration, not a study"),
    case("a file of no study", "run --config x.yaml", "x.yaml", files={"x.yaml": "hello"}),
    case("no workers", f"{MINI} --study_dir s --workers 0", "--workers: 0 is not at least 1"),
    case("a key of neither", f"{MINI} --study_dir s foo.bar=3", "foo: no such key"),
    case("a study in a file", f"{MINI} --study_dir s", "--study_dir", files={"s": "dear"}),
    case("status of nothing", "status", "--config"),
    case("status of nowhere", "status --study_dir nowhere", "nowhere"),
    case("report of no study", "report --study_dir s", "s", files={"s": None}),
    case("stop of nowhere", "stop --study_dir nowhere", "nowhere"),
    case("a word too much", "status please", "please"),
]


@each(CASES)
def test_refused(refused, bad: Case) -> None:
    refused("launch/sweep.py", bad)
