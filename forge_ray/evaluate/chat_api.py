"""Chats put to an OpenAI-compatible API of another system: a request each, with a limit of time and bounded retries.

TLS certificates are verified against the operating system's; no redirect is followed, and no proxy of the environment is
used, as nowhere in forge_ray. What an error shows of a server's words is without the key.
"""

from __future__ import annotations

import asyncio
import random
import ssl
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import Any

import httpx2

from forge_ray.config.base import SettingError
from forge_ray.config.origins import origin_of, parts_of
from forge_ray.errors import ConfigError, EngineError, NotFound, PolicyError
from forge_ray.evaluate.chat_format import OURS, Again, ChatAnswer, Unanswered, error_of, reply_of

TRIES = 5  # of a request that fails; one that is asked to come later has MOST_WAIT_S alone
FIRST_WAIT_S, MOST_WAIT_S = 1.0, 120.0  # before the second try; between all tries of a request
CONCURRENCY, TIMEOUT_S = 8, 120.0
MOST_BYTES = 8 << 20  # of a response


@dataclass(frozen=True)
class Endpoint:
    """A model behind an API of another system. `url`: as clients of OpenAI have it (`base_url`), mostly ending in `/v1`;
    `options`: more fields of every request, null leaves one out."""

    url: str
    model: str
    key: str = field(repr=False)
    options: Mapping[str, Any]
    concurrency: int
    timeout_s: float

    @property
    def origin(self) -> str:
        """What a policy names: scheme, host and port."""
        return origin_of(self.url)

    @property
    def name(self) -> str:
        return f"{self.model} at {self.url}"


def endpoint_of(
    url: str, model: str, key: str, options: Mapping[str, Any], concurrency: int | None, timeout_s: float | None
) -> Endpoint:
    """An endpoint, with the default of what is None. Raises `ConfigError` for a URL that is none, or not encrypted, and for
    options and keys that cannot be sent."""
    try:
        parts_of(url)
    except SettingError as error:
        raise ConfigError(f"--endpoint: {error}", hint=error.hint) from None
    if reserved := sorted(set(options) & set(OURS)):
        raise ConfigError(f"{reserved[0]} is not an option of the requests: the evaluation decides it", hint="leave it out")
    if key and not (key.isascii() and key.isprintable() and " " not in key):
        raise ConfigError("the key has blanks, line ends or letters that no header can hold", hint="check the variable")
    return Endpoint(url.rstrip("/"), model, key, dict(options), concurrency or CONCURRENCY, timeout_s or TIMEOUT_S)


@dataclass
class Connection:
    """An open connection: how many requests may be under way, and until when the server asked all of them to wait."""

    endpoint: Endpoint
    http: httpx2.AsyncClient
    slots: asyncio.Semaphore
    resume_at: float = 0.0
    num_sent: int = 0  # requests of which at least one try was sent


@asynccontextmanager
async def connected(endpoint: Endpoint) -> AsyncIterator[Connection]:
    headers = {"authorization": f"Bearer {endpoint.key}"} if endpoint.key else {}
    limits = httpx2.Limits(max_connections=endpoint.concurrency, max_keepalive_connections=endpoint.concurrency)
    async with httpx2.AsyncClient(
        headers=headers, timeout=endpoint.timeout_s, limits=limits, trust_env=False, follow_redirects=False
    ) as http:
        yield Connection(endpoint, http, asyncio.Semaphore(endpoint.concurrency))


