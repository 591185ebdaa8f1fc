"""Activation checkpointing: which activations a block saves for its backward pass, and which it recomputes there.

``full`` saves only a block's inputs. ``selective`` also saves the outputs of matrix products and attention, which take
nearly all of the FLOPs, and recomputes norms, activations, modulation and gates, which take nearly all of the memory.
Both give the same bits as ``none``: the same operations run on the same numbers.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from contextvars import ContextVar
from typing import Any, Literal

import torch
from torch import Tensor
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

_IN_PLACE = frozenset(f"aten::{name}_" for name in ("add", "sub", "mul", "div", "addmm", "addcmul", "baddbmm"))
_VIEWS = frozenset(f"aten::{name}" for name in ("view", "_unsafe_view", "t", "transpose", "permute", "detach"))

# Attention by kernels that are operators of others than aten.
_FLASH = frozenset(
    (
        "torch_attn::_varlen_attn",
        "flash_attn::_flash_attn_forward",
        "flash_attn::_flash_attn_varlen_forward",
        "flash_attn_3::_flash_attn_forward",
    )
)

Recompute = Literal["none", "selective", "full"]
Tensors = tuple[Tensor, ...]
_recomputed: ContextVar[bool] = ContextVar("recomputed", default=False)


def is_recomputed() -> bool:
    """Whether the block that runs now is checkpointed: what it saves lives only during its own backward pass.

    False where it is being compiled: the compiler sees equal operations of both passes and decides what to keep.
    """
    return not torch.compiler.is_compiling() and _recomputed.get()


def run_block(block: Callable[[Tensors], Tensors], inputs: Tensors, how: Recompute) -> Tensors:
    """``block(inputs)``, with activation checkpointing ``how`` where gradients are recorded."""
    if how == "none" or not torch.is_grad_enabled():
        return block(inputs)
    # No block draws from torch's generators (noise and dropout are keyed), so that their state need not be kept.
    options: dict[str, Any] = {"use_reentrant": False, "preserve_rng_state": False}
    if how == "selective":
        options["context_fn"] = _selective_contexts
    outputs: Tensors = checkpoint(functools.partial(_run_marked, block), inputs, **options)
    return outputs


def _selective_contexts() -> Any:
    return create_selective_checkpoint_contexts(_SaveProducts())


def _run_marked(block: Callable[[Tensors], Tensors], inputs: Tensors) -> Tensors:
    if torch.compiler.is_compiling():
        return block(inputs)  # nothing reads the mark
    token = _recomputed.set(True)  # here, and not around it all: the backward pass runs this again, in its own thread
    try:
        return block(inputs)
    finally:
        _recomputed.reset(token)


@functools.cache
def _products() -> frozenset[Any]:
    aten = torch.ops.aten
    names = (
        "mm",
        "addmm",
        "bmm",
        "baddbmm",
        "_scaled_mm",
        "_scaled_dot_product_flash_attention",
        "_scaled_dot_product_flash_attention_for_cpu",
        "_scaled_dot_product_efficient_attention",
        "_scaled_dot_product_cudnn_attention",
        "_scaled_dot_product_fused_attention_overrideable",
    )
    return frozenset(getattr(aten, name).default for name in names if hasattr(aten, name))


class _SaveProducts:
    """Selective checkpointing policy of one run of one block: save products, recompute everything else.

    A product that is changed in place right after it was computed (a bias added to it) would be saved changed, and be
    changed again in the backward pass: wrong gradients without an error. So that is an error here.
    """

    def __init__(self) -> None:
        self._last_saved: Any = None

    def __call__(self, _context: Any, operation: Any, *_args: Any, **_kwargs: Any) -> CheckpointPolicy:
        if operation in _products() or operation._schema.name in _FLASH:
            self._last_saved = operation
            return CheckpointPolicy.MUST_SAVE
        if self._last_saved is not None and operation._schema.name in _IN_PLACE:
            raise RuntimeError(
                f"{operation._schema.name} changes the result of {self._last_saved} in place in a selectively "
                "recomputed block"
            )
        if operation._schema.name not in _VIEWS:
            self._last_saved = None
        return CheckpointPolicy.PREFER_RECOMPUTE
