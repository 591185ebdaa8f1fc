"""``kernels.norm_modulate: apex``: NVIDIA apex's norms behind the same operations, here by a stand-in for its module.

The stand-in has the names and signatures of ``apex/normalization/fused_layer_norm.py``, and refuses what its CUDA code
cannot take.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from helpers.models.tiny_dit import dit_inputs, tiny_dit
from helpers.models.tiny_uvit import tiny_uvit, uvit_inputs
from megadit.config.schema.kernels import KernelConfig
from megadit.engine.kernels import check_kernels, describe_kernels, select_kernels
from megadit.errors import UserError
from megadit.models import build_model
from megadit_kernels import gated_residual, norm_modulate, residual_norm_modulate
from megadit_kernels.backends import backend
from megadit_kernels.norm_modulate import apex, reference

MODULE = "apex.normalization.fused_layer_norm"


@pytest.fixture(autouse=True)
def _automatic() -> Iterator[None]:
    yield
    select_kernels(KernelConfig())
    backend.cache_clear()


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the functions of apex that were called, of its stand-in."""
    called: list[str] = []

    def fused_layer_norm(
        input: Tensor, normalized_shape: Any, eps: float = 1e-6, memory_efficient: bool = False
    ) -> Any:
        called.append("plain")
        return F.layer_norm(input, normalized_shape, None, None, eps)

    def fused_layer_norm_affine(
        input: Tensor, weight: Tensor, bias: Tensor, normalized_shape: Any, eps: float = 1e-6,
        memory_efficient: bool = False,
    ) -> Tensor:  # fmt: skip
        assert input.dtype == weight.dtype == bias.dtype, "its kernel has one type of operands"
        called.append("affine")
        return F.layer_norm(input, normalized_shape, weight, bias, eps)

    def mixed_dtype_fused_layer_norm_affine(
        input: Tensor, weight: Tensor, bias: Tensor, normalized_shape: Any, eps: float = 1e-6,
        memory_efficient: bool = False,
    ) -> Tensor:  # fmt: skip
        assert weight.dtype == bias.dtype
        called.append("mixed")
        out = F.layer_norm(input.float(), normalized_shape, weight.float(), bias.float(), eps)
        return out.to(weight.dtype)  # of the weight's type, unlike the others

    def fused_rms_norm(input: Tensor, normalized_shape: Any, eps: float = 1e-6, memory_efficient: bool = False) -> Any:
        called.append("rms")
        return F.rms_norm(input, normalized_shape, None, eps)

    module = ModuleType(MODULE)
    for function in (
        fused_layer_norm, fused_layer_norm_affine, mixed_dtype_fused_layer_norm_affine, fused_rms_norm
    ):  # fmt: skip
        setattr(module, function.__name__, function)
    for name in ("apex", "apex.normalization", MODULE):
        monkeypatch.setitem(sys.modules, name, module if name == MODULE else ModuleType(name))
    return called


FORMS: dict[str, tuple[dict[str, Any], str]] = {
    "modulated": ({"shift": True, "scale": True}, "plain"),
    "modulated, with a table": ({"shift": True, "scale": True, "shift_row": True, "scale_row": True}, "plain"),
    "scale alone": ({"scale": True}, "plain"),
    "shift alone": ({"shift": True}, "plain"),
    "gain and bias": ({"shift_row": True, "scale_row": True, "one": 0.0, "eps": 1e-2}, "affine"),
    "gain alone": ({"scale_row": True, "one": 0.0}, "plain"),
    "RMS": ({"shift": True, "scale": True, "norm": "rms"}, "rms"),
    "in float32": ({"shift": True, "scale": True, "float32": True}, "plain"),
}


