"""The emoji-clip score: how well pictures of emoji go with their texts, by encoders that any machine has.

It is CLIP in small (Radford et al., arXiv 2103.00020): a linear head on frozen EfficientNet-Lite0 features of the
picture and one on frozen all-MiniLM-L6-v2 features of the text, trained on the training part of the emoji set to find
each other, every picture once as it is and once roughened, since samples of small models are blocky and noisy.
It knows 1,800 emoji and nothing else. Its numbers compare pictures with one another; they are not CLIP scores and must
not be called so.
"""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from megadit import rng
from megadit.config.schema.data import DataConfig, TextSource
from megadit.data import build_datasets
from megadit.data.batch import scale_images
from megadit.data.dataset import ImageSet, stack_images
from megadit.data.features.encoders import load_efficientnet, preprocessed, resized
from megadit.data.text.encoders import build_encoder
from megadit.errors import UserError
from megadit.files.paths import refuse_unwritable, save_tensors, user_cache

_SIDE = 64  # pixels to which pictures are enlarged for the image encoder
_WIDTH = 256  # channels of the space in which pictures and texts meet
# More steps fit the training pairs and find fewer of the unseen ones.
_STEPS, _BATCH, _LR, _DECAY, _TEMPERATURE = 100, 256, 1e-3, 0.1, 0.05
_BLOCK, _NOISE = 4, 24.0  # of roughened pictures: side of flattened blocks in pixels, noise in grey levels
_VERSION = 2


@dataclass(frozen=True)
class EmojiClipScore:
    """Cosines, averaged over pictures; ``shuffled`` against every other text of the list.

    margin: matched - shuffled.  margin_error: its standard error over pictures.  retrieval: share of pictures whose
    own text is the nearest of the distinct texts; ``chance`` is what guessing gives.
    """

    matched: float
    shuffled: float
    margin: float
    margin_error: float
    retrieval: float
    chance: float
    pictures: int
    texts: int


@dataclass(frozen=True)
class EmojiClip:
    """The two heads with the means and scales of their inputs."""

    tensors: dict[str, Tensor]

    def pictures(self, images: Tensor) -> Tensor:
        """uint8 (B, 3 or 1, H, W) -> unit vectors float32 (B, 256)."""
        return _embedded(image_features(images), self.tensors, "image")

    def texts(self, texts: Sequence[str]) -> Tensor:
        """Texts -> unit vectors float32 (B, 256)."""
        return _embedded(text_features(texts), self.tensors, "text")

    def score(self, images: Tensor, texts: Sequence[str]) -> EmojiClipScore:
        """images: uint8 (N, C, H, W).  texts: picture i shows texts[i mod K]. At least two texts must differ."""
        distinct = sorted(set(texts))
        if len(distinct) < 2:
            raise UserError("--prompts: hold one text only; the score compares a picture's own text with others")
        targets = torch.tensor([distinct.index(texts[i % len(texts)]) for i in range(len(images))])
        cosines = self.pictures(images) @ self.texts(distinct).T
        matched = cosines.gather(1, targets[:, None])[:, 0]
        others = (cosines.sum(1) - matched) / (len(distinct) - 1)
        margin = matched - others
        return EmojiClipScore(
            matched=matched.mean().item(),
            shuffled=others.mean().item(),
            margin=margin.mean().item(),
            margin_error=(margin.std() / len(margin) ** 0.5).item() if len(margin) > 1 else float("nan"),
            retrieval=(cosines.argmax(1) == targets).float().mean().item(),
            chance=1 / len(distinct),
            pictures=len(images),
            texts=len(distinct),
        )


@torch.no_grad()
def image_features(images: Tensor) -> Tensor:
    """EfficientNet-Lite0's last features, averaged over the picture: uint8 (B, C, H, W) -> float32 (B, 1280)."""
    network = load_efficientnet()
    parts = []
    for part in images.expand(-1, 3, -1, -1).split(64):
        grid = network.extract_features(preprocessed(resized(scale_images(part), _SIDE)))
        parts.append(grid.mean((2, 3)))
    return torch.cat(parts)


