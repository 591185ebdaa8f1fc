"""The one grammar of all families: a model is a list of stages, and a stage maps one state to the next.

Inside a stage the state's tensors have names. Between two stages they travel as a flat tuple, floats first and
integers last, of fixed shapes: pipelines send tuples, and DeepSpeed's hooks and activation checkpointing look for
tensors in tuples alone. ``forward`` folds the list, a pipeline cuts it, activation checkpointing wraps its members.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor, nn

from megadit.conditioning import Conditioning
from megadit.parallel.collectives import gather_sequence
from megadit.parallel.recompute import Recompute, run_block
from megadit.parallel.tensor import UNSHARDED, TensorLayout

StageIO = tuple[Tensor, ...]  # a packed state, as it travels


@dataclass(frozen=True)
class StageState:
    """What a stage takes or gives. A subclass's fields stand in the order in which they travel.

    A field may be a tuple of tensors, or None where a model has no such tensor: it takes no place then, and a subclass
    whose last fields are not the only such ones says in ``unpack`` which are there.
    """

    def pack(self) -> StageIO:
        """The tensors in order."""
        flat: list[Tensor] = []
        for value in vars(self).values():
            if value is not None:
                flat.extend(value if isinstance(value, tuple) else (value,))
        return tuple(flat)

    @classmethod
    def unpack(cls, tensors: StageIO) -> Self:
        """The state of which ``pack`` made these."""
        return cls(*tensors)


@dataclass(frozen=True)
class ModelInputs(StageState):
    """What a model is given: x (B, C, H, W), t (B,) in float32 and what its family is conditioned on.

    text (B, L, F), pooled (B, P), labels int64 (B,), text_mask bool (B, L): which tokens of the text are no padding.
    """

    x: Tensor
    t: Tensor
    text: Tensor | None = None
    pooled: Tensor | None = None
    labels: Tensor | None = None
    text_mask: Tensor | None = None

    @classmethod
    def unpack(cls, tensors: StageIO) -> Self:
        """Told apart by kind: a text has a dimension more than its pooled feature, a mask is of bools."""
        x, t, *given = tensors
        named: dict[str, Tensor] = {}
        for tensor in given:
            if tensor.is_floating_point():
                named["text" if tensor.dim() == 3 else "pooled"] = tensor
            else:
                named["text_mask" if tensor.dtype == torch.bool else "labels"] = tensor
        return cls(x, t, **named)


@dataclass(frozen=True)
class ModelOutput(StageState):
    """What the last stage gives: (B, C or 2C, H, W)."""

    image: Tensor


class Stage(nn.Module):
    """A piece of a model: ``run(state) -> state``, called as ``forward(tensors) -> tensors``.

    ``takes`` is the class of the state that ``run`` is given.
    ``prefix`` + a parameter's name within the stage is its canonical name in the whole model.
    ``is_block`` marks the stages that ``taps`` count.
    """

    takes: type[StageState]
    prefix: str = ""
    is_block: bool = False

    def forward(self, tensors: StageIO) -> StageIO:
        """Unpack the state, run the stage and pack what it gives."""
        return self.run(self.takes.unpack(tensors)).pack()

    def recomputed(self, tensors: StageIO, how: Recompute) -> StageIO:
        """``forward``, of which a block keeps for its backward pass what ``how`` says."""
        return run_block(self, tensors, how if self.is_block else "none")

    def run(self, state: Any) -> StageState:
        """The next stage's state."""
        raise TypeError(f"{type(self).__name__} does not say what it computes")


class StagedModel(nn.Module):
    """A model given by its stages. Subclasses say what its inputs are and list the stages.

    ``recompute`` says what the blocks keep for the backward pass (see ``megadit.parallel.recompute``).
    ``repa`` is the projector of the REPA loss and ``repa_block`` the block that it reads, counted from 1;
    ``build_model`` sets both, so that families know nothing of them.
    ``counted_tables`` names the buffers that published parameter counts include.
    ``layout`` is the one that the model was built for. A family whose token streams sequence parallelism may cut sets
    ``stream_tokens``, the number of tokens in its blocks' first tensor, which ``taps`` read.
    """

    counted_tables: tuple[str, ...] = ()
    layout: TensorLayout = UNSHARDED
    stream_tokens: int | None = None
    recompute: Recompute = "none"
    repa: nn.Module | None
    repa_block: int = 0

    def __init__(self) -> None:
        super().__init__()
        self.repa = None  # here and not in the class, where it would hide the submodule

    def inputs(self, x: Tensor, t: Tensor, cond: Conditioning) -> StageState:
        """The first stage's state. Raises ValueError: x or the condition does not fit the model."""
        raise TypeError(f"{type(self).__name__} does not say what its inputs are")

    def packed_inputs(self, x: Tensor, t: Tensor, cond: Conditioning) -> StageIO:
        """``inputs``, packed."""
        return self.inputs(x, t, cond).pack()

    def stages(self) -> list[Stage]:
        """All stages in order. Those that are not blocks only refer to the model's submodules."""
        raise TypeError(f"{type(self).__name__} does not list its stages")

    def image_tokens(self, tokens: Tensor) -> Tensor:
        """Of a block's tokens (B, T, n), those of the image, row-major; here all of them."""
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
        for stage in self.stages():
            stage_io = stage.recomputed(stage_io, self.recompute)
            if stage.is_block:
                blocks += 1
                if blocks in taps:
                    tapped[blocks] = self.gather_tokens(stage_io[0])
        if not taps:
            return stage_io[0]
        missing = [k for k in taps if k not in tapped]
        if missing:
            raise ValueError(f"taps: {missing} are not blocks of this model, which has blocks 1 to {blocks}")
        return stage_io[0], [tapped[k] for k in taps]

    def gather_tokens(self, tokens: Tensor) -> Tensor:
        """All tokens of a block's output, of which sequence parallelism leaves a rank its own."""
        return tokens if self.stream_tokens is None else gather_sequence(tokens, self.layout, self.stream_tokens)

    def project_tokens(self, tokens: Tensor) -> Tensor:
        """The REPA projection (B, T, F) of the image tokens after block ``repa_block``, from a rank's tokens."""
        return self._project_image_tokens(self.gather_tokens(tokens))

    def _project_image_tokens(self, tokens: Tensor) -> Tensor:
        assert self.repa is not None  # who asks has looked
        projection: Tensor = self.repa(self.image_tokens(tokens))
        return projection
