"""PixArt-alpha (arXiv 2310.00426) and its proxy of width 288; T5 captions of 120 tokens."""

from __future__ import annotations

from megadit.config.presets import sp_and_mup

_SHAPE = {"depth": 28, "patch_size": 2, "num_classes": 0, "text": {"dim": 4096}}
_XL = sp_and_mup("pixart-xl-2", {**_SHAPE, "width": 1152}, 16)
_PROXY = sp_and_mup("pixart-proxy", {**_SHAPE, "width": 288}, 4)

PRESETS = {
    name: {**keys, **({"init": "authors"} if name.endswith("-mup") else {})} for name, keys in (_XL | _PROXY).items()
}
