"""``TextEncoder``: from texts to the features of a model's condition; and the encoders.

all-MiniLM-L6-v2 of its package, T5 and CLIP of local folders, and a pooled feature of CLIP's.
"""

from __future__ import annotations

import functools
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megadit.conditioning import Conditioning
from megadit.config.schema.data import TextSource
from megadit.data.dataset import ProgressCallback
from megadit.data.text import folders
from megadit.data.text.folders import MODEL_TYPES, size
from megadit.errors import UserError
from megadit.files.json_fields import Fields

_PER_PASS = 64  # texts through the network at once


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
        self, texts: Sequence[str], max_length: int, progress: ProgressCallback | None = None
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Of each text in turn: states, float32 (tokens, D), and pooled, float32 (P,), on the CPU.

        Longer texts are cut to ``max_length`` tokens, of which the last is the end token.
        """

    def encode(self, texts: Sequence[str], max_length: int) -> Conditioning:
        """text float32 (B, max_length, D) with zeros behind each text's end, text_mask, pooled (None without), on the
        CPU.
        """
        return pad(list(self.features(texts, max_length)), max_length)


class NetworkEncoder(TextEncoder):
    """A ``TextEncoder`` that runs one network, in batches. device: where the network is."""

    device: torch.device

    @abstractmethod
    def forward(self, ids: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """ids int64 (B, L), mask bool (B, L) on the encoder's device -> states (B, L, D), pooled (B, P), any float."""

    @property
    @abstractmethod
    def padding(self) -> int:
        """The token after the end of shorter texts; its features are masked."""

    def features(
        self, texts: Sequence[str], max_length: int, progress: ProgressCallback | None = None
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """See ``TextEncoder``."""
        ids = [cut(tokens, max_length) for tokens in self.token_ids(texts)]
        for start in range(0, len(ids), _PER_PASS):
            yield from self._pass(ids[start : start + _PER_PASS])
            if progress is not None:
                progress(min(start + _PER_PASS, len(ids)), len(ids))

    @torch.no_grad()
    def _pass(self, batch: Sequence[list[int]]) -> list[tuple[Tensor, Tensor]]:
        width = max(map(len, batch))
        ids = torch.tensor([tokens + [self.padding] * (width - len(tokens)) for tokens in batch], device=self.device)
        lengths = torch.tensor([len(tokens) for tokens in batch], device=self.device)
        mask = torch.arange(width, device=self.device) < lengths[:, None]
        states, pooled = self.forward(ids, mask)
        padded = zip(batch, states.float().cpu(), pooled.float().cpu(), strict=True)
        return [(state[: len(tokens)], vector) for tokens, state, vector in padded]


def cut(ids: list[int], max_length: int) -> list[int]:
    """At most ``max_length`` tokens: the first ones, and the end token of the text."""
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


_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


class FolderEncoder(NetworkEncoder):
    """A transformers network of a local folder, with transformers' tokenizer. Loaded when first used."""

    kind: str
    class_name: str
    types: tuple[str, ...]

    def __init__(
        self, folder: Path, device: torch.device | str = "cpu", precision: str = "fp32", key: str = "data.text.path"
    ) -> None:
        """Read the configuration only. Raises UserError, naming ``key``, where it is not such a model's."""
        self.folder, self.key, self.precision = folder.resolve(), key, precision
        self.config = folders.read_config(self.folder, key, self.types)
        self.device = torch.device(device)
        self.dim, self.pooled_dim, self.longest = self._sizes()

    @abstractmethod
    def _sizes(self) -> tuple[int, int, int | None]:
        """dim, pooled_dim and longest of the configuration. Raises UserError for values that are none."""

    @property
    def identity(self) -> str:
        return f"{self.kind}:{folders.fingerprint(self.folder)}:{self.precision}"

    @functools.cached_property
    def network(self) -> Any:
        """The network on its device. Raises UserError if it does not load."""
        network = folders.load_network(self.folder, self.class_name, self.key, _DTYPES[self.precision])
        return network.to(self.device)

    @functools.cached_property
    def tokenizer(self) -> Any:
        """The tokenizer. Raises UserError if it does not load."""
        return folders.load_tokenizer(self.folder, self.key)

    @property
    def padding(self) -> int:
        return int(self.tokenizer.pad_token_id or 0)

    def token_ids(self, texts: Sequence[str]) -> list[list[int]]:
        # verbose: transformers' own warning about length; ours is an error or counts
        return [list(ids) for ids in self.tokenizer(list(texts), verbose=False)["input_ids"]]


class MiniLMEncoder(FolderEncoder):
    """all-MiniLM-L6-v2, a BERT of 6 layers: the last hidden states, and as pooled feature their masked mean.

    (sentence-transformers normalizes that mean; here it keeps its length.)
    """

    kind, class_name, types = "minilm", "BertModel", MODEL_TYPES["minilm"]

    def _sizes(self) -> tuple[int, int, int | None]:
        dim = size(self.config, "hidden_size")
        return dim, dim, size(self.config, "max_position_embeddings")

    def forward(self, ids: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        states = self.network(input_ids=ids, attention_mask=mask.long()).last_hidden_state
        return states, masked_mean(states, mask)


class T5TextEncoder(FolderEncoder):
    """The encoder of a T5, as PixArt-α uses T5-XXL: last hidden states, </s> at the end, no prefix.

    Pooled feature: the masked mean. ``spiece.model`` is read by sentencepiece itself, since transformers' T5 tokenizer
    needs protobuf for it, and without that makes one of four tokens.
    """

    kind, class_name, types = "t5", "T5EncoderModel", MODEL_TYPES["t5"]

    def _sizes(self) -> tuple[int, int, int | None]:
        others = {"mt5": "MT5EncoderModel", "umt5": "UMT5EncoderModel"}
        self.class_name = others.get(self.config.text("model_type"), self.class_name)
        # of spiece.model, which does not name them
        self._pad, self._end = (_token(self.config, *pair) for pair in (("pad_token_id", 0), ("eos_token_id", 1)))
        dim = size(self.config, "d_model")
        return dim, dim, None  # positions are relative

    @functools.cached_property
    def tokenizer(self) -> Any:
        path = folders.tokenizer_folder(self.folder) / "spiece.model"
        if not path.is_file():
            return folders.load_tokenizer(self.folder, self.key)
        from sentencepiece import SentencePieceProcessor

        try:
            return SentencePieceProcessor(model_file=str(path))
        except (RuntimeError, OSError) as error:
            raise UserError(f"{self.key}: '{path}' is not a sentencepiece model; fetch it again") from error

    @property
    def _by_pieces(self) -> bool:
        return not hasattr(self.tokenizer, "pad_token_id")

    @property
    def padding(self) -> int:
        return self._pad if self._by_pieces else super().padding

    def token_ids(self, texts: Sequence[str]) -> list[list[int]]:
        if not self._by_pieces:
            return super().token_ids(texts)
        return [[*ids, self._end] for ids in self.tokenizer.encode(list(texts))]

    def forward(self, ids: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        states = self.network(input_ids=ids, attention_mask=mask.long()).last_hidden_state
        return states, masked_mean(states.float(), mask)


class CLIPTextEncoder(FolderEncoder):
    """A CLIP text model with projection: the last but one hidden states, as Stable Diffusion 3 takes them.

    Pooled feature: ``text_embeds``, the projection of the end token's last state.

    Attention is causal, so tokens behind the end change nothing before it; they are masked here, while Stable
    Diffusion 3 passes on the states of all 77 positions.
    """

    kind, class_name, types = "clip", "CLIPTextModelWithProjection", MODEL_TYPES["clip"]

    def _sizes(self) -> tuple[int, int, int | None]:
        text = self.config.section("text_config", {}, null=True)  # of a whole CLIP's folder
        dim, longest = (
            size(text, name, size(self.config, name, default))
            for name, default in (("hidden_size", 512), ("max_position_embeddings", 77))
        )
        return dim, size(self.config, "projection_dim", size(text, "projection_dim", 512)), longest

    def forward(self, ids: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        output = self.network(input_ids=ids, attention_mask=mask.long(), output_hidden_states=True)
        return output.hidden_states[-2], output.text_embeds


def _token(config: Fields, key: str, default: int) -> int:
    """The id of a special token, by default T5's own. Raises UserError for what is no number."""
    value = config.integer(key, None, most=2**31, null=True)
    return default if value is None else value


class WithPooled(TextEncoder):
    """The states of one encoder with the pooled feature of another, or with none."""

    def __init__(self, states: TextEncoder, pooled: CLIPTextEncoder | None) -> None:
        self._states, self._pooled = states, pooled
        self.dim, self.longest = states.dim, states.longest
        self.pooled_dim = 0 if pooled is None else pooled.pooled_dim

    @property
    def identity(self) -> str:
        return f"{self._states.identity} pooled {'none' if self._pooled is None else self._pooled.identity}"

    def token_ids(self, texts: Sequence[str]) -> list[list[int]]:
        return self._states.token_ids(texts)

    def features(
        self, texts: Sequence[str], max_length: int, progress: ProgressCallback | None = None
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """See ``TextEncoder``. The other encoder cuts texts to its own limit (CLIP: 77 tokens)."""
        states = self._states.features(texts, max_length, progress)
        if self._pooled is None:
            yield from ((state, state.new_zeros(0)) for state, _ in states)
            return
        others = self._pooled.features(texts, self._pooled.longest or max_length)
        for (state, _), (_, vector) in zip(states, others, strict=True):
            yield state, vector


def build_encoder(source: TextSource, device: torch.device | str = "cpu") -> TextEncoder:
    """The encoder of ``data.text``. Reads configurations only; weights are loaded by the first text.

    Raises UserError, naming the key, where a folder or package is missing or holds something else.
    """
    kinds: dict[str, type[MiniLMEncoder | T5TextEncoder | CLIPTextEncoder]] = {
        "minilm": MiniLMEncoder,
        "t5": T5TextEncoder,
        "clip": CLIPTextEncoder,
    }
    states = kinds[source.encoder](folders.states_folder(source), device, source.precision)
    if source.pooled == "same":
        return states
    pooled = None
    if source.pooled == "clip":
        pooled = CLIPTextEncoder(folders.pooled_folder(source), device, source.precision, "data.text.pooled_path")
    return WithPooled(states, pooled)
