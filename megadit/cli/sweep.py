"""Hyperparameter studies: run one on this machine's workers, join it from elsewhere, look at it, report it, stop it.

python launch/sweep.py run --config configs/sweeps/dit-width-mini.yaml --workers 2
python launch/sweep.py status --config configs/sweeps/dit-width-mini.yaml
srun python launch/sweep.py worker --study_dir /shared/study          joins a study with storage: journal

Exit codes: 0 every trial has ended; 1 a trial failed; 2 bad input; 85 stopped with trials left, and the same command
goes on.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from megadit.errors import EXIT_PREEMPTED


def parser() -> argparse.ArgumentParser:
    """The command line."""
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = p.add_subparsers(dest="command", required=True, metavar="run|worker|status|report|stop")

    def add(name: str, text: str, *, overrides: bool = False, as_json: bool = False) -> argparse.ArgumentParser:
        one = commands.add_parser(name, help=text, description=text)
        one.add_argument("--config", metavar="FILE", help="study (YAML), also by its name in configs/sweeps")
        one.add_argument("--study_dir", metavar="DIR", help="where the study lies; default runs/sweeps/<study name>")
        if overrides:
            one.add_argument("overrides", nargs="*", metavar="key.sub=value", help="change a key of study or config")
        if as_json:
            one.add_argument("--json", action="store_true", help="one JSON object on stdout")
        return one

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
    args, rest = p.parse_known_args(argv)
    strange = [word for word in rest if word.startswith("-") or not hasattr(args, "overrides")]
    if strange:
        p.error(f"unrecognized arguments: {' '.join(strange)}")
    if rest:
        args.overrides = [*args.overrides, *rest]
    return args


def main(argv: Sequence[str] | None = None) -> int:
    """Do one of the commands."""
    args = parse(argv)
    from megadit.train.preemption import Preempted, preemption_signals

    if args.command == "worker":
        with preemption_signals("starting"):  # until it takes trials, and answers signals in its own way
            try:
                from megadit.search import sweep_commands as command

                return command.worker(args.config, args.study_dir, args.overrides)
            except Preempted:
                print("\nstopped before a trial was taken; start the same command again", file=sys.stderr)
                return EXIT_PREEMPTED
    from megadit.parallel.environment import refuse_ranks
    from megadit.search import sweep_commands as command

    refuse_ranks(f"launch/sweep.py {args.command}")
    if args.command == "run":
        return command.run(args.config, args.study_dir, args.overrides, args.workers, args.retry_failed)
    if args.command == "status":
        return command.status(args.config, args.study_dir, args.json)
    if args.command == "report":
        return command.report(args.config, args.study_dir, args.json)
    return command.stop(args.config, args.study_dir, args.now)
