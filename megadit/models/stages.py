"""The structure of every family: a model is a list of stages, and a stage maps one state to the next.

Inside a stage the state's tensors have names. Between two stages they are packed as a flat tuple, floats first and
integers last, of fixed shapes: pipelines send tuples, and DeepSpeed's hooks and activation checkpointing find tensors
in tuples alone. ``forward`` runs the list, a pipeline cuts it, activation checkpointing wraps its members.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor, nn

from megadit.conditioning import Conditioning
from megadit.parallel.collectives import gather_sequence
from megadit.parallel.recompute import Recompute, run_block
from megadit.parallel.tensor import UNSHARDED, TensorLayout
from megadit_kernels import choose_all

StageIO = tuple[Tensor, ...]  # a packed state
_COMPILATIONS = 96  # kinds of blocks (up to 6) times modes (3) times shapes


@dataclass(frozen=True)
class StageState:
    """Input or output of a stage; a subclass declares its tensors as fields, in the order in which they are packed.

    A field may be a tuple of tensors, or None where a model has no such tensor. None is not packed; a subclass where
    other fields than the last may be None, or tuples, overrides ``unpack``.
    """

    def pack(self) -> StageIO:
        """The tensors of all fields, in the order of the fields; None has no place."""
        tensors: list[Tensor] = []
        for value in vars(self).values():
            if value is not None:
                tensors.extend(value if isinstance(value, tuple) else (value,))
        return tuple(tensors)

    @classmethod
    def unpack(cls, tensors: StageIO) -> Self:
        """The state whose ``pack`` gives ``tensors``."""
        return cls(*tensors)

    def complete(self) -> StageState:
        """The state as it travels between ranks, is read by taps and projected: with the residual that its block left
        pending, where it left one, added to the tokens."""
        return self


_INTEGER_CONDITIONS = {torch.bool: "text_mask", torch.int64: "labels", torch.int32: "text_lengths"}


@dataclass(frozen=True)
class ModelInputs(StageState):
    """Input of the first stage: x (B, C, H, W), t (B,) in float32, and the conditions of the family.

    text (B, L, F), pooled (B, P), labels int64 (B,), text_mask bool (B, L): False for padding, text_lengths int32 (B,):
    tokens before the padding, None where they are not known.
    """

    x: Tensor
    t: Tensor
    text: Tensor | None = None
    pooled: Tensor | None = None
    labels: Tensor | None = None
    text_mask: Tensor | None = None
    text_lengths: Tensor | None = None

    @classmethod
    def unpack(cls, tensors: StageIO) -> Self:
        """Conditions are recognised by type and dimensions: text is 3-D, pooled 2-D, text_mask bool, labels int64,
        text_lengths int32."""
        x, t, *packed = tensors
        conditions: dict[str, Tensor] = {}
        for tensor in packed:
            if tensor.is_floating_point():
                conditions["text" if tensor.dim() == 3 else "pooled"] = tensor
            else:
                conditions[_INTEGER_CONDITIONS[tensor.dtype]] = tensor
        return cls(x, t, **conditions)


@dataclass(frozen=True)
class ModelOutput(StageState):
    """Output of the last stage: (B, C or 2C, H, W)."""

    image: Tensor


class Stage(nn.Module):
    """A part of a model: ``run(state) -> state``, called as ``forward(tensors) -> tensors``.

    ``takes`` is the class of ``run``'s input.
    ``prefix`` + a parameter's name within the stage is its canonical name in the model.
    ``is_block`` marks Transformer blocks, which ``taps`` count.
    ``takes_pending``: ``run`` also takes a state whose last residual is pending, and adds it within its first norm.
    ``compiled``: its ``forward`` is a compiled one, called as ``forward(*tensors)``, which recomputes as
    ``compile_blocks`` was told.
    """

    takes: type[StageState]
    prefix: str = ""
    is_block: bool = False
    takes_pending: bool = False
    compiled: bool = False

    def forward(self, tensors: StageIO, leave_pending: bool = False) -> StageIO:
        """``run`` on packed states. ``leave_pending``: the next stage adds the last residual, if ``run`` left one."""
        state = self.run(self.takes.unpack(tensors))
        return (state if leave_pending else state.complete()).pack()

    def recomputed(self, tensors: StageIO, how: Recompute, leave_pending: bool = False) -> StageIO:
        """``forward``, a block's under the activation checkpointing ``how``."""
        if self.compiled:  # DeepSpeed's hooks on the gradients of a whole block look at tensors, not tuples
            return self(*tensors, leave_pending=leave_pending)
        call = functools.partial(self, leave_pending=True) if leave_pending else self
        return run_block(call, tensors, how if self.is_block else "none")

    def run_on_own_inputs(self, compute: Callable[..., StageIO], tensors: StageIO) -> StageIO:
        """``compute(*tensors)``, which is the compiled ``forward``.

        A stage overrides this to keep from ``compute`` tensors that it only hands on: where blocks hand on different
        numbers of them, each would be a graph of its own.
        """
        return compute(*tensors)

    def run(self, state: Any) -> StageState:
        """The state that the next stage takes; a block may leave its last residual pending."""
        raise TypeError(f"{type(self).__name__} does not say what it computes")


