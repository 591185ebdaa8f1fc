"""Other owners of a folder: real processes of plain Python, and files as owners elsewhere would have left them."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from megadit.files.owner_file import FILE, Owner, OwnerFile, process_start_time

ROOT = Path(__file__).resolve().parents[2]
_OWN = """
import sys
from pathlib import Path
from megadit.files.ownership import acquire_folder
ownership = acquire_folder(Path(sys.argv[1]), "training", "--run_dir")
print("owned", flush=True)
sys.stdin.readline()
ownership.check()
print("still", flush=True)
"""


@contextlib.contextmanager
def living_owner(folder: Path) -> Iterator[subprocess.Popen[str]]:
    """A process that owns ``folder`` until it is killed, or a line is written to it, which has it check first."""
    process = subprocess.Popen(
        [sys.executable, "-c", _OWN, str(folder)],
        cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    try:
        assert process.stdout is not None and process.stderr is not None
        assert process.stdout.readline() == "owned\n", process.stderr.read()
        yield process
    finally:
        process.kill()
        process.communicate()


def killed_owner(folder: Path) -> subprocess.Popen[str]:
    """A process that owned ``folder`` and was killed by SIGKILL."""
    with living_owner(folder) as process:
        process.kill()
    return process


def leave_owner(folder: Path, file: str = FILE, **facts: Any) -> Owner:
    """Leave in ``folder`` the file of an owner that is this process but for ``facts``."""
    folder.mkdir(parents=True, exist_ok=True)
    owner = dataclasses.replace(Owner.of_this_process(folder, "training", 0.05), **facts)
    assert OwnerFile(folder / file).create(owner)
    return owner


def parent() -> dict[str, Any]:
    """The facts of an owner that lives on this host without being started for it: this process's parent."""
    return {"pid": os.getppid(), "process_start": process_start_time(os.getppid())}


def elsewhere(**facts: Any) -> dict[str, Any]:
    """The facts of an owner on another host."""
    return {"host": "gpu07", "view": "gpu07 another-kernel pid:[1]", "pid": 4242, **facts}


@contextlib.contextmanager
def beating(folder: Path, owner: Owner) -> Iterator[None]:
    """Advance the counter of ``owner`` in the block, as its own process would."""
    stop, count = threading.Event(), 0

    def beat() -> None:
        nonlocal count
        while not stop.wait(owner.beat_s):
            count += 1
            with contextlib.suppress(OSError):
                OwnerFile(folder / FILE).advance(owner, count)

    thread = threading.Thread(target=beat, daemon=True)
    thread.start()
    time.sleep(2 * owner.beat_s)
    try:
        yield
    finally:
        stop.set()
        thread.join()
