"""MMDiT (arXiv 2403.03206) at the two sizes of arXiv 2505.15270, section 5.2: 0.18B and 18B parameters."""

from __future__ import annotations

from megadit.config.presets import sp_and_mup

_BASE_WIDTH = 1920  # of its section 5.2, between the widths of proxy and target
_SHAPE = {"depth": 16, "patch_size": 2, "mlp": "swiglu", "num_classes": 0, "learn_sigma": False}
_SHAPE |= {"text": {"dim": 4096}, "qk_norm": "rms"}  # QK norm: its appendix C.4

PRESETS = sp_and_mup("mmdit-proxy", {**_SHAPE, "width": 512}, 8, _BASE_WIDTH)
PRESETS |= sp_and_mup("mmdit-18b", {**_SHAPE, "width": 5120}, 80, _BASE_WIDTH)