def roughened(images: Tensor) -> Tensor:
    """Pictures uint8 (B, C, H, W), each faded by a share of its own into flat blocks and noise."""
    exact = images.float()
    blocks = F.interpolate(exact, size=max(1, images.shape[-1] // _BLOCK), mode="area")
    flat = F.interpolate(blocks, size=images.shape[-1], mode="nearest")
    noise = _NOISE * rng.normal(rng.stream_key(0, "emoji-clip", "noise"), exact.shape)
    share = rng.uniform(rng.stream_key(0, "emoji-clip", "share"), (len(images), 1, 1, 1))
    return torch.lerp(exact, flat + noise, share).clamp(0, 255).to(torch.uint8)


def text_features(texts: Sequence[str]) -> Tensor:
    """all-MiniLM-L6-v2's mean of the states: float32 (B, 384)."""
    pooled = build_encoder(TextSource(encoder="minilm", pooled="same")).encode(list(texts), 64).pooled
    assert pooled is not None
    return pooled


def load_emoji_clip(image_size: int) -> EmojiClip:
    """The heads for pictures of ``image_size`` pixels: read from the cache, or trained in a minute or two and kept.

    Raises UserError where a package is missing or the cache cannot be written.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    settings = (_VERSION, _SIDE, _BLOCK, _NOISE, _WIDTH, _STEPS, _BATCH, _LR, _DECAY, _TEMPERATURE, image_size)
    encoder = build_encoder(TextSource(encoder="minilm", pooled="same")).identity
    name = hashlib.sha256(repr((settings, encoder)).encode()).hexdigest()[:16]
    path = user_cache() / "emoji-clip" / f"{name}.safetensors"
    if path.is_file():
        try:
            return EmojiClip(load_file(str(path)))
        except (SafetensorError, OSError):
            print(f"'{path}' is damaged; the heads are trained again", file=sys.stderr)
    train, held_out = build_datasets(DataConfig(image_size=image_size, condition="text"))
    print("emoji-clip: features of the emoji set, then its two heads: a minute or two, once", file=sys.stderr)
    model = EmojiClip(train_heads(*_features(train)))
    unseen = model.score(stack_images(held_out, range(len(held_out))), _captions(held_out))
    print(
        f"emoji-clip: real pictures held out, {unseen.pictures}: matched {unseen.matched:.3f}, shuffled "
        f"{unseen.shuffled:.3f}, retrieval {unseen.retrieval:.2f}",
        file=sys.stderr,
    )
    with refuse_unwritable("$XDG_CACHE_HOME", path.parent, "set it to a folder that can"):
        path.parent.mkdir(parents=True, exist_ok=True)
        save_tensors(path, model.tensors)
    return model


def train_heads(images: Tensor, texts: Tensor) -> dict[str, Tensor]:
    """Symmetric InfoNCE on pairs of features: images (N, I), texts (N, T) -> the tensors of an ``EmojiClip``."""
    tensors: dict[str, Tensor] = {}
    weights = []
    for side, features in (("image", images), ("text", texts)):
        tensors[f"{side}.mean"], tensors[f"{side}.std"] = features.mean(0), features.std(0) + 1e-6
        shape = (_WIDTH, features.shape[1])
        weight = rng.normal(rng.stream_key(0, "emoji-clip", side), shape) / shape[1] ** 0.5
        tensors[f"{side}.weight"] = weight.requires_grad_()
        weights.append(weight)
    optimizer = torch.optim.AdamW(weights, lr=_LR, weight_decay=_DECAY)
    batch = min(_BATCH, len(images))
    for step in range(_STEPS):
        draws = rng.uniform(rng.stream_key(0, "emoji-clip", "batch", str(step)), (len(images),))
        chosen = draws.argsort()[:batch]
        pictures, captions = _embedded(images[chosen], tensors, "image"), _embedded(texts[chosen], tensors, "text")
        logits = pictures @ captions.T / _TEMPERATURE
        targets = torch.arange(batch)
        loss = (F.cross_entropy(logits, targets) + F.cross_entropy(logits.T, targets)) / 2
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return {name: value.detach().clone() for name, value in tensors.items()}


def _features(images: ImageSet) -> tuple[Tensor, Tensor]:
    pictures, texts = stack_images(images, range(len(images))), text_features(_captions(images))
    return image_features(torch.cat([pictures, roughened(pictures)])), torch.cat([texts, texts])


def _captions(images: ImageSet) -> list[str]:
    return [images.caption(i) for i in range(len(images))]


def _embedded(features: Tensor, tensors: dict[str, Tensor], side: str) -> Tensor:
    centred = (features - tensors[f"{side}.mean"]) / tensors[f"{side}.std"]
    return F.normalize(centred @ tensors[f"{side}.weight"].T, dim=1)
