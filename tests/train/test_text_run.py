"""A text-conditional run from its configuration to pictures of prompts, with a tiny encoder of the real class."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from PIL import Image

from helpers.models.tiny_text import bert_folder
from helpers.ranks import run_ranks
from helpers.training import assemble_rank, small_config, train_on, train_rank
from megadit.cli import sample
from megadit.config import RunConfig
from megadit.data.conditions import NULL_TEXT_FILE, PROMPTS_FILE
from megadit.errors import UserError
from megadit.parallel import stop_processes
from megadit.train.pictures import draw_samples
from megadit.train.validation import validation_losses

SCRIPT = Path(__file__).resolve().parents[2] / "launch" / "sample.py"


def text_config(root: Path) -> RunConfig:
    """An MMDiT on digits and their captions."""
    source = {"path": str(bert_folder(root / "bert")), "pooled": "same", "cache": str(root / "cache")}
    return small_config(
        model={"family": "mmdit", "num_classes": 0, "text": {"dim": 16, "max_length": 8, "pooled_dim": 16}},
        data={"name": "digits", "condition": "text", "text": source},
        objective={"kind": "flow", "label_dropout": 0.5},
        train={"steps": 4, "validation_images": 8},
        sample={"count": 4, "steps": 2, "guidance": 2.0},
    )


@pytest.mark.distributed
def test_two_ranks_read_the_same_texts_as_one(tmp_path):
    config = text_config(tmp_path)
    losses = []
    for world in (2, 1):  # the two fill the cache, one of them for both
        folder = str(tmp_path / f"run{world}")
        results = run_ranks(world, train_rank, config, folder, 3, None, {"zero_optimization": {"stage": 1}})
        losses += [result["losses"] for result in results]
    assert len(list((tmp_path / "cache").glob("*.safetensors"))) == 1
    assert losses[0] == pytest.approx(losses[2], rel=1e-5) and losses[1] == losses[0]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Four steps, and a checkpoint."""
    root = tmp_path_factory.mktemp("run")
    config = text_config(root)
    run = assemble_rank(config, str(root / "run"))
    records = train_on(run, 4)
    run.directory.describe(config, {}, [], (), "", {})
    run.save()
    yield run, records
    stop_processes()


def test_it_trains_validates_and_draws_held_out_captions(run):
    run, records = run
    assert all(0 < record["loss"] < 10 for record in records)
    assert validation_losses(run) == validation_losses(run) != {}
    with Image.open(draw_samples(run)) as sheet:
        assert sheet.width > 64
    assert run.engine.loss.conditions.prompts.texts[0].startswith("the handwritten digit")
    assert {NULL_TEXT_FILE, PROMPTS_FILE} <= {path.name for path in run.directory.path.iterdir()}


def test_prompts_are_drawn_by_the_command(run, tmp_path, capsys):
    folder = run[0].directory.path

    def told(*arguments):
        assert (
            sample.main([str(folder), *arguments, "--json", "--device", "cpu", "--out", str(tmp_path / "a.png")]) == 0
        )
        return json.loads(capsys.readouterr().out)

    assert told()["prompts"] == list(run[0].engine.loss.conditions.prompts.texts)
    (tmp_path / "texts.txt").write_text("the digit seven\n\n red apple \n")
    both = told("--prompt", "cat", "--prompts", str(tmp_path / "texts.txt"))
    assert both["prompts"] == ["cat", "the digit seven", "red apple", "cat"] and both["labels"] is None
    for arguments, message in [
        (["--prompt", "cat " * 9], r"--prompt: 'cat cat.*has 11 tokens.*max_length is 8"),
        (["--classes", "3"], r"--classes: 3 cannot be chosen.*--prompt"),
        (["--prompts", str(tmp_path / "none.txt")], r"--prompts: .* cannot be read"),
    ]:
        with pytest.raises(UserError, match=message):
            sample.main([str(folder), *arguments])
