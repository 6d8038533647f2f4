"""The one place where commands print: what rows, names and reasons hold cannot move the cursor or rewrite the screen."""

from __future__ import annotations

import re
import select
import sys
from contextlib import suppress
from typing import Any

import click

from forge_ray.progress import visible

COLOURS = re.compile(r"\x1b\[[0-9;]*m")


def echo(text: Any = "", *, err: bool = False, nl: bool = True) -> None:
    """`click.echo` with control characters written out; JSON stays the same JSON."""
    click.echo(visible(str(text)), err=err, nl=nl)


def secho(text: str, *, err: bool = False, **style: Any) -> None:
    """`click.secho` of a text whose own control characters are written out."""
    click.secho(visible(text), err=err, **style)


def is_unread() -> bool:
    """Whether the output of this process goes to a pipe that its reader has closed, as `head` does. Pipes of another purpose
    break too, and that is a failure."""
    poll = select.poll()
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError, ValueError, AttributeError):  # a stream that is closed, or no file
            poll.register(stream.fileno(), select.POLLOUT)
    return any(state & (select.POLLERR | select.POLLHUP) for _, state in poll.poll(0))


def one_line(text: str) -> str:
    """A value that must not look like more lines than one."""
    return visible(text).replace("\n", r"\u000a")


def without_colours(log: str) -> str:
    """The log of another program without the colours that it sets."""
    return COLOURS.sub("", log)
