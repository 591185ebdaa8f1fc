"""``Conditions``: the model's conditions, from batches of a run's data, and their files in the run directory."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from megadit.conditioning import Conditioning, null_caption, null_label
from megadit.config.family import family_spec
from megadit.config.schema.model import ModelConfig, TextInput
from megadit.config.schema.run import RunConfig
from megadit.data.batch import Batch
from megadit.data.dataset import ImageSet, evenly_spaced
from megadit.data.text.encoders import TextEncoder, build_encoder, check_lengths
from megadit.data.text.feature_table import TextTable, build_table, cache_folder
from megadit.data.verify import check_captions
from megadit.errors import UserError, one_line
from megadit.files.file_kind import file_instead
from megadit.files.json_text import parse_json
from megadit.files.paths import save_tensors


@dataclass(frozen=True)
class Prompts:
    """Texts to sample pictures of, and their features as a batch."""

    texts: tuple[str, ...]
    cond: Conditioning


class Conditions:
    """Labels of a class-conditional model, text features of a text-conditional one.

    null: the unconditional input of guidance and dropout, a batch of one.  prompts: those of a text-conditional run.
    """

    def __init__(
        self,
        model: ModelConfig,
        null: Conditioning | None = None,
        table: TextTable | None = None,
        prompts: Prompts | None = None,
    ) -> None:
        """``null`` of a model with classes is its null label; ``table``: for batches without text features."""
        self._text, self._table = model.text, table
        self.null = null_label(model.num_classes) if null is None else for_model(null, model.text)
        self.prompts = None if prompts is None else Prompts(prompts.texts, for_model(prompts.cond, model.text))

    def of(self, batch: Batch, device: torch.device | str = "cpu") -> Conditioning:
        """The conditions of a batch, on ``device``."""
        if self._text is not None:
            table = self._table
            cond = stored_text(batch.extras, self._text) if table is None else table.of(batch.captions)
            return for_model(cond, self._text).to(device)
        if self.null is None:
            return Conditioning()
        return Conditioning(labels=batch.labels).to(device)

    def write(self, run_dir: Path) -> None:
        """Write null text and prompts into the run directory, so that sampling needs neither data nor encoder."""
        if self._text is not None and self.null is not None:
            save_conditions(run_dir / NULL_TEXT_FILE, self.null)
        if self.prompts is not None:
            save_conditions(run_dir / PROMPTS_FILE, self.prompts.cond, self.prompts.texts)


def for_model(cond: Conditioning, text: TextInput | None) -> Conditioning:
    """The conditions, on the CPU, as a model takes them: with the lengths of texts, or without their mask for one that
    attends to padding (``model.text.mask: false``).
    """
    return cond.with_lengths() if text is None or text.mask else cond.without_mask()


def stored_text(extras: dict[str, Tensor], text: TextInput) -> Conditioning:
    """Stored features, (B, l, D) with l up to ``max_length``, as a float32 condition of that length.

    Masked tokens become zeros, unless the model attends to padding (``model.text.mask: false``).
    """
    states, mask = extras["text"].float(), extras["text_mask"].bool()
    missing = text.max_length - states.shape[1]
    return Conditioning(
        text=torch.nn.functional.pad(states * mask[..., None] if text.mask else states, (0, 0, 0, missing)),
        text_mask=torch.nn.functional.pad(mask, (0, missing)),
        pooled=extras["pooled"].float() if text.pooled_dim else None,
    )


def build_conditions(
    config: RunConfig,
    train_set: ImageSet,
    val_set: ImageSet,
    device: torch.device | str = "cpu",
    *,
    null: Conditioning | None = None,
) -> Conditions:
    """The conditions of a run. Captions are encoded, once per host, unless the set stores their features.

    ``null``: the null text, where the model has one already (``trained_null_caption``).

    Raises UserError as ``check_text`` does, or where encoder or cache fail.
    """
    text = config.model.text
    if text is None:
        return Conditions(config.model)
    encoder = _checked_encoder(config, text, train_set, device)
    table = None
    if not _stores_text(train_set):
        assert encoder is not None
        captions = {images.caption(i) for images in (train_set, val_set) for i in range(len(images))}
        table = build_table(encoder, [*captions, ""], text.max_length, cache_folder(config.data.text.cache))
    null = _null_text(config, text, train_set, encoder, table) if null is None else null
    prompts = _prompts(config, text, val_set if len(val_set) else train_set, table, encoder)
    return Conditions(config.model, null, table, prompts)


def trained_null_caption(config: RunConfig, run_dir: Path | None) -> tuple[Conditioning | None, str]:
    """(null caption, note): the one that the model of ``run_dir`` was trained with; None where it has none.

    It is no parameter, so that it is stored in the run directory and not in checkpoints. It must have the length of
    ``model.text.max_length``.
    """
    text = config.model.text
    file = None if run_dir is None else run_dir / NULL_TEXT_FILE
    if not family_spec(config.model.family).null_caption or text is None or file is None or not file.is_file():
        return None, ""
    null = load_conditions(file)[0]
    shape = (1, text.max_length, text.dim)
    if null.text is None or null.text.shape != shape:
        length = 0 if null.text is None else null.text.shape[1]
        return None, (
            f"the null caption of '{file}' has {length} tokens and model.text.max_length is {text.max_length}, so the "
            "one of a new model takes its place"
        )
    if torch.equal(null.text[0].float(), null_caption(text.max_length, text.dim)):
        return None, ""
    return Conditioning(
        text=null.text.float()
    ), f"the null caption is that of '{file}', with which the model was trained"


def check_text(config: RunConfig, train_set: ImageSet, *held_out: ImageSet, begun: bool = False) -> None:
    """Refuse, before training, text that does not fit the model: stored or encoded features of other sizes, an encoder
    that is not there, captions that are missing, prompts that are too long. Loads no weights.

    ``held_out``: the validation part, whose captions are counted, too.  ``begun``: the run is resumed, so that missing
    captions, which it had before, do not end it.

    Raises UserError that names the key, both values and the remedy.
    """
    text = config.model.text
    if text is None:
        return
    if not _stores_text(train_set):
        check_captions(1.0 if begun else config.data.max_missing_captions, train_set, *held_out)
    encoder = _checked_encoder(config, text, train_set, "cpu")
    if encoder is not None and config.sample.prompts:
        check_lengths(encoder, config.sample.prompts, text.max_length, "sample.prompts")


def check_encoder(encoder: TextEncoder, text: TextInput) -> None:
    """Raise UserError unless the encoder's features are those that the model takes."""
    _check_sizes(text, encoder.dim, encoder.pooled_dim, "data.text.encoder gives")
    if encoder.longest is not None and text.max_length > encoder.longest:
        raise UserError(
            f"model.text.max_length: {text.max_length}, but data.text.encoder takes {encoder.longest} tokens; lower it"
        )


