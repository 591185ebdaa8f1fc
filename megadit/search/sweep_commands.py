"""What ``launch/sweep.py`` does: make and run a study, join it, tell how it stands, report it, stop it."""

from __future__ import annotations

import contextlib
import json
import signal
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megadit.errors import EXIT_FAILURE, EXIT_OK, EXIT_PREEMPTED, UserError, harmless, say
from megadit.files.ownership import Ownership, own
from megadit.search.storage.states import Counts
from megadit.search.study.spec import read_spec
from megadit.search.study.study import FROZEN, Study, find_study, load_study
from megadit.search.wording import point_text
from megadit.search.workers.pool import Place, Pool, places, this_machine
from megadit.search.workers.worker import AFTER, NOW, STOP, work
from megadit.streams import result_is_saved

_SHOW_S = 1.0  # how often the store is asked while workers run, at most
_SHARE = 50  # of the time, asking takes at most one part in so many: the cores are the workers'
_LINE_S = 30.0  # between plain progress lines when nothing ends


def run(
    config: str | None, study_dir: str | None, overrides: Sequence[str], workers: int | None, retry_failed: bool
) -> int:
    """Create or go on with a study on local workers until every trial has ended, then report it.

    Returns 0; 1 when a trial failed or a worker could not be kept alive; 85 when stopped with trials left: the same
    command goes on.

    Raises:
        UserError: the study cannot work, another ``run`` works on it (Occupied), or a worker refused to join it.
    """
    study = load_study(_source(config, study_dir), study_dir, overrides)
    remedy = "add workers to it with launch/sweep.py worker, wait for it, or choose another --study_dir"
    with own(study.folder, "running a study", "--study_dir", remedy) as ownership:
        return _run(study, workers, retry_failed, ownership)


def _run(study: Study, workers: int | None, retry_failed: bool, ownership: Ownership) -> int:
    from megadit.search.storage.store import StudyStore

    asked = study.spec.workers
    count = workers if workers is not None else asked.count
    if count < 1:
        raise UserError(f"--workers: {count} is not at least 1")
    cores, gpus = this_machine(asked.gpus > 0)
    slots = places(asked, count, cores, gpus)
    store = StudyStore.create_or_open(study, retry_failed=retry_failed)
    store.refuse_other_hosts()
    (study.folder / STOP).unlink(missing_ok=True)
    _announce(study, slots, cores)
    pool = _run_pool(study, store, slots)
    if pool.bad_input is not None:
        raise UserError(pool.bad_input)
    ownership.check()
    return _conclude(study, store, pool)


def _announce(study: Study, slots: Sequence[Place], cores: Sequence[int]) -> None:
    each = f"{len(slots[0].cores)} core{'s' if len(slots[0].cores) > 1 else ''}"
    if slots[0].gpus:
        each += f" and {len(slots[0].gpus)} GPU{'s' if len(slots[0].gpus) > 1 else ''}"
    print(f"study {study.spec.name} in {study.folder}: {len(slots)} worker(s) of {each}", file=sys.stderr)
    if len(slots) * study.spec.workers.cores > len(cores):
        print(
            f"warning: {len(slots)} workers of {study.spec.workers.cores} core(s) share the {len(cores)} core(s) of "
            "this machine and slow one another down; lower --workers",
            file=sys.stderr,
        )


def _run_pool(study: Study, store: Any, slots: list[Place]) -> Pool:
    """Run the workers; SIGINT and SIGTERM end them after the running step, a second one at once."""
    pool, progress, asked = Pool(study, slots), Progress(store, len(slots)), []

    def note(number: int, *_: Any) -> None:
        asked.append(number)
        if len(asked) == 1:
            say("\nstopping: running trials go back to the queue (again: at once)")
            pool.signal(signal.SIGTERM)
        else:
            pool.kill()

    before = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        with pool:
            pool.run(
                lambda: _ended_well(store.counts()),
                progress.tick,
                stopping=lambda: bool(asked) or (study.folder / STOP).exists(),
            )
    finally:
        progress.close()
        for number, handler in before.items():
            signal.signal(number, handler)
    return pool


def _ended_well(counts: Counts) -> int:
    return counts.done - counts.failed


def _conclude(study: Study, store: Any, pool: Pool) -> int:
    """Give back what killed workers ran, report, and say how it went."""
    from megadit.search.report import write_report
    from megadit.search.status import best_text, counts_text, status_of

    result_is_saved()
    store.reclaim_stale()
    status = status_of(store)
    counts = status.counts
    say(f"study {study.spec.name}: {counts_text(counts)}", sys.stdout)
    if counts.done:
        with harmless("the report"):
            html, markdown = write_report(study.folder)
            say(f"  report     {html}\n             {markdown}", sys.stdout)
    if status.best is not None:
        say(f"  best       {best_text(status.best)}", sys.stdout)
        say(f"  runs       {study.folder / 'trials'}", sys.stdout)
    say(f"  study      {study.folder}", sys.stdout)
    if counts.done < counts.planned:
        if pool.lost is not None:
            say(f"error: no worker could be kept alive; see {pool.lost}")
            return EXIT_FAILURE
        say("stopped with trials left; the same command goes on")
        return EXIT_PREEMPTED
    if counts.failed:
        first = next(trial for trial in status.trials if trial.outcome == "failed")
        say(
            f"error: {counts.failed} trial(s) failed, e.g. trial {first.number}: {first.reason}; when the cause is "
            "gone, run again with --retry_failed"
        )
        return EXIT_FAILURE
    return EXIT_OK


