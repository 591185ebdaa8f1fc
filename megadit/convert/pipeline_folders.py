"""Pipeline folders of diffusers: ``model_index.json``, ``transformer/`` and ``scheduler/``, in and out.

A bare transformer folder (``config.json`` and its weights) is read too. Autoencoders and text encoders are not
converted: a pipeline gets them when it is loaded, beside an autoencoder that the run itself names.
"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from megadit.config.json_text import JsonError, parse_json
from megadit.config.run import RunConfig
from megadit.convert.contents import Contents
from megadit.convert.difference import Difference, measure, memory_lacking
from megadit.convert.dispatch import diffusers_gap, from_diffusers, to_diffusers
from megadit.convert.official import contents_of, folded_notes, model_of, whole_state
from megadit.convert.request import Request
from megadit.convert.run_checkpoints import NULL_CAPTION
from megadit.convert.state_dicts import find_files, load_tensors, write_folder, write_one
from megadit.diffusion.ddpm import BETA_ENDS, beta_ends
from megadit.errors import UserError

SHARD_BYTES = 10 * 10**9  # above which diffusers' own save_pretrained cuts a model
_WEIGHTS = "diffusion_pytorch_model"
_VERSION = "0.30.0"  # of diffusers: all three classes and schedulers exist since then as they are written here
_VAE = "AutoencoderKL"
_DIT_CLASSES = 1000  # DiTPipeline's null label is this number, whatever the model
_NULL_KEY = "null_caption"  # of a safetensors file beside the pipeline
_NULL_FILE = f"{_NULL_KEY}.safetensors"
# Pipeline of each family, and its components that are not written here.
_PIPELINES: Mapping[str, tuple[str, dict[str, list[str]]]] = {
    "dit": ("DiTPipeline", {}),
    "pixart": (
        "PixArtAlphaPipeline",
        {"tokenizer": ["transformers", "T5Tokenizer"], "text_encoder": ["transformers", "T5EncoderModel"]},
    ),
    "mmdit": (
        "StableDiffusion3Pipeline",
        {
            "tokenizer": ["transformers", "CLIPTokenizer"],
            "text_encoder": ["transformers", "CLIPTextModelWithProjection"],
            "tokenizer_2": ["transformers", "CLIPTokenizer"],
            "text_encoder_2": ["transformers", "CLIPTextModelWithProjection"],
            "tokenizer_3": ["transformers", "T5TokenizerFast"],
            "text_encoder_3": ["transformers", "T5EncoderModel"],
        },
    ),
}


def read_diffusers(path: Path, request: Request) -> tuple[Contents, Difference | None]:
    """The transformer of a pipeline folder, or of a folder of its own, and how far the model here differs from it.

    Raises:
        UserError: it is neither, is broken or of a class that is not known, or the model here computes something else
            and ``--allow-inexact`` was not given.
    """
    folder = path / "transformer" if (path / "model_index.json").is_file() else path
    config_json = _json(folder / "config.json")
    files = find_files(folder, f"{_WEIGHTS}.safetensors", ".safetensors")
    files = files or find_files(folder, f"{_WEIGHTS}.bin", ".bin")
    if not files:
        raise UserError(f"IN: '{folder}' holds no weights ({_WEIGHTS}.safetensors); copy the whole folder")
    stored: dict[str, Tensor] = {}
    for file in files:
        stored |= load_tensors(file)
    caption = _null_caption(path / _NULL_FILE)
    model, state = from_diffusers(config_json, stored, max_length=_max_length(caption, request.config))
    if caption is None:
        state.pop(NULL_CAPTION, None)  # the pipeline's is the features of an empty text, and not PixArt's own
    else:
        if caption.shape != state[NULL_CAPTION].shape:
            raise UserError(
                f"IN: '{_NULL_FILE}' holds features of shape {list(caption.shape)}, the model takes "
                f"{list(state[NULL_CAPTION].shape)}; copy the whole folder again"
            )
        state[NULL_CAPTION] = caption
    difference, notes = _compared(request, model, state, config_json, stored)
    known, classes = ({}, ()) if folder == path else (_known(path), _classes(path, model.num_classes))
    return contents_of(f"diffusers model '{folder}'", model, state, notes, known, classes), difference


def write_diffusers(contents: Contents, target: Path, request: Request) -> tuple[list[str], Difference | None]:
    """Write a pipeline folder, in float32, after comparing it with the model here.

    Raises:
        UserError: diffusers has no place for the model, or its class computes something else and ``--allow-inexact``
            was not given.
    """
    model, own = model_of(contents), whole_state(contents)
    config_json, state = to_diffusers(model, own)
    state = {name: value.float().contiguous() for name, value in state.items()}
    difference, notes = _compared(request, model, own, config_json, state)
    notes = [*(["weights only: this format holds no optimizer state"] if contents.has_moments else []), *notes]
    target.mkdir()
    folder = target / "transformer"
    folder.mkdir()
    _write_json(folder / "config.json", {"_diffusers_version": _VERSION, **config_json})
    write_folder(folder, _WEIGHTS, state, SHARD_BYTES)
    scheduler = _scheduler(model.family, contents.config)
    (target / "scheduler").mkdir()
    _write_json(target / "scheduler" / "scheduler_config.json", scheduler)
    pipeline, others = _PIPELINES[model.family]
    index: dict[str, Any] = {"_class_name": pipeline, "_diffusers_version": _VERSION}
    index |= {"transformer": ["diffusers", config_json["_class_name"]], "vae": ["diffusers", _VAE], **others}
    index["scheduler"] = ["diffusers", scheduler["_class_name"]]
    missing = [*others, *([] if _copy_vae(contents.config, target) else ["vae"])]
    if model.family == "dit":
        names = contents.classes or tuple(map(str, range(model.num_classes)))
        if model.num_classes != _DIT_CLASSES:
            notes.append(
                f"{pipeline} takes label {_DIT_CLASSES} as the null one and this model has {model.num_classes} "
                "classes: draw with guidance_scale=1 there"
            )
        index["id2label"] = {str(label): name for label, name in enumerate(names)}
    _write_json(target / "model_index.json", index)
    if missing:
        given = ", ".join(f"{name}=…" for name in missing)
        notes.append(f"not in the folder are {', '.join(missing)}: {pipeline}.from_pretrained(OUT, {given}) takes them")
    if model.family == "mmdit" and model.text is not None and model.text.mask:
        notes.append(f"{pipeline} lets images see the padding of a text, which is masked here")
    if model.family == "pixart":
        notes.append(_write_null_caption(contents, target))
    return notes + folded_notes(model), difference


def _compared(
    request: Request,
    model: Any,
    own: Mapping[str, Tensor],
    config_json: Mapping[str, Any],
    stored: Mapping[str, Tensor],
) -> tuple[Difference | None, list[str]]:
    """The measured difference and what to say of it. Raises UserError where it is not allowed."""
    gap = diffusers_gap(config_json)
    lacking = memory_lacking(sum(value.numel() for value in own.values()))
    difference = None if lacking else measure(model, own, config_json, stored, gap)
    told = f"not measured, since {lacking}" if difference is None else str(difference)
    name = config_json["_class_name"]
    if gap is not None:
        if not request.allow_inexact:
            raise UserError(
                f"diffusers' {name} does not compute the same as this model: {gap}; {told}; --allow-inexact converts "
                "it all the same"
            )
        return difference, [f"diffusers' {name} does not compute the same: {gap}; {told}"]
    if difference is not None and not difference.small:
        raise UserError(
            f"diffusers' {name} should compute the same as this model and does not: {told}; the installed version of "
            "diffusers is another one than is known here, so nothing is converted"
        )
    return difference, [f"diffusers' {name} computes the same: {told}"]


def _scheduler(family: str, config: RunConfig | None) -> dict[str, Any]:
    """scheduler_config.json for the run's objective; without a run, for the family's usual one."""
    flow = family == "mmdit" if config is None else config.objective.kind == "flow"
    head = {"_diffusers_version": _VERSION, "num_train_timesteps": 1000}
    if flow:
        shift = 1.0 if config is None else config.objective.shift
        return {"_class_name": "FlowMatchEulerDiscreteScheduler", **head, "shift": shift}
    v = config is not None and config.objective.prediction == "v"
    schedule = "linear" if config is None else config.objective.beta_schedule
    head |= {} if config is None else {"num_train_timesteps": config.objective.diffusion_steps}
    first, last = beta_ends(schedule, int(str(head["num_train_timesteps"])))
    head |= {"beta_start": first, "beta_end": last, "beta_schedule": schedule}
    head |= {"prediction_type": "v_prediction" if v else "epsilon"}
    if family == "dit":
        return {"_class_name": "DDIMScheduler", **head, "clip_sample": False, "set_alpha_to_one": True}
    solver = {"algorithm_type": "dpmsolver++", "solver_order": 2, "solver_type": "midpoint"}
    return {"_class_name": "DPMSolverMultistepScheduler", **head, **solver}


def _known(path: Path) -> dict[str, dict[str, Any]]:
    """What scheduler and autoencoder of a pipeline tell of the run's configuration."""
    known: dict[str, dict[str, Any]] = {}
    file = path / "scheduler" / "scheduler_config.json"
    if file.is_file():
        scheduler = _json(file)
        if "FlowMatch" in str(scheduler.get("_class_name")):
            known["objective"] = {"kind": "flow", "shift": float(scheduler.get("shift", 1.0))}
        else:
            v = scheduler.get("prediction_type") == "v_prediction"
            known["objective"] = {"kind": "ddpm", "prediction": "v" if v else "eps", **_noise(scheduler)}
    file = path / "vae" / "config.json"
    if file.is_file():
        vae = _json(file)
        known["data"] = {
            "vae": {
                "path": str(file.parent.resolve()),
                "factor": 2 ** (len(vae.get("block_out_channels", [0] * 4)) - 1),
            }
        }
    return known


