"""Progress of stages on stderr: one line per stage, with a live view on a terminal."""

from __future__ import annotations

import re
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TextIO

from forge_ray.errors import Interrupted

# Control characters but tab and newline, marks of the direction of writing, separators of lines, halves of characters
INVISIBLE = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")
PLAIN_EVERY_S = 15.0  # seconds between progress lines of a stage without a terminal


def visible(text: str) -> str:
    """The text as it may be printed on a terminal: control characters are written as in JSON, where they mean the same."""
    return INVISIBLE.sub(lambda match: f"\\u{ord(match[0]):04x}", text)


class Stage:
    """One stage in progress: call `update` while it runs, and `done` with its result."""

    def __init__(self, name: str, stream: TextIO) -> None:
        self.name = name
        self.started = time.monotonic()
        self.result = ""
        self._stream = stream
        self._spoke = self.started
        self._live: Any = None
        self._bar: Any = None
        self._task: Any = None
        self._details: tuple[tuple[str, str], ...] = ()
        if stream.isatty():
            self._start_live()

    @property
    def is_live(self) -> bool:
        """Whether the stage has a live view on a terminal."""
        return self._live is not None

    def _start_live(self) -> None:
        from rich.console import Console
        from rich.live import Live
        from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

        console = Console(file=self._stream)
        columns = (
            SpinnerColumn(),
            TextColumn("[bold]{task.description:<9}"),
            BarColumn(bar_width=24),
            TimeElapsedColumn(),
            TextColumn("{task.fields[text]}", markup=False),
        )
        self._bar = Progress(*columns, console=console)
        self._task = self._bar.add_task(self.name, total=None, text="")
        self._live = Live(console=console, transient=True, get_renderable=self._view)
        self._live.start()

    def _view(self) -> Any:
        """The progress bar with the details below it."""
        from rich.console import Group
        from rich.table import Table
        from rich.text import Text

        if not self._details:
            return self._bar
        table = Table.grid(padding=(0, 2))
        table.add_column(style="dim", min_width=10)
        table.add_column()
        for name, value in self._details:
            style = "red" if name == "incident" else ""
            table.add_row(f"  {name}", Text(visible(value), style=style, overflow="ellipsis", no_wrap=True))
        return Group(self._bar, table)

    def update(self, done: float, total: float, text: str = "", details: Sequence[tuple[str, str]] = ()) -> None:
        """Report `done` of `total` with a short text; a terminal also shows `details` as (name, value)."""
        text = visible(text)
        if self._live:
            self._details = tuple(details)
            self._bar.update(self._task, completed=done, total=total, text=text)
        elif time.monotonic() - self._spoke >= PLAIN_EVERY_S:
            self._spoke = time.monotonic()
            print(f"  {self.name:<9} {done:g}/{total:g} {text}", file=self._stream, flush=True)

    def done(self, result: str) -> None:
        self.result = visible(result)

    def close(self, failed: bool) -> None:
        if self._live:
            self._live.stop()
        seconds = time.monotonic() - self.started
        mark = "✗" if failed else "✓"
        print(f"{mark} {self.name:<9} {self.result or 'failed'}  ({seconds:.1f} s)", file=self._stream, flush=True)


@contextmanager
def stage(name: str) -> Iterator[Stage]:
    """A stage that is closed when the block ends: `with stage("train") as it: it.update(3, 10); it.done("run_…")`."""
    current = Stage(name, sys.stderr)
    try:
        yield current
    except BaseException as error:
        current.result = ""
        current.close(failed=True)
        if isinstance(error, KeyboardInterrupt) and not isinstance(error, Interrupted):
            raise Interrupted(name) from error
        raise
    current.close(failed=False)
