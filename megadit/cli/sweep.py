"""Hyperparameter studies: run one on this machine's workers, join it from elsewhere, look at it, report it, stop it.

python launch/sweep.py run --config configs/sweeps/dit-width-mini.yaml --workers 2
python launch/sweep.py status --config configs/sweeps/dit-width-mini.yaml
srun python launch/sweep.py worker --study_dir /shared/study          joins a study with storage: journal

Exit codes: 0 every trial has ended; 1 a trial failed; 2 bad input; 85 stopped with trials left, and the same command
goes on.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING

from megadit.cli import add_plugins, import_plugins
from megadit.errors import EXIT_FAILURE, EXIT_OK, EXIT_PREEMPTED, UserError, say, warn_on_failure
from megadit.streams import result_is_saved

if TYPE_CHECKING:
    from megadit.search.storage.store import StudyStore
    from megadit.search.study.study import Study
    from megadit.search.workers.pool import DeviceSlot, WorkerPool

_SHOW_S = 1.0  # how often the store is asked while workers run, at most
_SHARE = 50  # of the time, asking takes at most one part in so many: the cores are the workers'
_LINE_S = 30.0  # between plain progress lines when nothing ends


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = p.add_subparsers(dest="command", required=True, metavar="run|worker|status|report|stop")

    def add(name: str, text: str, *, overrides: bool = False, as_json: bool = False) -> argparse.ArgumentParser:
        command = commands.add_parser(name, help=text, description=text)
        command.add_argument("--config", metavar="FILE", help="study (YAML), also by its name in configs/sweeps")
        command.add_argument(
            "--study_dir", metavar="DIR", help="where the study lies; default runs/sweeps/<study name>"
        )
        add_plugins(command)
        if overrides:
            command.add_argument(
                "overrides", nargs="*", metavar="key.sub=value", help="change a key of study or config"
            )
        if as_json:
            command.add_argument("--json", action="store_true", help="one JSON object on stdout")
        return command

    run = add("run", "make a study or go on with it on local workers, then report it", overrides=True)
    run.add_argument("--workers", type=int, metavar="N", help="how many at once; default: the study's workers.count")
    run.add_argument("--retry_failed", action="store_true", help="run trials again whose outcome is failed")
    worker = add("worker", "run trials of a study in this process, beside any other workers", overrides=True)
    worker.add_argument("--local_rank", "--local-rank", type=int, help=argparse.SUPPRESS)  # from launchers
    add("status", "how a study stands: counts, running trials, results, best point, time left", as_json=True)
    add("report", "write report.html and report.md of a study, finished or not", as_json=True)
    stop = add("stop", "end all workers of a study after their running trial; the next run goes on")
    stop.add_argument("--now", action="store_true", help="interrupt running trials, which go back to the queue")
    return p


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The arguments; overrides may stand anywhere, which argparse does not do for subcommands by itself."""
    p = parser()
    args, unparsed = p.parse_known_args(argv)
    unknown = [word for word in unparsed if word.startswith("-") or not hasattr(args, "overrides")]
    if unknown:
        p.error(f"unrecognized arguments: {' '.join(unknown)}")
    if unparsed:
        args.overrides = [*args.overrides, *unparsed]
    return args


def main(argv: Sequence[str] | None = None) -> int:
    """Run one of the commands; returns the exit code."""
    args = parse(argv)
    if args.command == "worker":
        from megadit.train.preemption import PreemptedAtStart, preemption_signals

        with preemption_signals("starting"):  # until it takes trials, and answers signals in its own way
            try:
                return worker(args)
            except PreemptedAtStart:
                print("\nstopped before a trial was taken; start the same command again", file=sys.stderr)
                return EXIT_PREEMPTED
    from megadit.parallel.environment import refuse_ranks

    refuse_ranks(f"launch/sweep.py {args.command}")
    return {"run": run, "status": status, "report": report, "stop": stop}[args.command](args)


