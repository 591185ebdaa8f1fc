"""Conditions of a text-conditional run: features of captions, null text, prompts, and what is refused beforehand."""

from __future__ import annotations

from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor

from helpers.models.tiny_text import CAPTIONS, bert_folder, clip_folder
from megadit.conditioning import Conditioning, null_caption
from megadit.config.schema.model import ModelConfig, TextInput
from megadit.config.schema.run import DataConfig, RunConfig, SampleConfig, TrainConfig
from megadit.data.batch import Batch
from megadit.data.conditions import (
    NULL_TEXT_FILE,
    PROMPTS_FILE,
    build_conditions,
    check_text,
    evenly_spaced,
    load_conditions,
    save_conditions,
    trained_null_caption,
)
from megadit.data.dataset import ArraySet, StoredFacts, Subset
from megadit.data.text.encoders import build_encoder
from megadit.errors import UserError

LENGTH = 12


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("text")
    return {"bert": bert_folder(root / "bert"), "clip": clip_folder(root / "clip"), "cache": root / "cache"}


def config(folders, *, family: str = "mmdit", prompts=(), count: int = 4, text=None, **source) -> RunConfig:
    settings = {"path": str(folders["bert"]), "pooled": "same", "cache": str(folders["cache"])} | source
    pooled = 16 if settings["pooled"] == "same" else 0
    model = ModelConfig(
        family=family, width=16, heads=1, depth=2, in_channels=1, input_size=4, learn_sigma=False, num_classes=0,
        text=TextInput(**({"dim": 16, "max_length": LENGTH, "pooled_dim": pooled} | (text or {}))),
    )  # fmt: skip
    data = DataConfig(name="digits", condition="text", text=settings)
    return RunConfig(
        model=model, data=data, train=TrainConfig(steps=1), sample=SampleConfig(prompts=prompts, count=count)
    )


def image_set(captions=tuple(CAPTIONS)) -> ArraySet:
    count = len(captions)
    return ArraySet(
        name="mine", classes=(), image_size=4, notice="", images=torch.zeros(count, 1, 4, 4, dtype=torch.uint8),
        labels=torch.zeros(count, dtype=torch.int64), captions=tuple(captions), bases=tuple(captions),
    )  # fmt: skip


def parts(images) -> tuple[Subset, Subset]:
    return Subset(images, tuple(range(5))), Subset(images, tuple(range(5, len(images))))


def batch(captions, extras: dict[str, Tensor] | None = None) -> Batch:
    count = len(captions)
    return Batch(torch.zeros(count, 1, 4, 4), torch.zeros(count), list(captions), torch.arange(count), extras or {})


def test_captions_become_the_encoders_features(folders):
    run = config(folders)
    conditions = build_conditions(run, *parts(image_set()))
    encoder = build_encoder(run.data.text)
    chosen = [CAPTIONS[6], CAPTIONS[0], CAPTIONS[6]]  # of both parts
    cond, expected = conditions.of(batch(chosen)), encoder.encode(chosen, LENGTH)
    torch.testing.assert_close(cond.text, expected.text, rtol=1e-3, atol=1e-3)  # held in float16
    torch.testing.assert_close(cond.pooled, expected.pooled, rtol=1e-5, atol=1e-5)
    assert cond.text_mask.equal(expected.text_mask) and cond.labels is None
    null = encoder.encode([""], LENGTH)
    torch.testing.assert_close(conditions.null.text, null.text, rtol=1e-3, atol=1e-3)
    dropped = cond.dropped(torch.tensor([True, False, True]), conditions.null)
    assert dropped.text[0].equal(conditions.null.text[0]) and dropped.text[1].equal(cond.text[1])
    assert dropped.text_mask.sum(1).tolist() == [2, int(cond.text_mask[1].sum()), 2]


