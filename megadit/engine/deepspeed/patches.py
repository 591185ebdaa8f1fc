"""Replacement of DeepSpeed's methods by methods of the same names."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any


class MethodPatches:
    """A class whose methods take the place of DeepSpeed's; those that they replace are in ``deepspeed_methods``."""

    def __init__(self) -> None:
        self.deepspeed_methods = SimpleNamespace()

    def _replace(self, target: Any, *names: str) -> None:
        for name in names:
            setattr(self.deepspeed_methods, name, getattr(target, name))
            setattr(target, name, getattr(self, name))
