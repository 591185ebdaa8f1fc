"""launch/sweep.py by its real command: kills of every kind, joining, stopping, several ranks, exit codes."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import psutil
import pytest

from helpers.ranks import ROOT, free_port, run_command
from helpers.studies.tiny_study import tiny_study
from megadit.cli import sweep as sweep_command
from megadit.errors import UserError

SWEEP = [sys.executable, "launch/sweep.py"]
pytestmark = [pytest.mark.distributed, pytest.mark.timeout(600)]


def write(folder: Path, **keys) -> list[str]:
    """A study file; the options that name it and its directory."""
    tiny_study(folder, **keys)
    return ["--config", str(folder / "tiny.yaml"), "--study_dir", str(folder / "study")]


def sweep(*words: str, timeout: float = 240):
    return run_command([*SWEEP, *words], timeout=timeout)


def status(*options: str) -> dict:
    done = sweep("status", *options, "--json")
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def wait_for(condition, what: str, seconds: float = 120):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, f"waited in vain for {what}"
        time.sleep(0.1)


def workers_of(folder: Path) -> list[psutil.Process]:
    """The worker processes of a study, zombies aside."""
    workers = []
    for process in psutil.process_iter(["cmdline", "status"]):
        line = process.info["cmdline"] or []
        if "megadit.search.workers.worker" in line and str(folder) in line and process.info["status"] != "zombie":
            workers.append(process)
    return workers


class Run:
    """A `run` in the background, its output in a file."""

    def __init__(self, folder: Path, *options: str) -> None:
        self.folder, self.log = folder, folder / "run.log"
        path = os.pathsep.join([str(ROOT), str(ROOT / "kernels")])
        with open(self.log, "w") as log:
            self.process = subprocess.Popen(
                [*SWEEP, "run", *options], cwd=ROOT, env={**os.environ, "PYTHONPATH": path}, stdout=log, stderr=log
            )

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.process.kill()
        self.process.wait()
        for worker in workers_of(self.folder / "study"):
            worker.kill()

    def trains(self) -> bool:
        assert self.process.poll() is None, self.log.read_text()[-3000:]
        return any((self.folder / "study" / "trials").glob("*/metrics.jsonl"))


LONG = {"proxy": {"steps": 300}, "space": {"optim.lr": {"grid": [0.001, 0.002]}}, "seeds": [0, 1]}


@pytest.mark.slow
def test_killing_anything_loses_at_most_the_running_trials(tmp_path):
    options = write(tmp_path, **LONG)
    study = tmp_path / "study"
    with Run(tmp_path, *options, "--workers", "2") as run:
        wait_for(run.trains, "a trial")
        victim = workers_of(study)[0]
        victim.kill()
        wait_for(lambda: "a worker ended by SIGKILL and is restarted" in run.log.read_text(), "the restart")
        wait_for(lambda: len(workers_of(study)) == 2, "the new worker")
        run.process.kill()
        wait_for(lambda: not workers_of(study), "the workers to follow the run")
    before = status(*options)
    assert before["counts"]["planned"] == 4 and before["counts"]["failed"] == 0
    done = sweep("run", *options, "--workers", "2")
    assert done.returncode == 0, done.stderr[-3000:]
    after = status(*options)
    assert after["complete"] and Counter(t["outcome"] for t in after["trials"]) == {"complete": 4}
    ended_before = {trial["number"] for trial in before["trials"]}
    assert [trial for trial in after["trials"] if trial["number"] in ended_before] == before["trials"], (
        "what had ended was not run again"
    )
    assert done.stdout.endswith(f"  study      {study}\n")
    assert str(study / "report.html") in done.stdout and (study / "report.html").is_file()
    assert "best       optim.lr=" in done.stdout


@pytest.mark.slow
def test_ctrl_c_gives_trials_back_and_the_same_command_goes_on(tmp_path):
    options = write(tmp_path, **{**LONG, "proxy": {"steps": 3000}, "seeds": [0]})
    study = tmp_path / "study"
    with Run(tmp_path, *options) as run:
        wait_for(run.trains, "a trial")
        run.process.send_signal(signal.SIGINT)
        assert run.process.wait(120) == 85, run.log.read_text()[-3000:]
        assert "the same command goes on" in run.log.read_text() and f"  study      {study}" in run.log.read_text()
    assert not workers_of(study)
    assert status(*options)["counts"] | {"done": 0} == {
        "planned": 2, "waiting": 2, "running": 0, "complete": 0, "diverged": 0, "pruned": 0, "failed": 0, "done": 0,
    }  # fmt: skip
    shutil.rmtree(study / "trials")
    with Run(tmp_path, *options) as run:
        wait_for(run.trains, "a trial")
        stopped = sweep("stop", *options, "--now")
        assert stopped.returncode == 0 and f" in {study} end at their next logged step" in stopped.stdout
        assert run.process.wait(120) == 85, run.log.read_text()[-3000:]
    assert (study / "stop").is_file() and status(*options)["counts"]["waiting"] == 2
    assert sweep("worker", *options).returncode == 85, "a worker heeds the flag; only run takes it away"


@pytest.mark.slow
def test_two_ranks_of_torchrun_join_a_new_study_and_run_each_trial_together(tmp_path):
    options = write(tmp_path, storage="journal", space={"optim.lr": {"grid": [0.002, 1e30]}})
    launcher = ["torchrun", "--nproc_per_node", "2", "--master_port", str(free_port())]
    done = run_command([*launcher, "launch/sweep.py", "worker", *options], timeout=240)
    assert done.returncode == 0, done.stderr[-3000:]
    trials = status(*options)["trials"]
    assert [trial["outcome"] for trial in trials] == ["complete", "diverged"]
    layout = json.loads((Path(trials[0]["run_dir"]) / "environment.json").read_text())
    assert layout["ranks"] == 2
    alone = tmp_path / "alone"
    alone.mkdir()
    again = write(alone, space={"optim.lr": {"grid": [0.002, 1e30]}})
    joined = sweep("worker", *again)
    assert joined.returncode == 0 and str(alone / "study") in joined.stderr.splitlines()[-1]
    assert status(*again)["trials"][0]["scores"] == pytest.approx(trials[0]["scores"], rel=1e-5)


@pytest.mark.slow
def test_a_failed_trial_is_told_and_can_be_run_again(tmp_path):
    program = f"import json, pathlib; assert pathlib.Path({str(tmp_path / 'ready')!r}).exists(); print('{{\"x\": 1}}')"
    score = {"name": "x", "kind": "command", "key": "x", "command": [sys.executable, "-c", program]}
    options = write(tmp_path, space={"optim.lr": {"grid": [0.002]}}, scores=[score])
    done = sweep("run", *options)
    assert done.returncode == 1
    assert "error: 1 trial(s) failed, e.g. trial 0: scores.x:" in done.stderr and "--retry_failed" in done.stderr
    (tmp_path / "ready").touch()
    again = sweep("run", *options, "--retry_failed")
    assert again.returncode == 0, again.stderr
    assert status(*options)["trials"][0]["scores"] == {"x": 1.0}


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        (["run"], "--config: is missing"),
        (["run", "--config", "no-such-study"], "no-such-study"),
        (["status", "--study_dir", "{tmp}"], "study.yaml"),
        (["run", "{options}", "--workers", "0"], "--workers: 0 is not at least 1"),
        (["run", "{options}", "workers.gpus=99"], "workers.gpus: 1 worker with 99 each need 99 GPUs"),
        (["run", "{options}", "optim.lr=3"], "optim.lr: is set by space"),
        (["run", "{options}", "optim.learning=3"], "optim.learning"),
        (["stop", "{options}"], "holds no study yet"),
        (["report", "{options}"], "holds no study yet"),
    ],
)
def test_bad_input_is_one_sentence_and_leaves_nothing(tmp_path, words, complaint):
    options = write(tmp_path)
    command = [word for part in words for word in (options if part == "{options}" else [part])]
    with pytest.raises(UserError, match=re.escape(complaint)):
        sweep_command.main([word.replace("{tmp}", str(tmp_path)) for word in command])
    assert not (tmp_path / "study").exists()


def test_bad_input_exits_with_2(tmp_path):
    done = sweep("run", *write(tmp_path), "optim.lr=3")
    assert done.returncode == 2 and done.stderr.startswith("error: optim.lr: is set by space")


def test_overrides_may_stand_anywhere():
    args = sweep_command.parse(["run", "a.b=1", "--config", "x", "c.d=2", "--workers", "2", "e=3"])
    assert (args.overrides, args.workers) == (["a.b=1", "c.d=2", "e=3"], 2)
    for words in (["status", "a.b=1"], ["run", "--no_such_option"]):
        with pytest.raises(SystemExit):
            sweep_command.parse(words)