def test_the_encoder_is_not_asked_twice(folders, monkeypatch):
    run, sets = config(folders), parts(image_set())
    first = build_conditions(run, *sets)
    monkeypatch.setattr("megadit.data.text.folders.load_network", None)
    second = build_conditions(run, *sets)
    assert first.of(batch(CAPTIONS)).text.equal(second.of(batch(CAPTIONS)).text)


def test_prompts_are_held_out_captions_or_those_given(folders):
    sets = parts(image_set([*CAPTIONS, CAPTIONS[6], ""]))
    assert build_conditions(config(folders), *sets).prompts.texts == tuple(CAPTIONS[5:])
    few = build_conditions(config(folders, count=2), *sets).prompts
    assert few.texts == (CAPTIONS[5], CAPTIONS[6]) and few.cond.batch_size == 2
    given = build_conditions(config(folders, prompts=("cat", "red flag")), *sets).prompts
    assert given.texts == ("cat", "red flag")
    assert given.cond.text_mask.sum(1).tolist() == [3, 4]
    nothing_held_out = build_conditions(config(folders), sets[0], Subset(sets[1].source, ()))
    assert nothing_held_out.prompts.texts == tuple(CAPTIONS[number] for number in (0, 1, 2, 3))
    assert evenly_spaced([("a", 0), ("b", 1), ("c", 2)], 2) == [("a", 0), ("b", 1)]


def test_pixart_has_a_null_caption_of_its_own_and_keeps_the_mask(folders):
    conditions = build_conditions(config(folders, family="pixart", pooled="none"), *parts(image_set()))
    assert conditions.null.text.equal(null_caption(LENGTH, 16)[None])
    cond = conditions.of(batch(CAPTIONS[:2]))
    dropped = cond.dropped(torch.tensor([True, False]), conditions.null)
    assert dropped.text[0].equal(conditions.null.text[0]) and dropped.text_mask.equal(cond.text_mask)


def test_a_model_that_sees_padding_is_given_no_mask(folders):
    run = config(folders, count=2)
    text = run.model.text.model_copy(update={"mask": False})
    seeing = run.model_copy(update={"model": run.model.model_copy(update={"text": text})})
    masked, seen = (build_conditions(each, *parts(image_set())) for each in (run, seeing))
    assert masked.of(batch(CAPTIONS[:2])).text_mask is not None and masked.null.text_mask is not None
    assert seen.of(batch(CAPTIONS[:2])).text_mask is None and seen.null.text_mask is None
    assert seen.prompts.cond.text_mask is None and seen.prompts.cond.text.equal(masked.prompts.cond.text)


def test_a_null_caption_goes_with_the_weights_that_know_it(folders, tmp_path):
    run = config(folders, family="pixart", pooled="none")
    assert trained_null_caption(run, None) == trained_null_caption(run, tmp_path) == (None, "")
    null_text = torch.randn(1, LENGTH, 16)
    save_conditions(tmp_path / NULL_TEXT_FILE, Conditioning(text=null_text))
    null, note = trained_null_caption(run, tmp_path)
    assert null is not None and null.text.equal(null_text) and "with which the model was trained" in note
    assert build_conditions(run, *parts(image_set()), null=null).null.text.equal(null_text)
    assert trained_null_caption(config(folders), tmp_path) == (None, "")  # whose null text is the empty one
    save_conditions(tmp_path / NULL_TEXT_FILE, Conditioning(text=null_text[:, :2]))
    null, note = trained_null_caption(run, tmp_path)
    assert null is None and f"has 2 tokens and model.text.max_length is {LENGTH}" in note


@dataclass(frozen=True, eq=False)
class Stored(ArraySet):
    """Features beside the images: every token of image i is i, of i + 1 tokens in 8."""

    stored: StoredFacts | None = None

    def extras(self, i: int) -> dict[str, Tensor]:
        mask = torch.arange(8) <= i
        return {"text": torch.full((8, 16), float(i)).half(), "text_mask": mask, "pooled": torch.full((16,), float(i))}

    def null_extras(self) -> dict[str, Tensor]:
        return self.extras(7)


