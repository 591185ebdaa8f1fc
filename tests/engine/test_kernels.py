"""``kernels.*``: what runs of a fused operation is selected, described and, where it cannot run, refused."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from helpers.kernels.interpreter import counted, need_interpreter
from helpers.models.tiny_dit import dit_inputs, tiny_dit
from helpers.models.tiny_mmdit import mmdit_inputs, tiny_mmdit
from helpers.models.tiny_pixart import pixart_inputs, tiny_pixart
from helpers.models.tiny_uvit import tiny_uvit, uvit_inputs
from megadit.config import RunConfig
from megadit.config.schema.kernels import KernelConfig
from megadit.engine.kernels import (
    adds_across_blocks,
    check_kernels,
    describe_kernels,
    select_for_inference,
    select_kernels,
)
from megadit.errors import UserError
from megadit.models import build_model
from megadit_kernels import FUSED_KEYS, OPS_OF_KEY, norm_modulate, residual_norm_modulate
from megadit_kernels.backends import Backend, backend


@pytest.fixture(autouse=True)
def _automatic() -> Iterator[None]:
    yield
    select_kernels(KernelConfig())


def test_every_key_has_its_operations_and_no_operation_lacks_a_key() -> None:
    assert {*OPS_OF_KEY, "residual_across_blocks"} == set(KernelConfig.model_fields)


def test_fused_is_refused_without_a_gpu() -> None:
    with pytest.raises(UserError, match=r"kernels.norm_modulate: fused needs a GPU and Triton \(.*auto or reference"):
        check_kernels(KernelConfig(norm_modulate="fused"), "cpu")
    check_kernels(KernelConfig(), "cpu")
    check_kernels(KernelConfig(norm_modulate="reference"), "cpu")


def test_a_model_that_was_trained_by_kernels_of_another_machine_is_sampled_from(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked = KernelConfig(norm_modulate="apex", swiglu="fused", gelu="fused", noise="reference", attention="flash-attn")
    line = select_for_inference(asked, "cpu")
    assert line is not None and line.count("\n") == 0
    assert line.startswith("not available here, so what auto chooses runs: kernels.norm_modulate=apex (")
    assert "kernels.swiglu=fused, kernels.gelu=fused (" in line and "kernels.attention=flash-attn (" in line
    for key, ops in OPS_OF_KEY.items():
        assert {op.choice for op in ops} == {"torch" if key == "noise" else "auto"}
        for op in ops:
            assert op.backend_on("cpu") in ("torch", "sdpa", "reference")
    assert select_for_inference(KernelConfig(swiglu="reference", attention="sdpa"), "cpu") is None
    works = {name: Backend(name, "ok", "1.0") for name in ("triton", "apex-norm", "flash-attn", "varlen")}
    monkeypatch.setattr("megadit.engine.kernels.backend", works.__getitem__)
    assert select_for_inference(asked, "cuda") is None
    assert "there is no GPU" in str(select_for_inference(asked, "cpu"))


def test_what_runs_is_described_with_the_reason() -> None:
    assert describe_kernels(KernelConfig(), "cpu").startswith(
        "kernels: norm_modulate, swiglu, noise, qk_norm, gelu by torch ("
    )
    reference = KernelConfig(norm_modulate="reference")
    select_kernels(reference)
    description = describe_kernels(reference, "cuda")
    assert description.startswith(
        "kernels: norm_modulate by torch (as configured); swiglu, noise, qk_norm, gelu by torch (Triton"
    )


def test_a_residual_crosses_blocks_where_the_norm_is_fused_and_nothing_is_recomputed() -> None:
    def crosses(choice: Any, recompute: Any) -> bool:
        config = KernelConfig(residual_across_blocks=choice)
        crosses = adds_across_blocks(config, "cpu", recompute)
        assert ("within the next block's norm" in describe_kernels(config, "cpu", recompute)) == crosses
        return crosses

    assert not crosses("auto", "none") and crosses(True, "full") and not crosses(False, "none")
    residual_norm_modulate.select("fused")
    assert crosses("auto", "none") and not crosses("auto", "selective") and not crosses("auto", "full")
    assert not crosses(False, "none")


@pytest.mark.parametrize("choice", ["varlen", "flash-attn"])
def test_flash_attention_is_refused_without_a_gpu_and_says_why(choice: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(
        UserError, match=rf"kernels.attention: {choice} needs a GPU and .+\(.+\); set kernels.attention=auto or"
    ):
        check_kernels(KernelConfig(attention=choice), "cuda")
    monkeypatch.setattr("megadit.engine.kernels.backend", lambda name: Backend(name, "ok", "as on a GPU"))
    check_kernels(KernelConfig(attention=choice), "cuda")
    with pytest.raises(UserError, match="training is on the CPU"):
        check_kernels(KernelConfig(attention=choice), "cpu")
    check_kernels(KernelConfig(attention="sdpa"), "cpu")


def test_attention_is_described_by_the_backends_name(monkeypatch: pytest.MonkeyPatch) -> None:
    def described(device: str, precision: str, **choice: Any) -> str:
        config = KernelConfig(**choice)
        select_kernels(config)
        return describe_kernels(config, device, precision=precision).rpartition("attention ")[2]

    assert described("cpu", "bf16") == "by sdpa (training is on the CPU)"
    assert described("cuda", "bf16", attention="sdpa") == "by sdpa (as configured)"
    assert described("cuda", "bf16") == f"by sdpa ({backend('varlen').detail})"
    monkeypatch.setattr("megadit.engine.kernels.backend", lambda name: Backend(name, "ok", f"{name} of torch 2.11"))
    assert described("cuda", "bf16", attention="varlen") == "by varlen (varlen of torch 2.11)"
    assert described("cuda", "fp32") == "by sdpa (train.precision is fp32)"


MMDIT = {"family": "mmdit", "width": 64, "heads": 4, "num_classes": 0, "learn_sigma": False}
TEXT = {"dim": 8, "max_length": 4}


@pytest.mark.parametrize(
    ("choice", "precision", "model", "message"),
    [
        ("varlen", "fp32", {"text": TEXT}, "varlen needs bf16 or fp16; set train.precision=bf16, or kernels.attention"),
        ("flash-attn", "bf16", {"text": TEXT, "heads": 1, "width": 264}, "heads of at most 256 channels.* have 264"),
        ("flash-attn", "bf16", {"text": TEXT, "attention_precision": "fp32"}, "not go with model.attention_precision"),
        ("varlen", "bf16", {"text": {**TEXT, "mask": False}}, "which this mmdit does not; set kernels.attention=auto"),
        ("varlen", "bf16", {"text": TEXT, "family": "uvit", "depth": 4}, "which this uvit does not"),
    ],
)
def test_flash_attention_that_would_have_nothing_to_do_is_refused(
    choice: str, precision: str, model: dict[str, Any], message: str
) -> None:
    def config(choice: str) -> RunConfig:
        values: dict[str, Any] = {
            "model": {**MMDIT, **model},
            "objective": {"kind": "flow"},
            "data": {"name": "digits", "condition": "text"},
            "parallel": {"zero_stage": 1},
            "kernels": {"attention": choice},
            "train": {"steps": 1, "global_batch": 4, "precision": precision},
        }
        return RunConfig.model_validate(values)

    with pytest.raises(ValueError, match=f"kernels.attention: {choice} .*{message}|kernels.attention: .*{message}"):
        config(choice)
    config("auto")
    config("sdpa")


def test_a_selection_lasts_until_the_next() -> None:
    select_kernels(KernelConfig(norm_modulate="fused"))
    assert residual_norm_modulate.backend_on("cpu") == norm_modulate.backend_on("cpu") == "fused"
    select_kernels(KernelConfig())
    assert residual_norm_modulate.backend_on("cpu") == "torch"
    with pytest.raises(ValueError, match="no implementation 'quick'; choose one of auto, reference, torch, fused"):
        norm_modulate.select("quick")


MODELS = {
    "dit": (tiny_dit, dit_inputs),
    "pixart": (tiny_pixart, pixart_inputs),
    "uvit": (tiny_uvit, uvit_inputs),
    "mmdit": (tiny_mmdit, mmdit_inputs),
}


def outputs_and_gradients(config: Any, inputs: Any, recompute: str) -> list[Tensor]:
    model = build_model(config)
    model.recompute = recompute
    torch.manual_seed(1)
    for parameter in model.parameters():  # no gate stays closed, no readout at zero
        torch.nn.init.normal_(parameter, std=0.2)
    out = model(*inputs)
    out.square().mean().backward()
    return [out.detach(), *(parameter.grad for parameter in model.parameters())]


@pytest.mark.parametrize("recompute", ["none", "selective", "full"])
@pytest.mark.parametrize("family", list(MODELS))
def test_a_model_is_the_same_by_fused_kernels(family: str, recompute: str) -> None:
    """In the interpreter: values and the gradient of every parameter, of recomputed blocks too."""
    need_interpreter()
    make, draw = MODELS[family]
    mlp = {"none": "gelu", "selective": "gelu_tanh", "full": "swiglu"}[recompute]
    config = make(depth=2, mlp=mlp, qk_norm="rms")
    inputs = draw(config)
    expected = outputs_and_gradients(config, inputs, recompute)
    select_kernels(KernelConfig(**dict.fromkeys(FUSED_KEYS, "fused")))
    with counted() as launches:
        fused = outputs_and_gradients(config, inputs, recompute)
    assert {launch.name for launch in launches} == {"forward", "backward", "add_partials"}
    for ours, theirs in zip(fused, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=2e-4, atol=2e-4 * float(theirs.abs().max()) + 1e-7)
