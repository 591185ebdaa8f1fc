"""Pipeline folders of diffusers: ``model_index.json``, ``transformer/`` and ``scheduler/``, in and out.

A bare transformer folder (``config.json`` and its weights) is read too. Autoencoders and text encoders are not
converted: a pipeline gets them when it is loaded, beside an autoencoder that the run itself names.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from megadit.config.family import family_spec
from megadit.config.schema.model import ModelConfig
from megadit.config.schema.run import ObjectiveConfig, RunConfig
from megadit.convert.contents import Contents, ValueCheck
from megadit.convert.diffusers.difference import Difference, measure, not_measured
from megadit.convert.diffusers.index import (
    CONFIG,
    INDEX,
    SCHEDULER,
    SCHEDULER_CONFIG,
    SIGMA,
    TRANSFORMER,
    VAE,
    Pipeline,
    class_names,
    find_pipeline,
    left_out,
)
from megadit.convert.diffusers.schedulers import (
    objective_gap,
    read_objective,
    scheduler_json,
    scheduler_notes,
)
from megadit.convert.family_adapters import diffusers_gap, from_diffusers, to_diffusers
from megadit.convert.official import contents_of, folded_notes, model_of
from megadit.convert.request import Request
from megadit.convert.state_dicts import load_tensors, load_weight_files, write_folder, write_one
from megadit.data.codecs.folder import VAE_CLASS, read_facts
from megadit.errors import UserError
from megadit.files.json_fields import Fields
from megadit.files.weight_files import find_weights
from megadit.models.conversion import conversion_of, diffusers_of
from megadit.models.conversion.diffusers_class import LEGACY, class_config

SHARD_BYTES = 10 * 10**9  # above which diffusers' own save_pretrained cuts a model
_WEIGHTS = "diffusion_pytorch_model"
_VERSION = "0.30.0"  # of diffusers: all three classes and schedulers exist since then as they are written here
_NAME_ONE = "leave one of them in the folder"
_NULL_KEY = "null_caption"  # of a safetensors file beside the pipeline
_NULL_FILE = f"{_NULL_KEY}.safetensors"
_SIGMA_LENGTH = 300  # tokens of PixArt-Sigma's captions, which its transformer does not tell from PixArt-alpha's


def read_diffusers(path: Path, request: Request, check: ValueCheck) -> Contents:
    """The transformer of a pipeline folder, or of a folder of its own, and how far the model here differs from it.

    Raises:
        UserError: it is neither, is broken or of a class that is not known, asks for something that a run here cannot
            be configured for, or the model here computes something else and ``--allow-inexact`` was not given.
    """
    pipeline = find_pipeline(path)
    folder = pipeline.transformer
    fields = Fields.of_file(folder / CONFIG, "IN", "copy the whole folder again")
    files = find_weights(folder, _WEIGHTS, [".safetensors"], _NAME_ONE)
    files = files or find_weights(folder, _WEIGHTS, [".bin"], _NAME_ONE)
    if files is None:
        raise UserError(f"IN: '{folder}' holds no weights ({_WEIGHTS}.safetensors); copy the whole folder")
    config_json, notes = class_config(fields)
    named = pipeline.component(TRANSFORMER)
    if named not in (None, LEGACY, config_json["_class_name"]):
        raise UserError(
            f"{fields.where} is of a {config_json['_class_name']}, but {INDEX} names a {named}; copy the whole folder "
            "again, or give this one alone"
        )
    stored, shard_notes = load_weight_files(files, check)
    caption = _null_caption(pipeline, check)
    length = _max_length(caption, pipeline, request.config)
    model, state = from_diffusers(config_json, stored, max_length=length, where=fields.where)
    name = family_spec(model.family).null_caption
    if caption is None:
        state.pop(name, None)  # the pipeline's is the features of an empty text, and not the model's own
    elif name in state:
        if caption.shape != state[name].shape:
            raise UserError(
                f"IN: '{_NULL_FILE}' holds features of shape {list(caption.shape)}, the model takes "
                f"{list(state[name].shape)}; copy the whole folder again"
            )
        state[name] = caption
    known, known_notes = _known(pipeline, model, request)
    classes, class_notes = class_names(pipeline, model.num_classes)
    difference, comparison_notes = _compared(request, model, state, config_json, stored, check)
    all_notes = (*shard_notes, *comparison_notes, *notes, *known_notes, *class_notes, *left_out(pipeline))
    description = f"diffusers model '{folder}'"
    return contents_of(description, model, state, notes=all_notes, known=known, classes=classes, difference=difference)


def write_diffusers(
    contents: Contents, target: Path, request: Request, check: ValueCheck
) -> tuple[list[str], Difference | None]:
    """Write a pipeline folder, in float32, after comparing it with the model here.

    Raises:
        UserError: diffusers has no place for the model, or its class computes something else and ``--allow-inexact``
            was not given.
    """
    model, weights = model_of(contents), contents.state_dict()
    objective = _objective(contents, model)
    inexact = objective_gap(objective)
    if inexact is not None and not request.allow_inexact:
        raise UserError(f"{inexact}; --allow-inexact converts it all the same")
    config_json, state = to_diffusers(model, weights)
    state = {name: value.float().contiguous() for name, value in state.items()}
    difference, notes = _compared(request, model, weights, config_json, state, check)
    notes = [*contents.weights_only_notes, *notes]
    notes += [] if inexact is None else [inexact]
    notes += scheduler_notes(model.family, objective)
    target.mkdir()
    folder = target / TRANSFORMER
    folder.mkdir()
    _write_json(folder / CONFIG, {"_diffusers_version": _VERSION, **config_json})
    write_folder(folder, _WEIGHTS, state, SHARD_BYTES)
    scheduler = {"_diffusers_version": _VERSION, **scheduler_json(model.family, objective)}
    (target / SCHEDULER).mkdir()
    _write_json(target / SCHEDULER / SCHEDULER_CONFIG, scheduler)
    diffusers = diffusers_of(model.family)
    pipeline, others = diffusers.pipeline, diffusers.components
    index: dict[str, Any] = {"_class_name": pipeline, "_diffusers_version": _VERSION}
    index |= {TRANSFORMER: ["diffusers", config_json["_class_name"]], VAE: ["diffusers", VAE_CLASS], **others}
    index[SCHEDULER] = ["diffusers", scheduler["_class_name"]]
    missing = [*others, *([] if _copy_vae(contents, target) else [VAE])]
    if diffusers.null_label is not None:
        names = contents.classes or tuple(map(str, range(model.num_classes)))
        if model.num_classes != diffusers.null_label:
            notes.append(
                f"{pipeline} takes label {diffusers.null_label} as the null one and this model has {model.num_classes} "
                "classes: draw with guidance_scale=1 there"
            )
        index["id2label"] = {str(label): name for label, name in enumerate(names)}
    _write_json(target / INDEX, index)
    if missing:
        arguments = ", ".join(f"{name}=…" for name in missing)
        notes.append(
            f"not in the folder are {', '.join(missing)}: {pipeline}.from_pretrained(OUT, {arguments}) takes them"
        )
    if diffusers.attends_to_padding and model.text is not None and model.text.mask:
        notes.append(f"{pipeline} lets images see the padding of a text, which is masked here")
    if family_spec(model.family).null_caption:
        notes.append(_write_null_caption(contents, target))
    return notes + folded_notes(model), difference


def _compared(
    request: Request,
    model: ModelConfig,
    weights: Mapping[str, Tensor],
    config_json: Mapping[str, Any],
    stored: Mapping[str, Tensor],
    check: ValueCheck,
) -> tuple[Difference | None, list[str]]:
    """The measured difference and what to say of it. Raises UserError where it is not allowed."""
    gap = diffusers_gap(config_json)
    unmeasured = not_measured(model, max(sum(value.numel() for value in each.values()) for each in (weights, stored)))
    difference = None if unmeasured else measure(model, weights, config_json, stored, gap)
    if difference is None and not unmeasured:
        check.notes(request.allow_nonfinite)  # refuses, and names the weights
        unmeasured = "outputs are not finite numbers"
        if not request.allow_nonfinite:
            raise UserError(
                f"IN: the model's {unmeasured} for random inputs, though its weights are: they are too large; give a "
                "checkpoint that is sound, or convert it as it is with --allow-nonfinite"
            )
    measured = f"not measured, since {unmeasured}" if difference is None else str(difference)
    name = config_json["_class_name"]
    if gap is not None:
        if not request.allow_inexact:
            raise UserError(
                f"diffusers' {name} does not compute the same as this model: {gap}; {measured}; --allow-inexact "
                "converts it all the same"
            )
        return difference, [f"diffusers' {name} does not compute the same: {gap}; {measured}"]
    if difference is not None and not difference.small:
        raise UserError(
            f"diffusers' {name} should compute the same as this model and does not: {measured}; the installed version "
            "of diffusers is another one than is known here, so nothing is converted"
        )
    return difference, [f"diffusers' {name} computes the same: {measured}"]


def _objective(contents: Contents, model: ModelConfig) -> ObjectiveConfig:
    """The objective of the run, else the one that the source names, else the family's usual one."""
    if contents.config is not None:
        return contents.config.objective
    usual = conversion_of(model.family).defaults(model)["objective"]
    return ObjectiveConfig.model_validate(contents.known.get("objective", usual))