class Progress:
    """A bar over the trials of a study; plain lines, when something has ended and now and then, without a terminal."""

    def __init__(self, store: Any, workers: int) -> None:
        self._store, self._workers = store, workers
        self._next = self._printed = 0.0
        self._done = -1
        self._bar: Any = None

    def tick(self) -> None:
        """Show the present state, when it is time to."""
        if time.monotonic() < self._next:
            return
        begin = time.monotonic()
        from megadit.search.status import duration, status_of

        status = status_of(self._store, self._workers)
        now, counts = time.monotonic(), status.counts
        self._next = now + max(_SHOW_S, _SHARE * (now - begin))
        parts = [f"{counts.running} running"]
        parts += [f"{number} {name}" for name in ("diverged", "pruned", "failed") if (number := getattr(counts, name))]
        if status.best is not None:
            parts.append(f"best {status.best.score} {status.best.value:.4f} at {point_text(status.best.hps)}")
        eta = "?" if status.eta_s is None else duration(status.eta_s)
        if sys.stderr is not None and sys.stderr.isatty():
            self._show_bar(counts.done, counts.planned, "  ".join([*parts, f"ETA {eta}"]))
        elif counts.done != self._done or now - self._printed > _LINE_S:
            self._done, self._printed = counts.done, now
            say(f"{counts.done}/{counts.planned} trials  {'  '.join(parts)}  ETA {eta}")

    def _show_bar(self, done: int, planned: int, text: str) -> None:
        if self._bar is None:
            from tqdm import tqdm

            layout = "{percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt} trials [{elapsed}] {postfix}"
            self._bar = tqdm(total=planned, initial=done, dynamic_ncols=True, bar_format=layout)
        self._bar.n = done
        with contextlib.suppress(OSError, ValueError):  # the terminal is gone
            self._bar.set_postfix_str(text)

    def close(self) -> None:
        """Close the bar."""
        if self._bar is not None:
            with contextlib.suppress(OSError, ValueError):
                self._bar.close()


def worker(config: str | None, study_dir: str | None, overrides: Sequence[str]) -> int:
    """Join a study, made first where there is none; also as one of several ranks. Returns as ``worker.work``."""
    from megadit.parallel import prepare_environment, start_processes
    from megadit.parallel.lifetime import die_with_launcher

    ranks = prepare_environment()
    die_with_launcher(ranks)
    if ranks.note:
        print(f"note: {ranks.note}", file=sys.stderr)
    source = _source(config, study_dir)
    folder = _folder_of(source, study_dir)
    exists = (folder / FROZEN).is_file()
    study = load_study(folder) if exists and not overrides else load_study(source, study_dir, overrides)
    if ranks.world_size == 1:
        _make_if_new(study)
    else:
        start_processes().on_main(lambda: _make_if_new(study))
    return work(study)


def _make_if_new(study: Study) -> None:
    from megadit.search.storage.locking import FILES
    from megadit.search.storage.store import StudyStore

    if not (study.folder / FILES[study.spec.storage]).is_file():
        StudyStore.create_or_open(study)


def status(config: str | None, study_dir: str | None, as_json: bool) -> int:
    """Print how a study stands."""
    from megadit.search.status import format_status, status_of
    from megadit.search.storage.store import open_readonly

    found = status_of(open_readonly(_existing(config, study_dir)))
    print(json.dumps(found.to_json()) if as_json else format_status(found))
    return EXIT_OK


def report(config: str | None, study_dir: str | None, as_json: bool) -> int:
    """Write the report of a study, finished or not, and print where it is."""
    folder = _existing(config, study_dir).folder
    from megadit.search.report import write_report

    html, markdown = write_report(folder)
    result_is_saved(as_json=as_json)
    if as_json:
        print(json.dumps({"html": str(html), "markdown": str(markdown)}))
    else:
        print(f"{html}\n{markdown}")
    return EXIT_OK


def stop(config: str | None, study_dir: str | None, now: bool) -> int:
    """Leave word for all workers of a study, wherever they are, to end: after their running trial, or with it."""
    study = _existing(config, study_dir)
    (study.folder / STOP).write_text(f"{NOW if now else AFTER}\n", encoding="utf-8")
    result_is_saved()
    when = "at their next logged step; their trials go back to the queue" if now else "after their running trials"
    print(f"workers of study {study.spec.name} in {study.folder} end {when}; the next run goes on")
    return EXIT_OK


def _source(config: str | None, study_dir: str | None) -> str:
    source = config if config is not None else study_dir
    if source is None:
        raise UserError("--config: is missing; name a study file, e.g. configs/sweeps/dit-width-mini.yaml")
    return source


def _folder_of(source: str, study_dir: str | None) -> Path:
    """The study directory that the arguments mean, without reading more of a study file than its name."""
    file, folder = find_study(source, study_dir)
    return folder if folder is not None else Path("runs") / "sweeps" / read_spec(file).name


def _existing(config: str | None, study_dir: str | None) -> Study:
    """The study that is there already, whatever overrides it was made with."""
    folder = _folder_of(_source(config, study_dir), study_dir)
    if not (folder / FROZEN).is_file():
        raise UserError(f"--study_dir: '{folder}' holds no study yet; start it with launch/sweep.py run")
    return load_study(folder)
