"""Facts as Markdown; text from records is escaped, so that it is never markup."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from forge_ray.papers.facts import NOT_RECORDED


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    if not rows:
        return "None on record.\n"
    lines = [" | ".join(header), " | ".join(["---"] * len(header))]
    lines += [" | ".join(cell.replace("|", "\\|").replace("\n", " ") for cell in row) for row in rows]
    return "\n".join(f"| {line} |" for line in lines) + "\n"


def plain(text: str) -> str:
    """Text of a record with Markdown's special characters escaped."""
    for sign in "\\`*_[]<>#":
        text = text.replace(sign, "\\" + sign)
    return " ".join(text.split())


def code(text: str) -> str:
    return f"`{' '.join(text.split())}`" if text and "`" not in text else plain(text) or NOT_RECORDED


def as_text(value: Any) -> str:
    """A setting or a figure as text; `not recorded` if it is None or empty."""
    if value is None or value == "" or value == ():
        return NOT_RECORDED
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        return f"{value:,.0f}" if value.is_integer() and abs(value) < 1e15 else f"{value:.4g}"
    return plain(str(value))


def counts(by_name: dict[str, int]) -> str:
    return ", ".join(f"{plain(name) or 'none given'} {count:,}" for name, count in by_name.items()) or "none"


def flops(value: float | None) -> str:
    return NOT_RECORDED if value is None else f"{value:.3g} FLOPs"


def hours(value: float | None) -> str:
    return NOT_RECORDED if value is None else f"{value:.3g} h"
