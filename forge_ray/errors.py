"""The error tree.

Every error is also the stdlib error it refines, pickles across Ray processes, and carries a stable `code`, a `hint` (the
remedy) and the `exit_code` with which the command line ends.
"""

from __future__ import annotations

from typing import Any

EXIT_FAILED = 1
EXIT_USAGE = 2
EXIT_POLICY = 3


class ForgeError(Exception):
    """Base of all errors that forge_ray raises on purpose: what was wrong, the values, the rule; `hint` is the remedy."""

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
    """A run file, flag or combination that cannot mean anything."""

    code = "config"
    exit_code = EXIT_USAGE


class DataError(ForgeError, ValueError):
    """Input rows that cannot become a dataset."""

    code = "data"


class NothingLeft(DataError):
    """Sources of which erasures leave nothing to train on."""

    code = "nothing_left"


class NotFound(ForgeError, LookupError):
    """An id, alias or file that is not in the store."""

    code = "not_found"
    exit_code = EXIT_USAGE


class StoreError(ForgeError, OSError):
    """Bytes that are missing, torn or not what their digest says."""

    code = "store"

    def __str__(self) -> str:  # OSError's own __str__ would come first for two arguments
        return ForgeError.__str__(self)


class ClusterError(ForgeError, RuntimeError):
    """A Ray of this machine that does not come up."""

    code = "cluster"


class TrainingError(ForgeError, RuntimeError):
    """A training run that cannot start or go on."""

    code = "training"


class EngineError(ForgeError, RuntimeError):
    """An inference engine that cannot answer."""

    code = "engine"


class RequestError(EngineError):
    """A request that the engine can never answer, such as a schema that makes no grammar: its sender must change it."""

    code = "request"
    exit_code = EXIT_USAGE


class PolicyError(ForgeError, PermissionError):
    """Refused by policy: an unsafe model directory, a rejected version, a gate not passed."""

    code = "policy"
    exit_code = EXIT_POLICY

    def __str__(self) -> str:  # PermissionError is an OSError, see StoreError
        return ForgeError.__str__(self)
