"""Ctrl-C and SIGTERM: both end a command in its main thread, in order, whatever a library does with them."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

ENDING = (signal.SIGINT, signal.SIGTERM)
_received = 0


def received() -> int:
    """The signal that ends this process; SIGINT where none of `raise_on_signals` came, for Python's own handler raises the
    same exception. Ray replaces an exception that a handler raises while it waits, so the exception does not say which."""
    return _received or signal.SIGINT


def raise_on_signals(first: Callable[[int], None]) -> None:
    """Raise `KeyboardInterrupt` in the main thread at the first SIGINT or SIGTERM; later ones change nothing. `first` is
    called with the number at once, in a thread: Python runs a handler only when the main thread leaves a library's call."""
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    once = threading.Lock()

    def call_first(signum: int) -> None:
        if once.acquire(blocking=False):
            first(signum)

    def watch() -> None:
        while number := os.read(reader, 1):
            if number[0] in ENDING:
                call_first(number[0])

    def handler(signum: int, frame: Any) -> None:
        global _received
        if not _received:
            _received = signum
            # an event loop that handled a signal itself in the main thread leaves no wakeup descriptor behind
            threading.Thread(target=call_first, args=(signum,), name="forge-end", daemon=True).start()
            raise KeyboardInterrupt

    for number in ENDING:
        if signal.getsignal(number) != signal.SIG_IGN:  # as shells start what runs in the background
            signal.signal(number, handler)
    signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
    threading.Thread(target=watch, name="forge-signals", daemon=True).start()


@contextmanager
def handlers_kept() -> Iterator[None]:
    """Put the handlers of this process back at the end of the block: `ray.init` installs its own for SIGTERM, which ends the
    process with exit code 1 and without a word. Where there was none, Ray's stays, for it ends Ray's processes."""
    is_main = threading.current_thread() is threading.main_thread()
    before = {number: signal.getsignal(number) for number in ENDING} if is_main else {}
    try:
        yield
    finally:
        for number, handler in before.items():
            if callable(handler):
                signal.signal(number, handler)
