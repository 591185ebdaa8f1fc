"""tools/compare_runs.py refuses bad input in one sentence."""

from helpers.bad_input import Case, case, each

CASES = [
    case("one run", "run", "B[,B2"),
    case("a run that is not there", "nowhere run", "no folder nowhere"),
    case("no such number", "run run --key colour", "--key colour", "it has loss"),
    case("no smoothing", "run run --smooth 0", "--smooth: 0"),
    case("metrics without a row", "run x", "holds no row", files={"x/metrics.jsonl": ""}),
    case("metrics of no rows", "run x", "line 1 of x/metrics.jsonl", files={"x/metrics.jsonl": '[1]\n{"loss": 1}\n'}),
    case("a comparison over a letter", "run run --out x", "--out: 'x/compare.json' is no comparison",
         files={"x/compare.json": '{"dear": 1}'}),
    case("a plot over a letter", "run run --out x", "--out: 'x/compare.png' is no PNG picture",
         files={"x/compare.png": "dear"}),
    case("pictures over a file", "run run --out run/config.yaml", "--out run/config.yaml"),
]  # fmt: skip


@each(CASES)
def test_refused(refused, run_folder, bad: Case) -> None:
    refused("tools/compare_runs.py", bad)
