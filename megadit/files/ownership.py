"""One owner per output folder: a lock file that works on shared file systems, where ``flock`` may not.

``owner.json`` lies in the folder as long as a process writes there. It is made by a hard link, which only one process
can make, and a thread of the owner advances a counter in it. Whether another owner lives is judged

- by Slurm: the same job with a higher restart count was requeued, so its earlier start has ended;
- by its process, within one kernel start and one process-id namespace;
- else by the counter: one that stands still for a while, by the reader's own clock, belongs to an owner that is gone.

Clocks of different hosts are never compared. A process that takes over replaces the file in one act, so that an owner
that was only stopped finds another's token there, and must write nothing more (``Ownership.check``).
"""

from __future__ import annotations

import contextlib
import errno
import math
import os
import threading
import time
from pathlib import Path
from types import TracebackType

from megadit.errors import EXIT_FAILURE, UserError, say
from megadit.files.owner_file import BEAT_S, FILE, Owner, OwnerFile
from megadit.files.paths import check_folder

TIMEOUT = "MEGADIT_OWNER_TIMEOUT_S"  # environment variable: how long a silent owner of another host is watched
_TIMEOUT_S = 60.0
_MISSED_BEATS = 3  # at least so many, however short the time-out
_LONGEST_S = 600.0  # that an owner's own interval can ask for
_POLL_S = 0.1
_MOST_VANISHED = 50  # a file that one cannot make and cannot read so often is a dangling link, or another such thing


class FolderInUse(UserError):
    """Another process that lives owns the folder."""


class OwnershipLost(UserError):
    """Another process took the folder over, so this one must write nothing more there (exit code 1)."""

    code = EXIT_FAILURE


class OwnershipRequest:
    """A request for the lock of ``folder``, which is made; ``try_acquire`` is called until it gives the ``Ownership``.

    purpose: what is done there, in a word or two.  key: the option that names the folder.  remedy: what else to do
    than to wait, where another owns it.  beat_s: between two advances of the owner's counter; 0: none.  name: of one
    entry of the folder, which is then all that is owned: its owner's file lies beside it.
    """

    def __init__(
        self,
        folder: Path,
        purpose: str,
        key: str = "--run_dir",
        remedy: str = "",
        *,
        beat_s: float = BEAT_S,
        name: str = "",
    ) -> None:
        self.folder, self.key = folder, key
        self._display = folder / name
        self._purpose, self.beat_s = purpose, beat_s
        self._remedy = remedy or f"wait for it, end it, or choose another {key}"
        self._timeout_s = _timeout_s()
        self._created: list[Path] = []
        self._file = OwnerFile(folder / (f".{name}.{FILE}" if name else FILE))
        self._owner: Owner | None = None
        self._watched_text, self._watched_since = "", 0.0
        self._announced = False

    def try_acquire(self, patience_s: float = math.inf) -> Ownership | None:
        """Own the folder; None where a silent owner must be watched for longer than ``patience_s``.

        Raises:
            FolderInUse: another process owns it and lives.
            UserError: the folder cannot be made or written.
        """
        deadline = time.monotonic() + patience_s
        try:
            own_record, vanished = self._begin(), 0
            while True:
                text = self._file.read()
                if text is None:
                    if self._file.create(own_record):
                        return Ownership(self, own_record, self._file, self._created)
                    vanished += 1
                    if vanished > _MOST_VANISHED:
                        raise OSError(errno.EEXIST, f"{FILE} is there and cannot be read")
                elif (reason := self._why_gone(text, own_record)) is not None:
                    if self._take_over(text, own_record):
                        return self._taken(text, own_record, reason)
                elif time.monotonic() >= deadline:
                    return None
                time.sleep(_POLL_S)
        except OSError as error:
            self.abandon()
            reason = error.strerror or str(error)
            raise UserError(
                f"{self.key}: '{self.folder}' cannot be written ({reason}); choose a writable one"
            ) from error
        except BaseException:
            self.abandon()
            raise

    def refuse_living(self) -> None:
        """Only look: raises FolderInUse if another process owns the folder and is seen to live."""
        with contextlib.suppress(OSError):
            text = self._file.read()
            if text is not None:
                self._announced = True
                self._why_gone(text, Owner.of_this_process(self.folder, self._purpose, self.beat_s))

    def abandon(self) -> None:
        """Remove the folders that were made for it and are empty."""
        _remove_empty(self._created)
        self._created.clear()

    def _begin(self) -> Owner:
        if self._owner is None:
            check_folder(self.folder, self.key)
            missing = [path for path in (self.folder, *self.folder.parents) if not path.exists()]
            self.folder.mkdir(parents=True, exist_ok=True)
            self._created = missing[::-1]
            self._owner = Owner.of_this_process(self.folder, self._purpose, self.beat_s)
        return self._owner

    def _why_gone(self, text: str, own_record: Owner) -> str | None:
        """Why the owner that ``text`` names has ended; None while that is not known. Raises FolderInUse if it lives."""
        owner = Owner.parse(text)
        if owner is not None:
            if owner.is_here():
                return ""  # of an earlier use in this process
            if owner.was_requeued_as(own_record):
                return f"whose Slurm job {owner.slurm_job} was started again"
            state = owner.state()
            if state == "gone":
                return "which has ended"
            if state == "running" and owner.folder == own_record.folder:
                raise self._occupied(owner)
        return self._watched(text, owner)

    def _watched(self, text: str, owner: Owner | None) -> str | None:
        now = time.monotonic()
        limit = (
            self._timeout_s if owner is None else max(self._timeout_s, min(_MISSED_BEATS * owner.beat_s, _LONGEST_S))
        )
        if text != self._watched_text:
            before = Owner.parse(self._watched_text)
            if owner is not None and before is not None and owner.token == before.token:
                raise self._occupied(owner)
            self._watched_text, self._watched_since = text, now
            if not self._announced:
                self._announced = True
                occupant = f"{owner.describe()} is still at work in" if owner is not None else "somebody is at work in"
                say(f"note: waiting up to {limit:g} s to see whether {occupant} '{self._display}'")
        return f"silent for {limit:g} s" if now - self._watched_since > limit else None

    def _occupied(self, owner: Owner) -> FolderInUse:
        return FolderInUse(f"{self.key}: '{self._display}' is in use by {owner.describe()}; {self._remedy}")

    def _take_over(self, text: str, own_record: Owner) -> bool:
        """Replace the file if it still is as ``text``. Those who try are kept apart by a lock file like this one."""
        guard = OwnershipRequest(self.folder, "takeover", self.key, beat_s=0)
        guard._file, guard._owner = OwnerFile(self._file.path.with_name(f"{self._file.path.name}.takeover")), own_record
        guard._announced = True
        try:
            held = guard.try_acquire(self._timeout_s + 1)
        except FolderInUse:
            return False  # somebody else is just taking it over
        if held is None:
            return False
        try:
            if self._file.read() != text:
                return False
            self._file.replace(own_record)
        finally:
            held.release()
        return True

    def _taken(self, text: str, own_record: Owner, reason: str) -> Ownership:
        owner = Owner.parse(text)
        if reason:
            previous = owner.describe() if owner is not None else f"an owner that its {FILE} does not tell"
            say(f"note: '{self._display}' is taken over from {previous}, {reason}")
        return Ownership(self, own_record, self._file, self._created, sure=not reason.startswith("silent"))


