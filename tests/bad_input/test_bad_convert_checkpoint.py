"""tools/convert_checkpoint.py refuses bad input in one sentence."""

import json
import pickle

import torch
from safetensors.torch import save

from helpers.bad_input import Case, case, each

SAFE = "--from megadit --to safetensors"
DIT = "--from official-dit --to megadit"
NAN = save({"a": torch.full((2,), float("nan"))})
LFS = "version https://git-lfs.github.com/spec/v1\noid sha256:abc\nsize 3\n"

CASES = [
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
    case("a shard elsewhere", "x y --from safetensors --to fp32-state-dict", "puts 'a' into '../b",
         files={"x/model.safetensors.index.json": json.dumps({"weight_map": {"a": "../b.safetensors"}})}),
    case("weights that are NaN", "x.safetensors y --from safetensors --to fp32-state-dict",
         "IN: 'a' holds 2 NaN of 2 values", files={"x.safetensors": NAN}),
    case("a diffusers config that was cut", "x y --from diffusers --to megadit", "x/config.json' is not valid JSON",
         files={"x/config.json": "{"}),
]  # fmt: skip


@each(CASES)
def test_refused(refused, run_folder, bad: Case) -> None:
    refused("tools/convert_checkpoint.py", bad)
