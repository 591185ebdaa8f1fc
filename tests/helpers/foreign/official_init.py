"""The initialisers of the originals and of the paper's authors, written a second time on torch's own modules.

``initial_distributions`` runs one without drawing: it records what each parameter would be drawn from. Modules hold
the parameters of a model under megadit's names and compute nothing.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode


@dataclass(frozen=True)
class InitialDistribution:
    """A distribution of mean 0 (``normal``, ``uniform``) and its standard deviation, or a ``constant`` value."""

    kind: str
    value: float


def initial_distributions(
    build: Callable[[], nn.Module], then: Callable[[nn.Module], None] | None = None
) -> dict[str, InitialDistribution]:
    """The distribution of every parameter of ``build()``, by name; ``then`` is run on the model after it was built."""
    recorder = _Recorder()
    with recorder, torch.device("meta"):
        model = build()
        if then is not None:
            then(model)
    return {name: recorder.distribution_of(param) for name, param in model.named_parameters()}


class _Recorder(TorchDispatchMode):
    """Follows fills and draws through the storages of meta tensors."""

    def __init__(self) -> None:
        super().__init__()
        self._starts: dict[int, InitialDistribution] = {}
        self._alive: list[Tensor] = []  # so that no storage's number is given twice

    def distribution_of(self, tensor: Tensor) -> InitialDistribution:
        return self._starts[_storage(tensor)]

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        if isinstance(out, Tensor):
            self._alive.append(out)
            before = self._starts.get(_storage(args[0])) if args and isinstance(args[0], Tensor) else None
            after = self._after(name, args[1:], kwargs or {}, before)
            if after is not None:
                self._starts[_storage(out)] = after
        return out

    @staticmethod
    def _after(
        name: str, args: Any, kwargs: dict[str, Any], before: InitialDistribution | None
    ) -> InitialDistribution | None:
        if name == "uniform_":
            low, high = (*args, *(kwargs.get(key) for key in ("from", "to")))[:2]
            assert low == -high
            return InitialDistribution("uniform", high / math.sqrt(3))
        if name == "normal_":
            return InitialDistribution(
                "normal", float((*args, 0.0, 1.0)[1] if len(args) > 1 else kwargs.get("std", 1.0))
            )
        if name in ("fill_", "zero_"):
            return InitialDistribution("constant", float(args[0]) if args else 0.0)
        if name in ("zeros", "ones"):
            return InitialDistribution("constant", float(name == "ones"))
        if name == "randn":
            return InitialDistribution("normal", 1.0)
        if before is not None and name in ("mul_", "mul", "div_", "div"):
            factor = float(args[0])
            return replace(before, value=before.value * factor if name.startswith("mul") else before.value / factor)
        return before


def _storage(tensor: Tensor) -> int:
    return cast("int", tensor.untyped_storage()._cdata)


def tree(**children: nn.Module | nn.Parameter) -> nn.Module:
    """A module that holds ``children`` and computes nothing."""
    module = nn.Module()
    for name, child in children.items():
        setattr(module, name, child)
    return module


def _activated(*linears: nn.Module) -> nn.Sequential:
    """SiLU before a single linear, between two."""
    first, *rest = linears
    return nn.Sequential(nn.SiLU(), first) if not rest else nn.Sequential(first, nn.SiLU(), *rest)


def _attention(n: int, bias: bool = True) -> nn.Module:
    return tree(qkv=nn.Linear(n, 3 * n, bias=bias), proj=nn.Linear(n, n))


def _mlp(n: int) -> nn.Module:
    return tree(fc1=nn.Linear(n, 4 * n), fc2=nn.Linear(4 * n, n))


def dit_shapes(n: int, readout: type[nn.Linear] = nn.Linear) -> nn.Module:
    """DiT of one block, patch 2, 4 channels, learned variance, 1000 classes."""
    block = tree(attn=_attention(n), mlp=_mlp(n), adaLN_modulation=_activated(nn.Linear(n, 6 * n)))
    return tree(
        x_embedder=tree(proj=nn.Conv2d(4, n, 2, 2)),
        t_embedder=tree(mlp=_activated(nn.Linear(256, n), nn.Linear(n, n))),
        y_embedder=tree(embedding_table=nn.Embedding(1001, n)),
        blocks=nn.ModuleList([block]),
        final_layer=tree(linear=readout(n, 32), adaLN_modulation=_activated(nn.Linear(n, 2 * n))),
    )


def pixart_shapes(n: int, readout: type[nn.Linear] = nn.Linear) -> nn.Module:
    """PixArt-alpha of one block, patch 2, 4 channels, learned variance, text of 4096 channels."""
    cross = tree(q_linear=nn.Linear(n, n), kv_linear=nn.Linear(n, 2 * n), proj=nn.Linear(n, n))
    block = tree(attn=_attention(n), cross_attn=cross, mlp=_mlp(n))
    block.scale_shift_table = nn.Parameter(torch.randn(6, n) / n**0.5)
    final = tree(linear=readout(n, 32))
    final.scale_shift_table = nn.Parameter(torch.randn(2, n) / n**0.5)
    return tree(
        x_embedder=tree(proj=nn.Conv2d(4, n, 2, 2)),
        t_embedder=tree(mlp=_activated(nn.Linear(256, n), nn.Linear(n, n))),
        t_block=_activated(nn.Linear(n, 6 * n)),
        y_embedder=tree(y_proj=tree(fc1=nn.Linear(4096, n), fc2=nn.Linear(n, n))),
        blocks=nn.ModuleList([block]),
        final_layer=final,
    )


def uvit_shapes(n: int) -> nn.Module:
    """Class-conditional U-ViT of two blocks and one in the middle, 16 x 16 tokens of 2 x 2 x 4, with the time MLP."""

    def block() -> nn.Module:
        return tree(norm1=nn.LayerNorm(n), attn=_attention(n, bias=False), norm2=nn.LayerNorm(n), mlp=_mlp(n))

    last = block()
    last.skip_linear = nn.Linear(2 * n, n)
    return tree(
        patch_embed=tree(proj=nn.Conv2d(4, n, 2, 2)),
        time_embed=_activated(nn.Linear(n, 4 * n), nn.Linear(4 * n, n)),
        label_emb=nn.Embedding(1001, n),
        pos_embed=tree(weight=nn.Parameter(torch.zeros(1, 258, n))),
        in_blocks=nn.ModuleList([block()]),
        mid_block=block(),
        out_blocks=nn.ModuleList([last]),
        norm=nn.LayerNorm(n),
        decoder_pred=nn.Linear(n, 16),
        final_layer=nn.Conv2d(4, 4, 3, padding=1),
    )


def mmdit_shapes(n: int) -> nn.Module:
    """MMDiT of two blocks, GELU, QK norm, 4 channels, text of 4096 and pooled text of 768 channels."""

    def stream(chunks: int) -> nn.Module:
        attention = tree(qkv=nn.Linear(n, 3 * n), ln_q=_gain(72), ln_k=_gain(72))
        half = tree(attn=attention, adaLN_modulation=_activated(nn.Linear(n, chunks * n)))
        if chunks == 6:
            attention.proj, half.mlp = nn.Linear(n, n), _mlp(n)
        return half

    blocks = [tree(context_block=stream(6), x_block=stream(6)), tree(context_block=stream(2), x_block=stream(6))]
    return tree(
        x_embedder=tree(proj=nn.Conv2d(4, n, 2, 2)),
        t_embedder=tree(mlp=_activated(nn.Linear(256, n), nn.Linear(n, n))),
        y_embedder=tree(mlp=_activated(nn.Linear(768, n), nn.Linear(n, n))),
        context_embedder=nn.Linear(4096, n),
        joint_blocks=nn.ModuleList(blocks),
        final_layer=tree(linear=nn.Linear(n, 16), adaLN_modulation=_activated(nn.Linear(n, 2 * n))),
    )


def _gain(size: int) -> nn.Module:
    return tree(weight=nn.Parameter(torch.ones(size)))


def xavier(model: nn.Module, init: Any = nn.init) -> None:
    """What the originals begin with: xavier_uniform on every linear and zero biases."""
    for module in model.modules():
        if isinstance(module, nn.Linear):
            init.xavier_uniform_(module.weight)
            if module.bias is not None:
                nn.init.constant_(module.bias, 0)


def small(*modules: Any, init: Any = nn.init) -> None:
    """N(0, .02) on the weights of linears and tables."""
    for module in modules:
        init.normal_(module if isinstance(module, Tensor) else module.weight, std=0.02)


def zero(*modules: Any) -> None:
    """Zero weights and biases."""
    for module in modules:
        nn.init.constant_(module.weight, 0)
        nn.init.constant_(module.bias, 0)


def patches_as_linear(proj: Any) -> None:
    """xavier_uniform on the patch embedding as on a linear, and a zero bias."""
    nn.init.xavier_uniform_(proj.weight.data.view([proj.weight.shape[0], -1]))
    nn.init.constant_(proj.bias, 0)


def official_dit(model: Any) -> None:
    """``DiT.initialize_weights`` of arXiv 2212.09748."""
    xavier(model)
    patches_as_linear(model.x_embedder.proj)
    small(model.y_embedder.embedding_table, model.t_embedder.mlp[0], model.t_embedder.mlp[2])
    zero(*(block.adaLN_modulation[-1] for block in model.blocks))
    zero(model.final_layer.adaLN_modulation[-1], model.final_layer.linear)


def authors_dit(model: Any) -> None:
    """The muP DiT of arXiv 2505.15270: kaiming_normal (a=1, fan_in) on every weight, the label table as torch does."""
    for module in model.modules():
        if isinstance(module, nn.Linear | nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, a=1, mode="fan_in")
            nn.init.constant_(cast("Tensor", module.bias), 0.0)
    zero(model.final_layer.linear)


def pixart(model: Any, init: Any = nn.init) -> None:
    """``PixArt.initialize_weights`` as the authors of arXiv 2505.15270 have it; ``init``: ``mup.init`` under muP."""
    xavier(model, init)
    if init is nn.init:
        patches_as_linear(model.x_embedder.proj)
    else:
        init.xavier_uniform_(model.x_embedder.proj.weight)
        nn.init.constant_(model.x_embedder.proj.bias, 0)
        small(model.final_layer.scale_shift_table, *(block.scale_shift_table for block in model.blocks), init=init)
    small(model.t_embedder.mlp[0], model.t_embedder.mlp[2], model.t_block[1], init=init)
    small(model.y_embedder.y_proj.fc1, model.y_embedder.y_proj.fc2, init=init)
    zero(*(block.cross_attn.proj for block in model.blocks), model.final_layer.linear)


def official_uvit(model: Any) -> None:
    """``UViT._init_weights`` of arXiv 2209.12152; what is neither linear nor norm stays as torch has it.

    Its trunc_normal_ cuts at -2 and 2, a hundred standard deviations away.
    """
    small(model.pos_embed)
    for module in model.modules():
        if isinstance(module, nn.Linear):
            small(module)
            if module.bias is not None:
                nn.init.constant_(module.bias, 0)


def mmdit_as_dit(model: Any) -> None:
    """MMDiT's authors published no initialiser; it starts as DiT, with text embedded as its timestep is."""
    xavier(model)
    patches_as_linear(model.x_embedder.proj)
    small(model.context_embedder, *(getattr(model, f"{name}_embedder").mlp[i] for name in "ty" for i in (0, 2)))
    streams = [half for block in model.joint_blocks for half in block.children()]
    zero(*(half.adaLN_modulation[-1] for half in streams))
    zero(model.final_layer.adaLN_modulation[-1], model.final_layer.linear)
