"""The tools of a request, and which of them may or must be called (no ray, no torch)."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Discriminator, Field, Tag

from forge_ray.serve.wire import NAME, Sparse, Wire


class Function(Sparse):
    KEPT = ("parameters",)

    name: str = Field(pattern=NAME)
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None

    @property
    def schema_(self) -> dict[str, Any]:
        """The schema of a call's arguments; without `parameters`, an empty object."""
        return self.parameters or {"type": "object", "properties": {}, "additionalProperties": False}


class Tool(Sparse):
    type: Literal["function"] = "function"
    function: Function

    def for_template(self) -> dict[str, Any]:
        return {"type": "function", "function": self.function.model_dump(exclude_none=True, exclude={"strict"})}


class NamedFunction(Wire):
    name: str


class NamedChoice(Wire):
    type: Literal["function"]
    function: NamedFunction


class AllowedTools(Wire):
    mode: Literal["auto", "required"]
    tools: list[NamedChoice] = Field(min_length=1)


class AllowedChoice(Wire):
    """The tools that may be called, among those that were sent."""

    type: Literal["allowed_tools"]
    allowed_tools: AllowedTools


def _choice_tag(choice: Any) -> str:
    """No field has this name: the path of an error shows fields alone."""
    kind = choice.get("type") if isinstance(choice, dict) else ""
    return f"{kind} choice"


BY_TYPE = Discriminator(_choice_tag, "choice_type", "A choice is an object of type function or allowed_tools")


ToolChoice = Annotated[
    Annotated[NamedChoice, Tag("function choice")] | Annotated[AllowedChoice, Tag("allowed_tools choice")], BY_TYPE
]
