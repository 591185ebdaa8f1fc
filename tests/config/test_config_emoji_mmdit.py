"""configs/quickstart/emoji-mmdit.yaml: what its comments and the documents say of it."""

from __future__ import annotations

from helpers.ranks import ROOT
from megadit.config import load_config
from megadit.data import build_datasets, check_against_model, describe


def test_half_of_the_prompts_are_of_pictures_that_are_held_out():
    config = load_config(ROOT / "configs" / "quickstart" / "emoji-mmdit.yaml")
    train, held_out = build_datasets(config.data)
    check_against_model(describe(train), config)
    seen, unseen = ({images.caption(i) for i in range(len(images))} for images in (train, held_out))
    prompts = config.sample.prompts
    assert len(prompts) == 12 and set(prompts[:6]) <= seen and set(prompts[6:]) <= unseen
    assert config.sample.count % len(prompts) == 0  # every prompt has the same number of rows
    assert config.data.text.encoder == "minilm" and config.model.parametrization == "mup"