def _known(pipeline: Pipeline, model: ModelConfig, request: Request) -> tuple[dict[str, dict[str, Any]], list[str]]:
    """Config keys that a pipeline's scheduler and autoencoder determine, by section, and notes on them."""
    known: dict[str, dict[str, Any]] = {}
    notes: list[str] = []
    if pipeline.index is None:
        return known, notes
    scheduler = pipeline.config_of(SCHEDULER, SCHEDULER_CONFIG)
    if scheduler is None:
        notes.append("the pipeline has no scheduler: objective.* is what is usual for its family")
    else:
        name, stated_class = pipeline.component(SCHEDULER), scheduler.text("_class_name", "")
        assert name is not None
        if stated_class not in ("", name):
            notes.append(f"its scheduler is a {name} as {INDEX} says and diffusers loads it, not a {stated_class}")
        known["objective"], more = read_objective(scheduler, name, model, allow_inexact=request.allow_inexact)
        notes += [*more, *_overruled(known["objective"], request.config)]
    vae = pipeline.component(VAE)
    folder = pipeline.folder / VAE
    if vae is not None and (folder / CONFIG).is_file():
        facts = read_facts(folder, "IN") if vae == VAE_CLASS else None
        if facts is None:
            notes.append(f"its autoencoder is a {vae}, which is not read here: data.vae.* is yours to give")
        elif facts.channels != model.in_channels:
            notes.append(
                f"its autoencoder has latents of {facts.channels} channels, the transformer takes {model.in_channels}: "
                "data.vae.* is yours to give"
            )
        else:
            known["data"] = {"vae": {"path": str(folder.resolve()), "factor": facts.factor}}
    return known, notes