def run(args: argparse.Namespace) -> int:
    """Create or go on with a study on local workers until every trial has ended, then report it.

    Returns 0; 1 when a trial failed or a worker could not be kept alive; 85 when stopped with trials left: the same
    command goes on.

    Raises:
        UserError: the study cannot work, another ``run`` works on it (FolderInUse), or a worker refused to join it.
    """
    from megadit.files.ownership import acquire_folder
    from megadit.search.storage.store import StudyStore
    from megadit.search.study.study import changed_plugins, load_study
    from megadit.search.workers.pool import WorkerPool, assign_devices, available_devices
    from megadit.search.workers.worker import STOP

    study = load_study(_source(args), args.study_dir, args.overrides)
    for change in changed_plugins(study.folder):
        say(f"warning: {change}")
    remedy = "add workers to it with launch/sweep.py worker, wait for it, or choose another --study_dir"
    with acquire_folder(study.folder, "running a study", "--study_dir", remedy) as ownership:
        spec = study.spec.workers
        count = args.workers if args.workers is not None else spec.count
        if count < 1:
            raise UserError(f"--workers: {count} is not at least 1")
        cores, gpus = available_devices(spec.gpus > 0)
        slots = assign_devices(spec, count, cores, gpus)
        store = StudyStore.create_or_open(study, retry_failed=args.retry_failed)
        store.refuse_other_hosts()
        (study.folder / STOP).unlink(missing_ok=True)
        _announce(study, slots, cores)
        pool = WorkerPool(study, slots)
        with contextlib.closing(StudyProgress(store, len(slots))) as progress:
            pool.run(lambda: sum(t.outcome != "failed" for t in store.results().trials), progress.tick)
        if pool.bad_input is not None:
            raise UserError(pool.bad_input)
        ownership.check()
        return _conclude(study, store, pool)


def _announce(study: Study, slots: Sequence[DeviceSlot], cores: Sequence[int]) -> None:
    from megadit.search.wording import counted

    each = counted(len(slots[0].cores), "core")
    each += f" and {counted(len(slots[0].gpus), 'GPU')}" if slots[0].gpus else ""
    say(f"study {study.spec.name} in {study.folder}: {counted(len(slots), 'worker')} of {each}")
    if len(slots) * study.spec.workers.cores > len(cores):
        say(
            f"warning: {len(slots)} workers of {study.spec.workers.cores} core(s) share the {len(cores)} core(s) of "
            "this machine and slow one another down; lower --workers"
        )


def _conclude(study: Study, store: StudyStore, pool: WorkerPool) -> int:
    """Give back what killed workers ran, report, and say how it went."""
    from megadit.search.report import write_report
    from megadit.search.status import best_text, counts_text, status_of

    result_is_saved()
    store.reclaim_stale()
    status = status_of(store)
    results, counts = status.results, status.results.counts
    say(f"study {study.spec.name}: {counts_text(counts)}", sys.stdout)
    if counts["done"]:
        with warn_on_failure("the report"):
            html, markdown = write_report(study.folder)
            say(f"  report     {html}\n             {markdown}", sys.stdout)
    if status.best is not None:
        say(f"  best       {best_text(status.best)}", sys.stdout)
        say(f"  runs       {study.folder / 'trials'}", sys.stdout)
    say(f"  study      {study.folder}", sys.stdout)
    if not results.complete:
        if pool.failed_worker_log is not None:
            say(f"error: no worker could be kept alive; see {pool.failed_worker_log}")
            return EXIT_FAILURE
        say("stopped with trials left; the same command goes on")
        return EXIT_PREEMPTED
    if counts["failed"]:
        first = next(trial for trial in results.trials if trial.outcome == "failed")
        say(
            f"error: {counts['failed']} trial(s) failed, e.g. trial {first.number}: {first.reason}; when the cause is "
            "gone, run again with --retry_failed"
        )
        return EXIT_FAILURE
    return EXIT_OK


