"""The report of a study: what it says in each case, in both forms, and that no word in it is markup or a link out."""

from __future__ import annotations

import dataclasses
import math
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest

from helpers.studies.fabricated import BASE, fabricate, make_study, valley
from megadit.errors import UserError
from megadit.search.report import compose, tables, write_report, write_results
from megadit.search.results import FAILED, PRUNED

BOTH = {"mup": {"model.parametrization": "mup"}, "sp": {"model.parametrization": "sp", "model.base_width": None}}
RATES = {"optim.lr": {"grid": ["2^-10", "2^-9", "2^-8", "2^-7", "2^-6", "2^-5"]}}
THREE = {
    "optim.lr": {"log_uniform": [1e-3, 1e-1]},
    "optim.clip.value": {"log_uniform": [0.01, 100]},
    "optim.warmup_steps": {"uniform": [1, 130]},
}
VOID = {"meta", "br", "path", "use", "rect", "image", "stop"}


def drifting(trial, scale):
    """muP stays, SP's optimum falls by an octave per octave and diverges soon above it."""
    loss = valley(-1.0 if trial.variant == "sp" else 0.0)(trial, scale)
    edge = -7 - math.log2(scale / 64) + 1.5
    return None if trial.variant == "sp" and math.log2(trial.hps["optim.lr"]) > edge else loss


def three_keys(trial, scale):
    """Depends on the rate alone, and diverges where that is high."""
    rate = math.log2(trial.hps["optim.lr"])
    return None if rate > -4 else 0.6 + 0.03 * (rate + 7) ** 2


