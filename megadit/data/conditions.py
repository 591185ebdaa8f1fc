"""``Conditions``: what a run's model is conditioned on, from batches of its data, and the files that keep them."""

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
    """Texts to draw and their features, a batch of as many."""

    texts: tuple[str, ...]
    cond: Conditioning


class Conditions:
    """Labels of a class-conditional model, text features of a text-conditional one.

    null: the condition, a batch of one, that stands for none.  prompts: what a text-conditional run draws.
    """

    def __init__(
        self,
        model: ModelConfig,
        null: Conditioning | None = None,
        table: TextTable | None = None,
        prompts: Prompts | None = None,
    ) -> None:
        """``null`` of a model with classes is its null label; ``table`` serves batches that bring no text features."""
        self._text, self._table = model.text, table
        self.null = null_label(model.num_classes) if null is None else drop_unused_mask(null, model.text)
        self.prompts = None if prompts is None else Prompts(prompts.texts, drop_unused_mask(prompts.cond, model.text))

    def of(self, batch: Batch, device: torch.device | str = "cpu") -> Conditioning:
        """The conditions of a batch, on ``device``."""
        if self._text is not None:
            table = self._table
            cond = stored_text(batch.extras, self._text) if table is None else table.of(batch.captions)
            return drop_unused_mask(cond, self._text).to(device)
        if self.null is None:
            return Conditioning()
        return Conditioning(labels=batch.labels).to(device)

    def write(self, run_dir: Path) -> None:
        """Keep null text and prompts in the run directory, so that drawing needs neither data nor encoder."""
        if self._text is not None and self.null is not None:
            save_conditions(run_dir / NULL_TEXT_FILE, self.null)
        if self.prompts is not None:
            save_conditions(run_dir / PROMPTS_FILE, self.prompts.cond, self.prompts.texts)


def drop_unused_mask(cond: Conditioning, text: TextInput | None) -> Conditioning:
    """The conditions as a model is given them: without a mask where it sees padding (``model.text.mask: false``)."""
    return cond if text is None or text.mask else cond.without_mask()


def stored_text(extras: dict[str, Tensor], text: TextInput) -> Conditioning:
    """Stored features, (B, l, D) with l up to ``max_length``, as a float32 condition of that length.

    What is masked becomes zeros, unless the model attends to padding (``model.text.mask: false``).
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
    stored = _stores_text(train_set)
    encoder = _checked_encoder(config, train_set, device)
    folder = cache_folder(config.data.text.cache)
    table = None
    if not stored:
        assert encoder is not None
        captions = {images.caption(i) for images in (train_set, val_set) for i in range(len(images))}
        table = build_table(encoder, [*captions, ""], text.max_length, folder)
    null = _null_text(config, train_set, encoder, table) if null is None else null
    prompts = _prompts(config, val_set if len(val_set) else train_set, table, encoder)
    return Conditions(config.model, null, table, prompts)


def trained_null_caption(config: RunConfig, run_dir: Path | None) -> tuple[Conditioning | None, str]:
    """The null caption that the model of ``run_dir`` was trained with, and what to tell of it; None where it has none.

    It is no parameter, so that checkpoints leave it to the run's directory. One of another length cannot be used.
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

    ``held_out``: the validation part, whose captions are counted, too.  ``begun``: the run goes on, so that captions
    which were missing before are no reason to end it.

    Raises UserError that names the key, both values and the remedy.
    """
    if config.model.text is None:
        return
    if not _stores_text(train_set):
        check_captions(1.0 if begun else config.data.max_missing_captions, train_set, *held_out)
    encoder = _checked_encoder(config, train_set, "cpu")
    if encoder is not None and config.sample.prompts:
        check_lengths(encoder, config.sample.prompts, config.model.text.max_length, "sample.prompts")


def check_encoder(encoder: TextEncoder, text: TextInput) -> None:
    """Raise UserError unless the encoder's features are those that the model takes."""
    _check_sizes(text, encoder.dim, encoder.pooled_dim, "data.text.encoder gives")
    if encoder.longest is not None and text.max_length > encoder.longest:
        raise UserError(
            f"model.text.max_length: {text.max_length}, but data.text.encoder takes {encoder.longest} tokens; lower it"
        )


def _check_sizes(text: TextInput, dim: int, pooled_dim: int, who: str) -> None:
    if text.dim != dim:
        raise UserError(
            f"model.text.dim: {text.dim}, but {who} {dim} channels; set model.text.dim={dim}, or another encoder"
        )
    if text.pooled_dim and text.pooled_dim != pooled_dim:
        what = f"a pooled feature of {pooled_dim}" if pooled_dim else "no pooled feature (data.text.pooled none)"
        raise UserError(
            f"model.text.pooled_dim: {text.pooled_dim}, but {who} {what}; make them agree by model.text.pooled_dim "
            "or data.text.pooled"
        )
    if not text.pooled_dim and pooled_dim and who.startswith("data.text.encoder"):
        raise UserError(
            f"model.text.pooled_dim: 0, but data.text.pooled gives a feature of {pooled_dim} that nothing takes; set "
            f"model.text.pooled_dim={pooled_dim}, or data.text.pooled=none"
        )


def _stores_text(images: ImageSet) -> bool:
    return images.stored is not None and images.stored.text_dim > 0


def _checked_encoder(config: RunConfig, train_set: ImageSet, device: torch.device | str) -> TextEncoder | None:
    """The encoder, if this run needs one; every size held against the model."""
    text = config.model.text
    assert text is not None
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
    config: RunConfig, train_set: ImageSet, encoder: TextEncoder | None, table: TextTable | None
) -> Conditioning:
    """The features of the empty caption, or the model's own null caption, which its checkpoints hold."""
    text = config.model.text
    assert text is not None
    if family_spec(config.model.family).null_caption:
        return Conditioning(text=null_caption(text.max_length, text.dim)[None])
    extras = train_set.null_extras()
    if extras and table is None:
        return stored_text({name: value[None] for name, value in extras.items()}, text)
    if table is None:
        assert encoder is not None
        table = build_table(encoder, [""], text.max_length, cache_folder(config.data.text.cache))
    return table.of([""])


def _prompts(config: RunConfig, held_out: ImageSet, table: TextTable | None, encoder: TextEncoder | None) -> Prompts:
    """``sample.prompts``, or an even choice of held-out captions, at most one for each picture."""
    text = config.model.text
    assert text is not None
    if config.sample.prompts:
        assert encoder is not None
        texts = config.sample.prompts
        check_lengths(encoder, texts, text.max_length, "sample.prompts")
        own = build_table(encoder, texts, text.max_length, cache_folder(config.data.text.cache))
        return Prompts(texts, own.of(texts))
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


def save_conditions(path: Path, cond: Conditioning, texts: Sequence[str] = ("",)) -> None:
    """Write text, text_mask and pooled of ``texts``, as far as they are given."""
    given = {name: getattr(cond, name) for name in ("text", "text_mask", "pooled")}
    tensors = {name: value.cpu().contiguous() for name, value in given.items() if value is not None}
    save_tensors(path, tensors, {"texts": json.dumps(list(texts))})


def load_conditions(path: Path) -> tuple[Conditioning, list[str]]:
    """What ``save_conditions`` wrote. Raises UserError if the file is missing or something else."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(str(path), "pt") as file:
            names = set(file.keys()) & {"text", "text_mask", "pooled"}
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
