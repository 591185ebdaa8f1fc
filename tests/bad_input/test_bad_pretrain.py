"""launch/pretrain.py refuses bad input in one sentence, and writes nothing.

Launchers' variables are in tests/parallel/, run directories in use in tests/train/.
"""

import json
import struct
from zlib import crc32

from helpers.bad_input import Case, case, each
from helpers.data.tars import samples, tar_bytes

DIGITS = "--config quickstart/digits.yaml"
DRY = f"{DIGITS} --dry_run"
FOLDER = f"{DRY} data.name=image-folder data.path=x data.image_size=8 data.val_fraction=0 model.in_channels=3"
ONE = "model.num_classes=1"


def yaml(text: str | bytes) -> dict[str, str | bytes]:
    """A configuration file x.yaml."""
    return {"x.yaml": text}


def ds(text: str | bytes) -> dict[str, str | bytes]:
    """A DeepSpeed file x.json."""
    return {"x.json": text}


def png(width: int, height: int) -> bytes:
    """A PNG of these sides, whatever its rows are."""
    parts = [(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)), (b"IDAT", b""), (b"IEND", b"")]
    chunks = [
        struct.pack(">I", len(data)) + name + data + struct.pack(">I", crc32(name + data)) for name, data in parts
    ]
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunks)


def metadata(*lines: object) -> dict[str, str | bytes]:
    """A folder x of a metadata.jsonl alone."""
    return {"x/metadata.jsonl": "\n".join(map(json.dumps, lines))}


FILES = [
    case("no file named", "--config", "expected one argument"),
    case("an option that is not there", "--configuration_file x", "unrecognized arguments"),
    case("no such file", "--config nowhere.yaml", "no file nowhere.yaml"),
    case("a folder", "--config here", "here is a folder", files={"here": None}),
    case("a file that was cut", "--config x.yaml", "not valid YAML", "line 1", files=yaml("model: {width: 64")),
    case("a file of no text", "--config x.yaml", "x.yaml", files=yaml(b"\x89PNG\r\n\x1a\n\x00\x00\xff")),
    case("a list", "--config x.yaml", "holds list", files=yaml("- 1\n- 2\n")),
    case("a key twice", "--config x.yaml", "key width is there twice", files=yaml("model: {width: 3, width: 4}")),
    case("code in a file", "--config x.yaml", "tag", files=yaml('x: !!python/object/apply:os.system ["touch y"]')),
    case("a base that is not there", "--config x.yaml", "no file y.yaml beside", files=yaml("base: y.yaml")),
    case("a file of brackets", "--config x.yaml", "is nested too deeply", "line 1", files=yaml("[" * 100_000)),
    case("a file of Latin-1", "--config x.yaml", "line 2 has the byte 0xe9", files=yaml(b"a: 1\nb: caf\xe9")),
    case("an override of brackets", f"{DRY} data.classes={'[' * 100_000}", "data.classes", "is nested too deeply"),
    case("DeepSpeed's file of brackets", f"{DRY} --ds_config x.json", "is nested too deeply", files=ds("[" * 100_000)),
    case("a file that is its own base", "--config x.yaml", "is a circle", files=yaml("base: x.yaml")),
    case("a base that is a number", "--config x.yaml", "base: 5 is not a file name", files=yaml("base: 5")),
    case("a section that is a number", "--config x.yaml", "model: 5 is not a section", files=yaml("model: 5")),
]