def _check_sizes(text: TextInput, dim: int, pooled_dim: int, source: str) -> None:
    """source: "data.text.encoder gives" or "NAME stores", for messages."""
    if text.dim != dim:
        raise UserError(
            f"model.text.dim: {text.dim}, but {source} {dim} channels; set model.text.dim={dim}, or another encoder"
        )
    if text.pooled_dim and text.pooled_dim != pooled_dim:
        feature = f"a pooled feature of {pooled_dim}" if pooled_dim else "no pooled feature (data.text.pooled none)"
        raise UserError(
            f"model.text.pooled_dim: {text.pooled_dim}, but {source} {feature}; make them agree by "
            "model.text.pooled_dim or data.text.pooled"
        )
    if not text.pooled_dim and pooled_dim and source.startswith("data.text.encoder"):
        raise UserError(
            f"model.text.pooled_dim: 0, but data.text.pooled gives a feature of {pooled_dim} that nothing takes; set "
            f"model.text.pooled_dim={pooled_dim}, or data.text.pooled=none"
        )


def _stores_text(images: ImageSet) -> bool:
    return images.stored is not None and images.stored.text_dim > 0


def _checked_encoder(
    config: RunConfig, text: TextInput, train_set: ImageSet, device: torch.device | str
) -> TextEncoder | None:
    """The encoder, if this run needs one. Raises UserError where any size differs from the model's."""
    facts = train_set.stored
    if facts is not None and facts.text_dim:
        _check_sizes(text, facts.text_dim, facts.pooled_dim, f"{train_set.name} stores")
        if facts.text_length > text.max_length:
            raise UserError(
                f"model.text.max_length: {text.max_length}, but {train_set.name} stores texts of up to "
                f"{facts.text_length} tokens; set model.text.max_length={facts.text_length}"
            )
        has_null = bool(family_spec(config.model.family).null_caption or train_set.null_extras())
        if has_null and not config.sample.prompts:
            return None
    encoder = build_encoder(config.data.text, device)
    check_encoder(encoder, text)
    if facts is not None and facts.text_encoder not in ("", encoder.identity):
        raise UserError(
            f"data.text.encoder: {encoder.identity}, but {train_set.name} stores features of {facts.text_encoder}; "
            "give that encoder, with which prompts must be read too"
        )
    return encoder


