"""The paper's own tables give its verdicts (arXiv 2505.15270, tables 7 to 11), and others the values of our files."""

from __future__ import annotations

import csv
import json
import math
from pathlib import Path

import pytest

from megadit.cli import transfer
from megadit.config import load_config
from megadit.transfer.score_table import Columns, lower_is_better, verify_table
from megadit.transfer.verdict import TransferVerdict

PAPER = Path(__file__).resolve().parents[1] / "data" / "paper"
TABLES = {
    7: ("table07_width_lr.csv", "width", "log2_lr"),
    8: ("table08_batch_lr.csv", "batch_size", "log2_lr"),
    9: ("table09_steps_lr.csv", "steps", "log2_lr"),
    10: ("table10_width_output_mult.csv", "width", "log2_output_mult"),
    11: ("table11_steps_output_mult.csv", "steps", "log2_output_mult"),
}
BASE = {7: 288, 8: 256, 9: 200_000, 10: 288, 11: 200_000}  # the setting of the paper's proxy


def verdict_on(table: int, score: str = "fid50k", proxy: float | None = None) -> TransferVerdict:
    name, scale, hp = TABLES[table]
    lower = lower_is_better(score)
    assert lower is not None
    return verify_table(PAPER / name, Columns(scale, hp, score), lower=lower, proxy=proxy)


@pytest.mark.parametrize("from_base", [False, True], ids=["from the smallest", "from the paper's base"])
@pytest.mark.parametrize(("table", "exceptions"), [(7, ()), (8, (128,)), (9, (100_000,))])
def test_the_learning_rate_transfers(table, exceptions, from_base):
    verdict = verdict_on(table, proxy=BASE[table] if from_base else None)
    assert verdict.verdict == "transfers"
    assert verdict.best == verdict.best_log2 == -10.0
    assert verdict.exceptions == exceptions
    assert verdict.regret == 0.0


@pytest.mark.parametrize("from_base", [False, True], ids=["from the smallest", "from the paper's base"])
@pytest.mark.parametrize("table", [10, 11])
def test_the_output_multiplier_transfers_in_a_broad_basin(table, from_base):
    verdict = verdict_on(table, proxy=BASE[table] if from_base else None)
    assert verdict.verdict == "transfers" and not verdict.exceptions
    assert verdict.best is not None and 0 <= verdict.best <= 4
    assert any("cannot be told from the best" in reason for reason in verdict.reasons)


def test_divergence_above_the_best_is_a_measured_edge():
    """2^-10 is the highest stable rate at every width: not the end of the grid."""
    verdict = verdict_on(7)
    for entry in verdict.scales:
        assert entry.optimum is not None
        assert entry.optimum.curve.high == "edge" and not entry.optimum.open


@pytest.mark.parametrize("score", ["sfid50k", "inception_score", "precision", "recall"])
def test_other_scores_agree_over_width(score):
    verdict = verdict_on(7, score)
    assert verdict.verdict == "transfers" and verdict.best == -10.0


def test_an_exception_is_told_with_its_cost():
    reasons = verdict_on(8).reasons
    assert reasons[0] == "transfers from batch_size 256 on; exception: batch_size 128"
    assert "1.07 (1.5 %)" in reasons[1]


@pytest.mark.parametrize("table", TABLES)
def test_the_command_gives_the_papers_verdict(table, capsys):
    """Exit code 0, the value and the exceptions, on the file as it is."""
    name, scale, hp = TABLES[table]
    words = ["verify", "--table", str(PAPER / name), "--scale", scale, "--hp", hp, "--score", "fid50k", "--json"]
    assert transfer.main(words) == 0
    plain = json.loads(capsys.readouterr().out)
    assert plain["verdict"] == "transfers"
    assert plain["exceptions"] == {8: [128.0], 9: [100_000.0]}.get(table, [])
    assert plain["best"] == -10.0 if table < 10 else 0 <= plain["best"] <= 4


def rows(name):
    with open(PAPER / name, encoding="utf-8", newline="") as file:
        return [{key: float(value or "nan") for key, value in row.items()} for row in csv.DictReader(file)]


def best(table, column):
    return min((row for row in table if not math.isnan(row[column])), key=lambda row: row[column])


def test_pixarts_rate_is_the_best_of_its_proxy():
    """Table 2: by training loss, GenEval and FID on COCO the highest rate that trains."""
    table = rows("table02_pixart_proxy.csv")
    chosen = math.log2(load_config("pixart/proxy-mup.yaml").optim.lr)
    assert chosen == math.log2(load_config("pixart/target-mup.yaml").optim.lr) == -10
    assert chosen == best(table, "train_loss")["log2_lr"] == best(table, "fid30k_coco")["log2_lr"]
    assert chosen == max((r for r in table if not math.isnan(r["geneval"])), key=lambda r: r["geneval"])["log2_lr"]
    assert [row["log2_lr"] for row in table if math.isnan(row["train_loss"])] == [-9]


def test_mmdits_rate_is_the_best_of_its_proxy():
    """Table 15."""
    chosen = best(rows("table15_mmdit_100k.csv"), "train_loss")["lr"]
    assert {load_config(f"mmdit/{name}.yaml").optim.lr for name in ("proxy-mup", "18b-mup")} == {chosen}


def test_dits_files_train_as_long_as_the_paper_compares():
    """Table 12: muP is ahead at every number of steps, and after 2.4M of SP after 7M."""
    table = rows("table12_dit_xl2_fid50k.csv")
    both = [row for row in table if not math.isnan(row["dit_xl2_mup"])]
    assert all(row["dit_xl2_mup"] < row["dit_xl2"] for row in both)
    sp, mup = (load_config(f"dit/{name}.yaml").train.steps for name in ("xl-2", "xl-2-mup"))
    at = {row["steps"]: row for row in table}
    assert (sp, mup) == (table[-1]["steps"], both[-1]["steps"]) and round(sp / mup, 1) == 2.9
    assert at[mup]["dit_xl2_mup"] < at[sp]["dit_xl2"]