VALUES = [
    case("no such section", f"{DRY} trian.steps=3", "did you mean train"),
    case("no such key", f"{DRY} optim.learning_rate=1", "optim.learning_rate: no such key"),
    case("no value", f"{DRY} train.steps", "is not of the form section.key=value"),
    case("a word for a number", f"{DRY} train.steps=many", "train.steps: 'many' is not a whole number"),
    case("half a pixel", f"{DRY} model.width=64.5", "model.width: 64.5 is not a whole number"),
    case("no steps", f"{DRY} train.steps=0", "train.steps: 0 is not at least 1"),
    case("more steps than numbers", f"{DRY} train.steps=1e999", "train.steps", "is not a whole number"),
    case("a rate below zero", f"{DRY} optim.lr=-1", "optim.lr: -1 is not greater than 0"),
    case("a rate of inf", f"{DRY} optim.lr=.inf", "optim.lr: inf is not a finite number"),
    case("a rate of nan", f"{DRY} optim.lr=nan", "optim.lr", "is not a"),
    case("one beta", f"{DRY} optim.betas=[0.9]", "too few items"),
    case("a beta of one", f"{DRY} optim.betas=[0.9,1]", "must both lie in [0, 1)"),
    case("no such preset", f"{DRY} model.preset=dit-xxl", "'dit-xxl' is not a preset; did you mean"),
    case("an average beyond one", f"{DRY} ema.decays=[2]", "ema.decays: 2.0 does not lie between 0 and 1"),
    case("an average that nobody keeps", f"{DRY} sample.weights=0.5", "sample.weights: 0.5 is none of online"),
    case(
        "texts without a text model", f"{DRY} sample.prompts=[a]", "sample.prompts: ['a'] need a model with model.text"
    ),
    case("no such objective", f"{DRY} objective.kind=edm", "objective.kind: 'edm' is not one of"),
    case("a batch beyond the memory", f"{DIGITS} train.global_batch=9999999999", "train.global_batch: 9999999999"),
    case("a width beyond numbers", f"{DRY} model.width=1000000000 model.head_dim=16", "model.width: 1000000000"),
    case("a seed beyond numbers", f"{DRY} train.seed=1e40", "train.seed"),
    case("no run directory", f"{DIGITS} --run_dir=", "--run_dir: is empty"),
    case("an unset variable", f"{DRY} train.init_from=", "train.init_from"),
]

DATA = [
    case("the wrong size", f"{DRY} data.image_size=7", "data.image_size: 7"),
    case("a class that is not there", f"{DRY} data.classes=[x]", "'x' is not a class of digits"),
    case("no class at all", f"{DRY} data.classes=[]", "data.classes"),
    case("nothing left to train on", f"{DRY} data.val_fraction=0.9999", "holds out all 1797 images"),
    case("a path that is not there", f"{DRY} data.name=webdataset data.path=nowhere", "there is no file nowhere"),
    case(
        "tars joined by cat",
        f"{DRY} data.name=webdataset data.path=t",
        "data.path: t/x.tar",
        "begin at byte 20480",
        files={"t/x.tar": tar_bytes(samples(0, 4)) + tar_bytes(samples(4, 8))},
    ),
    case(
        "a packed tar", f"{DRY} data.name=webdataset data.path=t", "no .tar files", "x.tgz", files={"t/x.tgz": b"\x1f"}
    ),
    case(
        "a label of billions",
        FOLDER,
        "line 2 of x/metadata.jsonl has the label 4294967295",
        "model.num_classes is 10",
        files=metadata({"file_name": "a", "label": 0}, {"file_name": "a", "label": 2**32 - 1}),
    ),
    case(
        "a label of null",
        FOLDER,
        "line 1 of x/metadata.jsonl: label",
        files=metadata({"file_name": "a", "label": None}),
    ),
    case("an image elsewhere", FOLDER, "leads out of x", files=metadata({"file_name": "/etc/hosts", "label": 0})),
    case(
        "an image that is gone",
        FOLDER + " model.num_classes=1",
        "line 1 of x/metadata.jsonl names a, which is not there",
        files=metadata({"file_name": "a", "label": 0}),
    ),
    case("a line of brackets", FOLDER, "line 1 of x/metadata.jsonl", files={"x/metadata.jsonl": "[" * 100_000}),
    case(
        "a link to nowhere",
        FOLDER,
        "a.png is a link to 'gone', which is not there",
        files={"x/c": None},
        breaks=lambda folder: (folder / "x/c/a.png").symlink_to("gone"),
    ),
    case("an image that is a line", f"{FOLDER} {ONE}", "a.png (it is 999 x 1 pixels", files={"x/c/a.png": png(999, 1)}),
    case(
        "an image of 10 gigapixels", f"{FOLDER} {ONE}", "10,000,000,000 pixels", files={"x/c/a.png": png(10**5, 10**5)}
    ),
    case(
        "a program as an image", f"{FOLDER} {ONE}", "a PostScript program", files={"x/c/a.png": "%!PS-Adobe-3.0 EPSF\n"}
    ),
    case("images left out", f"{DRY} data.on_corrupt=skip", "'skip' is not possible: to pass over an image"),
    case("a class twice", f"{DRY} data.classes=[7,7] model.num_classes=2", "'7' stands there twice"),
    case("a folder without images", f"{DRY} data.name=fashion-mnist data.path=.", "has no train-images-idx3-ubyte"),
]

