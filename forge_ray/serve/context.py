"""What the HTTP side of a replica works with: the models it serves, who asks, and leave to answer (no ray).

The HTTP side asks the directory one question, `choose`: which version answers this request? The models and aliases that are
served may change between two requests, never within one.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, Protocol
from weakref import WeakValueDictionary

from forge_ray.config.release import DeployConfig
from forge_ray.serve.fields import ChatRequest
from forge_ray.serve.keys import ApiKey
from forge_ray.serve.loaded import Loaded
from forge_ray.serve.metrics import Metrics
from forge_ray.serve.routing import RoutingInputs
from forge_ray.serve.seating import RequestSeats, Seating


@dataclass(frozen=True)
class Chosen:
    """The version that answers. `route` says why: "" (asked for by name), `stable`, `canary`, `rule 2`, `fallback`. The
    `shadows` answer too, and nobody sees their answers."""

    name: str
    loaded: Loaded
    route: str = ""
    shadows: tuple[Loaded, ...] = ()


@dataclass
class Caller:
    """One request and who sent it, for access control, limits and logs.

    The outermost ASGI layer creates it and puts it into `scope["state"]["caller"]`; the endpoints pass it on as an argument.
    `key` is None where none is required; `headers` are added to the response. The other fields are filled in on the way.
    """

    request_id: str
    key: ApiKey | None = None
    headers: dict[str, str] = field(default_factory=dict)
    name: str = ""
    version: str = ""
    prompt_tokens: int = 0
    completion_tokens: int = 0
    first_token_s: float | None = None
    admission: Admission | None = None  # until it is closed
    address: str = ""
    seats: RequestSeats | None = None  # in the engine, or in front of it
    lease: str = ""  # names the request in the counters of its key's limits
    settle: Callable[[int], None] | None = None  # reports the tokens used to these counters; None once that is done

    @property
    def holder(self) -> str:
        """Whose share of the endpoint the request takes: the key's, or the address's where no key is required."""
        return self.key.id if self.key is not None else self.address


class Directory(Protocol):
    """Names → versions, as `caller` may see them. A replica's directory follows the store; tests have a fixed one."""

    def stable(self, name: str, caller: Caller) -> Loaded:
        """The version whose tokenizer and template encode a prompt for `name`; `ApiError` 404 for an unknown name, 410 for
        an archived one."""
        ...

    async def choose(self, name: str, caller: Caller, inputs: RoutingInputs) -> Chosen:
        """The version that answers this request; raises the same `ApiError`s as `stable`."""
        ...

    def cards(self, caller: Caller) -> list[dict[str, Any]]:
        """One `/v1/models` entry per name."""
        ...


class Admission(Protocol):
    """Leave to answer one request; granted by `ServingContext.admit`, closed exactly once."""

    def close(self, prompt_tokens: int, completion_tokens: int, status: int) -> None:
        """Record what was used, also where the client left or the engine failed."""
        ...


class Unmetered:
    """An admission whose use nobody records."""

    def close(self, prompt_tokens: int, completion_tokens: int, status: int) -> None:
        return None


Admit = Callable[[Caller, Chosen, int, int], Awaitable[Admission]]


async def admit_all(caller: Caller, chosen: Chosen, prompt_tokens: int, max_new_tokens: int) -> Admission:
    return Unmetered()


Count = Callable[[Caller, int], Awaitable[None]]


async def count_nothing(caller: Caller, tokens: int) -> None:
    return None


class Turns:
    """One piece of work at a time for each caller, so that work of one waits for its own and not for that of others."""

    def __init__(self) -> None:
        self._locks: WeakValueDictionary[str, asyncio.Lock] = WeakValueDictionary()

    def of(self, holder: str) -> asyncio.Lock:
        """The caller's lock; it lives as long as somebody holds it or waits for it."""
        return self._locks.setdefault(holder, asyncio.Lock())


class AnswerKeeper(Protocol):
    """Keeps chats and their answers where the deployment says so (`keeper.Keeper`); neither call waits for the store."""

    def add(
        self, answer_id: str, body: ChatRequest, caller: Caller, chosen: Chosen, choices: Sequence[Sequence[Any]]
    ) -> None:
        """An answer that ended; `choices` are the `reply.Part`s of each."""
        ...

    def unfinished(self) -> None:
        """An answer that the client left or the engine broke off."""
        ...


@dataclass(frozen=True)
class ServingContext:
    """Everything that answering a request needs.

    `admit(caller, chosen, prompt_tokens, max_new_tokens)` grants or raises `ApiError` (403, 404, 429). `exposition` gives
    the metrics of all replicas where a coordinator collects them. `count(caller, tokens)` counts the request under the
    limits of the caller's key, before it is tokenised with 0 tokens, or raises `ApiError` 429. `keeper` is None where
    nothing of a prompt or an answer is kept.
    """

    config: DeployConfig
    deployment: str
    directory: Directory
    metrics: Metrics
    admit: Admit = admit_all
    exposition: Callable[[], Awaitable[str]] | None = None
    count: Count = count_nothing
    keeper: AnswerKeeper | None = None
    # Templates and tokenisation run off the event loop; long texts in a thread of their own, so that short ones do not wait
    tokenising: ThreadPoolExecutor = field(default_factory=lambda: ThreadPoolExecutor(1, "tokenising"))
    long_texts: ThreadPoolExecutor = field(default_factory=lambda: ThreadPoolExecutor(1, "long-texts"))
    embedding: ThreadPoolExecutor = field(default_factory=lambda: ThreadPoolExecutor(1, "embedding"))
    turns: Turns = field(default_factory=Turns)
    seating: Seating = field(default_factory=Seating)
