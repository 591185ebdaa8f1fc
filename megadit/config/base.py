"""What every configuration section shares: unknown keys are errors, values are strict and frozen after checking."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict


class Section(BaseModel):
    """One section of a run configuration (pydantic v2).

    No unknown keys, no silent coercion ("3" is not 3, true is not 1, nan is not a number) and no
    assignment after construction: what was checked is what the run uses. Change a value with
    ``megadit.config.replace``, which checks again.
    """

    model_config = ConfigDict(
        extra="forbid",
        frozen=True,
        strict=True,
        validate_default=True,
        allow_inf_nan=False,
        protected_namespaces=(),
    )