def check(form: str, dtype: torch.dtype, device: str, row_dtype: torch.dtype | None = None) -> None:
    """Values and gradients against float64."""
    torch.manual_seed(0)
    options = dict(FORMS[form][0])
    leaves = {"x": torch.randn(3, 5, 96, dtype=dtype, device=device)}
    for name in ("shift", "scale", "shift_row", "scale_row"):
        if options.pop(name, False):
            row = name.endswith("row")
            leaves[name] = torch.randn(96 if row else (3, 96), dtype=(row and row_dtype) or dtype, device=device)
    wide = {name: leaf.double().requires_grad_() for name, leaf in leaves.items()}
    leaves = {name: leaf.requires_grad_() for name, leaf in leaves.items()}

    def run(function: Any, operands: dict[str, Tensor]) -> Tensor:
        out: Tensor = function(**({"shift": None, "scale": None} | operands), **options)
        return out

    out = run(apex.norm_modulate, leaves)
    options.pop("float32", None)
    expected = run(reference.norm_modulate, wide)
    given = torch.randn_like(out)
    grads = torch.autograd.grad(out, list(leaves.values()), given)
    expected_grads = torch.autograd.grad(expected, list(wide.values()), given.double())
    tolerance = 2**-6 if dtype == torch.bfloat16 else 5e-6
    assert out.dtype == dtype
    for part, exact, leaf in zip((out, *grads), (expected, *expected_grads), (out, *leaves.values()), strict=True):
        error = (part.double() - exact).abs().max() / exact.abs().max()
        assert part.dtype == leaf.dtype and error < tolerance, f"{error:.2e}"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("form", list(FORMS))
def test_a_norm_by_its_signature(form: str, dtype: torch.dtype, calls: list[str]) -> None:
    check(form, dtype, "cpu")
    assert calls == [FORMS[form][1]]


def test_gain_and_bias_of_another_type_go_to_the_mixed_kernel(calls: list[str]) -> None:
    check("gain and bias", torch.bfloat16, "cpu", torch.float32)
    assert calls == ["mixed"]


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("form", list(FORMS))
def test_a_norm_by_apex_itself(form: str, dtype: torch.dtype) -> None:
    pytest.importorskip("fused_layer_norm_cuda", reason="NVIDIA's apex is not installed")
    check(form, dtype, "cuda")


@pytest.mark.parametrize(
    ("config", "draw"), [(tiny_dit(depth=2), dit_inputs), (tiny_uvit(depth=2), uvit_inputs)], ids=["dit", "uvit"]
)
def test_a_model_is_the_same_by_apex(config: Any, draw: Any, calls: list[str]) -> None:
    model = build_model(config)
    torch.manual_seed(1)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    results = []
    for choice in ("reference", "apex"):
        select_kernels(KernelConfig(norm_modulate=choice))
        model.zero_grad()
        out = model(*draw(config))
        out.square().mean().backward()
        results.append([out.detach(), *(p.grad.clone() for p in model.parameters())])
    assert len(calls) == 2 * config.blocks + 1 and set(calls) <= {"plain", "affine"}
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6 * float(theirs.abs().max()))


def test_it_runs_where_it_is_asked_for_and_works(monkeypatch: pytest.MonkeyPatch) -> None:
    """auto never takes it, working or not; asked for where it cannot run it is refused with the reason."""
    config = KernelConfig(norm_modulate="apex")
    with pytest.raises(
        UserError, match=r"norm_modulate: apex needs a GPU and NVIDIA apex \(NVIDIA apex: not installed\);"
    ):
        check_kernels(config, "cuda")
    probes = {"apex-norm": lambda: "0.1", "triton": lambda: "3", "varlen": lambda: "2"}
    monkeypatch.setattr("megadit_kernels.backends._probes", lambda: probes)
    backend.cache_clear()
    check_kernels(config, "cuda")
    with pytest.raises(UserError, match="training is on the CPU"):
        check_kernels(config, "cpu")
    for op in (norm_modulate, residual_norm_modulate, gated_residual):
        assert op.backend_on("cuda") == "fused" and op.backend_on("cpu") == "torch"
    select_kernels(config)
    assert norm_modulate.backend_on("cuda") == residual_norm_modulate.backend_on("cuda") == "apex"
    assert describe_kernels(config, "cuda").startswith("kernels: norm_modulate by NVIDIA apex; ")


def test_another_package_of_that_name_is_not_taken_for_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> None:
    (tmp_path / "apex.py").write_text("raise SystemExit('imported')\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    backend.cache_clear()
    probe = backend("apex-norm")
    assert probe.state == "missing" and "not NVIDIA's, or built without fused_layer_norm_cuda" in probe.detail
