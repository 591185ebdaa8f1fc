"""MMDiT and PixArt by flash kernels, which take texts' lengths, compute what they do by a mask over the padding."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from helpers.kernels.fake_cuda import fake_cuda
from helpers.kernels.flash import BACKENDS, CALLS, flash_on_cpu
from helpers.kernels.interpreter import need_interpreter
from helpers.models.tiny_mmdit import mmdit_inputs, tiny_mmdit
from helpers.models.tiny_pixart import pixart_inputs, tiny_pixart
from helpers.models.tiny_uvit import tiny_uvit, uvit_inputs
from helpers.models.weights import randomize
from megadit.conditioning import Conditioning
from megadit.models import build_model
from megadit.models.layers import StreamQKV, joint_attention, text_padding

LENGTHS = {"odd": [3, 5, 1], "empty": [0, 5, 0], "full": [5, 5, 5]}
Inputs = tuple[Tensor, Tensor, Conditioning]


def in_float64(inputs: Inputs) -> Inputs:
    x, t, cond = inputs
    assert cond.text is not None
    pooled = None if cond.pooled is None else cond.pooled.double()
    return x.double(), t, replace(cond, text=cond.text.double(), pooled=pooled)


def outputs_and_gradients(config: Any, inputs: Inputs, recompute: str = "none") -> dict[str, Tensor]:
    model = build_model(config)
    randomize(model)
    model.double().recompute = recompute
    out = model(*in_float64(inputs))
    out.square().mean().backward()
    return {"output": out.detach()} | {name: p.grad for name, p in model.named_parameters()}


def assert_same(ours: dict[str, Tensor], theirs: dict[str, Tensor], tolerance: float = 1e-11) -> None:
    assert ours.keys() == theirs.keys()
    largest = max(float(value.abs().max()) for value in theirs.values())
    for name, value in theirs.items():
        gap = float((ours[name] - value).abs().max()) / max(float(value.abs().max()), 1e-6 * largest)
        assert gap < tolerance, f"{name}: {gap:.1e}"


def mmdit(lengths: list[int]) -> tuple[Any, Inputs]:
    config = tiny_mmdit(qk_norm="rms", pooled=12)
    x, t, cond = mmdit_inputs(config, lengths=lengths)
    return config, (x, t, cond.with_lengths())


def pixart(lengths: list[int]) -> tuple[Any, Inputs]:
    config = tiny_pixart(text={"dim": 20, "max_length": 5})
    x, t, cond = pixart_inputs(config)
    cond = replace(cond, text_mask=torch.arange(5) < torch.tensor(lengths)[:, None])
    return config, (x, t, cond.with_lengths())


MODELS: dict[str, Callable[[list[int]], tuple[Any, Inputs]]] = {"mmdit": mmdit, "pixart": pixart}
# Per block of MMDiT one attention, of PixArt one to the text, and by flash-attn one of the image to itself.
CALLS_OF = {("mmdit", "varlen"): 3, ("mmdit", "flash"): 3, ("pixart", "varlen"): 2, ("pixart", "flash"): 4}


@pytest.mark.parametrize(
    ("lengths", "recompute"),
    [("odd", "none"), ("odd", "selective"), ("odd", "full"), ("empty", "none"), ("full", "selective")],
)
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("family", list(MODELS))
def test_outputs_and_gradients_are_those_by_a_mask(family: str, backend: str, lengths: str, recompute: str) -> None:
    """Of every parameter: nothing reads what padding asks for."""
    config, inputs = MODELS[family](LENGTHS[lengths])
    expected = outputs_and_gradients(config, inputs)
    with flash_on_cpu(backend):
        assert_same(outputs_and_gradients(config, inputs, recompute), expected)
        calls = [name for name, _ in CALLS]
    attentions = CALLS_OF[family, backend[:6] if backend == "varlen" else "flash"]
    # Full recomputation runs attention twice, selective keeps its result.
    assert calls.count("forward") == attentions * (2 if recompute == "full" else 1)
    assert calls.count("backward") == attentions


@pytest.mark.parametrize("family", list(MODELS))
def test_padding_between_tokens(family: str) -> None:
    """Without lengths from the CPU they are found on the device, and tokens moved to the front."""
    config, (x, t, cond) = MODELS[family]([5, 5, 5])
    mask = torch.tensor([[1, 0, 1, 1, 0], [0, 0, 0, 0, 1], [1, 1, 1, 1, 1]]).bool()
    cond = replace(cond, text_mask=mask, text_lengths=None).with_lengths()
    assert cond.text_lengths is None
    expected = outputs_and_gradients(config, (x, t, cond))
    with flash_on_cpu("varlen"):
        assert_same(outputs_and_gradients(config, (x, t, cond)), expected)
        assert CALLS


@pytest.fixture
def varlen() -> Iterator[None]:
    with flash_on_cpu("varlen"):
        yield


@pytest.mark.parametrize("family", list(MODELS))
def test_what_padding_holds_changes_nothing(family: str, varlen: None) -> None:
    config, (x, t, cond) = MODELS[family]([3, 5, 1])
    assert cond.text is not None and cond.text_mask is not None
    first = outputs_and_gradients(config, (x, t, cond))
    other = replace(cond, text=torch.where(cond.text_mask[..., None], cond.text, cond.text + 3.0))
    second = outputs_and_gradients(config, (x, t, other))
    assert_same(second, first)


def test_what_keeps_the_mask_keeps_it(varlen: None) -> None:
    """Attention in float32, texts among other tokens, and a model that attends to padding and so has no mask."""
    config, (x, t, cond) = mmdit([3, 5, 1])
    wide = tiny_mmdit(qk_norm="rms", pooled=12, attention_precision="fp32")
    outputs_and_gradients(wide, (x, t, cond))
    outputs_and_gradients(config, (x, t, cond.without_mask()))
    text = tiny_uvit("text")
    x, t, cond = uvit_inputs(text)
    outputs_and_gradients(text, (x, t, cond))
    assert not CALLS


def test_lengths_follow_their_texts() -> None:
    """Through selection, dropping, guidance's doubled batch; and are left out where one part has none."""
    mask = torch.arange(4) < torch.tensor([2, 4, 0])[:, None]
    cond = Conditioning(text=torch.ones(3, 4, 2), text_mask=mask).with_lengths()
    assert cond.text_lengths is not None and cond.text_lengths.dtype == torch.int32
    null = Conditioning(text=torch.zeros(1, 4, 2), text_mask=torch.tensor([[True, False, False, False]])).with_lengths()

    def lengths(changed: Conditioning) -> list[int] | None:
        if changed.text_lengths is not None:
            assert torch.equal(changed.text_lengths, changed.text_mask.sum(1))  # type: ignore[union-attr]
        return None if changed.text_lengths is None else changed.text_lengths.tolist()

    drop = torch.tensor([True, False, True])
    assert lengths(cond) == [2, 4, 0] and lengths(cond[[2, 0]]) == [0, 2] and lengths(cond.repeat(2)) == [2, 4, 0] * 2
    assert lengths(cond.dropped(drop, null)) == [1, 4, 1]
    assert lengths(cond.dropped(drop, Conditioning(text=null.text))) == [2, 4, 0]  # PixArt's, which takes the text's
    assert lengths(Conditioning.cat([cond, cond.dropped(drop, null)])) == [2, 4, 0, 1, 4, 1]
    gap = Conditioning(text=null.text, text_mask=torch.tensor([[False, True, False, False]])).with_lengths()
    assert lengths(gap) is lengths(cond.dropped(drop, gap)) is lengths(cond.without_mask()) is None
    assert lengths(Conditioning.cat([cond, gap])) is None
    assert lengths(cond.to("cpu")) == [2, 4, 0]


