"""A run that goes on, in words: for a line, and for the live view of a terminal."""

from __future__ import annotations

from typing import Any

from forge_ray.train.incidents import KINDS
from forge_ray.train.validation import Result, best


def progress_line(line: dict[str, Any]) -> str:
    """One step in a line."""
    loss = f"loss {line['loss']:.3f}" if "loss" in line else f"left out: {line['left_out']}"
    return f"step {line['step']}/{line['of']}  {loss}  {line['tokens_per_s']:.0f} tokens/s  {_clock(line['eta_s'])} left"


def _clock(seconds: float) -> str:
    hours, rest = divmod(int(seconds), 3600)
    return f"{hours}:{rest // 60:02d}:{rest % 60:02d}" if hours else f"{rest // 60}:{rest % 60:02d}"


def details(lines: list[dict[str, Any]], validations: list[Result], recorded: list[dict[str, Any]]) -> list[tuple[str, str]]:
    """What a terminal shows of a run beside its last step: (name, value)."""
    last, rows = lines[-1], []
    if "loss" in last:
        rows.append(("training", f"loss {last['loss']:.4f}, learning rate {last['lr']:.3g}"))
    scored = [result for result in validations if result.loss is not None]
    if scored and (top := best(scored)) and top.loss is not None:
        rows.append(
            ("validation", f"loss {scored[-1].loss:.4f} at step {scored[-1].step}, best {top.loss:.4f} at step {top.step}")
        )
    seconds = sum(line["seconds"] for line in lines[-20:])
    speed = f"{sum(line['tokens'] for line in lines[-20:]) / seconds:,.0f} tokens/s"
    used = [line for line in lines[-20:] if "mfu" in line]
    if used:
        mfu = sum(line["mfu"] * line["seconds"] for line in used) / sum(line["seconds"] for line in used)
        speed += f", {mfu:.1%} of the peak (MFU)"
    rows.append(("speed", f"{speed}, {_clock(last['eta_s'])} left"))
    if "peak_bytes" in last:
        workers = len(last["peak_bytes"])
        which = f" in one of {workers} workers" if workers > 1 else ""
        rows.append(("memory", f"{max(last['peak_bytes']) / 1e9:.2f} GB at most{which}"))
    rows += [("incident", f"step {incident['step']}: {KINDS[incident['kind']]}") for incident in recorded[-3:]]
    return rows