class StudyProgress:
    """A bar over the trials of a study; without a terminal a line when a trial has ended, and every 30 s."""

    def __init__(self, store: StudyStore, workers: int) -> None:
        from tqdm import tqdm

        self._store, self._workers = store, workers
        self._next = self._printed = 0.0
        self._done = -1
        terminal = sys.stderr is not None and sys.stderr.isatty()
        layout = "{percentage:3.0f}%|{bar}| [{elapsed}{postfix}]"
        self._bar = tqdm(total=len(store.plan), dynamic_ncols=True, bar_format=layout, disable=not terminal)

    def tick(self) -> None:
        """Show the present state, when it is time to."""
        begin = time.monotonic()
        if begin < self._next:
            return
        from megadit.search.status import best_text, counts_text, status_of
        from megadit.search.wording import duration_text

        status = status_of(self._store, self._workers)
        counts, now = status.results.counts, time.monotonic()
        self._next = now + max(_SHOW_S, _SHARE * (now - begin))
        text = counts_text(counts) + (f"; best {best_text(status.best)}" if status.best else "")
        text += f"; about {duration_text(status.eta_s)} left" if status.eta_s is not None else ""
        if not self._bar.disable:
            self._bar.n = counts["done"]
            with contextlib.suppress(OSError, ValueError):  # the terminal is gone
                self._bar.set_postfix_str(text)
        elif counts["done"] != self._done or now - self._printed > _LINE_S:
            self._done, self._printed = counts["done"], now
            say(text)

    def close(self) -> None:
        """Close the bar."""
        with contextlib.suppress(OSError, ValueError):
            self._bar.close()


def worker(args: argparse.Namespace) -> int:
    """Join a study, made first where there is none; also as one of several ranks. Returns as ``work``."""
    from megadit.parallel import prepare_environment, start_processes
    from megadit.parallel.launcher import exit_with_launcher
    from megadit.search.study.study import FROZEN, load_study, study_folder
    from megadit.search.workers.worker import work

    ranks = prepare_environment()
    exit_with_launcher(ranks)
    if ranks.note:
        print(f"note: {ranks.note}", file=sys.stderr)
    source = _source(args)
    folder = study_folder(source, args.study_dir)
    exists = (folder / FROZEN).is_file()
    study = load_study(folder) if exists and not args.overrides else load_study(source, args.study_dir, args.overrides)
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


def status(args: argparse.Namespace) -> int:
    """Print how a study stands."""
    from megadit.search.status import format_status, status_of
    from megadit.search.storage.store import open_readonly

    current = status_of(open_readonly(_existing(args)))
    print(json.dumps(current.to_json()) if args.json else format_status(current))
    return EXIT_OK


def report(args: argparse.Namespace) -> int:
    """Write the report of a study, finished or not, and print where it is."""
    folder = _existing(args).folder
    from megadit.search.report import write_report

    html, markdown = write_report(folder)
    result_is_saved(as_json=args.json)
    print(json.dumps({"html": str(html), "markdown": str(markdown)}) if args.json else f"{html}\n{markdown}")
    return EXIT_OK


def stop(args: argparse.Namespace) -> int:
    """Leave word for all workers of a study to end: after their running trial, or with it."""
    from megadit.search.workers.worker import request_stop

    study = _existing(args)
    request_stop(study, args.now)
    result_is_saved()
    when = "at their next logged step; their trials go back to the queue" if args.now else "after their running trials"
    print(f"workers of study {study.spec.name} in {study.folder} end {when}; the next run goes on")
    return EXIT_OK


def _source(args: argparse.Namespace) -> str:
    """What names the study, once the plugins are imported that the command line and a file given by --config name."""
    source: str | None = args.config if args.config is not None else args.study_dir
    if source is None:
        raise UserError("--config: is missing; name a study file, e.g. configs/sweeps/dit-width-mini.yaml")
    import_plugins(args)
    if args.config is not None:
        from megadit.search.study.study import import_study_plugins

        import_study_plugins(args.config)
    return source


def _existing(args: argparse.Namespace) -> Study:
    from megadit.search.study.study import existing_study

    return existing_study(_source(args), args.study_dir)
