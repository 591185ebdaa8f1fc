"""The launcher that started this process, and its rank, from environment variables.

Every command runs under plain ``python``, ``torchrun``, the ``deepspeed`` launcher, ``srun`` and ``mpirun``, each of
which sets variables of its own. They are read, checked and, for torch and DeepSpeed, completed here, before either is
imported. This module needs only the standard library.
"""

from __future__ import annotations

import importlib.util
import os
import re
import socket
import zlib
from collections.abc import Iterable, Mapping, MutableMapping
from dataclasses import dataclass, replace
from pathlib import Path

from megadit.errors import UserError

LAUNCHERS = "torchrun, deepspeed, srun or mpirun"
_GROUP = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "LOCAL_SIZE", "MASTER_ADDR", "MASTER_PORT")
# All variables by which launchers describe a rank.
_RANK_NAMES = re.compile(
    rf"{'|'.join(_GROUP)}|MEGADIT_COPIES|(GROUP|ROLE|CROSS)_\w+|TORCHELASTIC_\w+|(OMPI|MV2)_COMM_WORLD_\w+|PMIX?_\w+|"
    r"MPI_LOCALN?RANK\w+|SLURM_(PROCID|LOCALID|NTASKS|NPROCS|STEP_?ID|STEP_NUM_TASKS)"
)
# Per MPI family: rank, world size, local rank, local world size.
_MPI = (
    ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE", ("OMPI_COMM_WORLD_LOCAL_RANK",), ("OMPI_COMM_WORLD_LOCAL_SIZE",)),
    ("MV2_COMM_WORLD_RANK", "MV2_COMM_WORLD_SIZE", ("MV2_COMM_WORLD_LOCAL_RANK",), ("MV2_COMM_WORLD_LOCAL_SIZE",)),
    ("PMI_RANK", "PMI_SIZE", ("MPI_LOCALRANKID", "PMI_LOCAL_RANK"), ("MPI_LOCALNRANKS", "PMI_LOCAL_SIZE")),
)
_JOB_NAMES = ("PMIX_NAMESPACE", "PMI_JOBID", "SLURM_JOB_ID", "PBS_JOBID", "LSB_JOBID")
_FIRST_RESERVED_STEP = 0xFFFFFFF0  # Slurm numbers the batch script, the interactive shell and its like from here on
_DEFAULT_PORT = 29500  # torchrun's


@dataclass(frozen=True)
class RankVariables:
    """The rank of this process, as its launcher describes it.

    ``launcher`` is python (a single process), variables (RANK and WORLD_SIZE set by an unknown one), torchrun,
    deepspeed, srun, mpirun, or copies (``run_local_ranks``). None stands for a value that the launcher does not set.
    """

    launcher: str = "python"
    rank: int = 0
    world_size: int = 1
    local_rank: int | None = None
    local_world_size: int | None = None
    master_addr: str | None = None
    master_port: int | None = None
    note: str | None = None  # to print: tasks of an allocation that this process leaves unused


