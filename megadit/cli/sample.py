"""Draw pictures from a run. The same command gives the same pixels.

python launch/sample.py runs/emoji --classes "Food & Drink,Activities" --guidance 3 --out food.png
python launch/sample.py runs/imagenet --classes "tabby, tabby cat" --classes 207 --classes '["maillot, tank suit", 8]'
python launch/sample.py runs/emoji-mmdit --prompt "flag of France" --prompt "red apple" --count 16
"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megadit.cli import add_plugins, import_plugins
from megadit.errors import EXIT_OK, UserError
from megadit.streams import result_is_saved

if TYPE_CHECKING:
    from megadit.config import RunConfig

_SETTINGS = ("count", "steps", "guidance", "guidance_channels", "scheduler", "seed")
MAY_BE_EMPTY = ("--prompt",)  # the empty text is one, too


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("run_dir", metavar="RUN_DIR", type=Path, help="folder of a run of launch/pretrain.py")
    p.add_argument("--checkpoint", default="latest", metavar="latest|PATH", help="default latest")
    add_plugins(p)
    p.add_argument("--ema", metavar="NAME", help="an average's name such as 0.9999, or online; default sample.weights")
    p.add_argument("--out", type=Path, metavar="FILE.png", help="default RUN_DIR/samples/sample.png")
    p.add_argument("--npz", type=Path, metavar="FILE.npz", help="also write all pictures: arr_0, uint8 (N, H, W, 3)")
    names = "names or labels, taken in turn, or a JSON list; may be repeated; default: all in turn"
    p.add_argument("--classes", action="append", metavar="A,B,…", help=names)
    p.add_argument("--prompt", action="append", default=[], metavar="TEXT", help="text to draw; may be repeated")
    p.add_argument("--prompts", type=Path, metavar="FILE", help="texts to draw, one a line; default: the run's own")
    p.add_argument("--count", type=int, metavar="N", help="pictures; this and the next default to the run's sample.*")
    p.add_argument("--steps", type=int, metavar="N", help="sampling steps")
    p.add_argument("--guidance", type=float, metavar="G", help="classifier-free guidance scale; 1 is off")
    p.add_argument("--guidance_channels", type=int, metavar="K", help="guide the first K channels only (DiT: 3)")
    p.add_argument("--scheduler", choices=("auto", "ddpm", "ddim", "dpm", "euler"))
    p.add_argument("--seed", type=int, metavar="N")
    p.add_argument("--vae", metavar="DIR", help="codec that decodes latents; default: the run's data.vae.path")
    p.add_argument("--batch", type=int, default=64, metavar="N", help="pictures at once (memory); default 64")
    p.add_argument("--device", default="auto", metavar="auto|cpu|cuda", help="default: cuda where there is one")
    p.add_argument("--json", action="store_true", help="print one JSON object: grid, npz, count, scheduler, …")
    return p


def main(argv: Sequence[str] | None = None) -> int:
    """Sample, write the grid (and the npz), say where they are."""
    args = parser().parse_args(argv)
    from megadit.parallel.environment import refuse_ranks

    refuse_ranks("launch/sample.py")
    if args.batch < 1:
        raise UserError(f"--batch: {args.batch} is not at least 1; give the number of pictures to draw at once")
    if not args.run_dir.is_dir():
        from megadit.files.folder_kind import run_instead

        other = run_instead(args.run_dir) or "give the folder that pretrain.py wrote"
        raise UserError(f"{args.run_dir}: there is no such run directory; {other}")
    if args.checkpoint != "latest" and not Path(args.checkpoint).is_dir():
        raise UserError(
            f"--checkpoint: {args.checkpoint} is not a folder; give latest or one such as "
            f"{args.run_dir / 'checkpoints' / 'step-00001000'}"
        )
    import_plugins(args)
    grid = args.out or args.run_dir / "samples" / "sample.png"
    from megadit.checkpoint.names import run_config

    _check_outputs(grid, args.npz)

    model_config = _with_settings(run_config(args.run_dir), args).model  # refused before torch is imported
    if model_config.text is None and args.checkpoint == "latest":
        from megadit.diffusion.sampling.classes import chosen_classes

        chosen_classes(args.run_dir, args.classes, model_config.num_classes, notes=False)

    from megadit.checkpoint.find import load_model
    from megadit.cli.encode import device_of
    from megadit.config.schema.sampling import scheduler_name
    from megadit.data.codecs.codec import build_codec, vae_at
    from megadit.diffusion.sampling.classes import read_notice
    from megadit.diffusion.sampling.grid import save_npz
    from megadit.diffusion.sampling.pictures import sample_pictures, save_subject_grid
    from megadit.diffusion.sampling.prompts import chosen_subjects

    config, model = load_model(args.run_dir, checkpoint=args.checkpoint, weights=args.ema)
    config = _with_settings(config, args)
    device = device_of(args.device)
    subjects = chosen_subjects(
        args.run_dir, config, classes=args.classes, prompts=args.prompt, prompts_file=args.prompts, device=device
    )
    codec = build_codec(vae_at(config.data.vae, args.vae), device)
    drawn = sample_pictures(model.to(device), config, codec, subjects=subjects, device=device, batch_size=args.batch)
    save_subject_grid(drawn, subjects, grid, notice=read_notice(args.run_dir))
    if args.npz:
        save_npz(drawn, args.npz)
    summary: dict[str, Any] = {"grid": str(grid), "npz": str(args.npz) if args.npz else None}
    summary |= {"labels": subjects.labels_of(len(drawn)), "prompts": subjects.prompts_of(len(drawn))}
    summary = config.sample.model_dump() | summary | {"scheduler": scheduler_name(config.objective, config.sample)}
    result_is_saved(as_json=args.json)
    arrays = f"\nas arrays: {args.npz}" if args.npz else ""
    print(json.dumps(summary) if args.json else f"{len(drawn)} pictures: {grid}{arrays}")
    return EXIT_OK


def _with_settings(config: RunConfig, args: argparse.Namespace) -> RunConfig:
    """The run's configuration with the sampling options of the command line."""
    from pydantic import ValidationError

    from megadit.config.loading.messages import validation_message
    from megadit.config.schema.run import SampleConfig

    options = {name: getattr(args, name) for name in _SETTINGS if getattr(args, name) is not None}
    if args.guidance is not None and args.guidance != 1 and config.data.condition == "none":
        raise UserError(f"--guidance: {args.guidance:g} needs classes or texts, and this run has none; leave it out")
    if args.guidance_channels is not None and options.get("guidance", config.sample.guidance) == 1:
        raise UserError(
            f"--guidance_channels: {args.guidance_channels} is not read where guidance is 1, which is off; give "
            "--guidance too, or leave it out"
        )
    if args.ema is not None:
        options["weights"] = args.ema
    try:
        settings = SampleConfig.model_validate(config.sample.model_dump() | options)
    except ValidationError as error:
        raise UserError("--" + validation_message(error, SampleConfig, {}).replace("\n", "; --")) from error
    return config.model_copy(update={"sample": settings})


def _check_outputs(grid: Path, npz: Path | None) -> None:
    """Refuse, before the work, what could not be written after it, or would replace what is no earlier result.

    Raises:
        UserError: one is a folder, cannot be written, is a file of another kind, or both are one.
    """
    from megadit.files.paths import ARRAYS, PNG, check_output

    check_output(grid, "--out", "PNG picture", PNG)
    if npz is not None:
        check_output(npz, "--npz", "file of pictures", ARRAYS)
        if npz.absolute() == grid.absolute():
            raise UserError(f"--npz: '{npz}' is where --out writes the grid; give it a name of its own")
    for path, key, suffix in ((grid, "--out", ".png"), (npz, "--npz", ".npz")):
        if path is not None and path.suffix.lower() != suffix and not path.is_dir():
            raise UserError(f"{key}: '{path}' does not end in {suffix}, the one format that is written; rename it")
    for path in (grid, npz):
        if path is None:
            continue
        if path.is_dir():
            raise UserError(f"{path}: is a folder; give the name of a file")
        existing = next(parent for parent in path.absolute().parents if parent.exists())
        if not existing.is_dir() or not os.access(existing, os.W_OK):
            raise UserError(f"{path}: {existing} is not a folder that can be written; choose another place")
