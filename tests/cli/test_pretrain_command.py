"""The main path by its real command: every launcher, resume, preemption, and what a run directory holds."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest

from helpers.ranks import ROOT, free_port, run_command

RUN = ["launch/pretrain.py", "--config", "configs/quickstart/digits.yaml"]
SMALL = ["model.width=32", "model.depth=2", "train.steps=6", "train.log_every=1", "train.global_batch=16"]
SMALL += ["train.validation_images=20", "sample.count=4", "sample.steps=4", "train.tensorboard=false"]

pytestmark = [pytest.mark.distributed, pytest.mark.timeout(600)]  # whole commands, some after one another


def losses(run_dir):
    rows = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return [row["loss"] for row in rows], rows


def ends_well(command, **options):
    done = run_command(command, timeout=180, **options)
    assert done.returncode == 0, done.stderr[-3000:]
    return done


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """One process, the reference of the others."""
    run_dir = tmp_path_factory.mktemp("plain") / "run"
    done = ends_well([sys.executable, *RUN, *SMALL, "--run_dir", str(run_dir), "train.tensorboard=true"])
    return run_dir, done


def test_a_run_directory_is_complete(plain):
    run_dir, done = plain
    values, rows = losses(run_dir)
    assert [row["step"] for row in rows] == [1, 2, 3, 4, 5, 6]
    assert values[-1] < values[0]
    expected = {
        "loss_mse",
        "loss_bins",
        "grad_norm",
        "grad_norms",
        "lr",
        "lr_groups",
        "images_per_s",
        "data_wait_s",
        "step_s",
    }
    assert expected | {"mfu", "mem_gb", "samples_seen", "skipped_steps", "val_loss"} <= rows[-1].keys()
    assert rows[-1]["samples_seen"] == 96
    for name in ("config.yaml", "ds_config.json", "mup.json", "environment.json", "classes.json", "summary.json"):
        assert (run_dir / name).stat().st_size > 0, name
    assert (run_dir / "curves.png").read_bytes().startswith(b"\x89PNG")
    assert (run_dir / "samples/step-00000006.png").read_bytes().startswith(b"\x89PNG")
    assert json.loads((run_dir / "exit.json").read_text())["code"] == 0
    assert (run_dir / "checkpoints/latest").read_text() == "step-00000006\n"
    assert "step 6/6" in done.stderr
    assert str(run_dir / "samples/step-00000006.png") in done.stdout


def test_tensorboard_shows_the_same_numbers_and_the_grid(plain):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run_dir, _ = plain
    events = EventAccumulator(str(run_dir / "tensorboard"))
    events.Reload()
    shown = [(event.step, event.value) for event in events.Scalars("train/loss")]
    values, _ = losses(run_dir)
    assert [step for step, _ in shown[:6]] == [1, 2, 3, 4, 5, 6]
    assert [value for _, value in shown[:6]] == pytest.approx(values[:6])
    assert {"train/grad_norm", "grad_norm/hidden", "lr/hidden", "lr/input", "val/loss"} <= set(events.Tags()["scalars"])
    assert events.Images("samples")[0].step == 6


def test_a_complete_run_says_so_and_a_longer_one_goes_on(plain):
    run_dir, _ = plain
    before, _ = losses(run_dir)
    again = ends_well([sys.executable, *RUN, *SMALL, "--run_dir", str(run_dir)])
    assert "already trained to step 6 of 6" in again.stderr
    assert losses(run_dir)[0] == before
    assert json.loads((run_dir / "exit.json").read_text())["code"] == 0
    longer = ends_well([sys.executable, *RUN, *SMALL, "train.steps=8", "--run_dir", str(run_dir)])
    assert "resuming from" in longer.stderr
    assert "train.steps 6 → 8" in longer.stderr
    after, rows = losses(run_dir)
    assert [row["step"] for row in rows] == [1, 2, 3, 4, 5, 6, 7, 8]
    assert after[:6] == before


def same_curve(plain, run_dir):
    expected, _ = losses(plain[0])
    values, _ = losses(run_dir)
    assert values[:6] == pytest.approx(expected[:6], rel=1e-5)


def test_torchrun_trains_the_same_model(plain, tmp_path):
    launcher = ["torchrun", "--nproc_per_node", "2", "--master_port", str(free_port())]
    ends_well([*launcher, *RUN, *SMALL, "--run_dir", str(tmp_path / "run"), "parallel.zero_stage=2"])
    same_curve(plain, tmp_path / "run")


def test_the_deepspeed_launcher_trains_the_same_model_with_a_ds_config(plain, tmp_path):
    ds = {"train_batch_size": 16, "train_micro_batch_size_per_gpu": 4, "zero_optimization": {"stage": 3}}
    (tmp_path / "ds.json").write_text(json.dumps({**ds, "gradient_clipping": "auto"}))
    launcher = ["deepspeed", "--num_gpus", "2", "--master_port", str(free_port())]
    ends_well([*launcher, *RUN, "--deepspeed", "--ds_config", str(tmp_path / "ds.json"), *SMALL, "--run_dir",
               str(tmp_path / "run")])  # fmt: skip
    written = json.loads((tmp_path / "run/ds_config.json").read_text())
    assert written["gradient_accumulation_steps"] == 2
    assert written["gradient_clipping"] == 0.0
    same_curve(plain, tmp_path / "run")


def test_the_environment_of_srun_is_enough(plain, tmp_path):
    """Two tasks with nothing but Slurm's variables, as ``srun python`` starts them."""
    command = [sys.executable, *RUN, *SMALL, "--run_dir", str(tmp_path / "run")]
    common = {"SLURM_NTASKS": "2", "SLURM_STEP_ID": "0", "SLURM_JOB_ID": str(free_port())}
    common["SLURM_JOB_NODELIST"] = "localhost"
    path = os.pathsep.join([str(ROOT), str(ROOT / "kernels")])
    tasks = []
    for rank in ("0", "1"):
        env = {**os.environ, **common, "SLURM_PROCID": rank, "SLURM_LOCALID": rank, "PYTHONPATH": path}
        tasks.append(subprocess.Popen(command, env=env, cwd=ROOT, stderr=subprocess.PIPE, text=True))
    try:
        for task in tasks:
            _, stderr = task.communicate(timeout=180)
            assert task.returncode == 0, stderr[-3000:]
    finally:
        for task in tasks:
            task.kill()
    same_curve(plain, tmp_path / "run")


