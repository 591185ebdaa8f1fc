"""What every configuration section shares: unknown keys are errors, values are frozen after checking."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict


class Section(BaseModel):
    """One section of a run configuration (pydantic v2): no unknown keys, immutable, no silent coercion."""

    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True, protected_namespaces=())
