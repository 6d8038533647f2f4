"""The process in which a function of the user's scores answers, with limits: `python -m forge_ray.evaluate.foreign`.

The process that asks is `forge_ray.evaluate.own`; see `forge_ray.machine.limited` for the two together. The function has no
network, starts no program and writes no file: Python's own calls are refused by name, and the kernel refuses the network to
all others where it lets this user (network namespaces of Linux). It can read what the user can read.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import math
import numbers
import os
import resource
import sys
import traceback
import types
from collections.abc import Callable, Iterator
from typing import Any

from forge_ray.machine.limited import (
    LIMIT,
    READY,
    REASON,
    VALUE,
    Frame,
    own_pipes,
    pairs,
    set_memory,
    set_processor_time,
    used_memory,
    write,
)

MODULE = "own_metric"
IMPORT_CPU_S = 120.0  # of the file: large libraries take some ten seconds on a quiet core
CLONE_NEWUSER, CLONE_NEWNET = 0x10000000, 0x40000000  # linux/sched.h
# audit events (https://docs.python.org/3/library/audit_events.html) → what the function may not do
REFUSED = {
    "socket.__new__": "use the network",
    **dict.fromkeys(("subprocess.Popen", "os.system", "os.exec", "os.posix_spawn", "os.spawn"), "start a program"),
    **dict.fromkeys(("os.fork", "os.forkpty"), "start a process"),
    **dict.fromkeys(("os.remove", "os.rename", "os.rmdir", "os.mkdir", "os.link", "os.symlink"), "change files"),
    **dict.fromkeys(("os.chmod", "os.chown", "os.truncate", "os.utime"), "change files"),
}
WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC

Function = Callable[[Any, Any], Any]


class Fault(Exception):
    """Why there are no scores, as a clause about the function."""


refusals: list[str] = []  # what the function tried and may not, the last one last


def refuse(event: str, arguments: tuple[Any, ...]) -> None:
    """An audit hook, which cannot be removed."""
    reason = REFUSED.get(event, "")
    if event == "open" and isinstance(arguments[2], int) and arguments[2] & WRITES and arguments[0] != os.devnull:
        reason = "write files"
    if reason:
        refusals.append(reason)
        raise PermissionError(f"a scoring function may not {reason}")


def leave_network() -> None:
    """Into a network namespace without an interface, where the kernel lets this user."""
    with contextlib.suppress(OSError, AttributeError):
        unshare = ctypes.CDLL(None).unshare
        if unshare(CLONE_NEWNET):
            unshare(CLONE_NEWUSER | CLONE_NEWNET)


def load(name: str, function: str, source: bytes) -> Function:
    """The function, from a module that is in no file: its own folder is not importable."""
    module = types.ModuleType(MODULE)
    module.__file__ = name
    sys.modules[MODULE] = module
    exec(compile(source, name, "exec"), module.__dict__)
    value = module.__dict__.get(function)
    if not callable(value):
        defined = sorted(n for n, v in vars(module).items() if isinstance(v, types.FunctionType) and v.__module__ == MODULE)
        raise Fault(f"has no function {function!r}; it defines {', '.join(defined) or 'no function'}")
    return value  # type: ignore[no-any-return]


def scores_of(result: Any) -> dict[str, float]:
    """The scores that a call returned; raises `Fault`."""
    if not isinstance(result, dict):
        raise Fault(f"returned {type(result).__name__}, not a dict of scores by name")
    for name, value in result.items():
        if not isinstance(name, str):
            raise Fault(f"returned a score whose name is {type(name).__name__}, not text")
        if isinstance(value, bool) or not isinstance(value, numbers.Real):
            raise Fault(f"returned {type(value).__name__} as {name[:64]}, not a number")
        if not math.isfinite(value):
            raise Fault(f"returned {float(value)} as {name[:64]}, not a finite number")
    return {name: float(value) for name, value in result.items()}


def fault(error: BaseException, name: str, source: bytes, with_message: bool) -> str:
    """A clause: what was raised, where in the file. `with_message`: no row is at hand whose text it could hold."""
    if isinstance(error, Fault):
        return str(error)
    what = f"may not {refusals[-1]}" if refusals else f"raised {type(error).__name__}"
    if with_message and not refusals:
        what += f": {str(error)[:300]}"
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if frame.filename == name]
    if not frames:
        return what
    lines, number = source.decode("utf-8", "replace").splitlines(), frames[-1].lineno or 0
    code = lines[number - 1].strip()[:100] if 0 < number <= len(lines) else ""
    return f"{what} in line {number}: {code}"


def answers_to(requests: Any) -> Iterator[list[Frame]]:
    """One list of frames for each request: first the file is loaded, then each request is a call."""
    request, source = next(requests)
    name, cpu_s = request["file"], request["cpu_s"]
    if (base := used_memory()) is not None:
        set_memory(base + request["memory"])
    function: Function | None = None
    while True:
        refusals.clear()
        set_processor_time(IMPORT_CPU_S if function is None else cpu_s)
        try:
            if function is None:
                function = load(name, request["function"], source)
                frame = (VALUE, b"{}")
            else:
                frame = (VALUE, json.dumps(scores_of(function(request["row"], request["answer"]))).encode())
        except MemoryError:
            frame = (LIMIT, b"")
        except BaseException as error:  # SystemExit too: no row may end the process without a reason
            frame = (REASON, fault(error, name, source, with_message=function is None).encode("utf-8", "replace"))
        set_processor_time(0)
        yield [frame]
        request, _ = next(requests, (None, b""))
        if request is None:
            return


def main() -> None:
    requests, answers = own_pipes()
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))
    leave_network()
    sys.addaudithook(refuse)
    with contextlib.suppress(BrokenPipeError):
        write(answers, [(READY, b"")])
        for frames in answers_to(pairs(requests)):
            write(answers, frames)
    os._exit(0)


if __name__ == "__main__":
    main()
