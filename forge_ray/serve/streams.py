"""Several answers as one stream, how it is written, and an answer that ends when its client leaves (asyncio alone)."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable, Coroutine, Iterable, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any, Generic, TypeVar, cast

from starlette.requests import Request
from starlette.responses import StreamingResponse
from starlette.types import Receive, Scope, Send

MOST_AT_ONCE = 256  # items: a client that reads slowly must not make one large piece of all that waits for it
KEEP_ALIVE = b": keep-alive\n\n"

T = TypeVar("T")


class ClientGone(Exception):
    """The client closed the connection before it was answered."""


@dataclass(frozen=True)
class Arrived(Generic[T]):
    """Items that were there at the same moment, in their order, each with the number of its stream. `is_last`: none follows,
    as all streams have ended or one failed."""

    items: tuple[tuple[int, T], ...]
    is_last: bool = False


async def merged(streams: Sequence[AsyncGenerator[T, None]], idle_s: float) -> AsyncGenerator[Arrived[T] | None, None]:
    """What has arrived, at least one item each time; None after `idle_s` seconds without one. The first error of a stream
    ends all of them, behind the items that came before it, and so does closing."""
    queue: asyncio.Queue[tuple[int, T] | Exception | None] = asyncio.Queue()

    async def pump(number: int, stream: AsyncGenerator[T, None]) -> None:
        try:
            async with aclosing(stream):
                async for item in stream:
                    queue.put_nowait((number, item))
            queue.put_nowait(None)
        except Exception as error:
            queue.put_nowait(error)

    tasks = [asyncio.create_task(pump(number, stream)) for number, stream in enumerate(streams)]
    running = len(tasks)
    try:
        while running:
            try:
                if queue.empty():
                    async with asyncio.timeout(idle_s):
                        event = await queue.get()
                else:
                    event = queue.get_nowait()
            except TimeoutError:
                yield None
                continue
            items: list[tuple[int, T]] = []
            while not isinstance(event, Exception):
                if event is None:
                    running -= 1
                else:
                    items.append(event)
                if queue.empty() or len(items) == MOST_AT_ONCE:
                    break
                event = queue.get_nowait()
            if items:
                yield Arrived(tuple(items), is_last=not running or isinstance(event, Exception))
            if isinstance(event, Exception):
                raise event
    finally:
        await _cancelled(*tasks)


async def writes(
    first: Arrived[T] | None,
    rest: AsyncGenerator[Arrived[T] | None, None],
    events: Callable[[int, T], Iterable[bytes]],
    ending: Callable[[], Iterable[bytes]],
    failed: Callable[[Exception], bytes],
    beginning: Iterable[bytes] = (),
) -> AsyncGenerator[bytes, None]:
    """Server-sent events; what is there at the same moment is one piece, for each is a write to the client's connection.

    `events` makes those of an item, `ending` those behind the last item, `failed` the one in their place where the stream
    ends half-way. `rest` is closed before the last piece, which holds what `is_last`.
    """
    pieces = list(beginning)
    arrived = first
    try:
        async with aclosing(rest):
            while True:
                if arrived is None:
                    pieces.append(KEEP_ALIVE)
                else:
                    for item in arrived.items:
                        pieces += events(*item)
                if pieces and not (arrived and arrived.is_last):
                    piece = b"".join(pieces)
                    pieces.clear()
                    yield piece
                try:
                    arrived = await anext(rest)
                except StopAsyncIteration:
                    break
    except Exception as error:
        pieces.append(failed(error))
    else:
        pieces += ending()
    yield b"".join(pieces)


class EventResponse(StreamingResponse):
    """A response of events that are closed with it. A client that leaves while a piece is written would else have its
    answer generated until the interpreter happens to collect what is left of it."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async with aclosing(cast(AsyncGenerator[bytes, None], self.body_iterator)):
            await super().__call__(scope, receive, send)


async def unless_gone(request: Request, work: Coroutine[Any, Any, T]) -> T:
    """The result of `work`; if the client disconnects first, `work` is cancelled and `ClientGone` raised. The request's body
    must have been read."""
    task, disconnect = asyncio.create_task(work), asyncio.create_task(_disconnected(request))
    try:
        await asyncio.wait({task, disconnect}, return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            return task.result()
        raise ClientGone
    finally:
        await _cancelled(task, disconnect)


async def _disconnected(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


async def _cancelled(*tasks: asyncio.Task[Any]) -> None:
    """Cancel the tasks and wait until their generators are closed."""
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
