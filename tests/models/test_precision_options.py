"""float32 attention and norms inside a bf16 model: nearer to the float32 model, and bf16 again where they end."""

import pytest
import torch
from torch.nn import functional as F

from helpers.models.tiny_dit import dit_inputs, tiny_dit
from helpers.models.tiny_mmdit import mmdit_inputs, tiny_mmdit
from helpers.models.tiny_pixart import pixart_inputs, tiny_pixart
from helpers.models.tiny_uvit import tiny_uvit, uvit_inputs
from helpers.models.weights import randomize
from megadit.models import build_model
from megadit.models.build import parametrization
from megadit.models.layers import ModulatedNorm, SelfAttention, attend
from megadit.mup.spec import Dim
from megadit_kernels import qk_norm

FP32 = {"attention_precision": "fp32", "norm_precision": "fp32"}


def gap(value, expected):
    value, expected = value.detach().double(), expected.detach().double()
    return float((value - expected).norm() / expected.norm())


def normals(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1))


def test_norm_is_rounded_once():
    x, shift, scale = 3 + normals(4, 16, 64), normals(4, 64), normals(4, 64)
    exact = ModulatedNorm(1e-6)(*(v.bfloat16().double() for v in (x, shift, scale)))
    half = [v.bfloat16() for v in (x, shift, scale)]
    plain, once = ModulatedNorm(1e-6)(*half), ModulatedNorm(1e-6, "fp32")(*half)
    assert plain.dtype == once.dtype == torch.bfloat16
    assert (once == exact.float().bfloat16()).float().mean() > 0.995  # but where float32's error crosses a tie
    assert gap(plain, exact) > 1.3 * gap(once, exact)


def test_qk_norm_is_rounded_once():
    x, gain = normals(2, 8, 3, 2, 24).bfloat16(), (1 + 0.1 * normals(24)).bfloat16()
    (plain, *_), (once, *_) = (qk_norm(x, None, (gain, gain), float32=float32) for float32 in (False, True))
    q = x[:, :, 0].double()
    exact = q / (q.square().mean(-1, keepdim=True) + 1e-6).sqrt() * gain.double()
    assert once.dtype == torch.bfloat16 and (once == exact.float().bfloat16()).float().mean() > 0.99
    assert gap(once, exact) <= gap(plain, exact)


def test_attention_is_rounded_once():
    layers = []
    for precision in ("auto", "fp32"):
        layer = SelfAttention(Dim(48), 2, parametrization(tiny_dit()), precision=precision)
        randomize(layer, 0.5)
        layers.append(layer.bfloat16())
    q, k, v = (normals(4, 2, 64, 24).bfloat16() for _ in range(3))
    scores = (2 * q).double() @ k.double().transpose(-1, -2) / 24**0.5
    exact = torch.softmax(scores, dim=-1) @ v.double()
    plain, once = (attend(2 * q, k, v, precision=layer.precision) for layer in layers)
    assert plain.dtype == once.dtype == torch.bfloat16
    torch.testing.assert_close(once.double(), exact, rtol=2**-8, atol=1e-4)
    assert gap(once, exact) <= gap(plain, exact)
    assert layers[1](normals(2, 5, 48).bfloat16()).dtype == torch.bfloat16


@pytest.mark.parametrize("autocast", [False, True])
def test_whole_model_keeps_its_dtype_and_float32_its_bits(autocast):
    plain, exact = build_model(tiny_dit(qk_norm="rms")), build_model(tiny_dit(qk_norm="rms", **FP32))
    for model in (plain, exact):
        randomize(model)
    x, t, cond = dit_inputs(plain.config)
    with torch.no_grad():
        expected = plain(x, t, cond)
        assert torch.equal(exact(x, t, cond), expected)
        if autocast:
            with torch.autocast("cpu", torch.bfloat16):
                output = exact(x, t, cond)
        else:
            output = exact.bfloat16()(x, t, cond)
        assert output.dtype == torch.bfloat16 and gap(output, expected) < 0.02


BF16, FLOAT32 = torch.bfloat16, torch.float32
PIXART_TEXT = {"dim": 20, "max_length": 7}  # 16 patches attend to themselves, and to 7 tokens of text


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize(
    ("config", "inputs", "expected"),
    [
        (tiny_dit(attention_precision="fp32"), dit_inputs, {FLOAT32}),
        (tiny_uvit("text", attention_precision="fp32"), uvit_inputs, {FLOAT32}),
        (tiny_mmdit(attention_precision="fp32"), mmdit_inputs, {FLOAT32}),
        (tiny_pixart(attention_precision="fp32", text=PIXART_TEXT), pixart_inputs, {(16, FLOAT32), (7, BF16)}),
        (tiny_pixart(text=PIXART_TEXT), pixart_inputs, {(16, BF16), (7, BF16)}),
    ],
    ids=["dit", "uvit", "mmdit", "pixart", "pixart-auto"],
)
def test_what_attention_is_computed_in(config, inputs, expected, autocast, monkeypatch):
    """PixArt's authors cast the operands of self-attention and leave cross-attention in the working dtype."""
    dtypes, original = set(), F.scaled_dot_product_attention

    def attention(q, k, v, *rest):
        assert q.dtype == k.dtype == v.dtype
        casts = torch.is_autocast_enabled("cpu")  # in float32 nothing may cast the operands back
        assert not (casts and q.dtype == FLOAT32)
        dtypes.add((k.shape[2], q.dtype) if config.family == "pixart" else q.dtype)
        return original(q, k, v, *rest)

    monkeypatch.setattr(F, "scaled_dot_product_attention", attention)
    model = build_model(config)
    randomize(model)
    with torch.no_grad(), torch.autocast("cpu", BF16, enabled=autocast):
        (model if autocast else model.bfloat16())(*inputs(config))
    assert dtypes == expected


def test_gradients_flow_in_the_weights_dtype():
    config = tiny_dit(qk_norm="rms", **FP32)
    model = build_model(config)
    randomize(model)
    model.bfloat16()
    model(*dit_inputs(config)).float().square().mean().backward()
    assert {p.grad.dtype for p in model.parameters()} == {torch.bfloat16}
    assert all(p.grad.isfinite().all() for p in model.parameters())
