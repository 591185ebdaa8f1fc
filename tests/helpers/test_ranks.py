"""The multi-process helper itself: a broken one would make every layout test pass, or hang."""

from __future__ import annotations

import gc
import os
import signal
import subprocess
import sys
import time

import pytest
import torch
import torch.distributed as dist

from helpers.ranks import RankError, run_command, run_ranks
from megadit.errors import UserError

pytestmark = pytest.mark.distributed


def alive(pid: int) -> bool:
    """Whether the process exists and is not merely a zombie of somebody else's."""
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


def gone(pid: int) -> bool:
    end = time.monotonic() + 5
    while alive(pid) and time.monotonic() < end:
        time.sleep(0.02)
    return not alive(pid)


def test_ranks_share_a_group_and_answer_in_order():
    def add(offset: float) -> tuple[int, int, float, str]:
        value = torch.tensor([float(dist.get_rank())])
        dist.all_reduce(value)
        return dist.get_rank(), dist.get_world_size(), value.item() + offset, os.environ["LOCAL_RANK"]

    assert run_ranks(3, add, 10.0, timeout=30) == [(rank, 3, 13.0, str(rank)) for rank in range(3)]


def test_a_rank_may_leave_early():
    def uneven() -> int:
        if dist.get_rank() == 1:
            time.sleep(0.5)
            pair = dist.new_group([1])
            dist.barrier(group=pair)
        elif dist.get_rank() == 0:
            dist.new_group([1])
        return dist.get_rank()

    assert run_ranks(2, uneven, timeout=30) == [0, 1]


def test_the_first_error_is_raised_as_it_was():
    def fail() -> None:
        if dist.get_rank() == 1:
            print("said by rank one")
            raise UserError("data.path: wrong", everywhere=True)
        dist.barrier()

    start = time.monotonic()
    with pytest.raises(UserError, match="data.path: wrong") as caught:
        run_ranks(2, fail, timeout=60)
    note = "".join(caught.value.__notes__)
    assert "on rank 1 of 2" in note and "in fail" in note and "said by rank one" in note
    assert time.monotonic() - start < 20


def test_garbage_of_the_parent_is_left_alone():
    class Owner:
        """Stands for an object whose destructor waits for a thread of the parent."""

        def __init__(self, pid: int) -> None:
            self.pid, self.me = pid, self  # the cycle keeps it until a collection

        def __del__(self) -> None:
            if os.getpid() != self.pid:
                os._exit(99)

    run_ranks(1, int, timeout=30)  # imports are done now: they would collect in the parent
    gc.disable()
    try:
        Owner(os.getpid())
        assert run_ranks(1, gc.collect, timeout=30)[0] >= 0
    finally:
        gc.enable()
        gc.collect()


def test_an_error_that_cannot_be_pickled_keeps_its_text():
    class Local(Exception):
        pass

    def fail() -> None:
        raise Local("only here")

    with pytest.raises(RankError, match="Local: only here"):
        run_ranks(1, fail, timeout=30)


def test_a_result_that_cannot_be_pickled_is_told():
    with pytest.raises(RankError, match=r"without a result[\s\S]*pickle"):
        run_ranks(1, lambda: lambda: None, timeout=30)


def test_a_killed_rank_is_told_and_takes_the_others_down(tmp_path):
    def die() -> None:
        (tmp_path / str(dist.get_rank())).write_text(str(os.getpid()))
        if dist.get_rank() == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(60)

    with pytest.raises(RankError, match="rank 0: exit status -9"):
        run_ranks(2, die, timeout=30)
    assert gone(int((tmp_path / "1").read_text()))


def test_a_hang_shows_where_and_leaves_no_process(tmp_path):
    def stuck_here() -> None:
        worker = subprocess.Popen(["sleep", "60"])
        (tmp_path / "worker").write_text(str(worker.pid))
        deep(20)

    def deep(n: int) -> None:  # a stack longer than the part of a log that is shown otherwise
        time.sleep(60) if n == 0 else deep(n - 1)

    with pytest.raises(RankError, match=r"within 1\.5 s[\s\S]*deep[\s\S]*stuck_here[\s\S]*run_ranks"):
        run_ranks(1, stuck_here, timeout=1.5)
    assert gone(int((tmp_path / "worker").read_text()))


def test_a_test_out_of_its_own_time_shows_where_too():
    """What pytest's time limit raises in the middle of the waiting carries the stacks of the ranks."""

    class OutOfTime(BaseException):
        pass

    def ring(*_: object) -> None:
        raise OutOfTime

    def stuck_here(parent: int) -> None:
        os.kill(parent, signal.SIGUSR2)
        time.sleep(60)

    before = signal.signal(signal.SIGUSR2, ring)
    try:
        with pytest.raises(OutOfTime) as caught:
            run_ranks(1, stuck_here, os.getpid(), timeout=30)
    finally:
        signal.signal(signal.SIGUSR2, before)
    assert "stuck_here" in "".join(caught.value.__notes__)


def test_later_groups_inherit_the_time_limit():
    def wait_alone() -> None:
        group = dist.new_group([0, 1])
        if dist.get_rank() == 0:
            dist.barrier(group=group)
        else:
            time.sleep(20)

    start = time.monotonic()
    # The collective's own limit and the helper's are equal, so either may speak; half an hour must not pass.
    with pytest.raises((RankError, RuntimeError)):
        run_ranks(2, wait_alone, timeout=2)
    assert time.monotonic() - start < 15


def test_a_command_gives_its_code_and_both_outputs():
    program = "import sys, os; print(os.environ['A'], os.environ.get('HOME')); print('e', file=sys.stderr); sys.exit(7)"
    result = run_command([sys.executable, "-c", program], env={"A": "1", "HOME": None}, timeout=30)
    assert (result.returncode, result.stdout, result.stderr) == (7, "1 None\n", "e\n")


def test_a_command_out_of_time_is_killed_with_its_children(tmp_path):
    note = tmp_path / "pid"
    with pytest.raises(subprocess.TimeoutExpired) as caught:
        run_command(["sh", "-c", f"sleep 60 & echo $! > {note}; echo begun; wait"], timeout=1)
    assert caught.value.output == "begun\n"
    assert gone(int(note.read_text()))


def test_a_command_that_leaves_a_child_behind_does_not_keep_us(tmp_path):
    note = tmp_path / "pid"
    start = time.monotonic()
    result = run_command(["sh", "-c", f"sleep 60 & echo $! > {note}"], timeout=30)
    assert result.returncode == 0 and time.monotonic() - start < 5
    assert gone(int(note.read_text()))


def start_forkserver():
    from multiprocessing import forkserver

    forkserver.ensure_running()
    return forkserver._forkserver._forkserver_pid


def test_a_rank_starts_its_own_forkserver_where_the_parent_has_one():
    forkserver = start_forkserver()
    ranks = run_ranks(2, start_forkserver)
    assert len({forkserver, *ranks}) == 3


def _deepspeed_backend() -> object:
    import deepspeed

    return deepspeed.comm.comm.cdb


@pytest.mark.distributed
def test_a_rank_forgets_the_backend_of_a_run_in_the_process_that_forked_it(monkeypatch: pytest.MonkeyPatch) -> None:
    import deepspeed

    monkeypatch.setattr(deepspeed.comm.comm, "cdb", object())
    assert run_ranks(1, _deepspeed_backend) == [None]