LAYOUT = [
    case("a plan for no rank", f"{DRY} --world_size 0", "--world_size: 0 is no number of ranks"),
    case("a plan without planning", f"{DIGITS} --world_size 2", "--world_size: belongs to --dry_run"),
    case("an object without planning", f"{DIGITS} --json", "--json: belongs to --dry_run"),
    case("a batch that ranks do not share", f"{DRY} --world_size 3", "train.global_batch: 32"),
    case("heads that ranks do not share", f"{DRY} parallel.tensor=3 --world_size 3", "does not divide model.heads, 4"),
    case("more stages than blocks", f"{DRY} parallel.pipeline=99 --world_size 99", "parallel.pipeline: 99"),
    case("no time for others", f"{DRY} parallel.timeout_s=0", "parallel.timeout_s: 0 is not greater than 0"),
]

STARTS = [
    case("no such checkpoint", f"{DRY} --resume nowhere", "--resume: 'nowhere' is no checkpoint"),
    case("weights from nowhere", f"{DRY} train.init_from=nowhere", "train.init_from: 'nowhere' is no checkpoint"),
    case("an average of nothing", f"{DRY} train.init_from_ema=0.9", "train.init_from_ema: 0.9"),
]

DEEPSPEED = [
    case("no such DeepSpeed file", f"{DRY} --ds_config no.json", "no file no.json"),
    case("a folder as DeepSpeed file", f"{DRY} --ds_config x.json", "is a folder", files={"x.json": None}),
    case("an empty DeepSpeed file", f"{DRY} --ds_config x.json", "x.json", "JSON", files=ds("")),
    case("a DeepSpeed list", f"{DRY} --ds_config x.json", "is not a JSON object", files=ds("[]")),
    case(
        "a number for a section",
        f"{DRY} --ds_config x.json",
        "zero_optimization: 3",
        files=ds('{"zero_optimization": 3}'),
    ),
    case(
        "a word for a batch",
        f"{DRY} --ds_config x.json",
        'train_batch_size: "many"',
        files=ds('{"train_batch_size": "many"}'),
    ),
    case(
        "a batch of two kinds",
        f"{DRY} --ds_config x.json train.global_batch=32",
        "contradicts",
        files=ds('{"train_batch_size": 64}'),
    ),
    case(
        "a rate that kills muP",
        f"{DRY} --ds_config x.json",
        "OneCycle",
        files=ds('{"scheduler": {"type": "OneCycle", "params": {}}}'),
    ),
    case("an optimizer that is none", f"{DRY} --ds_config x.json", "optimizer: []", files=ds('{"optimizer": []}')),
    case(
        "a key that DeepSpeed refuses",
        f"{DRY} --ds_config x.json",
        "speed: 1",
        files=ds('{"bf16": {"enabled": true, "speed": 1}}'),
    ),
]


@each([*FILES, *VALUES])
def test_configuration(refused, bad: Case) -> None:
    refused("launch/pretrain.py", bad)


@each([*DATA, *LAYOUT, *STARTS])
def test_data_layout_and_start(refused, bad: Case) -> None:
    refused("launch/pretrain.py", bad)


@each(DEEPSPEED)
def test_deepspeed_files(refused, bad: Case) -> None:
    refused("launch/pretrain.py", bad)
