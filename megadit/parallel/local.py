"""Several processes of one command on this machine, without a launcher."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import time
from collections.abc import Sequence

from megadit.errors import UserError
from megadit.parallel.environment import child_environment, free_port, read_ranks
from megadit.parallel.lifetime import die_with_launcher

_POLL_S = 0.1
_GRACE_S = 5.0  # for the others to end by themselves, and tell why


def ranks_started(size: int, option: str) -> int:
    """How many ranks a launcher started, where ``option`` asks for ``size``; their lives are tied to it.

    Raises:
        UserError: they are neither one nor ``size``.
    """
    ranks = read_ranks()
    if ranks.world_size not in (1, size):
        raise UserError(
            f"{option} {size}: {ranks.world_size} processes were started; start {size}, or none by a launcher"
        )
    die_with_launcher(ranks)
    return ranks.world_size


def run_copies(count: int, argv: Sequence[str]) -> int:
    """Run ``python ARGV`` as ``count`` ranks of one group and wait; the first exit code that is not that of success.

    When one ends with an error, the others are ended too. Only rank 0 keeps its standard output.
    """
    port = free_port()
    copies = []
    try:
        for rank in range(count):
            place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": count, "MASTER_PORT": port}
            env = child_environment(os.environ) | {"MEGADIT_COPIES": str(count), "MASTER_ADDR": "127.0.0.1"}
            env |= {name: str(value) for name, value in place.items()}
            out = None if rank == 0 else subprocess.DEVNULL
            copies.append(subprocess.Popen([sys.executable, *argv], env=env, stdout=out))
        return _first_code(copies)
    finally:
        for copy in copies:
            if copy.poll() is None:
                copy.kill()
            copy.wait()


def _first_code(copies: Sequence[subprocess.Popen[bytes]]) -> int:
    while True:
        codes = [copy.poll() for copy in copies]
        failed = [code for code in codes if code]
        if failed:
            end = time.monotonic() + _GRACE_S
            for copy in copies:
                with contextlib.suppress(subprocess.TimeoutExpired):
                    copy.wait(max(0.0, end - time.monotonic()))
            return failed[0] if failed[0] > 0 else 1
        if None not in codes:
            return 0
        time.sleep(_POLL_S)