def compile_blocks(stages: Iterable[Stage], recompute: Recompute, **options: Any) -> None:
    """Compile the blocks among ``stages`` with torch.compile (``options``), each by itself, and what they recompute.

    One compilation serves all blocks that are alike, and the graph of a block holds its collectives. Hooks of the block
    itself stay outside (ZeRO-3 gathers its parameters there). The kinds of blocks, with and without gradients, at each
    number of images, share torch's limit of compilations, past which blocks would silently run uncompiled: so it is
    raised.
    """
    import torch._dynamo.config

    config = torch._dynamo.config
    config.recompile_limit = max(config.recompile_limit, _COMPILATIONS)
    choose_all("cuda" if torch.cuda.is_available() else "cpu")
    run = torch.compile(_run_recomputed, **options)
    for stage in stages:
        if stage.is_block:
            stage.forward = functools.partial(_run_compiled, run, stage, recompute)  # type: ignore[method-assign]
            stage.compiled = True


def _run_compiled(
    run: Callable[..., StageIO], stage: Stage, how: Recompute, *tensors: Tensor, leave_pending: bool = False
) -> StageIO:
    return stage.run_on_own_inputs(functools.partial(run, stage, how, leave_pending=leave_pending), tensors)


def _run_recomputed(stage: Stage, how: Recompute, *tensors: Tensor, leave_pending: bool = False) -> StageIO:
    """The block's forward pass as it was before it was compiled."""
    return run_block(functools.partial(type(stage).forward, stage, leave_pending=leave_pending), tensors, how)


