"""``Conditioning``: a batch of conditions as plain tensors, shared by data, objectives and models."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor

from megadit import rng


@dataclass(frozen=True)
class Conditioning:
    """One batch of conditions; a field is None where the model does not take it.

    labels: class of each sample, int64 (B,); ``num_classes`` is the null label.
    text: text features, float (B, L, D), padded to a fixed length L.
    text_mask: bool (B, L), True for tokens of ``text``, False for padding.
    pooled: one feature vector per text, float (B, P).
    text_lengths: int32 (B,), tokens of each text, where all of them stand before the padding (see ``with_lengths``).
    """

    labels: Tensor | None = None
    text: Tensor | None = None
    text_mask: Tensor | None = None
    pooled: Tensor | None = None
    text_lengths: Tensor | None = None

    @property
    def batch_size(self) -> int | None:
        """B; None where every field is None, for an unconditional model."""
        return next((value.shape[0] for value in self._tensors().values() if value is not None), None)

    def __getitem__(self, index: slice | Tensor | Sequence[int]) -> Conditioning:
        """The samples at ``index``: a slice, a list of positions, or an int64 or bool tensor."""
        if isinstance(index, int):
            raise TypeError("Conditioning takes a slice, a list or a tensor, so that the batch dimension stays")
        chosen = index if isinstance(index, slice | Tensor) else list(index)
        return self._map(lambda value: value[chosen])

    def to(self, device: torch.device | str) -> Conditioning:
        """The same conditions on ``device``, without waiting for copies to a GPU."""
        on_gpu = torch.device(device).type == "cuda"
        return self._map(lambda value: value.to(device, non_blocking=on_gpu))

    def repeat(self, times: int) -> Conditioning:
        """The batch ``times`` times, concatenated: sample b is at b, B + b, 2B + b, ..."""
        return self._map(lambda value: value.repeat(times, *[1] * (value.dim() - 1)))

    def without_mask(self) -> Conditioning:
        """The same conditions without ``text_mask``: all tokens are attended to."""
        return replace(self, text_mask=None, text_lengths=None)

    def with_lengths(self) -> Conditioning:
        """The same conditions with ``text_lengths``, by which attention needs no mask. Call it on the CPU: it reads the
        mask's values, and gives no lengths for a mask with padding before a token.
        """
        if self.text_mask is None:
            return self
        lengths = self.text_mask.sum(dim=1, dtype=torch.int32)
        positions = torch.arange(self.text_mask.shape[1], device=self.text_mask.device)
        tokens_first = torch.equal(positions < lengths[:, None], self.text_mask)
        return replace(self, text_lengths=lengths if tokens_first else None)

    def dropped(self, drop: Tensor, null: Conditioning) -> Conditioning:
        """The same conditions with ``null`` for the samples where ``drop``, bool (B,), is True.

        null: a batch of one, with every field that is set here. Where it lacks only the mask, the null text takes that
        of the text it replaces, as PixArt's null caption does. Raises ValueError where another field is missing.
        """
        changed: dict[str, Tensor | None] = {}
        for name, value in self._tensors().items():
            replacement = getattr(null, name)
            if name == "text_lengths" and replacement is None and null.text_mask is not None:
                value = None  # the null text has padding before a token
            if replacement is None and name in ("text_mask", "text_lengths") and null.text is not None:
                replacement = value
            if value is not None and replacement is None:
                raise ValueError(f"{name}: there is no null condition to take its place")
            if value is not None:
                where = drop.to(value.device).view(-1, *[1] * (value.dim() - 1))
                value = torch.where(where, replacement.to(value), value)
            changed[name] = value
        return Conditioning(**changed)

    @staticmethod
    def cat(parts: Sequence[Conditioning]) -> Conditioning:
        """The batches of ``parts`` concatenated, e.g. conditional then null for guidance.

        Raises ValueError where a field is set in some parts only, but for lengths, which are left out then.
        """
        joined: dict[str, Tensor | None] = {}
        for field in fields(Conditioning):
            values = [getattr(part, field.name) for part in parts]
            present = [value for value in values if value is not None]
            if field.name == "text_lengths" and len(present) != len(values):
                continue
            if present and len(present) != len(values):
                raise ValueError(f"{field.name}: given in some of the batches only, so they cannot be joined")
            joined[field.name] = torch.cat(present) if present else None
        return Conditioning(**joined)

    def _tensors(self) -> dict[str, Tensor | None]:
        return {field.name: getattr(self, field.name) for field in fields(self)}

    def _map(self, change: Callable[[Tensor], Tensor]) -> Conditioning:
        changed = {name: None if value is None else change(value) for name, value in self._tensors().items()}
        return Conditioning(**changed)


def checked_text(cond: Conditioning, dim: int, max_length: int | None) -> tuple[Tensor, Tensor | None]:
    """Text features (B, L, ``dim``) and mask, bool (B, L) or None, after a check of their shapes.

    ``max_length``: largest L; None: any.

    Raises ValueError for a text that is missing, too long or of other channels, or a mask or lengths of another shape.
    """
    text, mask = cond.text, cond.text_mask
    if text is None:
        raise ValueError(f"cond.text: this model is conditioned on text; give features (B, L, {dim})")
    if text.dim() != 3 or text.shape[2] != dim or (max_length is not None and text.shape[1] > max_length):
        most = "" if max_length is None else f" with at most {max_length} tokens (model.text.max_length)"
        raise ValueError(f"cond.text: {tuple(text.shape)} is not (B, L, {dim}){most}; give such features")
    if mask is not None and mask.shape != text.shape[:2]:
        raise ValueError(f"cond.text_mask: {tuple(mask.shape)} is not {tuple(text.shape[:2])}, one entry a token")
    lengths = cond.text_lengths
    if lengths is not None and (lengths.shape != text.shape[:1] or lengths.dtype != torch.int32):
        raise ValueError(f"cond.text_lengths: {lengths.dtype} {tuple(lengths.shape)} is not int32 ({len(text)},)")
    return text, None if mask is None else mask.bool()


def null_label(num_classes: int) -> Conditioning | None:
    """The null label, a batch of one; None where there are no classes."""
    return Conditioning(labels=torch.tensor([num_classes])) if num_classes else None


def null_caption(max_length: int, dim: int, device: torch.device | str | None = None) -> Tensor:
    """The default null caption, the same for all models: float32 (max_length, dim).

    Normal samples of std 1/sqrt(dim) that are never trained, as official PixArt's (PixArt_blocks.py, CaptionEmbedder),
    from a fixed key, so that training and sampling need no file for it.
    """
    return rng.normal(rng.stream_key(0, "null-caption"), (max_length, dim), device=device) / dim**0.5