def _noise(scheduler: Mapping[str, Any]) -> dict[str, Any]:
    """``objective.beta_schedule`` and ``diffusion_steps`` of a scheduler. Raises UserError for another schedule."""
    steps, name = int(scheduler.get("num_train_timesteps", 1000)), str(scheduler.get("beta_schedule", "linear"))
    ends = tuple(float(scheduler.get(key, value)) for key, value in (("beta_start", 1e-4), ("beta_end", 2e-2)))
    if (
        name not in BETA_ENDS
        or scheduler.get("trained_betas") is not None
        or any(not math.isclose(a, b, rel_tol=1e-6) for a, b in zip(ends, beta_ends(name, steps), strict=True))
    ):
        known = ", ".join(f"{kind} {first:g} to {last:g}" for kind, (first, last) in BETA_ENDS.items())
        raise UserError(
            f"IN: its scheduler has {steps} betas, {name} from {ends[0]:g} to {ends[1]:g}, but the schedules known "
            f"here are, at 1000 steps, {known}; give the transformer's folder alone, and the objective by --config"
        )
    return {"beta_schedule": name, "diffusion_steps": steps}


def _classes(path: Path, count: int) -> tuple[str, ...]:
    """Names by label, where the pipeline has all of them."""
    named = _json(path / "model_index.json").get("id2label")
    names = {int(label): str(name) for label, name in named.items()} if isinstance(named, dict) else {}
    return tuple(names[label] for label in range(count)) if set(range(count)) <= set(names) else ()


