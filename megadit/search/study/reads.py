"""Keys of a study that none of its runs would read are refused, not ignored."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping

from megadit.config import RunConfig
from megadit.config.schema.reads import check_late
from megadit.errors import UserError
from megadit.search.study.spec import PruningSpec, StudySpec


def check_reads(spec: StudySpec, runs: Iterable[RunConfig], of_command_line: Iterable[str]) -> None:
    """Whether what ``spec`` and the command line (dotted configuration keys) ask for is read in one of ``runs``.

    Raises:
        UserError: nothing reads a key, with the choice that decides it.
    """
    for key, default in PruningSpec().model_dump().items():
        value = getattr(spec.pruning, key)
        if spec.pruning.rule == "none" and value != default:
            raise UserError(
                f"pruning.{key}: {str(value).lower()} is not read where pruning.rule is none; leave it out, or set "
                "pruning.rule=median"
            )
    if spec.sampler == "grid" and spec.sampler_seed:
        raise UserError(
            f"sampler_seed: {spec.sampler_seed} is not read where sampler is grid, which runs every point; leave it "
            "out, or set sampler=random"
        )
    # A study has no DeepSpeed file, which could choose another schedule.
    asked = dict.fromkeys((*spec.space, *_overrides(spec), *of_command_line), f"study {spec.name}")
    told = [_refusal(run, asked) for run in runs]
    if told and told[0] is not None and None not in told:
        raise UserError(told[0])


def _refusal(run: RunConfig, asked: Mapping[str, str]) -> str | None:
    optim = run.optim
    try:
        check_late({"optim.schedule": optim.schedule, "optim.min_lr_ratio": optim.min_lr_ratio}, asked)
    except UserError as error:
        return str(error)
    return None


def _overrides(spec: StudySpec) -> Iterator[str]:
    yield from spec.overrides
    for changes in spec.variants.values():
        yield from changes
