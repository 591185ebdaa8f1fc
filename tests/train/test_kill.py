"""Killed at any moment, a run has a checkpoint that loads, and goes on as if nothing had been."""

import json
import os
import random
import shutil
import signal
import threading
import time
from pathlib import Path

import pytest
import torch

from helpers.models.no_model import ALONE
from helpers.ranks import RankError, run_ranks
from helpers.training import layout_of, small_config
from megadit.checkpoint import fragment_files
from megadit.checkpoint import write as checkpoint_write
from megadit.checkpoint.find import open_checkpoint
from megadit.checkpoint.format import Position
from megadit.checkpoint.inspect import verify
from megadit.checkpoint.write import save_checkpoint
from megadit.engine.deepspeed.partitions import Fragment


class OneWeight:
    """Partitions of a model with a single parameter, whose values tell the step and the course of the run."""

    stage, replicated = 0, True

    def __init__(self, value):
        self.state = torch.full((3, 500), float(value))

    def fragments_to_save(self):
        return [Fragment("w", (500,), 0, 500, self.state[0], self.state[0], 0)]

    def moments(self, fragment):
        return {"exp_avg": self.state[1], "exp_avg_sq": self.state[2]}

    def adam_step(self):
        return 1

    def loss_scale_state(self):
        return {}


def save(run_dir, step, value=None, keep_last=2):
    config = small_config(train={"keep_last": keep_last})
    parts = OneWeight(step if value is None else value)
    save_checkpoint(run_dir, parts, config, Position(step, 16 * step), [], ALONE)


def die_before_operation(number):
    """Kill this process by SIGKILL before the ``number``-th thing that it does to the disk from now on."""
    done = 0

    def counted(action):
        def wrapper(*args, **kwargs):
            nonlocal done
            done += 1
            if done == number:
                os.kill(os.getpid(), signal.SIGKILL)
            return action(*args, **kwargs)

        return wrapper

    for owner, name in (
        *((os, name) for name in ("fsync", "replace", "unlink", "mkdir", "rmdir")),
        (shutil, "rmtree"),
        (fragment_files, "_write_all"),
    ):
        setattr(owner, name, counted(getattr(owner, name)))


def die_in(name):
    """Kill this process as soon as checkpoint_write has come to the end of that function."""
    action = getattr(checkpoint_write, name)

    def last(*args, **kwargs):
        action(*args, **kwargs)
        os.kill(os.getpid(), signal.SIGKILL)

    setattr(checkpoint_write, name, last)


def survives(number, action):
    """Do it in a fork that dies before its ``number``-th operation; whether there were that many."""
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            die_before_operation(number)
            action()
            code = 0
        finally:
            os._exit(code)
    _, status = os.waitpid(pid, 0)
    code = os.waitstatus_to_exitcode(status)
    assert code in (0, -signal.SIGKILL)
    return code == 0


# What is there before (step, value), and what the killed save writes; a value other than the step is another course.
SCENES = {
    "first": ([], (10, 10), 2),
    "next": ([(10, 10)], (20, 20), 2),
    "only one kept": ([(10, 10)], (20, 20), 1),
    "many dropped": ([(10, 10), (15, 15), (20, 20)], (25, 25), 1),
    "taken back": ([(10, 10), (20, 20), (30, 30)], (20, 21), 2),
}


@pytest.mark.parametrize("scene", SCENES)
def test_a_save_killed_before_any_of_its_operations_leaves_one_that_loads(tmp_path, scene, capsys):
    before, (step, value), keep_last = SCENES[scene]
    (tmp_path / "before").mkdir()
    for old_step, old_value in before:
        save(tmp_path / "before", old_step, old_value, keep_last=5)
    if scene == "taken back":
        (tmp_path / "before/checkpoints/latest").write_text("step-00000010\n")
    for number in range(1, 100):
        run_dir = shutil.copytree(tmp_path / "before", tmp_path / str(number))
        done = survives(number, lambda run_dir=run_dir: save(run_dir, step, value, keep_last))
        opened = open_checkpoint(run_dir)
        old = (None, None) if not before else before[0] if scene == "taken back" else before[-1]
        allowed = [(step, value)] if done else [old, (step, value)]
        got = (None, None)
        if opened is not None:
            assert verify(opened.stored) == []
            values = torch.empty(500)
            with opened.stored.reader() as reader:
                reader.read_into(values, "weights", "w")
            assert values.unique().numel() == 1
            got = (opened.stored.position.step, int(values[0]))
        assert got in allowed, number
        save(run_dir, 40, keep_last=1)  # a run that goes on leaves nothing of all this behind
        assert sorted(path.name for path in (run_dir / "checkpoints").iterdir()) == ["latest", "step-00000040"]
        if done:
            break
    assert done and number > 10, "the operations were not seen"
    assert scene == "first" or capsys.readouterr().err == ""  # only a first save may lack its latest


def small_tmpfs(folder, kilobytes):
    """Mount a file system of that size, or say why not."""
    folder.mkdir()
    import subprocess

    done = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={kilobytes}k", "none", str(folder)], capture_output=True, text=True
    )
    if done.returncode:
        pytest.skip(f"NOT TESTED HERE: a full disk needs the right to mount a tmpfs ({done.stderr.strip()})")


