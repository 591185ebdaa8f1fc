"""Ranks read from the variables of every launcher, and variables that are refused."""

import os

import pytest

from megadit.errors import UserError
from megadit.parallel.environment import (
    is_rank_variable,
    prepare_environment,
    read_rank_variables,
    refuse_ranks,
    without_rank_variables,
)

TORCHRUN = {"TORCHELASTIC_RUN_ID": "none", "RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2"}
DEEPSPEED = {"CROSS_RANK": "1", "CROSS_SIZE": "2", "LOCAL_SIZE": "2", "RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1"}
OPENMPI = {
    "OMPI_COMM_WORLD_RANK": "1",
    "OMPI_COMM_WORLD_SIZE": "2",
    "OMPI_COMM_WORLD_LOCAL_RANK": "1",
    "OMPI_COMM_WORLD_LOCAL_SIZE": "2",
    "PMIX_RANK": "1",
    "PMIX_NAMESPACE": "1147469825",
}
HYDRA = {"PMI_RANK": "1", "PMI_SIZE": "2", "MPI_LOCALRANKID": "1", "MPI_LOCALNRANKS": "2", "PMI_FD": "6"}
# As Slurm 22.05 sets them; a batch script is told that it is task 0.
BATCH = {"SLURM_JOB_ID": "7", "SLURM_NTASKS": "4", "SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_TASK_PID": "1"}
STEP = BATCH | {"SLURM_STEP_ID": "0", "SLURM_STEP_NUM_TASKS": "4", "SLURM_STEP_NODELIST": "n[1-2]"}
TASK_3 = STEP | {"SLURM_PROCID": "3", "SLURM_LOCALID": "1"}
ADDRESS = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}


@pytest.mark.parametrize(
    ("env", "launcher", "numbers"),
    [
        ({}, "python", (0, 1, None)),
        (TORCHRUN, "torchrun", (3, 4, 1)),
        (DEEPSPEED, "deepspeed", (3, 4, 1)),
        (OPENMPI, "mpirun", (1, 2, 1)),
        (HYDRA, "mpirun", (1, 2, 1)),
        (HYDRA | {"PMIX_RANK": "0"}, "mpirun", (1, 2, 1)),  # typed in a shell that srun --mpi=pmix started
        ({"MV2_COMM_WORLD_RANK": "1", "MV2_COMM_WORLD_SIZE": "2"}, "mpirun", (1, 2, None)),
        (TASK_3, "srun", (3, 4, 1)),
        (TASK_3 | {"PMIX_RANK": "3"}, "srun", (3, 4, 1)),  # srun --mpi=pmix
        (TASK_3 | {"PMI_RANK": "3", "PMI_SIZE": "4"}, "mpirun", (3, 4, None)),  # srun --mpi=pmi2
        (STEP | {"SLURM_NTASKS": "8"}, "srun", (0, 4, 0)),  # a step of fewer tasks than its job has
        (TORCHRUN | STEP, "torchrun", (3, 4, 1)),  # srun starts torchrun, once a host
        (OPENMPI | STEP, "mpirun", (1, 2, 1)),  # mpirun starts its daemons by srun
        (TASK_3 | {"WORLD_SIZE": "4", **ADDRESS}, "srun", (3, 4, 1)),  # a usual line of job scripts
        (OPENMPI | {"RANK": "1", "WORLD_SIZE": "2"}, "mpirun", (1, 2, 1)),
        ({"RANK": "1", "WORLD_SIZE": "2"}, "variables", (1, 2, None)),
        ({"WORLD_SIZE": "1"}, "python", (0, 1, None)),
        (BATCH | {"RANK": "1", "WORLD_SIZE": "2"}, "variables", (1, 2, None)),
    ],
)
def test_the_rank_is_read_from_the_variables_of_each_launcher(env, launcher, numbers):
    ranks = read_rank_variables(env)
    assert (ranks.launcher, (ranks.rank, ranks.world_size, ranks.local_rank)) == (launcher, numbers)


