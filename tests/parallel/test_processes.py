"""The environment of a process under each way of starting."""

import pytest

from megadit.errors import UserError
from megadit.parallel.environment import first_slurm_host, prepare_environment


def test_plain_python_is_one_process():
    env: dict[str, str] = {}
    prepare_environment(env)
    assert (env["RANK"], env["WORLD_SIZE"], env["LOCAL_RANK"], env["MASTER_ADDR"]) == ("0", "1", "0", "127.0.0.1")
    assert 0 < int(env["MASTER_PORT"]) < 65536


def test_srun_variables_become_ranks():
    env = {
        "SLURM_PROCID": "5",
        "SLURM_LOCALID": "1",
        "SLURM_NTASKS": "8",
        "SLURM_JOB_ID": "4711",
        "SLURM_JOB_NODELIST": "gpu[03-04]",
    }
    prepare_environment(env)
    assert (env["RANK"], env["LOCAL_RANK"], env["WORLD_SIZE"]) == ("5", "1", "8")
    assert (env["MASTER_ADDR"], env["MASTER_PORT"]) == ("gpu03", "24711")


def test_a_step_meets_on_its_own_nodes_and_apart_from_the_others():
    job = {"SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_NTASKS": "2", "SLURM_JOB_ID": "4711"}
    job["SLURM_JOB_NODELIST"] = "gpu[03-06]"
    steps = [{**job, "SLURM_STEP_NODELIST": "gpu[05-06]", "SLURM_STEP_ID": number} for number in "01"]
    for step in steps:
        prepare_environment(step)
    assert [step["MASTER_ADDR"] for step in steps] == ["gpu05", "gpu05"]
    assert steps[0]["MASTER_PORT"] != steps[1]["MASTER_PORT"]


def test_launcher_variables_win_over_slurm():
    variables = {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1", "MASTER_ADDR": "h", "MASTER_PORT": "1"}
    env = {**variables, "SLURM_PROCID": "0", "SLURM_NTASKS": "4"}
    prepare_environment(env)
    assert {key: env[key] for key in variables} == variables


def test_a_single_task_inside_a_slurm_job_needs_no_host_list():
    env = {"SLURM_PROCID": "0", "SLURM_NTASKS": "1"}
    prepare_environment(env)
    assert env["WORLD_SIZE"] == "1"


def test_several_processes_without_a_port_are_refused():
    with pytest.raises(UserError, match="MASTER_PORT"):
        prepare_environment({"RANK": "0", "WORLD_SIZE": "2"})


@pytest.mark.parametrize(
    ("nodes", "host"),
    [("n1", "n1"), ("n1,n2", "n1"), ("gpu[03-06,9],x1", "gpu03"), ("a[1,4]-ib,b2", "a1-ib"), ("dgx-[007]", "dgx-007")],
)
def test_first_host_of_a_node_list(nodes, host):
    assert first_slurm_host(nodes) == host
