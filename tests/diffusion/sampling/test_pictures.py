"""From a model to a grid of 8-bit pictures, batched and labelled."""

from __future__ import annotations

import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from megadit.conditioning import Conditioning
from megadit.config.schema.model import ModelConfig, TextInput
from megadit.config.schema.run import DataConfig, ObjectiveConfig, RunConfig, SampleConfig, TrainConfig
from megadit.data.codecs.codec import PixelCodec
from megadit.diffusion.sampling.pictures import (
    Subjects,
    class_subjects,
    grid_labels,
    sample_pictures,
    save_subject_grid,
    text_subjects,
)
from megadit.errors import UserError


class LabelAsLevel(nn.Module):
    """A flow whose data are constant images of one grey level per label; the null label is black."""

    def __init__(self, classes: int) -> None:
        super().__init__()
        self.classes = classes

    def forward(self, x: Tensor, t: Tensor, cond: Conditioning) -> Tensor:
        assert cond.labels is not None
        level = cond.labels.float() / max(self.classes - 1, 1) * 2 - 1
        level = torch.where(cond.labels == self.classes, -1.0, level).view(-1, 1, 1, 1)
        return (x - level) / (t / 1000).view(-1, 1, 1, 1)


def config(classes: int = 3, dropout: float = 0.1, **settings) -> RunConfig:
    return RunConfig(
        model=ModelConfig(
            width=16, heads=1, depth=1, in_channels=1, input_size=8, learn_sigma=False, num_classes=classes
        ),
        objective=ObjectiveConfig(kind="flow", label_dropout=dropout),
        data=DataConfig(condition="class" if classes else "none"),
        train=TrainConfig(steps=1),
        sample=SampleConfig(**({"count": 7, "steps": 3} | settings)),
    )


def test_each_picture_shows_its_label():
    run = config()
    drawn = sample_pictures(LabelAsLevel(3), run, PixelCodec(), subjects=class_subjects(run, []), batch_size=4)
    assert drawn.shape == (7, 1, 8, 8) and drawn.dtype == torch.uint8
    levels = drawn.float().flatten(1)
    assert levels.std(1).max() < 1.5
    assert (levels.mean(1) - torch.tensor([0, 127.5, 255, 0, 127.5, 255, 0])).abs().max() < 2


def test_guidance_goes_beyond_the_condition():
    run = config(guidance=0.5)
    drawn = sample_pictures(LabelAsLevel(3), run, PixelCodec(), subjects=class_subjects(run, [], [2]))
    assert (drawn.float() - 127.5).abs().max() < 2  # half-way from black to white


def test_batches_do_not_change_the_pictures():
    run = config()
    subjects = class_subjects(run, [])
    one, other = (
        sample_pictures(LabelAsLevel(3), run, PixelCodec(), subjects=subjects, batch_size=size) for size in (2, 7)
    )
    assert (one.int() - other.int()).abs().max() <= 1


def test_ranks_can_each_draw_their_share():
    run, model = config(), LabelAsLevel(3)
    subjects = class_subjects(run, [])
    images = sample_pictures(model, run, PixelCodec(), subjects=subjects)
    shares = [sample_pictures(model, run, PixelCodec(), subjects=subjects, numbers=range(r, 7, 2)) for r in (0, 1)]
    for rank, share in enumerate(shares):
        assert (share.int() - images[rank::2].int()).abs().max() <= 1


def test_guidance_on_a_model_that_never_lost_its_labels_is_refused():
    run = config(dropout=0.0, guidance=2.0)
    with pytest.raises(UserError, match=r"sample\.guidance: 2.*label_dropout"):
        sample_pictures(LabelAsLevel(3), run, PixelCodec(), subjects=class_subjects(run, [], [0]))


def test_labels_of_a_grid():
    assert grid_labels(3, 7) == [0, 1, 2]
    assert grid_labels(1000, 4) == [0, 250, 500, 750]
    assert class_subjects(config(), ["a", "b"], [2, 0]).labels_of(7) == [2, 0, 2, 0, 2, 0, 2]
    assert class_subjects(config(), ["a", "b"], [2, 0]).names_of(3) == ["2", "a", "2"]
    nothing = class_subjects(config(classes=0), [])
    assert nothing.labels_of(4) is None and nothing.prompts_of(4) is None and nothing.names_of(4) == []


