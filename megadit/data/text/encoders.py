"""The text encoders: all-MiniLM-L6-v2 of its package, T5 and CLIP of local folders, and a pooled feature of CLIP's."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megadit.config.schema.data import TextSource
from megadit.data.text.encoder import NetworkEncoder, Progress, TextEncoder, masked_mean
from megadit.data.text.folders import (
    MODEL_TYPES,
    fingerprint,
    load_network,
    load_tokenizer,
    minilm_folder,
    pooled_folder,
    read_config,
    size,
    states_folder,
    tokenizer_folder,
)
from megadit.errors import UserError
from megadit.files.json_fields import Fields

_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


class FolderEncoder(NetworkEncoder):
    """A transformers network of a local folder, with transformers' tokenizer. Loaded when first used."""

    kind: str
    class_name: str
    types: tuple[str, ...]

    def __init__(self, folder: Path, key: str, device: torch.device | str = "cpu", precision: str = "fp32") -> None:
        """Read the configuration only. Raises UserError, naming ``key``, where it is not such a model's."""
        self.folder, self.key, self.precision = folder.resolve(), key, precision
        self.config = read_config(self.folder, key, self.types)
        self._device = torch.device(device)
        self._network: Any = None
        self._tokenizer: Any = None

    @property
    def identity(self) -> str:
        return f"{self.kind}:{fingerprint(self.folder)}:{self.precision}"

    @property
    def device(self) -> torch.device:
        return self._device

    @property
    def network(self) -> Any:
        """The network on its device. Raises UserError if it does not load."""
        if self._network is None:
            network = load_network(self.folder, self.class_name, self.key, _DTYPES[self.precision])
            self._network = network.to(self._device)
        return self._network

    @property
    def tokenizer(self) -> Any:
        """The tokenizer. Raises UserError if it does not load."""
        if self._tokenizer is None:
            self._tokenizer = self._load_tokenizer()
        return self._tokenizer

    def _load_tokenizer(self) -> Any:
        return load_tokenizer(self.folder, self.key)

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

    def __init__(self, folder: Path | None, device: torch.device | str = "cpu", precision: str = "fp32") -> None:
        super().__init__(folder or minilm_folder(), "data.text.path", device, precision)
        self.dim = self.pooled_dim = size(self.config, "hidden_size")
        self.longest = size(self.config, "max_position_embeddings")

    def forward(self, ids: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        states = self.network(input_ids=ids, attention_mask=mask.long()).last_hidden_state
        return states, masked_mean(states, mask)


class T5TextEncoder(FolderEncoder):
    """The encoder of a T5, as PixArt-α uses T5-XXL: last hidden states, </s> at the end, no prefix.

    Pooled feature: the masked mean. ``spiece.model`` is read by sentencepiece itself, since transformers' T5 tokenizer
    needs protobuf for it, and without that makes one of four tokens.
    """

    kind, class_name, types = "t5", "T5EncoderModel", MODEL_TYPES["t5"]

    def __init__(self, folder: Path, device: torch.device | str = "cpu", precision: str = "fp32") -> None:
        super().__init__(folder, "data.text.path", device, precision)
        others = {"mt5": "MT5EncoderModel", "umt5": "UMT5EncoderModel"}
        self.class_name = others.get(self.config.text("model_type"), self.class_name)
        # of spiece.model, which does not name them
        self._pad, self._end = (_token(self.config, *pair) for pair in (("pad_token_id", 0), ("eos_token_id", 1)))
        self.dim = self.pooled_dim = size(self.config, "d_model")
        self.longest = None  # positions are relative

    def _load_tokenizer(self) -> Any:
        path = tokenizer_folder(self.folder) / "spiece.model"
        if not path.is_file():
            return super()._load_tokenizer()
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

    def __init__(
        self, folder: Path, device: torch.device | str = "cpu", precision: str = "fp32", key: str = "data.text.path"
    ) -> None:
        super().__init__(folder, key, device, precision)
        # a whole CLIP's folder keeps the text model's settings in a part of their own
        text = self.config.section("text_config", {}, null=True)
        self.dim, self.longest = (
            size(text, name, size(self.config, name, default))
            for name, default in (("hidden_size", 512), ("max_position_embeddings", 77))
        )
        self.pooled_dim = size(self.config, "projection_dim", size(text, "projection_dim", 512))

    def forward(self, ids: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        output = self.network(input_ids=ids, attention_mask=mask.long(), output_hidden_states=True)
        return output.hidden_states[-2], output.text_embeds


def _token(config: Fields, key: str, default: int) -> int:
    """The number of a special token; T5's own where none is named. Raises UserError for what is no number."""
    value = config.whole(key, None, most=2**31, null=True)
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
        self, texts: Sequence[str], max_length: int, progress: Progress | None = None
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """See ``TextEncoder``. The other encoder reads as many of a text's tokens as it takes (CLIP: 77)."""
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
    states = _states_encoder(source, device)
    if source.pooled == "same":
        return states
    pooled = None
    if source.pooled == "clip":
        pooled = CLIPTextEncoder(pooled_folder(source), device, source.precision, "data.text.pooled_path")
    return WithPooled(states, pooled)


def _states_encoder(source: TextSource, device: torch.device | str) -> FolderEncoder:
    kinds: dict[str, type[MiniLMEncoder | T5TextEncoder | CLIPTextEncoder]] = {
        "minilm": MiniLMEncoder,
        "t5": T5TextEncoder,
        "clip": CLIPTextEncoder,
    }
    return kinds[source.encoder](states_folder(source), device, source.precision)