def _copy_vae(config: RunConfig | None, target: Path) -> bool:
    """Copy the run's autoencoder into the pipeline, if it is one of diffusers'; tells whether it did."""
    path = None if config is None or config.data.vae is None else config.data.vae.path
    if path is None or not (Path(path) / "config.json").is_file():
        return False
    if _json(Path(path) / "config.json").get("_class_name") != _VAE:
        return False
    shutil.copytree(path, target / "vae")
    return True


def _write_null_caption(contents: Contents, target: Path) -> str:
    from megadit.conditioning import null_caption

    text = model_of(contents).text
    assert text is not None  # held by the config: pixart has text
    caption = contents.extras.get(NULL_CAPTION)
    caption = null_caption(text.max_length, text.dim) if caption is None else caption
    write_one(target / _NULL_FILE, {_NULL_KEY: caption})
    return (
        f"the null caption has no place in the class: it is {_NULL_FILE}, to be given as negative_prompt_embeds "
        '(the pipeline would take the features of "" instead)'
    )


def _null_caption(file: Path) -> Tensor | None:
    """The null caption beside a pipeline, (length, dim), if it is there."""
    caption = load_tensors(file).get(_NULL_KEY) if file.is_file() else None
    return caption.float() if caption is not None and caption.dim() == 2 else None


def _max_length(caption: Tensor | None, config: RunConfig | None) -> int | None:
    """Tokens of a text: as many as the null caption has, or as the ``--config`` says."""
    if caption is not None:
        return len(caption)
    return None if config is None or config.model.text is None else config.model.text.max_length


def _json(file: Path) -> dict[str, Any]:
    try:
        values = parse_json(file.read_bytes())
    except OSError as error:
        raise UserError(
            f"IN: '{file}' cannot be read ({error.strerror}); give a pipeline folder, or a transformer's folder"
        ) from error
    except JsonError as error:
        raise UserError(f"IN: '{file}' {error}; correct the file, or copy it again") from error
    if not isinstance(values, dict):
        raise UserError(f"IN: '{file}' holds no keys and values; copy it again")
    return values


def _write_json(file: Path, values: Mapping[str, Any]) -> None:
    file.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