def test_a_grid_is_the_same_twice_and_names_the_classes(tmp_path):
    run = config()
    paths = []
    for i, names in enumerate((["black", "grey", "white"], ["black", "grey", "white"], [])):
        subjects = class_subjects(run, names)
        drawn = sample_pictures(LabelAsLevel(3), run, PixelCodec(), subjects=subjects)
        paths.append(save_subject_grid(drawn, subjects, tmp_path / f"{i}.png", notice="by someone"))
    first, second, unnamed = (path.read_bytes() for path in paths)
    assert first == second
    assert first != unnamed  # labels as numbers
    with Image.open(paths[0]) as sheet:
        # Three classes, seven pictures: three columns and three rows of 64 pixels, titles and a footer.
        assert sheet.width == 4 + 3 * 68 and sheet.height == 4 + 14 + 3 * 68 + 14


def test_many_classes_have_captions(tmp_path):
    run = config(classes=40, count=40)
    subjects = class_subjects(run, [])
    drawn = sample_pictures(LabelAsLevel(40), run, PixelCodec(), subjects=subjects)
    with Image.open(save_subject_grid(drawn, subjects, tmp_path / "a.png")) as sheet:
        assert sheet.width == 4 + 7 * 68 and sheet.height == 4 + 6 * (68 + 14)


class TextAsLevel(nn.Module):
    """A flow whose data are constant images as bright as the mean of the text's tokens."""

    def forward(self, x: Tensor, t: Tensor, cond: Conditioning) -> Tensor:
        assert cond.text is not None and cond.text_mask is not None
        weights = cond.text_mask.float()
        level = ((cond.text[..., 0] * weights).sum(1) / weights.sum(1)).view(-1, 1, 1, 1)
        return (x - level) / (t / 1000).view(-1, 1, 1, 1)


def text_config(**settings) -> RunConfig:
    text = TextInput(dim=2, max_length=3)
    model = ModelConfig(
        family="mmdit", width=16, heads=1, depth=1, in_channels=1, input_size=8, learn_sigma=False, num_classes=0,
        text=text,
    )  # fmt: skip
    return RunConfig(
        model=model,
        objective=ObjectiveConfig(kind="flow"),
        data=DataConfig(condition="text"),
        train=TrainConfig(steps=1),
        sample=SampleConfig(**({"count": 6, "steps": 3} | settings)),
    )


def two_texts(run: RunConfig, null_mask: bool = True) -> Subjects:
    levels = torch.tensor([[1.0, 0.0, 9.0], [-0.5, 9.0, 9.0]])
    mask = torch.tensor([[True, True, False], [True, False, False]])
    cond = Conditioning(text=levels[..., None].expand(-1, -1, 2), text_mask=mask)
    null_text = torch.tensor([[-1.0, -1.0, -1.0]])[..., None].expand(-1, -1, 2)
    null = Conditioning(text=null_text, text_mask=torch.ones(1, 3, dtype=torch.bool) if null_mask else None)
    return text_subjects(run, ["bright", "dark"], cond, null)


@pytest.mark.parametrize("null_mask", [True, False])
def test_texts_take_turns_and_guidance_leaves_the_null_text(null_mask):
    run = text_config(guidance=1.5)
    subjects = two_texts(run, null_mask)
    drawn = sample_pictures(TextAsLevel(), run, PixelCodec(), subjects=subjects)
    levels = drawn.float().flatten(1).mean(1) / 127.5 - 1
    # -1 + 1.5 * (0.5 + 1), and -1 + 1.5 * (-0.5 + 1)
    assert (levels - torch.tensor([1.0, -0.25]).repeat(3)).abs().max() < 0.02
    assert subjects.prompts_of(3) == ["bright", "dark", "bright"] and subjects.labels_of(3) is None


def test_rows_of_a_grid_of_texts_are_seeds(tmp_path):
    run = text_config(count=4)
    subjects = two_texts(run)
    drawn = sample_pictures(TextAsLevel(), run, PixelCodec(), subjects=subjects)
    with Image.open(save_subject_grid(drawn, subjects, tmp_path / "a.png")) as sheet:
        assert sheet.width == 4 + 2 * 68 and sheet.height == 4 + 14 + 2 * 68
    undropped = run.model_copy(update={"objective": ObjectiveConfig(kind="flow", label_dropout=0.0)})
    assert two_texts(undropped).null is None