def _null_text(
    config: RunConfig, text: TextInput, train_set: ImageSet, encoder: TextEncoder | None, table: TextTable | None
) -> Conditioning:
    """The features of the empty caption, or the model's own null caption."""
    if family_spec(config.model.family).null_caption:
        return Conditioning(text=null_caption(text.max_length, text.dim)[None])
    extras = train_set.null_extras()
    if extras and table is None:
        return stored_text({name: value[None] for name, value in extras.items()}, text)
    if table is None:
        assert encoder is not None
        table = build_table(encoder, [""], text.max_length, cache_folder(config.data.text.cache))
    return table.of([""])


def _prompts(
    config: RunConfig, text: TextInput, held_out: ImageSet, table: TextTable | None, encoder: TextEncoder | None
) -> Prompts:
    """``sample.prompts``, or evenly spaced held-out captions, at most one for each picture."""
    if config.sample.prompts:
        assert encoder is not None
        texts = config.sample.prompts
        check_lengths(encoder, texts, text.max_length, "sample.prompts")
        table = build_table(encoder, texts, text.max_length, cache_folder(config.data.text.cache))
        return Prompts(texts, table.of(texts))
    first: dict[str, int] = {}
    for i in range(len(held_out)):
        first.setdefault(held_out.caption(i), i)
    first.pop("", None)
    chosen = evenly_spaced(list(first.items()), config.sample.count)
    texts = tuple(caption for caption, _ in chosen)
    if table is not None:
        return Prompts(texts, table.of(texts))
    extras = [held_out.extras(i) for _, i in chosen]
    return Prompts(texts, stored_text({name: torch.stack([e[name] for e in extras]) for name in extras[0]}, text))


NULL_TEXT_FILE, PROMPTS_FILE = "null_text.safetensors", "prompts.safetensors"
_PARTS = ("text", "text_mask", "pooled")


def save_conditions(path: Path, cond: Conditioning, texts: Sequence[str] = ("",)) -> None:
    """Write text, text_mask and pooled of ``texts``, as far as ``cond`` has them."""
    values = {name: getattr(cond, name) for name in _PARTS}
    tensors = {name: value.cpu().contiguous() for name, value in values.items() if value is not None}
    save_tensors(path, tensors, {"texts": json.dumps(list(texts))})


def load_conditions(path: Path) -> tuple[Conditioning, list[str]]:
    """What ``save_conditions`` wrote. Raises UserError if the file is missing or something else."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(str(path), "pt") as file:
            names = set(file.keys()) & set(_PARTS)
            texts = parse_json((file.metadata() or {})["texts"])
            if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
                raise ValueError("its texts are no list of texts")
            cond = Conditioning(**{name: file.get_tensor(name) for name in names})
    except (SafetensorError, OSError, ValueError, KeyError) as error:
        other = file_instead(path, "safetensors")
        if other is not None:
            raise UserError(f"'{path}' cannot be read: {other}") from error
        raise UserError(
            f"'{path}' is missing or damaged ({one_line(error, 120)}); start the run's training command "
            "again, which writes it"
        ) from error
    return cond, texts
