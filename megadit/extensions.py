"""The registries of megadit, one per kind of extension. See docs/extending.md.

A plugin is a Python module with a function ``register()`` that adds to these:

    from megadit.extensions import METRICS

    def register() -> None:
        METRICS.add("brightness", Brightness)

megadit's own extensions are listed by the packages named here, one file or folder each.
"""

from __future__ import annotations

from typing import Any

from megadit.registry import Registry

FAMILIES: Registry[Any] = Registry("model family", "model.family", "megadit.models:FAMILIES")
DATA_SOURCES: Registry[Any] = Registry("data source", "data.name", "megadit.data.sources:SOURCES")
CODECS: Registry[Any] = Registry("codec", "data.vae.path", "megadit.data.codecs:CODECS")
SCHEDULES: Registry[Any] = Registry("schedule", "optim.schedule", "megadit.engine:SCHEDULES")
CALLBACKS: Registry[Any] = Registry("callback", "train.callbacks", "megadit.train.callbacks:CALLBACKS")
FUSED_OPS: Registry[Any] = Registry("fused operation", "kernels", "megadit_kernels:OPS")
METRICS: Registry[Any] = Registry("metric", "evaluate", "megadit.evaluate.metrics:METRICS")
# The plugins that this process has imported, by module name: see megadit/plugins.py.
PLUGINS: dict[str, Any] = {}
