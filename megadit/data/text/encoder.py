"""``TextEncoder``: what turns texts into the features of a model's condition, whoever computes them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from megadit.conditioning import Conditioning
from megadit.errors import UserError

_PER_PASS = 64  # texts through the network at once

Progress = Callable[[int, int], None]  # texts done, texts in all


class TextEncoder(ABC):
    """A frozen text network with its tokenizer.

    dim: channels of a token's features.  pooled_dim: of the pooled feature; 0: the encoder has none.
    longest: the most tokens that the network takes; None: any number.
    """

    dim: int
    pooled_dim: int
    longest: int | None

    @property
    @abstractmethod
    def identity(self) -> str:
        """One line that changes with whatever changes the features: kind, weights, tokenizer, precision."""

    @abstractmethod
    def token_ids(self, texts: Sequence[str]) -> list[list[int]]:
        """The tokens of each text, the special ones among them, uncut; the last one ends the text."""

    @abstractmethod
    def features(
        self, texts: Sequence[str], max_length: int, progress: Progress | None = None
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Of each text in turn: states, float32 (tokens, D), and pooled, float32 (P,), on the CPU.

        A text of more than ``max_length`` tokens loses those before its last, which ends it.
        """

    def encode(self, texts: Sequence[str], max_length: int) -> Conditioning:
        """text float32 (B, max_length, D) with zeros behind each text's end, text_mask, pooled (None without), on the
        CPU.
        """
        return pad(list(self.features(texts, max_length)), max_length)


class NetworkEncoder(TextEncoder):
    """A ``TextEncoder`` that runs one network, in batches."""

    @abstractmethod
    def forward(self, ids: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """ids int64 (B, L), mask bool (B, L) on the encoder's device -> states (B, L, D), pooled (B, P), any float."""

    @property
    @abstractmethod
    def device(self) -> torch.device:
        """Where the network is."""

    @property
    @abstractmethod
    def padding(self) -> int:
        """The token behind the end of shorter texts; what it becomes is masked."""

    def features(
        self, texts: Sequence[str], max_length: int, progress: Progress | None = None
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """See ``TextEncoder``."""
        ids = [cut(own, max_length) for own in self.token_ids(texts)]
        for start in range(0, len(ids), _PER_PASS):
            yield from self._pass(ids[start : start + _PER_PASS])
            if progress is not None:
                progress(min(start + _PER_PASS, len(ids)), len(ids))

    @torch.no_grad()
    def _pass(self, batch: Sequence[list[int]]) -> list[tuple[Tensor, Tensor]]:
        width = max(map(len, batch))
        ids = torch.tensor([own + [self.padding] * (width - len(own)) for own in batch], device=self.device)
        lengths = torch.tensor([len(own) for own in batch], device=self.device)
        mask = torch.arange(width, device=self.device) < lengths[:, None]
        states, pooled = self.forward(ids, mask)
        whole = zip(batch, states.float().cpu(), pooled.float().cpu(), strict=True)
        return [(state[: len(own)], vector) for own, state, vector in whole]


def cut(ids: list[int], max_length: int) -> list[int]:
    """The first ``max_length`` tokens, the last of them being the text's own last."""
    return ids if len(ids) <= max_length else ids[: max_length - 1] + ids[-1:]


def pad(features: Sequence[tuple[Tensor, Tensor]], max_length: int) -> Conditioning:
    """Features of several texts as one batch: zeros and False behind each text's end; pooled None if it is empty."""
    states = [state for state, _ in features]
    text = states[0].new_zeros(len(states), max_length, states[0].shape[1])
    mask = torch.zeros(len(states), max_length, dtype=torch.bool)
    for row, state in enumerate(states):
        text[row, : len(state)] = state
        mask[row, : len(state)] = True
    pooled = torch.stack([vector for _, vector in features])
    return Conditioning(text=text, text_mask=mask, pooled=pooled if pooled.shape[1] else None)


def masked_mean(states: Tensor, mask: Tensor) -> Tensor:
    """The mean of each text's tokens: states (B, L, D), mask bool (B, L) -> (B, D)."""
    weights = mask[..., None].to(states)
    return (states * weights).sum(1) / weights.sum(1)


def check_lengths(encoder: TextEncoder, texts: Sequence[str], max_length: int, key: str) -> None:
    """Raise UserError for the first text, named with ``key``, that has more tokens than ``max_length``."""
    for text, ids in zip(texts, encoder.token_ids(texts), strict=True):
        if len(ids) > max_length:
            shown = text if len(text) <= 60 else text[:57] + "..."
            raise UserError(
                f"{key}: '{shown}' has {len(ids)} tokens, but model.text.max_length is {max_length}; shorten it"
            )