class Ownership:
    """A folder that is this process's until ``release``, or until another process takes it over.

    sure: whether the owner before has certainly ended, so that what it left unfinished is nobody's.
    """

    def __init__(
        self, request: OwnershipRequest, owner: Owner, file: OwnerFile, created: list[Path], *, sure: bool = True
    ) -> None:
        self.folder, self.token, self.sure = request.folder, owner.token, sure
        self._key, self._owner, self._file, self._created = request.key, owner, file, created
        self._stop = threading.Event()
        if request.beat_s > 0:
            threading.Thread(target=self._beat, name="owner", daemon=True).start()

    def __enter__(self) -> Ownership:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.release()

    def holds(self) -> bool:
        """Whether the folder is still this process's. A file system that does not answer changes nothing."""
        try:
            owner = Owner.parse(self._file.read() or "")
        except OSError:
            return True
        return owner is not None and owner.token == self.token

    def check(self) -> None:
        """To be called before what another owner's work must not meet: a checkpoint, a removal, a record.

        Raises:
            OwnershipLost: the folder is another's by now.
        """
        if self.holds():
            return
        other = None
        with contextlib.suppress(OSError):
            other = Owner.parse(self._file.read() or "")
        cause = f"{other.describe()} has taken it over" if other is not None else f"its {FILE} is gone"
        raise OwnershipLost(
            f"{self._key}: '{self.folder}' is no longer this process's: {cause}, since this one was silent for too "
            "long or somebody removed the file; it ends and writes nothing more there"
        )

    def release(self) -> None:
        """Give the folder back; in a forked child nothing happens, and nothing is raised."""
        if os.getpid() != self._owner.pid or self._stop.is_set():
            return
        self._stop.set()
        with contextlib.suppress(OSError):
            self._file.remove(self._owner)
        _remove_empty(self._created)

    def _beat(self) -> None:
        count = 0
        while not self._stop.wait(self._owner.beat_s):
            count += 1
            with contextlib.suppress(OSError):  # a full disk, a server that is away: the next one may arrive
                self._file.advance(self._owner, count)


def _remove_empty(folders: list[Path]) -> None:
    for path in reversed(folders):
        with contextlib.suppress(OSError):  # not empty, as a rule
            path.rmdir()


def acquire_folder(folder: Path, purpose: str, key: str = "--out", remedy: str = "", *, name: str = "") -> Ownership:
    """Own ``folder``, which is made, after watching a silent owner for as long as it takes; for a ``with`` block.

    ``name``: of one entry of the folder, which is then all that is owned.

    Raises:
        FolderInUse: another process owns it and lives.
        UserError: the folder cannot be made or written.
    """
    ownership = OwnershipRequest(folder, purpose, key, remedy, name=name).try_acquire()
    assert ownership is not None
    return ownership


def refuse_folder_in_use(folder: Path, key: str = "--out") -> None:
    """A cheap look before expensive work: raises FolderInUse if a process that is seen to live owns ``folder``."""
    if (folder / FILE).is_file():
        OwnershipRequest(folder, "", key).refuse_living()


def is_owned_by_other(folder: Path, token: str | None = None) -> bool:
    """Whether a process that is not known to have ended owns the folder, other than the holder of ``token``."""
    try:
        text = OwnerFile(folder / FILE).read()
    except OSError:
        return False
    if text is None:
        return False
    owner = Owner.parse(text)
    if owner is None:
        return True
    return owner.token != token and not owner.is_here() and owner.state() != "gone"


def is_lock_file(name: str) -> bool:
    """Whether a file of that name belongs to a lock, and not to what the folder holds."""
    return name.startswith((FILE, f".{FILE}"))


def _timeout_s() -> float:
    text = os.environ.get(TIMEOUT, "")
    try:
        limit = float(text or _TIMEOUT_S)
    except ValueError:
        limit = math.nan
    if not 0 <= limit < math.inf:
        raise UserError(f"{TIMEOUT}: '{text}' is not a number of seconds; give one such as {_TIMEOUT_S:g}, or unset it")
    return limit
