"""docs/search.md stays complete: it names every key of a study file and every tolerance, with their defaults."""

from __future__ import annotations

import re

import pytest

from helpers.ranks import ROOT
from megadit.search.study.spec import ScaleSpec, StudySpec
from megadit.transfer.evidence import Limits

TEXT = (ROOT / "docs/search.md").read_text()


@pytest.mark.parametrize("key", StudySpec.model_fields)
def test_every_key_has_a_row(key):
    assert len(re.findall(rf"^\| `{key}` \|", TEXT, re.MULTILINE)) == 1


def test_the_table_has_no_key_that_is_not_there():
    table = TEXT.split("| key of a study file |")[1].split("\n\n")[0]
    assert set(re.findall(r"^\| `(\w+)` \|", table, re.MULTILINE)) == set(StudySpec.model_fields)


def test_scales_and_tolerances_are_the_ones_of_the_code():
    for key in ScaleSpec.model_fields["key"].annotation.__args__:
        assert f"`{key}`" in TEXT
    limits = Limits()
    assert f"`--max-regret` ({100 * limits.max_regret:g} % of the score)" in TEXT
    assert f"`--max-drift` ({limits.max_drift:g} octaves per octave)" in TEXT
    assert f"`--allowance` ({limits.allowance:g})" in TEXT