def stored_set(**facts) -> Stored:
    plain = image_set()
    values = {name: getattr(plain, name) for name in plain.__dataclass_fields__}
    stored = StoredFacts(text_dim=16, text_length=8, pooled_dim=16)
    return Stored(**(values | {"stored": replace(stored, **facts)}))


def test_stored_features_need_no_encoder(folders):
    run = config(folders, path=str(folders["cache"] / "nowhere"))
    sets = parts(stored_set())
    check_text(run, sets[0])
    conditions = build_conditions(run, *sets)
    extras = {name: value[None] for name, value in sets[0].extras(3).items()}
    cond = conditions.of(batch(["unknown words"], extras))
    assert cond.text[0, :, 0].tolist() == [3.0] * 4 + [0.0] * (LENGTH - 4) and cond.text.dtype == torch.float32
    assert cond.text_mask.sum() == 4 and cond.pooled[0, 0] == 3
    assert conditions.null.text_mask.sum() == 8 and conditions.null.text[0, 0, 0] == 7
    assert conditions.prompts.texts == tuple(CAPTIONS[5:]) and conditions.prompts.cond.text[0, 0, 0] == 5


def test_what_does_not_fit_is_refused(folders):
    plain, text = image_set(), {"max_length": LENGTH}
    for run, images, message in [
        (config(folders, text={"dim": 24}), plain, r"model\.text\.dim: 24.* 16 channels; set model\.text\.dim=16"),
        (config(folders, text={"pooled_dim": 8}), plain, r"model\.text\.pooled_dim: 8.* of 16"),
        (config(folders, text={"pooled_dim": 0}), plain, r"model\.text\.pooled_dim: 0.*pooled=none"),
        (config(folders, pooled="none", text={"pooled_dim": 8}), plain, r"no pooled feature"),
        (config(folders, text={"max_length": 40}), plain, r"model\.text\.max_length: 40.* takes 32 tokens"),
        (config(folders, path=str(folders["clip"])), plain, r"data\.text\.path: .*clip_text_model, not bert"),
        (config(folders), image_set([""] * 8), r"data\.condition: text, but no image of mine has a caption"),
        (config(folders, prompts=("cat " * 20,)), plain, r"sample\.prompts: 'cat .*has 22 tokens.* is 12"),
        (config(folders, text=text), stored_set(text_dim=24), r"model\.text\.dim: 16, but mine stores 24"),
        (config(folders, text=text), stored_set(text_length=30), r"max_length: 12, but mine stores .* 30 tokens"),
        (config(folders, prompts=("cat",)), stored_set(text_encoder="t5:x"), r"stores features of t5:x"),
    ]:
        with pytest.raises(UserError, match=message):
            check_text(run, images)
    check_text(config(folders), plain)
    check_text(config(folders, prompts=("cat",)), plain)


def test_null_text_and_prompts_are_kept_in_the_run_directory(folders, tmp_path):
    conditions = build_conditions(config(folders), *parts(image_set()))
    conditions.write(tmp_path)
    null, texts = load_conditions(tmp_path / NULL_TEXT_FILE)
    assert texts == [""] and null.text.equal(conditions.null.text) and null.pooled.equal(conditions.null.pooled)
    prompts, texts = load_conditions(tmp_path / PROMPTS_FILE)
    assert texts == CAPTIONS[5:] and prompts.text_mask.equal(conditions.prompts.cond.text_mask)
    (tmp_path / NULL_TEXT_FILE).write_bytes(b"torn")
    with pytest.raises(UserError, match="cannot be read: it is a text file"):
        load_conditions(tmp_path / NULL_TEXT_FILE)
    save_conditions(tmp_path / "partly.safetensors", Conditioning(text=torch.ones(1, 2, 3)))
    assert load_conditions(tmp_path / "partly.safetensors")[0].text_mask is None