class Reader(HTMLParser):
    """Collects identities and addresses, and complains about tags that are not closed in order."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.identities: list[str] = []
        self.addresses: list[str] = []
        self.tags: list[str] = []
        self.feed(page)
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        for name, value in attrs:
            if name == "id":
                self.identities.append(value)
            if name in ("href", "src", "xlink:href"):
                self.addresses.append(value)
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        if tag in VOID:
            self.handle_starttag(tag, attrs)
        else:
            self.handle_starttag(tag, attrs)
            self.open.pop()

    def handle_endtag(self, tag):
        if tag not in VOID:
            assert self.open.pop() == tag


def written(results) -> tuple[str, str]:
    page, text = write_results(results)
    assert (page.name, text.name) == ("report.html", "report.md")
    return page.read_text(), text.read_text()


def sections(page: str) -> list[str]:
    return re.findall(r'<section id="([^"]+)">', page)


def test_a_transfer_study_shows_both_variants_their_verdicts_and_numbers(tmp_path):
    study = make_study(tmp_path, variants=BOTH, description="Does it hold?")
    study.folder.mkdir()
    page, text = written(fabricate(study, drifting))
    assert sections(page) == ["overview", "verdict", "curves", "best", "failures", "cost", "study"]
    for said in (page, text):
        assert "Does it hold?" in said
        assert "optim.lr under mup: transfers" in said
        assert "does not transfer" in said
        assert "72 of 72" in said
    assert '<span class="badge good">optim.lr under mup: transfers</span>' in page
    # The chosen rate at the proxy (width 32) and its mean: .6 + .02 at one octave below 64.
    assert "optim.lr = 2^-7" in page and "0.62" in page
    assert (study.folder / "plots/curves-optim.lr.png").stat().st_size > 10_000
    assert "![train\\_loss against optim.lr." in text and "(plots/curves-optim.lr.png)" in text
    assert "| sp | 128 | 2^-8 |" in re.sub(r"\\", "", text)


def test_the_page_stands_alone_and_its_identities_are_unique(tmp_path):
    study = make_study(tmp_path, space=THREE, scale=None, sampler="random", trials=20, seeds=[0])
    study.folder.mkdir()
    page, _ = written(fabricate(study, three_keys))
    read = Reader(page)
    assert all(address.startswith("#") for address in read.addresses)
    names = {"http://www.w3.org/2000/svg", "http://www.w3.org/1999/xlink"}  # of XML: nobody fetches them
    assert set(re.findall(r'https?:[^"\s]*', page)) == names and "@import" not in page and "url(#" in page
    assert len(read.identities) == len(set(read.identities))
    assert {address[1:] for address in read.addresses} <= set(read.identities)
    assert read.tags.count("svg") == len(re.findall(r'<div role=img aria-label="[^"]{20,}"[^>]*><svg ', page)) == 3
    assert str(Path.home()) not in page


def test_a_search_over_several_keys_shows_importance_slices_and_lines(tmp_path):
    study = make_study(tmp_path, space=THREE, scale=None, sampler="random", trials=24, seeds=[0])
    report = compose(fabricate(study, three_keys))
    figures = report.drawn
    assert [figure.name for figure in figures] == ["importance", "slices", "parallel"]
    assert figures[0].alt.startswith("Importance: optim.lr ")
    assert "verdict" not in report.sections
    tooltips = figures[1].tooltips
    assert any("optim.clip.value = " in text and "trials " in text for text in tooltips.values())
    assert any("diverged (1 of 1 runs)" in text for text in tooltips.values())
    for mark, text in tooltips.items():
        assert f'<g id="slices-{mark}"><title>{text}</title>' in figures[1].svg


def test_a_search_with_too_few_points_for_importance_says_so(tmp_path):
    study = make_study(tmp_path, space=THREE, scale=None, sampler="random", trials=10, seeds=[0])
    report = compose(fabricate(study, three_keys))
    for form in ("html", "md"):
        assert "Importance is not estimated from 10 finished points" in report.render(form)
    assert [figure.name for figure in report.drawn] == ["slices", "parallel"]


def test_horizons_are_shown_as_scales_of_one_run(tmp_path):
    study = make_study(
        tmp_path,
        scale={"key": "train.steps", "values": [100, 150, 200]},
        scores=[{"name": "tail", "kind": "train_loss"}],
    )
    assert study.horizons
    study.folder.mkdir()
    page, text = written(fabricate(study, lambda trial, scale: valley()(trial, 64.0) - scale / 1e4))
    assert "one run scores all of them" in page
    assert "| 100 | 2^-7 |" in text.replace("\\", "") and "| 200 | 2^-7 |" in text.replace("\\", "")
    assert "12 of 12" in page


def test_an_incomplete_study_says_so_and_has_no_verdict(tmp_path):
    study = make_study(tmp_path)
    study.folder.mkdir()
    page, text = written(fabricate(study, valley(), keep=lambda trial: trial.number < 20))
    for said in (page, text):
        assert "incomplete: 20 of 36 trials have ended" in said
        assert "no verdict" in said
        assert "Best so far" in said
    assert "launch/sweep.py run" in page


def test_nothing_finished_is_still_a_page(tmp_path):
    study = make_study(tmp_path)
    study.folder.mkdir()
    page, text = written(fabricate(study, valley(), keep=lambda trial: False))
    assert sections(page) == ["overview", "verdict", "failures", "cost", "study"]
    assert "Nothing is chosen" in page and "No trial has ended yet" in text
    assert list((study.folder / "plots").iterdir()) == []


def test_all_diverged_is_a_result_without_curves(tmp_path):
    study = make_study(tmp_path, scores=[{"name": "a", "kind": "train_loss"}, {"name": "b", "kind": "val_loss"}])
    study.folder.mkdir()
    page, _ = written(fabricate(study, lambda trial, scale: None))
    assert "No trial has a value of a yet, so there is nothing to draw." in page
    assert "36 diverged" in page and "100 %" in page
    assert "Trials that diverged took 100 % of the FLOPs." in page


def test_every_word_of_the_study_is_escaped(tmp_path):
    evil = "<script>alert('x')</script> | `y` [z](http://example.org) & \"q\""
    study = make_study(tmp_path, description=evil)
    study.folder.mkdir()
    results = fabricate(study, valley())
    failed = dataclasses.replace(results.trials[0], outcome=FAILED, reason=evil, scores={"train_loss": None})
    pruned = dataclasses.replace(results.trials[1], outcome=PRUNED, reason="median at step 50")
    page, text = written(dataclasses.replace(results, trials=(failed, pruned, *results.trials[2:])))
    assert page.count("<script>") == 1, "the page's own, and no other"
    assert "&lt;script&gt;alert(" in page
    assert "<script>" not in text.replace("\\<script\\>", "").split("```")[0]
    assert "1 failed" in page and "1 pruned" in page and "median at step 50" in page
    row = next(line for line in text.splitlines() if line.startswith("| 0 |") and "alert" in line)
    assert len(re.findall(r"(?<!\\)\|", row)) == 9, "a pipe in a reason does not make a column"


def test_scores_are_compared_with_their_directions(tmp_path):
    command = {"name": "recall", "kind": "command", "command": ["x"], "key": "r", "lower_is_better": False}
    study = make_study(tmp_path, scores=[{"name": "loss", "kind": "train_loss"}, command])
    results = fabricate(study, valley())
    trials = tuple(
        dataclasses.replace(t, scores={**t.scores, "recall": None if t.scores["loss"] is None else -t.scores["loss"]})
        for t in results.trials
    )
    text = compose(dataclasses.replace(results, trials=trials)).render("md")
    assert "| `loss` | +1.00 | +1.00 |" in text


def test_a_second_report_removes_figures_that_it_no_longer_has(tmp_path):
    study = make_study(tmp_path)
    (study.folder / "plots").mkdir(parents=True)
    for name in ("curves-old.key.png", "mine.png"):
        (study.folder / "plots" / name).write_bytes(b"x")
    written(fabricate(study, valley()))
    assert sorted(p.name for p in (study.folder / "plots").iterdir()) == ["curves-optim.lr.png", "mine.png"]
    assert [p for p in study.folder.iterdir() if p.name.startswith(".")] == []


def test_values_that_are_no_numbers_have_axes_too(tmp_path):
    space = {"optim.schedule": {"choice": ["constant", "cosine"]}, **RATES}
    study = make_study(tmp_path, space=space, scale=None, seeds=[0])
    study.folder.mkdir()
    page, _ = written(fabricate(study, valley()))
    assert {"curves-optim.lr.png", "curves-optim.schedule.png", "slices.png", "parallel.png"} <= {
        p.name for p in (study.folder / "plots").iterdir()
    }
    assert "optim.schedule = cosine" in page


def test_without_a_study_there_is_one_sentence(tmp_path):
    with pytest.raises(UserError):
        write_report(tmp_path / "nothing")


def test_the_page_is_the_same_from_the_same_results(tmp_path):
    results = fabricate(make_study(tmp_path, base=BASE), valley())
    first, second = (compose(results).render("html") for _ in range(2))
    assert re.sub(r"Written [^U]+UTC", "", first) == re.sub(r"Written [^U]+UTC", "", second)


def test_a_grid_over_two_keys_has_a_verdict_and_a_figure_for_each(tmp_path):
    space = {"optim.lr": {"grid": ["2^-9", "2^-8", "2^-7", "2^-6", "2^-5"]}, "model.output_mult": {"grid": [1, 2, 4]}}
    study = make_study(tmp_path, space=space, scale={"key": "model.width", "values": [32, 64]})

    def loss(trial, scale):
        base = valley()(trial, scale)
        return None if base is None else base + 0.03 * math.log2(trial.hps["model.output_mult"] / 2) ** 2

    report = compose(fabricate(study, loss))
    texts = [badge.text for badge in tables.badges(report.data)]
    assert sorted(texts) == ["complete", "model.output_mult: transfers", "optim.lr: transfers"]
    figures = [figure.name for figure in report.drawn]
    assert set(figures[:2]) == {"curves-optim.lr", "curves-model.output_mult"}
    assert "importance" in figures, "15 points at the proxy are enough for two keys"
