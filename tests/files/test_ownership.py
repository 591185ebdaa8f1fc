"""One owner per folder: who is refused, who takes over when, and that nobody is ever cleaned away who lives."""

from __future__ import annotations

import json
import os
import signal
import threading
import time
from pathlib import Path

import pytest

from helpers.owners import beating, elsewhere, killed_owner, leave_owner, living_owner
from megadit.errors import UserError
from megadit.files.owner_file import FILE, Owner, OwnerFile
from megadit.files.ownership import (
    TIMEOUT,
    FolderInUse,
    Ownership,
    OwnershipLost,
    OwnershipRequest,
    acquire_folder,
    is_owned_by_other,
)


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("SLURM_JOB_ID", "SLURM_RESTART_COUNT", "SLURM_CLUSTER_NAME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv(TIMEOUT, "0.3")


def stderr_of(capsys: pytest.CaptureFixture[str]) -> str:
    return capsys.readouterr().err


class TestOwner:
    def test_file_names_the_process_and_goes_with_it(self, tmp_path: Path) -> None:
        folder = tmp_path / "new" / "run"
        with acquire_folder(folder, "training"):
            values = json.loads((folder / FILE).read_text())
            assert values["pid"] == os.getpid()
            assert values["beat"] == 0
            assert [path.name for path in folder.iterdir()] == [FILE]
        assert not (tmp_path / "new").exists()  # nothing was put there

    def test_folder_with_content_stays(self, tmp_path: Path) -> None:
        with acquire_folder(tmp_path / "run", "training"):
            (tmp_path / "run" / "config.yaml").write_text("")
        assert [path.name for path in (tmp_path / "run").iterdir()] == ["config.yaml"]

    def test_counter_advances_in_place(self, tmp_path: Path) -> None:
        ownership = OwnershipRequest(tmp_path, "training", beat_s=0.02).try_acquire()
        assert ownership is not None
        inode, deadline = (tmp_path / FILE).stat().st_ino, time.monotonic() + 60
        while json.loads((tmp_path / FILE).read_text())["beat"] < 3:
            assert time.monotonic() < deadline
            time.sleep(0.02)
        assert (tmp_path / FILE).stat().st_ino == inode
        assert ownership.holds()
        ownership.release()

    def test_counter_that_cannot_be_written_ends_nothing(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        tries = threading.Semaphore(0)

        def full(*_: object) -> bool:
            tries.release()
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(OwnerFile, "advance", full)
        ownership = OwnershipRequest(tmp_path, "training", beat_s=0.01).try_acquire()
        assert ownership is not None
        assert tries.acquire(timeout=60) and tries.acquire(timeout=60)  # it tries again
        ownership.check()
        ownership.release()

    def test_forked_child_neither_releases_nor_is_refused_its_end(self, tmp_path: Path) -> None:
        with acquire_folder(tmp_path, "training") as ownership:
            child = os.fork()
            if child == 0:
                ownership.release()
                os._exit(0)
            os.waitpid(child, 0)
            ownership.check()

    def test_file_system_without_hard_links(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        def no_links(*_: object) -> None:
            raise OSError(1, "Operation not permitted")

        monkeypatch.setattr(os, "link", no_links)
        with acquire_folder(tmp_path, "training"):
            assert not OwnerFile(tmp_path / FILE).create(Owner.of_this_process(tmp_path, "training", 5))
        assert not list(tmp_path.iterdir())


class TestRefusal:
    def test_living_process_is_named_and_untouched(self, tmp_path: Path) -> None:
        with living_owner(tmp_path) as other:
            before = (tmp_path / FILE).read_text()
            with pytest.raises(FolderInUse) as refused:
                acquire_folder(tmp_path, "training", "--run_dir")
            assert f"process {other.pid} on {os.uname().nodename}" in str(refused.value)
            assert str(refused.value).startswith(f"--run_dir: '{tmp_path}' is in use by ")
            assert refused.value.code == 2
            assert (tmp_path / FILE).read_text() == before
            assert is_owned_by_other(tmp_path)

    def test_counter_that_moves_on_another_host(self, tmp_path: Path) -> None:
        owner = leave_owner(tmp_path, **elsewhere(slurm_job="77"))
        with beating(tmp_path, owner), pytest.raises(FolderInUse, match=r"process 4242 on gpu07 \(Slurm job 77, since"):
            acquire_folder(tmp_path, "training")

    def test_time_out_that_is_no_number(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv(TIMEOUT, "soon")
        with pytest.raises(UserError, match="MEGADIT_OWNER_TIMEOUT_S: 'soon' is not a number of seconds"):
            acquire_folder(tmp_path / "run", "training")

    def test_owner_file_that_leads_nowhere(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("megadit.files.ownership._MOST_VANISHED", 2)
        (tmp_path / FILE).symlink_to(tmp_path / "nowhere")
        with pytest.raises(UserError, match="cannot be written"):
            acquire_folder(tmp_path, "training")


class TestTakeover:
    def test_killed_process_at_once_with_a_note(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        dead = killed_owner(tmp_path)
        assert (tmp_path / FILE).is_file()
        assert not is_owned_by_other(tmp_path)
        with acquire_folder(tmp_path, "training") as ownership:
            assert ownership.sure
        assert f"note: '{tmp_path}' is taken over from process {dead.pid} on" in (note := stderr_of(capsys))
        assert "which has ended" in note
        assert "waiting" not in note
        assert not list(tmp_path.iterdir())

    def test_process_id_that_was_given_anew(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        leave_owner(tmp_path, pid=os.getppid(), process_start="1")
        acquire_folder(tmp_path, "training").release()
        assert "which has ended" in stderr_of(capsys)

    @pytest.mark.parametrize("view", ["{host} another-boot pid:[1]", "gpu07 another-boot pid:[1]"])
    def test_silent_owner_whose_process_cannot_be_asked(
        self, tmp_path: Path, capsys: pytest.CaptureFixture[str], view: str
    ) -> None:
        host = os.uname().nodename
        leave_owner(tmp_path, host=host, view=view.format(host=host), pid=os.getppid())
        assert is_owned_by_other(tmp_path)
        assert OwnershipRequest(tmp_path, "training").try_acquire(0) is None  # not at once
        with acquire_folder(tmp_path, "training") as ownership:
            assert not ownership.sure  # some rank of it may still be writing
        note = stderr_of(capsys)
        assert "note: waiting up to 0.3 s to see whether process" in note
        assert "silent for 0.3 s" in note

    def test_own_counter_decides_how_long_is_silent(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        leave_owner(tmp_path, **elsewhere(beat_s=0.2))
        acquire_folder(tmp_path, "training").release()
        assert "silent for 0.6 s" in stderr_of(capsys)

    def test_old_times_of_a_file_mean_nothing(self, tmp_path: Path) -> None:
        leave_owner(tmp_path, **elsewhere())
        os.utime(tmp_path / FILE, (0, 0))
        assert OwnershipRequest(tmp_path, "training").try_acquire(0) is None

    def test_requeued_job_at_once(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        monkeypatch.setenv(TIMEOUT, "600")
        monkeypatch.setenv("SLURM_JOB_ID", "77")
        monkeypatch.setenv("SLURM_RESTART_COUNT", "2")
        leave_owner(tmp_path, **elsewhere(slurm_restarts=1))
        acquire_folder(tmp_path, "training").release()
        assert "whose Slurm job 77 was started again" in stderr_of(capsys)

    @pytest.mark.parametrize("facts", [{"slurm_restarts": 2}, {"slurm_job": "78"}, {"slurm_cluster": "other"}])
    def test_another_job_is_not_a_requeued_one(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, facts: dict[str, object]
    ) -> None:
        monkeypatch.setenv("SLURM_JOB_ID", "77")
        monkeypatch.setenv("SLURM_RESTART_COUNT", "2")
        leave_owner(tmp_path, **{**elsewhere(slurm_restarts=1), **facts})
        assert OwnershipRequest(tmp_path, "training").try_acquire(0) is None

    def test_own_process_silently(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        leave_owner(tmp_path)
        acquire_folder(tmp_path, "training").release()
        assert stderr_of(capsys) == ""

    def test_copy_of_an_owned_folder(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        with living_owner(tmp_path / "a"):
            (tmp_path / "b").mkdir()
            (tmp_path / "b" / FILE).write_text(
                (tmp_path / "a" / FILE).read_text().replace('"beat_s": 5.0', '"beat_s": 0')
            )
            acquire_folder(tmp_path / "b", "training").release()
        assert "silent for 0.3 s" in stderr_of(capsys)

    @pytest.mark.parametrize("text", ["", "{", "[]", "7", '{"token": 3}', '{"token": "a", "pid": 1.5}', "\udcff"])
    def test_file_that_nobody_can_read(self, tmp_path: Path, text: str, capsys: pytest.CaptureFixture[str]) -> None:
        (tmp_path / FILE).write_bytes(text.encode("utf-8", "surrogateescape"))
        acquire_folder(tmp_path, "training").release()
        assert "taken over from an owner that its owner.json does not tell, silent for 0.3 s" in stderr_of(capsys)

    def test_only_one_of_many_takers_wins(self, tmp_path: Path) -> None:
        dead = Owner.parse((killed_owner(tmp_path), (tmp_path / FILE).read_text())[1])
        assert dead is not None
        won: list[int] = []
        children = []
        for number in range(6):
            child = os.fork()
            if child == 0:
                code = 2
                try:
                    acquire_folder(tmp_path, "training")
                    code = 0
                    time.sleep(0.5)  # lives on while the others decide
                except FolderInUse:
                    pass
                finally:
                    os._exit(code)
            children.append((number, child))
        for number, child in children:
            if os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0:
                won.append(number)
        assert len(won) == 1

    def test_taker_that_was_killed_on_the_way(self, tmp_path: Path) -> None:
        killed_owner(tmp_path)
        (tmp_path / FILE).rename(tmp_path / f"{FILE}.takeover")  # it had got so far
        leave_owner(tmp_path, pid=os.getppid(), process_start="1")
        acquire_folder(tmp_path, "training").release()
        assert not list(tmp_path.iterdir())


class TestLoss:
    def test_stopped_owner_notices_before_it_writes(self, tmp_path: Path) -> None:
        with living_owner(tmp_path) as other:
            other.send_signal(signal.SIGSTOP)
            leave = json.loads((tmp_path / FILE).read_text())
            # Seen from another host, where its process cannot be asked, it is silent.
            (tmp_path / FILE).write_text(json.dumps({**leave, "view": "gpu07", "beat_s": 0, "beat": 0}))
            with acquire_folder(tmp_path, "training"):
                other.send_signal(signal.SIGCONT)
                assert other.stdin is not None and other.stdout is not None and other.stderr is not None
                other.stdin.write("go on\n")
                other.stdin.flush()
                assert other.stdout.readline() == ""
                assert "is no longer this process's: process" in other.stderr.read()
                assert json.loads((tmp_path / FILE).read_text())["pid"] == os.getpid()
        assert not list(tmp_path.iterdir())

    def test_removed_file_is_a_loss_too(self, tmp_path: Path) -> None:
        ownership = acquire_folder(tmp_path, "training")
        (tmp_path / FILE).unlink()
        with pytest.raises(OwnershipLost, match="its owner.json is gone") as lost:
            ownership.check()
        assert lost.value.code == 1
        ownership.release()

    def test_loser_advances_and_removes_nothing_of_the_winner(self, tmp_path: Path) -> None:
        loser = acquire_folder(tmp_path, "training")
        (tmp_path / FILE).unlink()
        winner = leave_owner(tmp_path)
        before = (tmp_path / FILE).read_text()
        assert not OwnerFile(tmp_path / FILE).advance(Owner.of_this_process(tmp_path, "training", 5), 9)
        loser.release()
        assert (tmp_path / FILE).read_text() == before
        assert is_owned_by_other(tmp_path) is False  # of this very process
        assert winner.token in before

    def test_server_that_does_not_answer_is_none(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        ownership: Ownership = acquire_folder(tmp_path, "training")

        def away(*_: object) -> str:
            raise OSError(116, "Stale file handle")

        with monkeypatch.context() as patch:
            patch.setattr(OwnerFile, "read", away)
            ownership.check()
        ownership.release()