async def answers(
    connection: Connection, bodies: Sequence[dict[str, Any]]
) -> AsyncIterator[tuple[int, ChatAnswer | Unanswered]]:
    """(number of the request, its answer), in the order in which they come. Raises a `ForgeError` for what holds for every
    request: a refused key, an unknown model, a redirect, a certificate that does not hold."""

    async def numbered(number: int) -> tuple[int, ChatAnswer | Unanswered]:
        return number, await _ask(connection, bodies[number])

    tasks = [asyncio.create_task(numbered(number)) for number in range(len(bodies))]
    try:
        for done in asyncio.as_completed(tasks):
            yield await done
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def _ask(connection: Connection, body: dict[str, Any]) -> ChatAnswer | Unanswered:
    async with connection.slots:
        await _pause(connection)
        connection.num_sent += 1
        num_tries, num_failed, waited = 0, 0, 0.0
        while True:
            outcome = await _try(connection, body)
            if not isinstance(outcome, Again):
                return outcome
            num_tries, num_failed = num_tries + 1, num_failed + (not outcome.is_busy)
            wait = max(outcome.wait_s or 0.0, FIRST_WAIT_S * 2 ** (num_tries - 1) * random.uniform(0.5, 1.0))
            if num_failed == TRIES or waited + wait > MOST_WAIT_S:
                return Unanswered(outcome.reason, outcome.message, is_outage=True)
            waited += wait
            if outcome.is_busy:
                connection.resume_at = max(connection.resume_at, time.monotonic() + wait)
                await _pause(connection)
            else:
                await asyncio.sleep(wait)


async def _pause(connection: Connection) -> None:
    """Wait until the server may be asked again; not all at the same moment."""
    while (left := connection.resume_at - time.monotonic()) > 0:
        await asyncio.sleep(left * random.uniform(1.0, 1.1))


async def _try(connection: Connection, body: dict[str, Any]) -> ChatAnswer | Unanswered | Again:
    endpoint = connection.endpoint
    url = f"{endpoint.url}/chat/completions"
    try:
        async with asyncio.timeout(endpoint.timeout_s), connection.http.stream("POST", url, json=body) as response:
            content = bytearray()
            async for data in response.aiter_bytes():
                content += data
                if len(content) > MOST_BYTES:
                    return Unanswered(f"the answer has more than {MOST_BYTES >> 20} MiB")
    except (TimeoutError, httpx2.TimeoutException):
        return Again(f"no answer within {endpoint.timeout_s:g} s")
    except (httpx2.TransportError, httpx2.DecodingError) as error:
        if _is_unverified(error):
            raise EngineError(
                f"the certificate of {endpoint.origin} does not hold: {str(error)[:200]}",
                hint="add the authority that signed it to the operating system's certificates; it is never left unverified",
            ) from None
        return Again(f"the connection failed: {type(error).__name__}", str(error)[:200])
    if response.status_code == httpx2.codes.OK:
        return reply_of(bytes(content))
    return _outcome_of(endpoint, response, bytes(content))


def _outcome_of(endpoint: Endpoint, response: httpx2.Response, content: bytes) -> Unanswered | Again:
    """What another status than 200 means for one request; an error where it holds for all."""
    status = response.status_code
    code, message = error_of(content, endpoint.key)
    text = f"{endpoint.url} answered {status}{f': {message}' if message else ''}"
    if 300 <= status < 400:
        place = response.headers.get("location", "nowhere")[:200]
        raise EngineError(f"{endpoint.url} redirects to {place}, and no redirect is followed", hint="give the URL itself")
    if status in (401, 403):
        raise PolicyError(text, hint="--key-env names the variable of a key that may ask this model")
    if status == httpx2.codes.NOT_FOUND:
        raise NotFound(
            text, hint="--endpoint is the URL before /chat/completions, mostly ending in /v1; check the model's name too"
        )
    reason = f"answered {status}{f' {code}' if code else ''}"
    if status in (408, 409, 425, 429) or status >= 500:
        wait = _wait_of(response.headers.get("retry-after", ""))
        return Again(reason, message, wait, is_busy=status == 429 or wait is not None)
    return Unanswered(reason, message)


def _is_unverified(error: BaseException | None) -> bool:
    while error is not None and not isinstance(error, ssl.SSLCertVerificationError):
        error = error.__cause__ or error.__context__
    return error is not None


def _wait_of(text: str) -> float | None:
    """Seconds of a `Retry-After`, which is a number or a date; None without one."""
    try:
        return max(0.0, float(text))
    except ValueError:
        pass
    try:
        moment = parsedate_to_datetime(text)
    except ValueError:
        return None
    moment = moment if moment.tzinfo else moment.replace(tzinfo=UTC)
    return max(0.0, (moment - datetime.now(UTC)).total_seconds())