class StagedModel(nn.Module):
    """Base class of models: subclasses define ``inputs`` and ``stages``.

    ``recompute``: activation checkpointing of the blocks (see ``megadit.parallel.recompute``).
    ``residual_across_blocks``: a block leaves its last residual to the first norm of the stage after it.
    ``repa``, ``repa_block``: projector of the REPA loss, and the block whose tokens it projects, counted from 1;
    ``build_model`` sets both.
    ``counted_tables``: names of the buffers that published parameter counts include.
    ``layout``: the tensor layout that the model was built for.
    ``stream_tokens``: the number of tokens of a block's output, in a family whose tokens sequence parallelism may
    shard; ``taps`` gather them.
    """

    counted_tables: tuple[str, ...] = ()
    layout: TensorLayout = UNSHARDED
    stream_tokens: int | None = None
    recompute: Recompute = "none"
    residual_across_blocks: bool = False
    repa: nn.Module | None
    repa_block: int = 0

    def __init__(self) -> None:
        super().__init__()
        self.repa = None  # a class attribute would hide the submodule

    def inputs(self, x: Tensor, t: Tensor, cond: Conditioning) -> StageState:
        """Input of the first stage. Raises ValueError where x or the condition does not fit the model."""
        raise TypeError(f"{type(self).__name__} does not say what its inputs are")

    def packed_inputs(self, x: Tensor, t: Tensor, cond: Conditioning) -> StageIO:
        """``inputs``, packed."""
        return self.inputs(x, t, cond).pack()

    def stages(self) -> list[Stage]:
        """All stages in order. Those that are no blocks refer to submodules of the model."""
        raise TypeError(f"{type(self).__name__} does not list its stages")

    def compile_blocks(self, **options: Any) -> None:
        """Compile the blocks with torch.compile, and the recomputation that is set; see ``compile_blocks``."""
        compile_blocks(self.stages(), self.recompute, **options)

    def image_tokens(self, tokens: Tensor) -> Tensor:
        """The image tokens among a block's tokens (B, T, n), row-major; by default all."""
        return tokens

    def forward(
        self,
        x: Tensor,
        t: Tensor,
        cond: Conditioning | None = None,
        taps: Sequence[int] = (),
        project: bool = False,
    ) -> Any:
        """Predict from a noisy image.

        x (B, C, H, W) of any floating dtype; t (B,) in [0, 1000], kept in float32; returns (B, C or 2C, H, W)
        in the weights' dtype. With ``taps`` also, in their order, the tokens (B, T, n) after block k, counted
        from 1. With ``project`` it returns (output, projected): beside the output the REPA projection of the image
        tokens after block ``repa_block``, (B, T, F).

        Raises:
            ValueError: a condition that the model needs is missing, x has another size than the model, a
                tap is not the number of a block, or there is no projector.
        """
        if project:
            if self.repa is None or taps:
                raise ValueError("project: the model has no REPA projector (model.repa), or taps are asked for too")
            output, [tokens] = self.forward(x, t, cond, taps=(self.repa_block,))
            return output, self._project_image_tokens(tokens)
        stage_io = self.packed_inputs(x, t, Conditioning() if cond is None else cond)
        tapped: dict[int, Tensor] = {}
        blocks = 0
        stages = self.stages()
        for stage, following in zip(stages, (*stages[1:], None), strict=True):
            blocks += stage.is_block
            is_read = stage.is_block and blocks in taps
            pending = self.leaves_pending(stage, following, is_read)
            stage_io = stage.recomputed(stage_io, self.recompute, pending)
            if is_read:
                tapped[blocks] = self.gather_tokens(stage_io[0])
        if not taps:
            return stage_io[0]
        missing = [k for k in taps if k not in tapped]
        if missing:
            raise ValueError(f"taps: {missing} are not blocks of this model, which has blocks 1 to {blocks}")
        return stage_io[0], [tapped[k] for k in taps]

    def leaves_pending(self, stage: Stage, following: Stage | None, is_read: bool) -> bool:
        """Whether ``stage`` leaves its last residual to ``following``, None at the end of what this rank holds.

        ``is_read``: something besides reads the tokens between the two.
        """
        takes_pending = following is not None and following.takes_pending
        return self.residual_across_blocks and stage.is_block and takes_pending and not is_read

    def gather_tokens(self, tokens: Tensor) -> Tensor:
        """All tokens of a block's output, (B, T, n), from those of this rank under sequence parallelism."""
        return tokens if self.stream_tokens is None else gather_sequence(tokens, self.layout, self.stream_tokens)

    def project_tokens(self, tokens: Tensor) -> Tensor:
        """The REPA projection (B, T, F) of the image tokens, from this rank's tokens after block ``repa_block``."""
        return self._project_image_tokens(self.gather_tokens(tokens))

    def _project_image_tokens(self, tokens: Tensor) -> Tensor:
        assert self.repa is not None  # callers check it
        projection: Tensor = self.repa(self.image_tokens(tokens))
        return projection
