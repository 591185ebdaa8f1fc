"""Signals: before the first step, while training, a second one, and those that a launcher sends for another rank."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time

import pytest

from helpers.ranks import ROOT, run_ranks
from helpers.training import layout_of, small_config
from megadit.cli import pretrain
from megadit.train.preemption import PreemptedAtStart, StopRequest, exit_before_training, preemption_signals
from megadit.train.run_dir import RunDirectory

SIGNALS = (signal.SIGUSR1, signal.SIGTERM, signal.SIGINT)


def send(number):
    os.kill(os.getpid(), number)


@pytest.fixture(autouse=True)
def _handlers():
    """What is set outside of the blocks, whatever runs these tests."""
    before = {number: signal.getsignal(number) for number in SIGNALS}
    signal.signal(signal.SIGUSR1, signal.SIG_DFL)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.fixture
def main():
    return pretrain.main


@pytest.mark.parametrize("number", SIGNALS)
def test_a_signal_before_training_ends_the_start(number):
    with pytest.raises(PreemptedAtStart) as asked, preemption_signals("starting"):
        send(number)
    assert asked.value.number == number and not isinstance(asked.value, Exception)
    assert signal.getsignal(signal.SIGUSR1) is signal.SIG_DFL
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


@pytest.mark.parametrize("number", SIGNALS)
def test_a_signal_while_training_is_noted_and_said(number, capfd):
    with preemption_signals() as stop_request:
        send(number)
        send(number)  # launchers pass one on twice
        assert stop_request.received
    stderr = capfd.readouterr().err
    assert stderr.count(f"{signal.Signals(number).name} received: saving after this step") == 1
    assert ("press Ctrl-C again" in stderr) == (number == signal.SIGINT)


def test_training_goes_on_with_the_interrupt_of_the_start_and_the_end_hears_no_more():
    with preemption_signals("starting") as outer:
        with preemption_signals() as stop_request:
            assert stop_request is outer and outer.phase == "training"
        send(signal.SIGTERM)  # saved and done: nothing is left to end
        assert outer.phase == "ending"


def test_what_others_answer_is_left_to_them():
    """A study's worker takes SIGTERM and SIGINT itself, and nohup's children ignore SIGINT."""
    heard = []
    signal.signal(signal.SIGTERM, lambda number, _: heard.append(number))
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    with preemption_signals() as stop_request:
        send(signal.SIGTERM)
        send(signal.SIGINT)
        assert heard == [signal.SIGTERM] and not stop_request.received


# A step that neither ends nor returns to Python, where no handler runs; a thread says that it has begun.
HANGS = """
import hashlib, sys, threading
from megadit.train import preemption
preemption.REPEAT_WINDOW_S = 0.2
with preemption.preemption_signals({phase!r}):
    threading.Timer(0.5, print, ["begun"], {{"flush": True}}).start()
    hashlib.pbkdf2_hmac("sha256", b"", b"", 2**31 - 1)
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_second_signal_ends_a_step_that_hangs(number):
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(
        [sys.executable, "-c", HANGS.format(phase="training")], env=environment, stdout=subprocess.PIPE
    )
    with process:
        try:
            assert process.stdout.readline() == b"begun\n"
            process.send_signal(number)
            time.sleep(1.0)
            assert process.poll() is None
            process.send_signal(number)
            assert process.wait(30) == -number
        finally:
            process.kill()


def test_a_start_that_hangs_is_given_up():
    program = HANGS.format(phase="starting").replace("REPEAT_WINDOW_S = 0.2", "_STARTUP_TIMEOUT_S = 0.3")
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(
        [sys.executable, "-c", program], env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    with process:
        try:
            assert process.stdout.readline() == b"begun\n"
            process.send_signal(signal.SIGUSR1)
            assert process.wait(30) == 85
            assert b"cannot be interrupted: exiting" in process.stderr.read()
        finally:
            process.kill()


@pytest.mark.parametrize("number", SIGNALS)
def test_the_command_answers_from_its_start(main, tmp_path, monkeypatch, capfd, number):
    monkeypatch.setattr("megadit.train.entry.run", lambda *_, **__: send(number))
    assert main(["--run_dir", str(tmp_path / "run")]) == 85
    assert "preempted before the first step: nothing to save; start the same command again" in capfd.readouterr().err
    ended = json.loads((tmp_path / "run/exit.json").read_text())
    assert (ended["code"], ended["reason"], ended["step"]) == (85, "preempted", 0)


def test_a_dry_run_is_ended_as_any_command(main, monkeypatch):
    monkeypatch.setattr("megadit.train.entry.run", lambda *_, **__: send(signal.SIGINT))
    with pytest.raises(KeyboardInterrupt):
        main(["--dry_run"])


def asked(number=signal.SIGTERM):
    return PreemptedAtStart(number, time.time() - 5)


def test_sigterm_for_another_ranks_failure_is_no_preemption(tmp_path, monkeypatch, capfd):
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    run = RunDirectory(tmp_path)
    run.write_exit(1, "CUDA out of memory", 3)  # by the rank that failed, a moment ago
    assert exit_before_training(tmp_path, asked()) == 1
    assert json.loads((tmp_path / "exit.json").read_text())["reason"] == "CUDA out of memory"
    os.utime(tmp_path / "exit.json", (1, 1))  # of an earlier start
    assert exit_before_training(tmp_path, asked()) == 85
    assert json.loads((tmp_path / "exit.json").read_text())["code"] == 85
    # torchrun's ranks tell it why they end
    for rank in "01":
        (tmp_path / "attempt" / rank).mkdir(parents=True)
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(tmp_path / "attempt/0/error.json"))
    os.utime(tmp_path / "exit.json", (1, 1))
    assert exit_before_training(tmp_path, asked()) == 85
    os.utime(tmp_path / "exit.json", (1, 1))
    (tmp_path / "attempt/1/error.json").write_text("{}")
    assert exit_before_training(tmp_path, asked()) == 1
    assert exit_before_training(tmp_path, asked(signal.SIGUSR1)) == 85
    assert "another rank has ended" in capfd.readouterr().err


def test_only_the_first_rank_records_it(tmp_path, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    assert exit_before_training(tmp_path / "run", asked(signal.SIGUSR1)) == 85
    assert not (tmp_path / "run").exists()


def _rank(config, folder, number):
    from megadit.data import build_datasets
    from megadit.train import loop
    from megadit.train.prepare import TrainingJob
    from megadit.train.pretrain import pretrain

    signals = loop.preemption_signals

    @contextlib.contextmanager
    def with_signal():
        with signals() as stop_request:
            if os.environ["RANK"] == "0":
                send(number)
            yield stop_request

    loop.preemption_signals = with_signal
    config, ds_config = layout_of(config, int(os.environ["WORLD_SIZE"]))
    return pretrain(TrainingJob(config, ds_config, folder, "auto", *build_datasets(config.data)))


@pytest.mark.distributed
def test_a_signal_to_one_rank_as_the_training_begins_makes_no_step(tmp_path):
    folder = tmp_path / "run"
    assert run_ranks(2, _rank, small_config(train={"steps": 30}), folder, signal.SIGUSR1) == [85, 85]
    ended = json.loads((folder / "exit.json").read_text())
    assert (ended["code"], ended["reason"], ended["step"]) == (85, "preempted", 0)
    assert not (folder / "checkpoints/latest").exists()


def test_an_interrupt_is_a_handler():
    stop_request = StopRequest()
    stop_request(signal.SIGTERM)
    assert stop_request.received
