"""What every object of a request has in common (no ray, no torch)."""

from __future__ import annotations

from typing import Any, ClassVar

from pydantic import BaseModel, ConfigDict, model_validator

from forge_ray.serve.replayed import without_what_is_empty

NAME = r"^[a-zA-Z0-9_-]{1,64}$"


class Wire(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, protected_namespaces=())


class Sparse(Wire):
    """An object in which what is empty asks for nothing, except for the fields in `KEPT`."""

    KEPT: ClassVar[tuple[str, ...]] = ()

    @model_validator(mode="before")
    @classmethod
    def _without_what_is_empty(cls, value: Any) -> Any:
        return without_what_is_empty(value, cls.KEPT)
