"""tools/transfer.py apply as a command, on studies in their real store: exit codes, files and both outputs."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from helpers.studies.fabricated import fabricate, make_study, store, valley
from megadit.cli import transfer
from megadit.config import load_config
from megadit.errors import UserError

ROOT = Path(__file__).resolve().parents[2]
SMALL = {"scale": {"key": "model.width", "values": [32, 64]}, "seeds": [0]}
TARGET = ["--target", "quickstart/digits.yaml"]


@pytest.fixture(scope="module")
def main():
    return transfer.main


@pytest.fixture(scope="module")
def studies(tmp_path_factory):
    folder = tmp_path_factory.mktemp("studies")
    loss = valley()
    return {
        "stays": str(store(fabricate(make_study(folder, "stays", **SMALL), loss))),
        "moves": str(store(fabricate(make_study(folder, "moves", **SMALL), valley(drift=-2.0)))),
        "partial": str(store(fabricate(make_study(folder, "partial", **SMALL), loss, lambda t: t.number < 3))),
    }


def test_writes_the_target_and_tells(main, studies, tmp_path, capsys):
    out = tmp_path / "new" / "big.yaml"
    args = ["apply", studies["stays"], *TARGET, "--out", str(out), "model.width=256", "train.steps=400"]
    assert main([*args, "--json"]) == 0
    plain = json.loads(capsys.readouterr().out)
    written = load_config(out)
    assert (written.model.width, written.train.steps, written.optim.lr) == (256, 400, 2**-7)
    assert plain["written"] == str(out) and plain["hps"] == {"optim.lr": 2**-7} and plain["m"]["target"] == 4.0
    assert main(args) == 0
    text = capsys.readouterr().out
    assert "verdict of stays on optim.lr: transfers" in text and "does not transfer by itself" in text
    assert f"launch/pretrain.py --config {out}" in text


def test_refuses_with_exit_code_3_and_writes_nothing(main, studies, tmp_path, capsys):
    out = tmp_path / "big.yaml"
    args = ["apply", studies["moves"], *TARGET, "--out", str(out)]
    assert main([*args, "--json"]) == 3
    printed = capsys.readouterr()
    plain = json.loads(printed.out)
    assert plain["written"] is None and plain["verdicts"][0]["verdict"] == "does not transfer"
    assert printed.err.startswith("refused: study moves, optim.lr") and not out.exists()
    assert main([*args, "--force"]) == 0 and out.is_file()
    # --verified-by takes several studies; an override behind them is one of the target all the same.
    behind = ["--verified-by", studies["stays"], studies["moves"], "train.steps=7"]
    assert main(["apply", studies["stays"], *TARGET, "--out", str(out), *behind]) == 3
    assert main(["apply", studies["stays"], *TARGET, "--out", str(out), *behind, "--force"]) == 0
    assert load_config(out).train.steps == 7


def test_bad_input_is_one_sentence(main, studies, tmp_path):
    out = ["--out", str(tmp_path / "x.yaml")]
    with pytest.raises(UserError, match="is incomplete"):
        main(["apply", studies["partial"], *TARGET, *out])
    with pytest.raises(UserError, match=r"model.parametrization: the target .*xl-2.yaml is under sp"):
        main(["apply", studies["stays"], "--target", "dit/xl-2.yaml", *out])
    with pytest.raises(UserError, match="--target: no file dit/xl-3-mup.yaml; did you mean configs/dit/xl-2-mup.yaml"):
        main(["apply", studies["stays"], "--target", "dit/xl-3-mup.yaml", *out])
    with pytest.raises(UserError):
        main(["apply", str(tmp_path), *TARGET, *out])
    with pytest.raises(SystemExit) as end:
        main(["apply", studies["stays"], *TARGET, "--nonsense"])
    assert end.value.code == 2 and list(tmp_path.iterdir()) == []
