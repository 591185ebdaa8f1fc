"""The one grammar of all families: a model is a list of stages over a flat carrier of tensors.

A carrier is a tuple, floats first and integers last, of fixed shapes; every stage maps one to the next.
``forward`` folds the list, a pipeline cuts it, activation checkpointing wraps its members.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from megadit.conditioning import Conditioning
from megadit.parallel.collectives import all_tokens
from megadit.parallel.recompute import Recompute, run_block
from megadit.parallel.tensor import WHOLE, TensorLayout

Carrier = tuple[Tensor, ...]


class Stage(nn.Module):
    """A piece of a model: ``forward(carrier) -> carrier``.

    ``prefix`` + a parameter's name within the stage is its canonical name in the whole model.
    ``is_block`` marks the stages that ``taps`` count.
    """

    prefix: str = ""
    is_block: bool = False


class StagedModel(nn.Module):
    """A model given by its stages. Subclasses say what the first carrier is and list the stages.

    ``recompute`` says what the blocks keep for the backward pass (see ``megadit.parallel.recompute``).
    ``repa`` is the projector of the REPA loss and ``repa_block`` the block that it reads, counted from 1;
    ``build_model`` sets both, so that families know nothing of them.
    ``counted_tables`` names the buffers that published parameter counts include.
    ``layout`` is the one that the model was built for. A family whose token streams sequence parallelism may cut sets
    ``stream_tokens``, the number of tokens in its blocks' first tensor.
    """

    counted_tables: tuple[str, ...] = ()
    layout: TensorLayout = WHOLE
    stream_tokens: int | None = None
    recompute: Recompute = "none"
    repa: nn.Module | None
    repa_block: int = 0

    def __init__(self) -> None:
        super().__init__()
        self.repa = None  # here and not in the class, where it would hide the submodule

    def carrier(self, x: Tensor, t: Tensor, cond: Conditioning) -> Carrier:
        """The first stage's input: (x, t, ...), floats first, integers last."""
        raise TypeError(f"{type(self).__name__} does not say what its first carrier is")

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
            return output, self._project(tokens)
        carrier = self.carrier(x, t, Conditioning() if cond is None else cond)
        tapped: dict[int, Tensor] = {}
        blocks = 0
        for stage in self.stages():
            carrier = run_block(stage, carrier, self.recompute if stage.is_block else "none")
            if stage.is_block:
                blocks += 1
                if blocks in taps:
                    tapped[blocks] = self.whole_stream(carrier[0])
        if not taps:
            return carrier[0]
        missing = [k for k in taps if k not in tapped]
        if missing:
            raise ValueError(f"taps: {missing} are not blocks of this model, which has blocks 1 to {blocks}")
        return carrier[0], [tapped[k] for k in taps]

    def whole_stream(self, tokens: Tensor) -> Tensor:
        """All tokens of a block's output, of which sequence parallelism leaves a rank its own."""
        return tokens if self.stream_tokens is None else all_tokens(tokens, self.layout, self.stream_tokens)

    def projected(self, tokens: Tensor) -> Tensor:
        """The REPA projection (B, T, F) of the image tokens after block ``repa_block``, from a rank's tokens."""
        return self._project(self.whole_stream(tokens))

    def _project(self, tokens: Tensor) -> Tensor:
        assert self.repa is not None  # who asks has looked
        projection: Tensor = self.repa(self.image_tokens(tokens))
        return projection