def _overruled(objective: Mapping[str, Any], config: RunConfig | None) -> list[str]:
    """A note on what a ``--config`` says otherwise than the pipeline's scheduler."""
    configured = {} if config is None else config.objective.model_dump()
    pairs = [
        f"objective.{key} is {configured[key]} and not {value}"
        for key, value in objective.items()
        if configured.get(key, value) != value
    ]
    return [f"as --config says, {', '.join(pairs)} as in the pipeline's scheduler"] if pairs else []


def _copy_vae(contents: Contents, target: Path) -> bool:
    """Copy the run's autoencoder into the pipeline, if it is one of diffusers'. Returns whether it did."""
    config = contents.config
    if config is not None:
        path = None if config.data.vae is None else config.data.vae.path
    else:
        path = contents.known.get("data", {}).get("vae", {}).get("path")
    if path is None or not (Path(path) / CONFIG).is_file():
        return False
    if Fields.of_file(Path(path) / CONFIG, "data.vae.path").raw("_class_name") != VAE_CLASS:
        return False
    shutil.copytree(path, target / VAE)
    return True


def _write_null_caption(contents: Contents, target: Path) -> str:
    from megadit.conditioning import null_caption

    model = model_of(contents)
    text = model.text
    assert text is not None  # of which there is a null caption
    caption = contents.extras.get(family_spec(model.family).null_caption)
    caption = null_caption(text.max_length, text.dim) if caption is None else caption
    write_one(target / _NULL_FILE, {_NULL_KEY: caption})
    return (
        f"the null caption has no place in the class: it is {_NULL_FILE}, to be given as negative_prompt_embeds "
        '(the pipeline would take the features of "" instead)'
    )


def _null_caption(pipeline: Pipeline, check: ValueCheck) -> Tensor | None:
    """The null caption beside a pipeline's model_index.json, (length, dim), if it is there.

    Raises:
        UserError: the file is there and holds no such features.
    """
    folder = pipeline.folder
    folder = folder.parent if pipeline.index is None and folder.name == TRANSFORMER else folder
    file = folder / _NULL_FILE
    if not file.is_file():
        return None
    caption = check.watched(load_tensors(file)).get(_NULL_KEY)
    if caption is None or caption.dim() != 2 or not caption.is_floating_point() or not caption.numel():
        raise UserError(f"IN: '{file}' holds no {_NULL_KEY} of shape [tokens, channels]; copy the whole folder again")
    return caption.float()


def _max_length(caption: Tensor | None, pipeline: Pipeline, config: RunConfig | None) -> int | None:
    """Tokens of a text: as many as the null caption has, as the ``--config`` says, or as the pipeline takes."""
    if caption is not None:
        return len(caption)
    if config is not None and config.model.text is not None:
        return config.model.text.max_length
    return _SIGMA_LENGTH if pipeline.name == SIGMA else None


def _write_json(file: Path, values: Mapping[str, Any]) -> None:
    file.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