@pytest.mark.parametrize(
    ("env", "message"),
    [
        ({"RANK": "abc", "WORLD_SIZE": "2"}, "RANK: 'abc' is not an integer of 0 or more"),
        ({"RANK": "-1", "WORLD_SIZE": "2"}, "RANK: '-1' is not an integer"),
        ({"RANK": "1.0", "WORLD_SIZE": "2"}, "RANK: '1.0' is not an integer"),
        ({"RANK": "1_0", "WORLD_SIZE": "20"}, "RANK: '1_0' is not an integer"),
        ({"RANK": "9" * 5000, "WORLD_SIZE": "2"}, "RANK: '999"),
        ({"RANK": "", "WORLD_SIZE": "2"}, "RANK: is set but empty"),
        ({"RANK": "0", "WORLD_SIZE": " "}, "WORLD_SIZE: is set but empty"),
        ({"LOCAL_RANK": ""}, "LOCAL_RANK: is set but empty"),
        ({"MASTER_ADDR": ""}, "MASTER_ADDR: is set but empty"),
        ({"MASTER_PORT": ""}, "MASTER_PORT: is set but empty"),
        ({"RANK": "4", "WORLD_SIZE": "4"}, "RANK: 4 is not below WORLD_SIZE, 4"),
        ({"RANK": "1", "WORLD_SIZE": "1"}, "RANK: 1 is not below WORLD_SIZE, 1"),
        ({"RANK": "0", "WORLD_SIZE": "0"}, "WORLD_SIZE: 0 is not at least 1"),
        ({"RANK": "0"}, "RANK: 0 is set but WORLD_SIZE is not"),
        ({"WORLD_SIZE": "2"}, "WORLD_SIZE: 2 is set but RANK is not"),
        ({"LOCAL_RANK": "0"}, "LOCAL_RANK: 0 is set but RANK is not"),
        ({"LOCAL_WORLD_SIZE": "4"}, "LOCAL_WORLD_SIZE: 4 is set but RANK is not"),
        (TASK_3 | {"PMIX_RANK": "2"}, "PMIX_RANK: 2, but SLURM_PROCID says 3"),
        (OPENMPI | {"PMIX_RANK": "0"}, "PMIX_RANK: 0, but OMPI_COMM_WORLD_RANK says 1"),
        (TORCHRUN | {"LOCAL_RANK": "2"}, "LOCAL_RANK: 2 is not below LOCAL_WORLD_SIZE, 2"),
        (DEEPSPEED | {"LOCAL_RANK": "2"}, "LOCAL_RANK: 2 is not below LOCAL_WORLD_SIZE, 2"),
        (TORCHRUN | {"LOCAL_WORLD_SIZE": "5"}, "LOCAL_WORLD_SIZE: 5 is not from 1 to WORLD_SIZE, 4"),
        ({"MASTER_PORT": "0"}, "MASTER_PORT: '0' is not a port from 1 to 65535"),
        ({"MASTER_PORT": "65536"}, "MASTER_PORT: '65536' is not a port"),
        ({"MASTER_PORT": "tcp"}, "MASTER_PORT: 'tcp' is not a port"),
        ({"MASTER_ADDR": "tcp://n1"}, "MASTER_ADDR: 'tcp://n1' is not a host name"),
        (OPENMPI | {"RANK": "0", "WORLD_SIZE": "2"}, "RANK: 0, but OMPI_COMM_WORLD_RANK says 1"),
        (OPENMPI | {"WORLD_SIZE": "8"}, "WORLD_SIZE: 8, but OMPI_COMM_WORLD_SIZE says 2"),
        (HYDRA | {"LOCAL_RANK": "0"}, "LOCAL_RANK: 0, but MPI_LOCALRANKID says 1"),
        (TASK_3 | {"RANK": "0", "WORLD_SIZE": "1"}, "RANK: 0, but SLURM_PROCID says 3"),
        (STEP | {"RANK": "0", "WORLD_SIZE": "8"}, "WORLD_SIZE: 8, but SLURM_STEP_NUM_TASKS says 4"),
        (OPENMPI | {"OMPI_COMM_WORLD_RANK": "2"}, "OMPI_COMM_WORLD_RANK: 2 is not below OMPI_COMM_WORLD_SIZE, 2"),
        ({"OMPI_COMM_WORLD_RANK": "0"}, "OMPI_COMM_WORLD_RANK: 0 is set but OMPI_COMM_WORLD_SIZE is not"),
        ({"PMI_SIZE": "2"}, "PMI_SIZE: 2 is set but PMI_RANK is not"),
        (HYDRA | {"PMI_RANK": ""}, "PMI_RANK: is set but empty"),
        ({"PMIX_RANK": "1"}, "PMIX_RANK: 1 is set, but nothing says of how many ranks"),
        (TASK_3 | {"SLURM_STEP_NUM_TASKS": "3"}, "SLURM_PROCID: 3 is not below SLURM_STEP_NUM_TASKS, 3"),
        ({"SLURM_PROCID": "0", "SLURM_NTASKS": "x"}, "SLURM_NTASKS: 'x' is not an integer"),
        ({"SLURM_PROCID": "", "SLURM_NTASKS": "2"}, "SLURM_PROCID: is set but empty"),
        ({"SLURM_PROCID": "1", "SLURM_STEP_ID": "0"}, "SLURM_PROCID: 1 is set but SLURM_NTASKS is not"),
        ({"SLURM_NTASKS": "", "SLURM_JOB_ID": "7"}, "SLURM_NTASKS: is set but empty"),
    ],
)
def test_impossible_ranks_are_refused_by_the_name_of_the_variable(env, message):
    with pytest.raises(UserError) as refused:
        read_rank_variables(env)
    text = str(refused.value)
    assert text.startswith(message) and "; " in text and "\n" not in text


