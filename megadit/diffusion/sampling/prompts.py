"""Subjects of ``launch/sample.py``: the classes or prompts of its command line, or those of the run."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from megadit.config.schema.run import RunConfig
from megadit.data.labels import quoted
from megadit.diffusion.sampling.classes import chosen_classes
from megadit.errors import UserError
from megadit.files.text import decode_text, has_lone_surrogate, split_lines

if TYPE_CHECKING:
    import torch

    from megadit.diffusion.sampling.pictures import Subjects


def chosen_subjects(
    run_dir: Path,
    config: RunConfig,
    *,
    classes: str | Sequence[str] | None = None,
    prompts: Sequence[str] = (),
    prompts_file: Path | None = None,
    device: torch.device | str = "cpu",
) -> Subjects:
    """The subjects of these classes or prompts, by default those of the run's own grids.

    Raises UserError for a class that the model does not have, a kind of condition that it does not take, and a text
    that is too long.
    """
    from megadit.diffusion.sampling.pictures import class_subjects

    check_prompts(prompts)
    texts = [*prompts, *(read_prompts(prompts_file) if prompts_file is not None else ())]
    if config.model.text is not None:
        if classes is not None:
            shown = quoted(classes if isinstance(classes, str) else ", ".join(classes))
            raise UserError(f"--classes: {shown} cannot be chosen, the model takes texts; give --prompt")
        return _text_choice(run_dir, config, texts, device)
    if texts or prompts_file is not None:
        takes = "classes; give --classes" if config.model.num_classes else "no condition; leave it out"
        raise UserError(f"--prompt: '{texts[0] if texts else prompts_file}' cannot be drawn, the model takes {takes}")
    return class_subjects(config, *chosen_classes(run_dir, classes, config.model.num_classes))


def _text_choice(run_dir: Path, config: RunConfig, texts: list[str], device: torch.device | str) -> Subjects:
    from megadit.data.conditions import NULL_TEXT_FILE, PROMPTS_FILE, check_encoder, for_model, load_conditions
    from megadit.data.text.encoders import build_encoder, check_lengths
    from megadit.diffusion.sampling.pictures import text_subjects

    assert config.model.text is not None
    length, has_null_text = config.model.text.max_length, (run_dir / NULL_TEXT_FILE).is_file()
    if not texts and not (run_dir / PROMPTS_FILE).exists():
        raise UserError(
            f"--prompt: is needed, since '{run_dir}' keeps no prompts of its own; give one, or --prompts FILE"
        )
    if not texts:
        null, _ = load_conditions(run_dir / NULL_TEXT_FILE)
        cond, stored_prompts = load_conditions(run_dir / PROMPTS_FILE)
        cond, null = for_model(cond, config.model.text), for_model(null, config.model.text)
        return text_subjects(config, stored_prompts, cond, null)
    encoder = build_encoder(config.data.text, device)
    check_encoder(encoder, config.model.text)
    check_lengths(encoder, texts, length, "--prompt")
    # A converted run has no stored null text where its model has none: it is the empty text, as in training.
    null = load_conditions(run_dir / NULL_TEXT_FILE)[0] if has_null_text else encoder.encode([""], length)
    cond = for_model(encoder.encode(texts, length), config.model.text)
    return text_subjects(config, texts, cond, for_model(null, config.model.text))


def read_prompts(path: Path) -> list[str]:
    """The lines of a text file that are not empty; a line ends at \\n, \\r\\n or \\r.

    Raises UserError where there are none, or the file is not text.
    """
    remedy = "give a text file of a prompt a line"
    try:
        data = path.read_bytes()
    except OSError as error:
        raise UserError(f"--prompts: '{path}' cannot be read ({error.strerror or error}); {remedy}") from error
    text = decode_text(data, f"--prompts: '{path}'")
    lines = split_lines(text.replace("\r\n", "\n").replace("\r", "\n"))
    texts = [line.strip() for line in lines if line.strip()]
    if not texts:
        raise UserError(f"--prompts: '{path}' holds no prompt; write one a line")
    return texts


def check_prompts(texts: Sequence[str]) -> None:
    """Raise UserError for a ``--prompt`` that is not UTF-8, as from a terminal of another encoding."""
    not_utf8 = next((text for text in texts if has_lone_surrogate(text)), None)
    if not_utf8 is not None:
        raise UserError(f"--prompt: {not_utf8[:60]!r} is not UTF-8; write it into a file in UTF-8 for --prompts FILE")
