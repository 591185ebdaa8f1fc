"""Makes the pins of this folder anew: ``python tests/pins/make.py help schema ...``. See README.md beside it."""

from __future__ import annotations

import json
import os
import re
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "kernels"), str(ROOT / "tests")]

from helpers.help_texts import ask_all  # noqa: E402
from helpers.ranks import free_port, run_command, run_ranks  # noqa: E402
from helpers.studies.tiny_study import result_for  # noqa: E402

CONFIG = HERE / "digits.yaml"
LAYOUTS = {
    "zero1": (2, ["parallel.zero_stage=1"], "1:50:kill"),
    "tensor2-pipeline2": (4, ["parallel.tensor=2", "parallel.pipeline=2"], "1:160:kill"),
}
KEPT = ("config.yaml", "ds_config.json", "mup.json", "metrics.jsonl", "classes.json", "DATA-NOTICE.txt", "checkpoints")


def help_texts() -> dict[str, str]:
    """``--help`` of every command and sub-command, by the words before it."""
    return {words: answer["text"] for words, answer in ask_all().items()}


def schema() -> dict[str, Any]:
    """What ``tools/config_schema.py`` prints."""
    done = run_command([sys.executable, "tools/config_schema.py"])
    return dict(json.loads(done.stdout))


def mup_tables() -> dict[str, list[dict[str, Any]]]:
    """The muP table of every preset as ``tools/mup_table.py`` prints it: alike blocks are one row."""
    from megadit.config.presets import preset, preset_names
    from megadit.config.schema.optim import OptimConfig
    from megadit.models import build_model
    from megadit.mup.table import by_role, rows

    optim = OptimConfig(lr=1e-3)
    return {name: by_role(rows(build_model(preset(name), device="meta"), optim)) for name in preset_names()}


def resumed(run_dir: Path, *overrides: str, ranks: int = 1) -> list[float]:
    """The losses of all steps of a run that is begun, or gone on with, by the command's ``main`` on forked ranks."""
    config = run_dir / "config.yaml" if (run_dir / "config.yaml").is_file() else CONFIG
    codes = run_ranks(ranks, pretrain, ["--config", str(config), "--run_dir", str(run_dir), *overrides])
    assert codes == [0] * ranks
    return losses_of(run_dir)


def pretrain(words: list[str]) -> int:
    """``launch/pretrain.py`` in this process, as a launcher would have started it."""
    from megadit.cli.pretrain import main

    return int(main(words))


def losses_of(run_dir: Path) -> list[float]:
    """The losses in the run's metrics, which must be one of each step."""
    rows = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text(encoding="utf-8").split("\n") if line]
    steps = [row for row in rows if "loss" in row]
    assert [row["step"] for row in steps] == list(range(1, len(steps) + 1))
    return [row["loss"] for row in steps]


def family_losses() -> dict[str, list[float]]:
    """Losses of 20 steps of each family, alone, by the real command."""
    from helpers.models.tiny_text import bert_folder

    losses = {}
    with tempfile.TemporaryDirectory() as folder:
        bert_folder(Path(folder, "bert"))
        for family in FAMILIES:
            losses[family] = resumed(Path(folder, family), *family_overrides(family, Path(folder)))
    return losses


TEXT = [
    "data.condition=text", "model.num_classes=0", "model.text.dim=16", "model.text.max_length=8",
    "sample.prompts=[the handwritten digit seven]",
]  # fmt: skip
FAMILIES: dict[str, list[str]] = {
    "dit": [],
    "pixart": TEXT,
    "uvit": ["model.mlp=gelu", "model.qkv_bias=false"],
    "mmdit": [*TEXT, "model.text.pooled_dim=16", "data.text.pooled=same", "model.qk_norm=rms", "model.mlp=swiglu"],
}


