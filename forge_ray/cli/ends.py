"""How a command ends that does not succeed: one `error:`, one `hint:`, an exit code.

Errors of forge_ray say all that themselves, also where a task, a worker or a replica raised them. Of any other error the
first cause is shown, and the whole traceback is in a file that the hint names.
"""

from __future__ import annotations

import errno
import json
import os
import signal
import time
import traceback
from contextlib import suppress
from datetime import UTC, datetime
from types import TracebackType

from forge_ray.cli.terminal import echo, one_line, secho
from forge_ray.config.yaml_text import cut
from forge_ray.errors import EXIT_FAILED, ForgeError, Interrupted, first_cause, last_line
from forge_ray.machine.signals import received
from forge_ray.progress import visible
from forge_ray.store.home import PRIVATE, state_file

END_S = 6.0  # seconds that a command may take to end in order after a signal
MOST_LOGS = 20  # tracebacks that are kept; the oldest goes first
MOST_LETTERS = 500  # of a library's message; the log has all of it
_has_spoken = _is_in_order = False  # whether this process has said how it ends; whether that is no failure
RESUMES = "the same command resumes: finished stages and checkpoints are kept"
AGAIN = "the same command can be run again"


def report(error: BaseException, as_json: bool = False) -> int:
    """Say how a command failed; returns its exit code."""
    if isinstance(error, KeyboardInterrupt):
        stage, signum = error.stage if isinstance(error, Interrupted) else "", received()
        message = f"stopped by {_name(signum)}{f' in stage {stage}' if stage else ''}"
        return _say("interrupted", message, RESUMES if stage else AGAIN, 128 + signum, as_json)
    cause = first_cause(error)
    if isinstance(cause, ForgeError):
        return _say(cause.code, cause.message, cause.hint, cause.exit_code, as_json)
    message, hint = _of_library(cause)
    log = write_log(error)
    hint = f"{hint}; the traceback is in {log}" if hint else f"the traceback is in {log}; report it with that file"
    return _say("internal", message, hint, EXIT_FAILED, as_json)


def _say(code: str, message: str, hint: str, exit_code: int, as_json: bool) -> int:
    global _has_spoken
    _has_spoken = True
    secho(f"error: {message}", fg="red", err=True)
    if hint:
        echo(f"hint: {hint}", err=True)
    if as_json:  # at the end: that nobody reads it hides nothing
        echo(json.dumps({"error": {"code": code, "message": message, "hint": hint}}))
    return exit_code


def _of_library(error: BaseException) -> tuple[str, str]:
    """Message and remedy of an error that forge_ray did not raise."""
    if isinstance(error, MemoryError):
        return "this process ran out of memory", "use a smaller model, micro-batch or number of workers"
    if isinstance(error, OSError) and error.strerror:
        named = f": {cut(str(error.filename))}" if error.filename is not None else ""
        return one_line(f"{cut(error.strerror)}{named}"), REMEDIES.get(error.errno or 0, "")
    kind = type(error)
    text = one_line(last_line(error))[:MOST_LETTERS]
    message = f"{kind.__name__}: {text}" if text else kind.__name__
    if kind.__module__.partition(".")[0] == "ray":  # a process of Ray ended, and nothing was raised in it
        return message, "a process of Ray ended; most often memory ran out, or a machine was lost; the same command resumes"
    return message, ""


REMEDIES = {
    errno.EACCES: "give this user access to it",
    errno.EPERM: "give this user access to it",
    errno.EROFS: "the file system is read-only: choose another place",
    errno.ENOSPC: "free space on that disk",
    errno.EDQUOT: "free space, or raise the quota of this user",
    errno.ENOENT: "check the path",
    errno.ENOTDIR: "a part of the path is a file, not a folder",
    errno.EISDIR: "give a file, not a folder",
    errno.ELOOP: "the links at that path lead in a circle",
    errno.ENAMETOOLONG: "shorten the path",
    errno.EMFILE: "raise the limit of open files: ulimit -n 65536",
    errno.EADDRINUSE: "another program listens there: choose another port",
}


def write_log(error: BaseException) -> str:
    """Write a traceback where only this user reads it, for it may hold rows; returns the path, or why there is none."""
    try:
        folder = state_file("errors")
        folder.mkdir(mode=PRIVATE, parents=True, exist_ok=True)
        for old in sorted(folder.glob("*.log"))[: 1 - MOST_LOGS]:
            old.unlink(missing_ok=True)
        path = folder / f"{datetime.now(UTC):%Y%m%dT%H%M%S.%f}-{os.getpid()}.log"
        text = visible("".join(traceback.format_exception(error)))
        with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w", encoding="utf-8") as stream:
            stream.write(text)
        return str(path)
    except (OSError, ForgeError) as why:
        return f"no file ({one_line(str(why))})"


def end_in_order() -> None:
    """A signal was the end that this command waited for: it has not failed."""
    global _has_spoken, _is_in_order
    _has_spoken = _is_in_order = True


def stop_in_time(signum: int) -> None:
    """End this process after `END_S` seconds at the latest: something may not let go, such as a call into a library. For a
    thread of its own."""
    time.sleep(END_S)
    if not _has_spoken:
        with suppress(Exception):  # the streams may be closed by now
            report(KeyboardInterrupt())
    os._exit(0 if _is_in_order else 128 + signum)


def _name(signum: int) -> str:
    name = signal.Signals(signum).name
    return f"Ctrl-C ({name})" if signum == signal.SIGINT else name


def show_exception(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """For `sys.excepthook`: what ends the process outside of a verb."""
    report(error)