def test_preemption_saves_and_the_same_command_goes_on(tmp_path):
    run_dir = tmp_path / "run"
    command = [sys.executable, *RUN, *SMALL, "train.steps=4000", "--run_dir", str(run_dir)]
    path = os.pathsep.join([str(ROOT), str(ROOT / "kernels")])
    with open(tmp_path / "log", "w") as log:
        process = subprocess.Popen(command, cwd=ROOT, env={**os.environ, "PYTHONPATH": path}, stdout=log, stderr=log)
        try:
            deadline = time.monotonic() + 120
            while not (run_dir / "metrics.jsonl").is_file() or len(losses(run_dir)[0]) < 3:
                assert process.poll() is None and time.monotonic() < deadline, (tmp_path / "log").read_text()[-2000:]
                time.sleep(0.05)
            process.send_signal(signal.SIGUSR1)
            assert process.wait(60) == 85
        finally:
            process.kill()
    ended = json.loads((run_dir / "exit.json").read_text())
    assert (ended["code"], ended["reason"]) == (85, "preempted")
    stopped = ended["step"]
    resumed = ends_well([*command[:-2], f"train.steps={stopped + 2}", "--run_dir", str(run_dir)])
    assert f"at step {stopped}" in resumed.stderr
    assert [row["step"] for row in losses(run_dir)[1]] == list(range(1, stopped + 3))


def test_a_diverged_run_fails_with_a_reason_and_saves_nothing(tmp_path):
    run_dir = tmp_path / "run"
    command = [sys.executable, *RUN, *SMALL, "optim.lr=1e30", "--run_dir", str(run_dir)]
    done = run_command(command)
    assert done.returncode == 1
    assert "error: the loss at step 2 is " in done.stderr and "train.skip_samples=" in done.stderr
    assert json.loads((run_dir / "exit.json").read_text())["reason"].startswith("diverged")
    assert not (run_dir / "checkpoints/latest").exists()
