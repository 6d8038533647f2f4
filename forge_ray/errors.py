"""The errors of forge_ray.

Every error is also the built-in error that it refines, can be pickled between Ray processes, and has a stable `code`, a
`hint` (the remedy) and the `exit_code` of the command line.
"""

from __future__ import annotations

from typing import Any

EXIT_FAILED = 1
EXIT_USAGE = 2
EXIT_POLICY = 3


class ForgeError(Exception):
    """Base of all errors that forge_ray raises deliberately. The message names the problem, the values and the rule;
    `hint` is the remedy."""

    code = "error"
    exit_code = EXIT_FAILED

    def __init__(self, message: str, hint: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.message, self.hint)

    def __str__(self) -> str:
        return f"{self.message}\nhint: {self.hint}" if self.hint else self.message


class ConfigError(ForgeError, ValueError):
    """An invalid run file, option or combination of them."""

    code = "config"
    exit_code = EXIT_USAGE


class DataError(ForgeError, ValueError):
    """Input rows that cannot become a dataset."""

    code = "data"


class NothingLeft(DataError):
    """Sources of which no row is left to train on after erasures."""

    code = "nothing_left"


class EncodersDiffer(ForgeError, RuntimeError):
    """A fast encoder that made other ids of a record than the reference did, or ended."""

    code = "encoders"


class NotFound(ForgeError, LookupError):
    """An id, alias or file that is not in the store."""

    code = "not_found"
    exit_code = EXIT_USAGE


class StoreError(ForgeError, OSError):
    """Files that are missing, incomplete or do not match their digest."""

    code = "store"

    def __str__(self) -> str:  # OSError's own __str__ would come first for two arguments
        return ForgeError.__str__(self)


class ClusterError(ForgeError, RuntimeError):
    """A local Ray that does not start, or a piece of work whose processes are lost."""

    code = "cluster"


class TrainingError(ForgeError, RuntimeError):
    """A training run that cannot start or continue."""

    code = "training"


class EngineError(ForgeError, RuntimeError):
    """An inference engine that cannot answer a request."""

    code = "engine"


class RequestError(EngineError):
    """An invalid request, such as one with a schema that cannot become a grammar: the client must change it."""

    code = "request"
    exit_code = EXIT_USAGE


class PolicyError(ForgeError, PermissionError):
    """A refusal by policy, such as an unsafe model folder or a rejected version."""

    code = "policy"
    exit_code = EXIT_POLICY

    def __str__(self) -> str:  # PermissionError is an OSError, see StoreError
        return ForgeError.__str__(self)


class Interrupted(KeyboardInterrupt):
    """Ctrl-C or SIGTERM in a stage of this name."""

    def __init__(self, stage: str) -> None:
        super().__init__(stage)
        self.stage = stage


def first_cause(error: BaseException) -> BaseException:
    """The exception inside the wrappers of Ray (of a task, an actor, a group of workers): what was raised first.

    An error of forge_ray ends the search, for it says more than the library's error that it was raised from. Ray's own
    class of an error from a task is a subclass of the task's error too, so wrappers are told by their base classes."""
    seen: set[int] = set()
    while id(error) not in seen:
        seen.add(id(error))
        is_wrapper = any(base.__module__.partition(".")[0] == "ray" for base in type(error).__mro__)
        if isinstance(error, ForgeError) and not is_wrapper:
            return error
        failures = getattr(error, "worker_failures", None)
        inner = next(iter(failures.values())) if failures else getattr(error, "cause", None) or error.__cause__
        if not isinstance(inner, BaseException):
            return error
        error = inner
    return error


def first_line(error: object) -> str:
    """The first line of the message of an error, of any library; "" where there is none."""
    return next(iter(str(error).strip().splitlines()), "")


def last_line(error: object) -> str:
    """The last line of the message of an error: what was raised, where the message holds a traceback."""
    return next(reversed(str(error).strip().splitlines()), "")