def test_lengths_of_another_shape_are_refused() -> None:
    config, (x, t, cond) = mmdit([3, 5, 1])
    for wrong in (torch.ones(2, dtype=torch.int32), torch.ones(3, dtype=torch.int64)):
        with pytest.raises(ValueError, match=r"cond.text_lengths: torch.int\d\d \(\d,\) is not int32 \(3,\)"):
            build_model(config)(x, t, replace(cond, text_lengths=wrong))


@pytest.mark.parametrize("known", [True, False])
def test_fake_cuda_tensors_go_without_a_mask(known: bool) -> None:
    """No step asks the device for a value: a fake tensor has none."""
    need_interpreter()
    with fake_cuda():
        image, context = (
            StreamQKV(torch.empty(2, rows, 3, 4, 64, device="cuda", dtype=torch.bfloat16), None, False)
            for rows in (9, 5)
        )
        text, mask = torch.empty(2, 5, 20, device="cuda"), torch.empty(2, 5, device="cuda", dtype=torch.bool)
        lengths = torch.empty(2, device="cuda", dtype=torch.int32) if known else None
        moved, keys = text_padding(text, mask, lengths, image.qkv, 64, keys_before=9)
        assert keys is not None and keys.shape == (2, 5) and keys.dtype == torch.int32 and moved.shape == text.shape
        of_image, of_context = joint_attention(image, context, keys)
        assert (of_image.shape, of_context.shape) == ((2, 9, 4, 64), (2, 5, 4, 64))
        of_image, of_context = joint_attention(image, context, keys, context_queries=False)
        assert (of_image.shape, of_context.shape) == ((2, 9, 4, 64), (2, 0, 4, 64))
        assert of_image.device.type == "cuda" and of_image.dtype == torch.bfloat16


def test_half_precision_goes_the_same_way() -> None:
    config, inputs = mmdit([3, 5, 1])
    model = build_model(config)
    randomize(model)
    model.bfloat16()
    with torch.no_grad():
        expected = model(*inputs).float()
        with flash_on_cpu("varlen"):
            out = model(*inputs).float()
            assert len(CALLS) == 3
    assert (out - expected).abs().max() < 0.05 * expected.abs().max()
