"""The remarks on how a set was read."""

from __future__ import annotations

from dataclasses import replace

import pytest

from megadit.config import DataConfig
from megadit.data import build_datasets, describe
from megadit.data.dataset import Subset, print_remarks


def test_remarks_are_told_once_on_a_host(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    train, _ = build_datasets(DataConfig(name="digits"))
    assert train.remarks == ()
    assert isinstance(train, Subset)
    noted = replace(train, source=replace(train.source, remarks=("data.path: caf\udce9.npy is passed over", "two")))
    assert len(describe(noted).notice) and noted.remarks[1] == "two"
    print_remarks(noted)
    assert capsys.readouterr().err == "note: data.path: caf\\udce9.npy is passed over\nnote: two\n"
    monkeypatch.setenv("LOCAL_RANK", "1")
    print_remarks(noted)
    assert capsys.readouterr().err == ""
