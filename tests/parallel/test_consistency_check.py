"""Ranks that differ in configuration or code are refused at the start, with the differences and the ranks named."""

from __future__ import annotations

from typing import Any

import pytest

from helpers.ranks import run_ranks
from megadit.errors import UserError
from megadit.nested import flatten
from megadit.parallel import consistency_check, start_processes
from megadit.parallel.consistency_check import check_consistency, code_facts, rank_differences


def agree(changes: dict[int, dict[str, Any]], code: dict[int, dict[str, str]]) -> str:
    context = start_processes()
    facts = {**flatten({"optim": {"lr": 1e-3, "betas": [0.9, 0.99]}}), **changes.get(context.rank, {})}
    local_facts = {**code_facts(), **code.get(context.rank, {})}
    consistency_check.code_facts = lambda: local_facts  # type: ignore[assignment]
    try:
        check_consistency(context, facts)
    except UserError as error:
        assert error.everywhere
        return str(error)
    return ""


@pytest.mark.distributed
def test_ranks_that_agree_go_on() -> None:
    assert run_ranks(2, agree, {}, {}) == ["", ""]


@pytest.mark.distributed
def test_every_rank_tells_what_differs() -> None:
    changes = {1: {"optim.lr": 2e-3}, 2: {"parallel.tensor": 2}}
    code = {3: {"megadit": "0.0.9", "source megadit/rng.py": "00000000"}}
    messages = run_ranks(4, agree, changes, code)
    assert len(set(messages)) == 1
    assert "optim.lr is 0.001 on ranks 0, 2-3, 0.002 on rank 1" in messages[0]
    assert "megadit is 0.1.0 on ranks 0-2, 0.0.9 on rank 3" in messages[0]
    assert "parallel.tensor is missing on ranks 0-1, 3, 2 on rank 2" in messages[0]
    assert "source megadit/rng.py is " in messages[0] and "00000000 on rank 3" in messages[0]


def test_long_values_are_cut_and_many_differences_counted() -> None:
    assert rank_differences([{"a": "1"}, {"a": "1"}]) == []
    assert rank_differences([{"a": "1"}, {}, {"a": "1"}]) == ["a is 1 on ranks 0, 2, missing on rank 1"]
    assert len(consistency_check._short("x" * 500)) < 60
    assert consistency_check._short("x" * 500) != consistency_check._short("x" * 499)


def test_a_changed_source_file_has_another_digest() -> None:
    facts = code_facts()
    assert {"megadit", "torch", "deepspeed", "source megadit/rng.py", "source megadit_kernels/__init__.py"} <= set(
        facts
    )