def family_overrides(family: str, folder: Path) -> list[str]:
    """What makes ``digits.yaml`` a run of ``family``; ``folder`` has the text network ``bert``."""
    text = [f"data.text.path={folder / 'bert'}", f"data.text.cache={folder / 'cache'}"]
    chosen = FAMILIES[family]
    return [f"model.family={family}", *chosen, *(text if "data.condition=text" in chosen else [])]


def make_help() -> None:
    """help/, a file for each command."""
    shutil.rmtree(HERE / "help", ignore_errors=True)
    (HERE / "help").mkdir()
    for words, text in help_texts().items():
        (HERE / "help" / help_file(words)).write_text(text, encoding="utf-8")


def help_file(words: str) -> str:
    """The name of a help text's file: ``launch-sweep-run.txt``."""
    return re.sub(r"\.py|[/ ]", lambda match: "" if match[0] == ".py" else "-", words) + ".txt"


def make_schema() -> None:
    """run.schema.json."""
    _write("run.schema.json", schema())


def make_mup() -> None:
    """mup.json."""
    tables = mup_tables()
    lines = [
        f" {json.dumps(name)}: [\n  " + ",\n  ".join(map(json.dumps, rows)) + "\n ]" for name, rows in tables.items()
    ]
    (HERE / "mup.json").write_text("{\n" + ",\n".join(lines) + "\n}\n", encoding="utf-8")


def make_losses() -> None:
    """losses.json."""
    losses = family_losses()
    with tempfile.TemporaryDirectory() as folder:
        for name, (ranks, overrides, _) in LAYOUTS.items():
            losses[name] = resumed(Path(folder, name), *overrides, ranks=ranks)
    _write("losses.json", losses)


def make_runs() -> None:
    """run_dirs/: each run is killed by SIGKILL on one rank, as a lost node does it."""
    for name, (ranks, overrides, fault) in LAYOUTS.items():
        with tempfile.TemporaryDirectory() as folder:
            run_dir = Path(folder, name)
            launcher = ["torchrun", "--nproc_per_node", str(ranks), "--master_port", str(free_port())]
            command = ["tests/helpers/faulty_pretrain.py", "--config", str(CONFIG), "--run_dir", str(run_dir)]
            done = run_command([*launcher, *command, *overrides], {"FAULT": fault})
            assert done.returncode != 0
            target = HERE / "run_dirs" / name
            shutil.rmtree(target, ignore_errors=True)
            target.mkdir(parents=True)
            for entry in KEPT:
                (shutil.copytree if (run_dir / entry).is_dir() else shutil.copy)(run_dir / entry, target / entry)


def make_study() -> None:
    """studies/unfinished: two of four trials are complete, a third was running when its worker's host was lost."""
    from megadit.search.storage.identity import WorkerId
    from megadit.search.storage.store import StudyStore
    from megadit.search.study.study import load_study

    target = HERE / "studies" / "unfinished"
    shutil.rmtree(target, ignore_errors=True)
    study = load_study(HERE / "study.yaml", target)
    store, worker = StudyStore.create_or_open(study), WorkerId("lost-host", "another machine", 1, "1")
    for loss in (1.7, 1.6, None):
        claim = store.claim(worker)
        assert claim is not None
        if loss is not None:
            assert store.finish(claim, result_for(claim, loss), worker)


def exit_codes(lines: Iterable[str]) -> dict[str, int]:
    """The code that each command ends with; in its line, {folder} is empty and {pins} this folder."""
    codes = {}
    with tempfile.TemporaryDirectory() as folder:
        for line in lines:
            words = [word.format(folder=folder, pins=HERE) for word in line.split()]
            codes[line] = run_command([sys.executable, *words]).returncode
    return codes


def _write(name: str, values: Any) -> None:
    (HERE / name).write_text(json.dumps(values, indent=1) + "\n", encoding="utf-8")


MAKERS: dict[str, Callable[[], None]] = {
    "help": make_help, "schema": make_schema, "mup": make_mup, "losses": make_losses, "runs": make_runs,
    "study": make_study,
}  # fmt: skip

if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    for wanted in sys.argv[1:] or MAKERS:
        MAKERS[wanted]()