@pytest.mark.parametrize("kilobytes", [20, 24, 28, 32, 36])
def test_a_full_disk_costs_nothing_that_was_saved(tmp_path, kilobytes):
    from megadit.errors import UserError

    small_tmpfs(tmp_path / "disk", kilobytes)
    try:
        run_dir = tmp_path / "disk/run"
        save(run_dir, 10)  # 6 kB of tensors, index and state, in pages of 4 kB
        with pytest.raises(UserError, match="cannot be written .*No space left on device.*free space"):
            for step in range(20, 200, 10):
                save(run_dir, step, keep_last=99)
        opened = open_checkpoint(run_dir)
        assert verify(opened.stored) == []
        assert opened.stored.path.name == (run_dir / "checkpoints/latest").read_text().strip()
        assert not [path for path in (run_dir / "checkpoints").iterdir() if path.name.startswith(".step")]
    finally:
        os.system(f"umount {tmp_path / 'disk'}")


def life(config, folder, plan=None):
    """A start of the run on one rank; ``plan`` is (rank, step, operation, function or delay) of its death, or None."""
    from megadit.data import build_datasets
    from megadit.engine.engine import TrainingEngine
    from megadit.engine.loss import TrainingLoss
    from megadit.train.prepare import TrainingJob
    from megadit.train.pretrain import pretrain

    rank = int(os.environ["RANK"])
    prepare, train_batch = TrainingLoss.prepare, TrainingEngine.train_batch
    steps = []

    def noted(loss, batch):
        with open(Path(folder) / f"samples-{rank}.jsonl", "a") as file:
            file.write(json.dumps([steps[-1], batch.numbers.tolist()]) + "\n")
        return prepare(loss, batch)

    def doomed(engine, step, *rest):
        steps.append(step)
        if plan is not None and plan[0] == rank and step == plan[1]:
            if isinstance(plan[2], int):
                die_before_operation(plan[2])  # inside the next save, or the one after
            elif isinstance(plan[2], str):
                die_in(plan[2])
            else:
                threading.Thread(target=lambda: (time.sleep(plan[2]), os.kill(os.getpid(), signal.SIGKILL))).start()
        return train_batch(engine, step, *rest)

    TrainingLoss.prepare, TrainingEngine.train_batch = noted, doomed
    config, ds_config = layout_of(config, int(os.environ["WORLD_SIZE"]))
    return pretrain(TrainingJob(config, ds_config, Path(folder), "auto", *build_datasets(config.data)))


def killed(config, folder, plan, limit=100):
    """Whether the start died of its plan; it may have been complete before."""
    try:
        assert run_ranks(2, life, config, str(folder), plan, timeout=limit) == [0, 0]
    except RankError as error:
        assert "exit status -9" in str(error)
        return True
    except Exception as error:  # the other rank may be the first to tell, of a connection that is gone
        assert any(word in str(error) for word in ("onnection", "closed", "reset", "peer")), repr(error)
        return True
    return False


def assert_no_seam(folder, straight, config):
    """The metrics are those of the run that was left alone, and each sample was drawn once for the steps that count."""
    rows, expected = (
        [json.loads(line) for line in (f / "metrics.jsonl").read_text().splitlines()] for f in (folder, straight)
    )
    assert [row["step"] for row in rows] == list(range(1, config.train.steps + 1))
    for key in ("loss", "grad_norm", "samples_seen", "lr"):
        assert [row[key] for row in rows] == [row[key] for row in expected], key
    drawn: dict[int, dict[int, list[int]]] = {}
    for rank in (0, 1):
        seen: dict[int, list[int]] = {}
        for line in (folder / f"samples-{rank}.jsonl").read_text().splitlines():
            step, numbers = json.loads(line)
            seen[step] = numbers  # what an earlier start drew for this step did not count
        for step, numbers in seen.items():
            drawn.setdefault(step, {})[rank] = numbers
    batch = config.train.global_batch
    for step in range(config.train.steps):
        numbers = sorted(drawn[step][0] + drawn[step][1])
        assert numbers == list(range(step * batch, (step + 1) * batch)), step


# One micro batch a step, so that a line of samples-RANK.jsonl is all that the rank draws for a step.
KILLED = {"model": {"width": 16, "depth": 1}, "parallel": {"zero_stage": 2}, "sample": {"count": 1, "steps": 1}}


@pytest.mark.distributed
def test_ranks_killed_inside_a_save_leave_no_seam(tmp_path):
    config = small_config(**KILLED, train={"steps": 9, "checkpoint_every": 3})
    assert not killed(config, tmp_path / "straight", None)
    # Rank 1 in the second save, when its data is written; then rank 0 there, before the folder gets its last name.
    assert killed(config, tmp_path / "run", (1, 5, "write_fragments"))
    assert open_checkpoint(tmp_path / "run").stored.position.step == 3
    assert killed(config, tmp_path / "run", (0, 5, "write_index"))
    assert open_checkpoint(tmp_path / "run").stored.position.step == 3
    assert not killed(config, tmp_path / "run", None)
    assert_no_seam(tmp_path / "run", tmp_path / "straight", config)


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.timeout(1500)
def test_fifty_kills_at_random_moments_leave_no_seam(tmp_path):
    config = small_config(**KILLED, train={"steps": 600, "checkpoint_every": 5, "validate_every": 10**6})
    chance, folder, kills = random.Random(7), tmp_path / "run", 0
    while kills < 50:
        opened = open_checkpoint(folder)
        first = 0 if opened is None else opened.stored.position.step
        if opened is not None:
            assert verify(opened.stored) == []
        inside = chance.random() < 0.5
        step = first + chance.randrange(1, 14)
        how = chance.randrange(1, 90) if inside else chance.random() * 0.05
        kills += killed(config, folder, (chance.randrange(2), step, how))
        rows = (folder / "metrics.jsonl").read_text().splitlines()
        assert rows, "the run makes no progress"
    assert not killed(config, folder, None, limit=600)
    assert not killed(config, tmp_path / "straight", None, limit=600)
    assert_no_seam(folder, tmp_path / "straight", config)