@pytest.mark.parametrize(
    "env",
    [
        BATCH,
        {"SLURM_JOB_ID": "7", "SLURM_NTASKS": "4"},  # the shell of salloc
        BATCH | {"SLURM_STEP_ID": "4294967290", "SLURM_STEP_NUM_TASKS": "4"},  # salloc's interactive step
        {"SLURM_JOB_ID": "7", "SLURM_NTASKS_PER_NODE": "2", "SLURM_JOB_NUM_NODES": "2"},
        STEP | {"SLURM_PTY_PORT": "40000"},  # typed in the shell of srun --pty
    ],
)
def test_plain_python_in_an_allocation_of_several_tasks_is_one_process_and_says_so(env):
    ranks = read_rank_variables(env)
    assert (ranks.launcher, ranks.world_size) == ("python", 1)
    assert ranks.note is not None and "allocation of 4 tasks" in ranks.note and "srun" in ranks.note


def test_a_task_with_a_terminal_is_a_rank_and_an_allocation_of_one_task_says_nothing():
    direct = STEP | {"SLURM_PTY_PORT": "40000", "SLURM_TASK_PID": str(os.getpid())}
    assert read_rank_variables(direct).launcher == "srun"
    assert read_rank_variables({"SLURM_JOB_ID": "7", "SLURM_NTASKS": "1", "SLURM_PROCID": "0"}).note is None


def test_ranks_of_mpirun_agree_on_where_to_meet_and_jobs_do_not_share_it():
    names = ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_LOCAL_RANK", "PMIX_RANK")
    ranks = [OPENMPI | dict.fromkeys(names, rank) for rank in "01"]
    prepared = [prepare_environment(env) for env in ranks]
    assert {(each.master_addr, each.master_port) for each in prepared} == {("127.0.0.1", prepared[0].master_port)}
    assert [env["RANK"] for env in ranks] == ["0", "1"] and ranks[1]["LOCAL_WORLD_SIZE"] == "2"
    assert prepare_environment(dict(OPENMPI, PMIX_NAMESPACE="other")).master_port != prepared[0].master_port
    assert prepare_environment(dict(HYDRA)).master_port == 29500  # nothing names the job


def test_tasks_of_one_host_need_no_name_for_it():
    single_process = prepare_environment(TASK_3 | {"SLURM_STEP_NODELIST": "n1"})
    spread = prepare_environment(dict(TASK_3))
    assert (single_process.master_addr, spread.master_addr) == ("127.0.0.1", "n1")


def test_mpirun_on_several_hosts_is_told_the_first_or_refused(tmp_path):
    spread = OPENMPI | {"OMPI_COMM_WORLD_LOCAL_SIZE": "1", "OMPI_COMM_WORLD_LOCAL_RANK": "0"}
    with pytest.raises(UserError, match="MASTER_ADDR: not set, and mpirun started 2 ranks on several hosts"):
        prepare_environment(dict(spread))
    assert prepare_environment(spread | {"MASTER_ADDR": "n7"}).master_addr == "n7"
    assert prepare_environment(spread | {"SLURM_JOB_NODELIST": "gpu[03-04]"}).master_addr == "gpu03"
    (tmp_path / "nodes").write_text("a1\na1\nb2\n")
    assert prepare_environment(spread | {"PBS_NODEFILE": str(tmp_path / "nodes")}).master_addr == "a1"


@pytest.mark.parametrize("env", [{}, TORCHRUN | ADDRESS, OPENMPI, HYDRA, TASK_3, STEP, BATCH])
def test_a_completed_environment_reads_as_the_same_place(env):
    """The library reads it again, and so do the processes that this one starts."""
    first = prepare_environment(env := dict(env))
    again = prepare_environment(env)
    assert (again.rank, again.world_size, again.local_rank) == (first.rank, first.world_size, first.local_rank)
    assert (again.master_addr, again.master_port) == (first.master_addr, first.master_port)


def test_a_process_of_its_own_gets_nothing_of_a_launchers():
    everything = TORCHRUN | DEEPSPEED | OPENMPI | HYDRA | TASK_3 | ADDRESS | {"ROLE_RANK": "1", "HOME": "/h"}
    remaining = without_rank_variables(everything, also=["HOME"])
    assert read_rank_variables(remaining).launcher == "python" and remaining.keys() == {
        "SLURM_JOB_ID",
        "SLURM_TASK_PID",
        "SLURM_STEP_NODELIST",
    }
    assert not is_rank_variable("SLURM_JOB_ID") and not is_rank_variable("FRANK")


def test_a_command_of_one_process_refuses_to_be_several():
    with pytest.raises(
        UserError, match=r"tools/x.py: works as one process, and this is rank 1 of 2 of mpirun; start it"
    ):
        refuse_ranks("tools/x.py", OPENMPI)
    with pytest.raises(UserError, match="unset them"):
        refuse_ranks("tools/x.py", {"RANK": "0", "WORLD_SIZE": "2"})
    refuse_ranks("tools/x.py", BATCH)
    refuse_ranks("tools/x.py", {"RANK": "0", "WORLD_SIZE": "1"})
