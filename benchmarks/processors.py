"""Processor seconds of the parts of an endpoint, so that a small machine's client is not taken for its server."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

import psutil

# The first whose mark is in a process's command line
PARTS = (
    ("engine", "VLLM::EngineCore"),
    ("engine", "forge_ray.inference.engine_process"),
    ("engine", "serve_processes.py engine"),
    ("engine", "serve_processes.py sequential"),
    ("replica", "serve_processes.py uvicorn"),
    ("gateway", "forge_ray.cli gateway"),
    ("replica", "ray::ServeReplica"),
    ("proxy", "ray::ProxyActor"),
    ("proxy", "ray::HAProxy"),
    ("proxy", "haproxy"),
)


def seconds_by_part() -> Counter[str]:
    """Processor seconds that this process and those that it has started have taken until now; `other`: Ray's own."""
    own: Any = os.times()  # seconds are no whole numbers, which is what a counter is said to hold
    seconds: Counter[str] = Counter(client=own.user + own.system)
    for process in psutil.Process().children(recursive=True):
        with suppress(psutil.Error, OSError):
            command = " ".join(process.cmdline())
            part = next((part for part, mark in PARTS if mark in command), "other")
            times = process.cpu_times()
            seconds[part] += times.user + times.system
    return seconds


@contextmanager
def added_to(spent: Counter[str]) -> Iterator[None]:
    """Adds what the parts take meanwhile."""
    before = seconds_by_part()
    yield
    after = seconds_by_part()
    spent.update({part: after[part] - before[part] for part in after if part in before or part == "gateway"})


def in_words(spent: Counter[str]) -> str:
    """`engine 20.1, replica 2.9, client 1.2`, the largest first."""
    return ", ".join(f"{part} {seconds:.1f}" for part, seconds in spent.most_common() if seconds >= 0.05)
