"""One line per stage on stderr, with a live bar on a terminal and plain lines elsewhere (level 1)."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, TextIO

PLAIN_EVERY_S = 15.0  # without a terminal, how often a long stage says where it is


class Stage:
    """One stage in progress: `update` while it runs, `done` with what came of it."""

    def __init__(self, name: str, stream: TextIO) -> None:
        self.name = name
        self.started = time.monotonic()
        self.result = ""
        self._stream = stream
        self._spoke = self.started
        self._live: Any = None
        self._task: Any = None
        if stream.isatty():
            self._start_live()

    def _start_live(self) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

        columns = (
            SpinnerColumn(),
            TextColumn("[bold]{task.description:<9}"),
            BarColumn(bar_width=24),
            TimeElapsedColumn(),
            TextColumn("{task.fields[text]}"),
        )
        self._live = Progress(*columns, console=Console(file=self._stream), transient=True)
        self._live.start()
        self._task = self._live.add_task(self.name, total=None, text="")

    def update(self, done: float, total: float, text: str = "") -> None:
        """`done` of `total`, and a few words."""
        if self._live:
            self._live.update(self._task, completed=done, total=total, text=text)
        elif time.monotonic() - self._spoke >= PLAIN_EVERY_S:
            self._spoke = time.monotonic()
            print(f"  {self.name:<9} {done:g}/{total:g} {text}", file=self._stream, flush=True)

    def done(self, result: str) -> None:
        self.result = result

    def close(self, failed: bool) -> None:
        if self._live:
            self._live.stop()
        seconds = time.monotonic() - self.started
        mark = "✗" if failed else "✓"
        print(f"{mark} {self.name:<9} {self.result or 'failed'}  ({seconds:.1f} s)", file=self._stream, flush=True)


@contextmanager
def stage(name: str) -> Iterator[Stage]:
    """`with stage("train") as it: … it.update(3, 10) … it.done("run_…")`"""
    current = Stage(name, sys.stderr)
    try:
        yield current
    except BaseException:
        current.result = ""
        current.close(failed=True)
        raise
    current.close(failed=False)
