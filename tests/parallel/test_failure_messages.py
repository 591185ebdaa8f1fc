"""Messages of failed ranks: the cause as it is, its consequences on other ranks in one line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from megadit.parallel.failure_messages import explain_timeout, peer_failure, summary, write_torchelastic_error

GONE = "[../third_party/gloo/gloo/transport/tcp/pair.cc:554] Connection closed by peer [127.0.0.1]:26117"
LATE = "[../third_party/gloo/gloo/transport/tcp/unbound_buffer.cc:81] Timed out waiting 15000ms for recv operation"


def test_what_follows_from_another_rank_is_one_line() -> None:
    line = peer_failure(RuntimeError(GONE))
    assert line is not None and "another rank has ended (Connection closed by peer)" in line and "\n" not in line
    assert peer_failure(ValueError(GONE)) is None and peer_failure(RuntimeError("shapes differ")) is None
    assert peer_failure(RuntimeError(LATE)) is None  # the first error where a rank hangs


def test_a_timeout_names_its_key() -> None:
    late, other = RuntimeError(LATE), RuntimeError("shapes differ")
    for error in (late, late, other):
        explain_timeout(error, 15.0)
    assert len(late.__notes__) == 1
    assert "parallel.timeout_s, 15 s" in late.__notes__[0] and not hasattr(other, "__notes__")


def test_the_launcher_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from torch.distributed.elastic.multiprocessing.errors import ProcessFailure

    file = tmp_path / "error.json"
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(file))
    try:
        raise ValueError("planted")
    except ValueError as error:
        write_torchelastic_error(summary(error))
    assert json.loads(file.read_text())["message"].startswith("ValueError: planted (file ")
    assert "ValueError: planted" in ProcessFailure(0, 1, 1, str(file)).message
    monkeypatch.delenv("TORCHELASTIC_ERROR_FILE")
    write_torchelastic_error("nobody reads this")
