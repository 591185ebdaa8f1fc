"""launch/sample.py refuses bad input in one sentence."""

import shutil
from pathlib import Path

from helpers.bad_input import Case, case, each


def of_run(pattern: str, text: str):
    """Write ``text`` into the run's files of that pattern."""

    def breaks(folder: Path) -> None:
        for path in (folder / "run").glob(pattern):
            path.write_text(text, encoding="utf-8")

    return breaks


def cut(folder: Path) -> None:
    """Leave 100 bytes of the weights."""
    for path in (folder / "run").rglob("*.safetensors"):
        path.write_bytes(path.read_bytes()[:100])


def config_alone(folder: Path) -> None:
    """A folder x with the run's configuration and nothing else."""
    shutil.copy(folder / "run/config.yaml", folder / "x/config.yaml")


CASES = [
    case("no run", "", "RUN_DIR"),
    case("a run that is not there", "nowhere", "there is no such run directory"),
    case("a folder that is no run", "x", "is no run directory", files={"x": None}),
    case("a run that saved nothing", "x", "x", files={"x": None}, breaks=config_alone),
    case("no such checkpoint", "run --checkpoint nowhere", "--checkpoint: nowhere is not a folder"),
    case("no such average", "run --ema 0.5", "weights '0.5'", "holds online, 0.9"),
    case("no such class", "run --classes cat", "--classes: cat is not a class"),
    case("no such label", "run --classes 99", "--classes: 99 is not a label"),
    case("no class", "run --classes=", "--classes: is empty"),
    case("a list that was cut", "run --classes [1", "begins as a JSON list, but"),
    case("a number as a name", 'run --classes ["99"]', "--classes: 99 is not a class"),
    case("digits of another script", "run --classes \u0661", "written with the digits 0 to 9"),
    case("a text for a class model", "run --prompt hello", "--prompt: 'hello' cannot be drawn"),
    case("no pictures", "run --count 0", "--count: 0 is not at least 1"),
    case("no steps", "run --steps 0", "--steps: 0 is not at least 1"),
    case("guidance of nan", "run --guidance nan", "--guidance: nan is not a finite number"),
    case("guidance below zero", "run --guidance -2", "--guidance: -2.0 is not at least 0"),
    case("more channels than there are", "run --guidance 2 --guidance_channels 99", "guidance_channels: 99"),
    case("no such scheduler", "run --scheduler fast", "--scheduler"),
    case("no batch", "run --batch 0", "--batch: 0"),
    case("no such device", "run --device tpu", "--device: tpu"),
    case("a codec for pixels", "run --vae nowhere", "--vae: nowhere"),
    case("channels of no guidance", "run --guidance 1 --guidance_channels 1", "--guidance_channels: 1 is not read"),
    case("a picture over a config", "run --out run/config.yaml", "--out: 'run/config.yaml' is no PNG picture"),
    case("arrays over a config", "run --npz run/config.yaml", "--npz: 'run/config.yaml' is no file of pictures"),
    case("a picture of another format", "run --out x.jpg", "--out: 'x.jpg' does not end in .png"),
    case("arrays of another format", "run --npz x.pt", "--npz: 'x.pt' does not end in .npz"),
    case("a picture over a letter", "run --out x.png", "'x.png' is no PNG picture", files={"x.png": "dear"}),
    case("arrays over a letter", "run --npz x.npz", "'x.npz' is no file of pictures", files={"x.npz": "dear"}),
    case("a picture into a folder", "run --out run", "is a folder; give the name of a file"),
    case("a config that was cut", "run", "config.yaml is not valid YAML", breaks=of_run("config.yaml", "x: [")),
    case("an index that is none", "run", "its index cannot be read", breaks=of_run("checkpoints/*/index.json", "[]")),
    case("a state that is none", "run", "state.json has", breaks=of_run("checkpoints/*/state.json", "{}")),
    case("weights that were cut", "run", "has 100 bytes", breaks=cut),
]  # fmt: skip


@each(CASES)
def test_refused(refused, run_folder, bad: Case) -> None:
    refused("launch/sample.py", bad)