def read_rank_variables(env: Mapping[str, str] | None = None) -> RankVariables:
    """The rank of this process, from the variables of its launcher.

    Raises:
        UserError: one of them is empty, no number, out of range, left over from another job, or contradicts another.
    """
    env = os.environ if env is None else env
    for name in _GROUP:
        if name in env and not env[name].strip():
            raise UserError(f"{name}: is set but empty; {_remedy(name)}")
    host, port = _address(env)
    torch_variables = {name: _number(env, name) for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")}
    if torch_variables["LOCAL_WORLD_SIZE"] is None and "CROSS_RANK" in env:
        torch_variables["LOCAL_WORLD_SIZE"] = _number(env, "LOCAL_SIZE")
    for variable, launcher in (
        ("TORCHELASTIC_RUN_ID", "torchrun"),
        ("CROSS_RANK", "deepspeed"),
        ("MEGADIT_COPIES", "copies"),
    ):
        if variable in env and torch_variables["RANK"] is not None:
            return replace(_from_group(torch_variables), launcher=launcher, master_addr=host, master_port=port)
    native = _from_mpi(env) or _from_slurm(env)
    if native is None:
        if "PMIX_RANK" in env and torch_variables["RANK"] is None:
            raise UserError(
                f"PMIX_RANK: {env['PMIX_RANK']} is set, but nothing says of how many ranks; set RANK, WORLD_SIZE, "
                "LOCAL_RANK, MASTER_ADDR and MASTER_PORT, or start by mpirun or srun"
            )
        ranks = _from_group(torch_variables)
        note = _unused_tasks(env) if ranks.launcher == "python" else None
        return replace(ranks, master_addr=host, master_port=port, note=note)
    names, ranks = native
    _check_pmix(env, ranks, names["RANK"])
    for name, value in torch_variables.items():
        native_value = getattr(ranks, name.lower())
        if value is not None and native_value is not None and value != native_value:
            raise UserError(
                f"{name}: {value}, but {names[name]} says {native_value}: one of them is of another job; "
                f"unset {name}, which {ranks.launcher} does not need"
            )
    return replace(ranks, master_addr=host, master_port=port)


def _from_group(torch_variables: Mapping[str, int | None]) -> RankVariables:
    """The rank by torch's own variables."""
    rank, world = torch_variables["RANK"], torch_variables["WORLD_SIZE"]
    local, local_world = torch_variables["LOCAL_RANK"], torch_variables["LOCAL_WORLD_SIZE"]
    if rank is None:
        for name, value in (("WORLD_SIZE", world), ("LOCAL_RANK", local), ("LOCAL_WORLD_SIZE", local_world)):
            if value is not None and (name == "LOCAL_RANK" or value != 1):
                raise UserError(
                    f"{name}: {value} is set but RANK is not, so no launcher set it for this process; unset {name} for "
                    f"a single process, or start the ranks by {LAUNCHERS}"
                )
        return RankVariables()
    if world is None:
        raise UserError(f"RANK: {rank} is set but WORLD_SIZE is not; {_remedy('RANK')}")
    _check_range("RANK", rank, "WORLD_SIZE", world)
    if local is not None:
        _check_range("LOCAL_RANK", local, "WORLD_SIZE", world)
        if local_world is not None:
            _check_range("LOCAL_RANK", local, "LOCAL_WORLD_SIZE", local_world)
    if local_world is not None and not 1 <= local_world <= world:
        raise UserError(
            f"LOCAL_WORLD_SIZE: {local_world} is not from 1 to WORLD_SIZE, {world}; {_remedy('LOCAL_WORLD_SIZE')}"
        )
    return RankVariables("variables", rank, world, local, local_world)


def _from_mpi(env: Mapping[str, str]) -> tuple[dict[str, str], RankVariables] | None:
    """The rank by the variables of an MPI launcher, with their names by those of torch; None without such variables."""
    for rank_name, size_name, local_names, local_size_names in _MPI:
        rank, size = _number(env, rank_name), _number(env, size_name)
        if rank is None and size is None:
            continue
        if rank is None or size is None:
            one, other = (rank_name, size_name) if size is None else (size_name, rank_name)
            raise UserError(f"{one}: {env[one]} is set but {other} is not; {_remedy(one)}")
        _check_range(rank_name, rank, size_name, size)
        local_name = next((name for name in local_names if name in env), local_names[0])
        local_size_name = next((name for name in local_size_names if name in env), local_size_names[0])
        local, local_size = _number(env, local_name), _number(env, local_size_name)
        if local is not None:
            _check_range(local_name, local, local_size_name, size if local_size is None else local_size)
        names = dict(zip(("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"),
                         (rank_name, size_name, local_name, local_size_name), strict=True))  # fmt: skip
        return names, RankVariables("mpirun", rank, size, local, local_size)
    return None


def _check_pmix(env: Mapping[str, str], ranks: RankVariables, name: str) -> None:
    """PMIX_RANK must agree under Open MPI and Slurm; Hydra ignores it, and may pass on that of an outer job."""
    rank = _number(env, "PMIX_RANK") if not name.startswith("PMI_") else None
    if rank is not None and rank != ranks.rank:
        raise UserError(
            f"PMIX_RANK: {rank}, but {name} says {ranks.rank}: one of them is of another job; unset PMIX_RANK, which "
            f"{ranks.launcher} does not need here"
        )


def _from_slurm(env: Mapping[str, str]) -> tuple[dict[str, str], RankVariables] | None:
    """The rank of a task that ``srun`` started; None in a batch script or a shell, which have the same variables."""
    rank, local = _number(env, "SLURM_PROCID"), _number(env, "SLURM_LOCALID")
    size_name = _size_name(env)
    size = _number(env, size_name)
    if rank is None or not _is_task(env, rank):
        return None
    if size is None:
        raise UserError(f"SLURM_PROCID: {rank} is set but {size_name} is not; {_remedy('SLURM_PROCID')}")
    _check_range("SLURM_PROCID", rank, size_name, size)
    if local is not None:
        _check_range("SLURM_LOCALID", local, size_name, size)
    names = {"RANK": "SLURM_PROCID", "WORLD_SIZE": size_name, "LOCAL_RANK": "SLURM_LOCALID"}
    return names, RankVariables("srun", rank, size, local)


def _size_name(env: Mapping[str, str]) -> str:
    return next(
        (name for name in ("SLURM_STEP_NUM_TASKS", "SLURM_NTASKS", "SLURM_NPROCS") if name in env), "SLURM_NTASKS"
    )


def _is_task(env: Mapping[str, str], rank: int) -> bool:
    """Whether this process is a task of Slurm's, not a batch script and not a command typed in the shell of a task."""
    step = env.get("SLURM_STEP_ID", env.get("SLURM_STEPID"))
    if step is None:
        return rank > 0  # in a batch script SLURM_PROCID is 0
    if not step.isdecimal() or int(step) >= _FIRST_RESERVED_STEP:
        return False
    return "SLURM_PTY_PORT" not in env or env.get("SLURM_TASK_PID") == str(os.getpid())


def _unused_tasks(env: Mapping[str, str]) -> str | None:
    size = _number(env, _size_name(env))
    if size is None:  # a job requested with --ntasks-per-node
        per_node, nodes = (_number(env, name) for name in ("SLURM_NTASKS_PER_NODE", "SLURM_JOB_NUM_NODES"))
        size = (per_node or 1) * (nodes or 1)
    if "SLURM_JOB_ID" not in env or size < 2:
        return None
    return f"this is one process in a Slurm allocation of {size} tasks; start the command by srun to use them all"


def _number(env: Mapping[str, str], name: str) -> int | None:
    """The variable as an integer from 0 on; None where it is not set."""
    text = env.get(name)
    if text is None:
        return None
    if not re.fullmatch(r"[0-9]{1,9}", text):
        problem = f"'{text}' is not an integer of 0 or more" if text.strip() else "is set but empty"
        raise UserError(f"{name}: {problem}; {_remedy(name)}")
    return int(text)


def _check_range(name: str, value: int, size_name: str, size: int) -> None:
    if size < 1:
        raise UserError(f"{size_name}: {size} is not at least 1; {_remedy(size_name)}")
    if value >= size:
        raise UserError(f"{name}: {value} is not below {size_name}, {size}; {_remedy(name)}")


def _remedy(name: str) -> str:
    return f"unset {name} for a single process, or start the ranks by {LAUNCHERS}"


def _address(env: Mapping[str, str]) -> tuple[str | None, int | None]:
    host, port = env.get("MASTER_ADDR"), env.get("MASTER_PORT")
    if host is not None and re.search(r"[\s/]", host):
        raise UserError(f"MASTER_ADDR: '{host}' is not a host name or address; give that of the host of rank 0")
    if port is not None and not (re.fullmatch(r"[0-9]{1,5}", port) and 1 <= int(port) <= 65535):
        raise UserError(f"MASTER_PORT: '{port}' is not a port from 1 to 65535; give a free one of the host of rank 0")
    return host, None if port is None else int(port)


def first_slurm_host(node_list: str) -> str:
    """The first host of a Slurm node list: ``gpu[03-06,9],x1`` -> ``gpu03``."""
    match = re.match(r"([^\[,]+)(?:\[([^\],-]+)[^\]]*\])?([^\[,]*)", node_list)
    if match is None:
        raise UserError(f"SLURM_JOB_NODELIST: '{node_list}' names no host; set MASTER_ADDR to the first host yourself")
    return match.group(1) + (match.group(2) or "") + match.group(3)


def free_port() -> int:
    """A TCP port of the loopback interface that nobody listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def prepare_environment(env: MutableMapping[str, str] | None = None) -> RankVariables:
    """Read the rank of this process and set RANK, LOCAL_RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT accordingly.

    Under ``srun`` and ``mpirun`` the address is that of the job's first host and the port is derived from the job's
    number, so that ranks agree on it and jobs that share a host do not collide. Plain ``python`` is a single process.

    Raises:
        UserError: as ``read_rank_variables``; or no variable gives the address of rank 0.
    """
    env = os.environ if env is None else env
    ranks = read_rank_variables(env)
    if ranks.world_size == 1:
        host, port = "127.0.0.1", ranks.master_port or free_port()
    elif ranks.launcher == "srun":
        host, port = _slurm_address(env)
    elif ranks.launcher == "mpirun":
        host, port = _mpi_address(env, ranks)
    elif ranks.master_port is None:
        raise UserError(f"MASTER_PORT: not set for {ranks.world_size} processes; start them by {LAUNCHERS}")
    else:
        host, port = "127.0.0.1", ranks.master_port
    local = ranks.local_rank
    if local is None:  # several hosts: the device is the rank modulo the number of devices
        local = ranks.rank if ranks.launcher in ("mpirun", "srun") else 0
    completed = replace(
        ranks, local_rank=local, master_addr=ranks.master_addr or host, master_port=ranks.master_port or port
    )
    variables = {"RANK": completed.rank, "WORLD_SIZE": completed.world_size, "LOCAL_RANK": completed.local_rank}
    variables |= {"LOCAL_WORLD_SIZE": completed.local_world_size} if completed.local_world_size else {}
    variables |= {"MASTER_ADDR": completed.master_addr, "MASTER_PORT": completed.master_port}  # type: ignore[dict-item]
    env.update({name: str(value) for name, value in variables.items()})
    return completed


def _slurm_address(env: Mapping[str, str]) -> tuple[str, int]:
    # A step may use only some of its job's nodes, and run beside other steps of the job.
    nodes = env.get("SLURM_STEP_NODELIST") or env.get("SLURM_JOB_NODELIST") or "127.0.0.1"
    number = (_number(env, "SLURM_JOB_ID") or 0) + 31 * (_number(env, "SLURM_STEP_ID") or 0)
    one_host = re.fullmatch(r"[^\[\],]+", nodes) is not None  # which may not resolve its own name
    return "127.0.0.1" if one_host else first_slurm_host(nodes), 20000 + number % 20000


def _mpi_address(env: Mapping[str, str], ranks: RankVariables) -> tuple[str, int]:
    job = next((env[name] for name in _JOB_NAMES if env.get(name)), None)
    port = _DEFAULT_PORT if job is None else 20000 + zlib.crc32(job.encode()) % 12000
    if ranks.master_addr is not None or ranks.local_world_size == ranks.world_size:
        return "127.0.0.1", port
    nodes = env.get("SLURM_JOB_NODELIST")
    if nodes:
        return first_slurm_host(nodes), port
    try:
        with open(env.get("PBS_NODEFILE", ""), encoding="utf-8") as file:
            host = file.readline().strip()
    except OSError:
        host = ""
    if not host:
        raise UserError(
            f"MASTER_ADDR: not set, and mpirun started {ranks.world_size} ranks on several hosts; give the host of "
            "rank 0 to all of them (mpirun -x MASTER_ADDR=HOST, or -genv MASTER_ADDR HOST)"
        )
    return host, port


def refuse_ranks(command: str, env: Mapping[str, str] | None = None) -> None:
    """Refuse a single-process command that a launcher started as several ranks: each would do all of the work.

    Raises:
        UserError: as ``read_rank_variables``; or this is one of several ranks.
    """
    ranks = read_rank_variables(env)
    if ranks.world_size > 1:
        raise UserError(
            f"{command}: works as one process, and this is rank {ranks.rank} of {ranks.world_size}"
            f"{'' if ranks.launcher == 'variables' else f' of {ranks.launcher}'}; start it once, by plain python"
            f"{' (RANK and WORLD_SIZE are set: unset them)' if ranks.launcher == 'variables' else ''}"
        )


def is_rank_variable(name: str) -> bool:
    """Whether launchers describe a rank by this variable."""
    return _RANK_NAMES.fullmatch(name) is not None


def without_rank_variables(env: Mapping[str, str], also: Iterable[str] = ()) -> dict[str, str]:
    """A copy of the environment without the variables of ranks and those in ``also``."""
    dropped = set(also)
    return {name: value for name, value in env.items() if not is_rank_variable(name) and name not in dropped}


def child_environment(env: Mapping[str, str]) -> dict[str, str]:
    """The environment of a subprocess of megadit: without variables of ranks, and with megadit in PYTHONPATH, so that
    it is importable from any folder, installed or not.
    """
    specs = filter(None, (importlib.util.find_spec(name) for name in ("megadit", "megadit_kernels")))
    paths = [str(Path(str(spec.origin)).resolve().parents[1]) for spec in specs]
    child = without_rank_variables(env)
    child["PYTHONPATH"] = os.pathsep.join([*paths, *filter(None, [env.get("PYTHONPATH")])])
    return child


def is_local_main() -> bool:
    """Whether this is the first rank of its host, which prints messages common to all (in a completed environment)."""
    return os.environ.get("LOCAL_RANK", "0") == "0"
