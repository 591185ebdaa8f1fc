"""Moving averages by the real commands: trained, validated, drawn from, and sampled by name."""

from __future__ import annotations

import json
import sys

import pytest
import torch

from helpers.ranks import run_command
from megadit.checkpoint.find import load_model
from megadit.cli import sample as sample_command
from megadit.errors import UserError

RUN = [sys.executable, "launch/pretrain.py", "--config", "configs/quickstart/digits.yaml", "model.width=32"]
RUN += ["model.depth=2", "train.log_every=1", "train.global_batch=16", "train.validation_images=20", "optim.lr=0.01"]
RUN += ["sample.count=4", "sample.steps=4", "optim.warmup_steps=0"]
AVERAGES = ["ema.decays=[0.5]", "ema.sigma_rels=[0.2]", "sample.weights=0.5"]
AVERAGES += ["train.validate_with=[online,0.5,sigma-0.2]"]

pytestmark = [pytest.mark.distributed, pytest.mark.timeout(600)]  # whole commands, one after another


def records(run_dir):
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


def test_averages_are_validated_drawn_from_and_sampled(tmp_path, capsys):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run_dir = tmp_path / "run"
    done = run_command([*RUN, *AVERAGES, "train.steps=4", "--run_dir", str(run_dir)], timeout=180)
    assert done.returncode == 0, done.stderr[-3000:]
    last = records(run_dir)[-1]
    losses = [last[key] for key in ("val_loss", "val_loss_ema/0.5", "val_loss_ema/sigma-0.2")]
    assert len(set(losses)) == 3
    assert json.loads((run_dir / "summary.json").read_text())["val_loss"] == losses[0]
    events = EventAccumulator(str(run_dir / "tensorboard"))
    events.Reload()
    assert {"val/loss", "val/loss_ema/0.5", "val/loss_ema/sigma-0.2"} <= set(events.Tags()["scalars"])

    online, average = (dict(load_model(run_dir, weights=name)[1].named_parameters()) for name in ("online", "0.5"))
    assert not all(torch.equal(online[name], average[name]) for name in online)
    drawn = (run_dir / "samples/step-00000004.png").read_bytes()
    sample = [str(run_dir), "--json", "--device", "cpu"]
    for arguments, weights in (([], "0.5"), (["--ema", "online"], "online")):
        assert sample_command.main([*sample, *arguments, "--out", str(tmp_path / f"{weights}.png")]) == 0
        assert json.loads(capsys.readouterr().out)["weights"] == weights
    assert (tmp_path / "0.5.png").read_bytes() == drawn  # what the run drew of its average, by its checkpoint
    assert (tmp_path / "online.png").read_bytes() != drawn
    with pytest.raises(UserError, match=r"weights '0\.7': .* holds online, 0\.5, sigma-0\.2"):
        sample_command.main([*sample, "--ema", "0.7"])
