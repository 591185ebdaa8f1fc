"""What the families' modules share: sizes that weights only hint at, and the sentences where they do not tell."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from torch import Tensor

from megadit.errors import UserError


def heads_of(width: int, hint: int | None, published: Mapping[int, int], head_dims: Sequence[int]) -> int:
    """The number of heads: the hint, that of the published size with this width, or the only one of ``head_dims``.

    Raises:
        UserError: none or several of ``head_dims`` divide the width and there is no hint, or the hint does not.
    """
    if hint is not None:
        return fitting_heads(width, int(hint))
    if width in published:
        return published[width]
    fitting = [width // dim for dim in head_dims if width % dim == 0]
    if len(fitting) != 1:
        raise UserError(
            f"--hint heads: is needed, since nothing in the weights tells how many heads a width of {width} has; give "
            "--hint heads=N"
        )
    return fitting[0]


def fitting_heads(width: int, heads: int) -> int:
    """``heads``, which the width must be a multiple of. Raises UserError where it is not."""
    if width % heads:
        raise UserError(f"--hint heads: {heads} does not divide the width {width} of IN; give another number")
    return heads


def learns_sigma(out: int, channels: int, what: str) -> bool:
    """Whether ``out`` channels are a prediction and a variance. ``what`` the model is, such as "a DiT".

    Raises:
        UserError: they are neither as many as the input's ``channels`` nor twice as many.
    """
    if out not in (channels, 2 * channels):
        raise UserError(
            f"IN: is not {what}: it puts out {out} channels for an input of {channels}, and {what} has as many or "
            "twice as many; give another file"
        )
    return out == 2 * channels


def input_size(table: Tensor | None, patch: int, hint: int | None) -> int:
    """Side of the image: the hint, or of the stored positions (1, tokens, width), which a hint must agree with.

    Raises:
        UserError: there is neither, or they differ.
    """
    if table is None:
        if hint is None:
            raise size_needed("the file has no pos_embed that would tell")
        return int(hint)
    side = math.isqrt(table.shape[1]) * patch if table.dim() == 3 else 0
    if hint is not None and int(hint) != side:
        raise UserError(f"--hint input_size: {hint}, but pos_embed of IN is for {side}; leave the hint out")
    return side


def size_needed(why: str) -> UserError:
    """The error that asks for the size of the image."""
    return UserError(
        f"--hint input_size: is needed, since {why}; give --hint input_size=N, the side of the (latent) image"
    )


def refuse_lacking(lacking: Mapping[str, bool], who: str) -> None:
    """Raise UserError with the first of the model's keys and values that is found and ``who`` has no place for."""
    for what, found in lacking.items():
        if found:
            raise UserError(f"{what}, which {who} cannot represent; this model stays with --to safetensors")
