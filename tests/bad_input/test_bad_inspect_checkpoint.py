"""tools/inspect_checkpoint.py refuses bad input in one sentence."""

from pathlib import Path

from helpers.bad_input import Case, case, each


def no_index(folder: Path) -> None:
    """Take the index of the run's checkpoint away."""
    for path in (folder / "run").glob("checkpoints/*/index.json"):
        path.unlink()


CASES = [
    case("nothing to inspect", "nowhere", "'nowhere' is no checkpoint"),
    case("a file", "run/config.yaml", "'run/config.yaml' is no checkpoint"),
    case("a checkpoint without index", "run", "is not complete", breaks=no_index),
    case("nothing to compare with", "run --diff nowhere", "'nowhere' is no checkpoint"),
]


@each(CASES)
def test_refused(refused, run_folder, bad: Case) -> None:
    refused("tools/inspect_checkpoint.py", bad)
