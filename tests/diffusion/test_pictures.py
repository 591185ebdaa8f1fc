"""From a model to a grid of 8-bit pictures, batched and labelled."""

from __future__ import annotations

import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from megadit.conditioning import Conditioning
from megadit.config.model import ModelConfig
from megadit.config.run import DataConfig, ObjectiveConfig, RunConfig, SampleConfig, TrainConfig
from megadit.data.latents import PixelCodec
from megadit.diffusion.pictures import grid_labels, picture_labels, sample_grid, sample_pictures
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
    drawn = sample_pictures(LabelAsLevel(3), run, PixelCodec(), labels=picture_labels(run), batch_size=4)
    assert drawn.shape == (7, 1, 8, 8) and drawn.dtype == torch.uint8
    levels = drawn.float().flatten(1)
    assert levels.std(1).max() < 1.5
    assert (levels.mean(1) - torch.tensor([0, 127.5, 255, 0, 127.5, 255, 0])).abs().max() < 2


def test_guidance_goes_beyond_the_condition():
    run = config(guidance=0.5)
    drawn = sample_pictures(LabelAsLevel(3), run, PixelCodec(), labels=[2])
    assert (drawn.float() - 127.5).abs().max() < 2  # half-way from black to white


def test_batches_do_not_change_the_pictures():
    run = config()
    labels = picture_labels(run)
    one, other = (
        sample_pictures(LabelAsLevel(3), run, PixelCodec(), labels=labels, batch_size=size) for size in (2, 7)
    )
    assert (one.int() - other.int()).abs().max() <= 1


def test_ranks_can_each_draw_their_share():
    run, model = config(), LabelAsLevel(3)
    labels = picture_labels(run)
    whole = sample_pictures(model, run, PixelCodec(), labels=labels)
    shares = [sample_pictures(model, run, PixelCodec(), labels=labels, numbers=range(r, 7, 2)) for r in (0, 1)]
    for rank, share in enumerate(shares):
        assert (share.int() - whole[rank::2].int()).abs().max() <= 1


def test_guidance_on_a_model_that_never_lost_its_labels_is_refused():
    run = config(dropout=0.0, guidance=2.0)
    with pytest.raises(UserError, match=r"sample\.guidance: 2.*label_dropout"):
        sample_pictures(LabelAsLevel(3), run, PixelCodec(), labels=[0])


def test_labels_of_a_grid():
    assert grid_labels(3, 7) == [0, 1, 2, 0, 1, 2, 0]
    assert grid_labels(1000, 4) == [0, 250, 500, 750]
    assert picture_labels(config(), [2, 0]) == [2, 0, 2, 0, 2, 0, 2]
    assert picture_labels(config(classes=0)) is None


def test_a_grid_is_the_same_twice_and_names_the_classes(tmp_path):
    run = config()
    paths = [
        sample_grid(LabelAsLevel(3), run, PixelCodec(), names, tmp_path / f"{i}.png", notice="by someone")
        for i, names in enumerate((["black", "grey", "white"], ["black", "grey", "white"], []))
    ]
    first, second, unnamed = (path.read_bytes() for path in paths)
    assert first == second
    assert first != unnamed  # labels as numbers
    with Image.open(paths[0]) as sheet:
        # Three classes, seven pictures: three columns and three rows of 64 pixels, titles and a footer.
        assert sheet.width == 4 + 3 * 68 and sheet.height == 4 + 14 + 3 * 68 + 14


def test_many_classes_have_captions(tmp_path):
    run = config(classes=40, count=40)
    path = sample_grid(LabelAsLevel(40), run, PixelCodec(), [], tmp_path / "a.png")
    with Image.open(path) as sheet:
        assert sheet.width == 4 + 7 * 68 and sheet.height == 4 + 6 * (68 + 14)
