"""What a replica serves, as its HTTP side sees it (no ray).

The HTTP side asks one question, `choose`: who answers this request? Which models there are and which alias leads where may
change between two requests, never within one.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, Protocol

from forge_ray.config.release import DeployConfig
from forge_ray.serve.keys import ApiKey
from forge_ray.serve.loaded import Loaded
from forge_ray.serve.metrics import Metrics


@dataclass(frozen=True)
class RoutingInputs:
    """What a route may look at. `prompt_ids` are of the stable version's template."""

    headers: Mapping[str, str]
    user: str
    prompt_ids: tuple[int, ...]


@dataclass(frozen=True)
class Chosen:
    """Who answers. `route` says why: "" (asked by name), `stable`, `canary`, `rule 2`, `fallback`. `shadows` answer too,
    unseen."""

    name: str
    loaded: Loaded
    route: str = ""
    shadows: tuple[Loaded, ...] = ()


@dataclass
class Caller:
    """One request as those see it who count and log: put into its state (`caller`) before it is read, filled in on its way.
    `headers` go onto its answer; `key` is None where none is asked for."""

    request_id: str
    key: ApiKey | None = None
    headers: dict[str, str] = field(default_factory=dict)
    name: str = ""
    version: str = ""
    prompt_tokens: int = 0
    completion_tokens: int = 0
    first_token_s: float | None = None
    admission: Admission | None = None  # as long as it is not closed


class Directory(Protocol):
    """Names → versions. `tests` have a fixed one, a replica the one that follows the store."""

    def stable(self, name: str) -> Loaded:
        """Whose tokenizer and template a prompt for `name` takes; `ApiError` 404 for an unknown name, 410 for an archived
        one."""
        ...

    async def choose(self, name: str, facts: RoutingInputs) -> Chosen:
        """Who answers this request; `ApiError` as `stable`."""
        ...

    def cards(self) -> list[dict[str, Any]]:
        """One `/v1/models` entry per name."""
        ...


class Admission(Protocol):
    """Leave to answer one request; taken by `Served.admit`, closed exactly once."""

    def close(self, prompt_tokens: int, completion_tokens: int, status: int) -> None:
        """What was used, also where the client left or the engine failed."""
        ...


class Free:
    """Where nobody counts."""

    def close(self, prompt_tokens: int, completion_tokens: int, status: int) -> None:
        return None


Admit = Callable[[Caller | None, Chosen, int, int], Awaitable[Admission]]


async def admit_all(caller: Caller | None, chosen: Chosen, prompt_tokens: int, most_new_tokens: int) -> Admission:
    return Free()


@dataclass(frozen=True)
class Served:
    """Everything that a request needs. `admit(caller, chosen, prompt_tokens, most_new_tokens)` grants or raises `ApiError`
    (403, 404, 429); `caller` is what authentication put into the request's state, None without it."""

    config: DeployConfig
    deployment: str
    directory: Directory
    metrics: Metrics
    admit: Admit = admit_all
    exposition: Callable[[], Awaitable[str]] | None = None  # the metrics of all replicas, where somebody knows them
    # Templates and tokenisation run here, off the event loop; one thread, for tokenizers are not safe to share
    tokenising: ThreadPoolExecutor = field(default_factory=lambda: ThreadPoolExecutor(1, "tokenising"))
