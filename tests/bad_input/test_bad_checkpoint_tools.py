"""convert_checkpoint, inspect_checkpoint and compare_runs refuse bad input in one sentence."""

import pickle
from pathlib import Path

from helpers.bad_input import Case, case, each

SAFE = "--from megadit --to safetensors"
DIT = "--from official-dit --to megadit"
LFS = "version https://git-lfs.github.com/spec/v1\noid sha256:abc\nsize 3\n"


def no_index(folder: Path) -> None:
    """Take the index of the run's checkpoint away."""
    for path in (folder / "run").glob("checkpoints/*/index.json"):
        path.unlink()


CONVERT = [
    case("no formats", "run out", "--from"),
    case("no such format", "run out --from onnx --to megadit", "'onnx'"),
    case("nothing to convert", f"nowhere out {SAFE}", "IN: 'nowhere' does not exist"),
    case("a folder of no checkpoint", f"x out {SAFE}", "IN: 'x' is no checkpoint", files={"x": None}),
    case("over what is there", f"run run {SAFE}", "OUT: 'run' exists already"),
    case("no such average", f"run x.safetensors {SAFE} --ema 0.5", "weights '0.5'"),
    case("another family's format", "run x.pt --from megadit --to official-uvit", "--to: official-uvit"),
    case("from the same to the same", "run x --from megadit --to megadit", "is what IN is already"),
    case("a class of no diffusers", f"run x {SAFE} --allow-inexact", "--allow-inexact: is about classes of diffusers"),
    case("half a hint", f"run x {SAFE} --hint heads", "--hint: 'heads' is not KEY=VALUE"),
    case("a hint for what needs none", f"run x {SAFE} --hint heads=3", "--hint heads"),
    case("a change of no config", f"run x {SAFE} train.steps=5", "there is no --config"),
    case("another model's config", f"run x {SAFE} --config quickstart/digits.yaml", "the model needs"),
    case("an empty file", "x.safetensors y --from safetensors --to megadit --config quickstart/digits.yaml",
         "cannot be read as safetensors", files={"x.safetensors": ""}),
    case("code in a pickle", f"x.pt y {DIT}", "x.pt", files={"x.pt": pickle.dumps({"a": print}, protocol=2)}),
    case("a web page", f"x.pt y {DIT}", "x.pt", files={"x.pt": "<html>"}),
    case("a pointer of git-lfs", f"x.pt y {DIT}", "x.pt", files={"x.pt": LFS}),
    case("a diffusers folder without weights", "x y --from diffusers --to megadit", "IN: 'x' holds no weights",
         files={"x/config.json": "{}"}),
    case("a diffusers config that was cut", "x y --from diffusers --to megadit", "x/config.json' is not valid JSON",
         files={"x/config.json": "{"}),
]  # fmt: skip

INSPECT = [
    case("nothing to inspect", "nowhere", "'nowhere' is no checkpoint"),
    case("a file", "run/config.yaml", "'run/config.yaml' is no checkpoint"),
    case("a checkpoint without index", "run", "is not complete", breaks=no_index),
    case("nothing to compare with", "run --diff nowhere", "'nowhere' is no checkpoint"),
]

COMPARE = [
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


@each(CONVERT)
def test_convert_refuses(refused, run_folder, bad: Case) -> None:
    refused("tools/convert_checkpoint.py", bad)


@each(INSPECT)
def test_inspect_refuses(refused, run_folder, bad: Case) -> None:
    refused("tools/inspect_checkpoint.py", bad)


@each(COMPARE)
def test_compare_refuses(refused, run_folder, bad: Case) -> None:
    refused("tools/compare_runs.py", bad)
