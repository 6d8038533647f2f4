"""The process of an engine that a replica started: `python -m forge_ray.inference.engine_process DESCRIPTOR`.

The interpreter that runs the model holds its lock for most of a step. Here nothing else waits for it: HTTP, admission and
the refusals of a full endpoint are in the process that started this one (`own_process.py`), and the two exchange messages
(`engine_wire.py`), one for all tokens of a step. It ends with the process that started it, however that one ended.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import os
import sys
import threading
import traceback
from collections.abc import Callable
from dataclasses import astuple
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from forge_ray.config.base import parse
from forge_ray.config.release import EngineConfig
from forge_ray.errors import ForgeError
from forge_ray.inference.choose import open_engine
from forge_ray.inference.engine import Engine
from forge_ray.inference.engine_wire import from_error, from_token, receive, send, to_requests

HEALTH_EVERY_S = 1.0


class Answers:
    """Answers the messages of one connection in one event loop; the engine's blocking calls run in threads."""

    def __init__(self, engine: Engine, connection: Connection) -> None:
        self._engine, self._connection = engine, connection
        self._loop = asyncio.get_running_loop()
        self._outbox: list[Any] = []
        self._streams: dict[int, asyncio.Task[None]] = {}
        self._calls: set[asyncio.Task[None]] = set()

    async def forever(self) -> None:
        threading.Thread(target=self._receive, name="messages", daemon=True).start()
        while True:
            health = self._engine.health()
            self._put("health", 0, [health.ok, health.detail])
            await asyncio.sleep(HEALTH_EVERY_S)

    def _receive(self) -> None:
        while True:
            try:
                message = receive(self._connection)
            except (EOFError, OSError):
                os._exit(0)  # nobody is left who could be answered; the generation thread would keep the process
            self._loop.call_soon_threadsafe(self._handle, message)

    def _handle(self, message: list[Any]) -> None:
        what, number, *arguments = message
        if what == "cancel":
            if stream := self._streams.pop(number, None):
                stream.cancel()
        elif what == "stream":
            self._streams[number] = self._loop.create_task(self._stream(number, arguments))
        else:
            call = self._loop.create_task(self._call(number, what, arguments))
            self._calls.add(call)
            call.add_done_callback(self._calls.discard)

    async def _stream(self, number: int, requests: list[Any]) -> None:
        try:
            (request,) = to_requests(requests)
            async with contextlib.aclosing(self._engine.stream(request)) as tokens:  # type: ignore[type-var]
                async for token in tokens:
                    self._put("token", number, from_token(token))
        except Exception as error:
            self._put("error", number, _reported(error))
        finally:
            self._streams.pop(number, None)

    async def _call(self, number: int, what: str, arguments: list[Any]) -> None:
        try:
            self._put("result", number, await asyncio.to_thread(CALLS[what], self._engine, *arguments))
        except Exception as error:
            self._put("error", number, _reported(error))

    def _put(self, what: str, number: int, value: Any) -> None:
        """What is put while the loop goes round once is one message: all tokens of a step."""
        if not self._outbox:
            self._loop.call_soon(self._flush)
        self._outbox.append([what, number, value])

    def _flush(self) -> None:
        message, self._outbox = self._outbox, []
        try:
            send(self._connection, message)
        except OSError:
            os._exit(0)


def _reported(error: Exception) -> list[str]:
    """As `from_error`; what nobody foresaw is written to this process's log, which its message names."""
    if not isinstance(error, ForgeError):
        traceback.print_exception(error)
    return from_error(error)


def _generate(engine: Engine, requests: Any) -> Any:
    return [astuple(generation) for generation in engine.generate(to_requests(requests))]


def _score_all(engine: Engine, questions: Any) -> Any:
    return [[astuple(score) for score in scores] for scores in engine.score_all(questions)]


def _embed(engine: Engine, inputs: Any, adapter: str) -> Any:
    return engine.embed(inputs, adapter)


def _load_adapter(engine: Engine, name: str, folder: str) -> None:
    engine.load_adapter(name, Path(folder))


def _unload_adapter(engine: Engine, name: str) -> None:
    engine.unload_adapter(name)


CALLS: dict[str, Callable[..., Any]] = {
    "generate": _generate,
    "score_all": _score_all,
    "embed": _embed,
    "load_adapter": _load_adapter,
    "unload_adapter": _unload_adapter,
}


def main(descriptor: int) -> None:
    with contextlib.suppress(Exception):  # `open_engine` raises it again, where it is reported
        import forge_ray.inference.load  # noqa: F401  # seconds, in which the process that started this one has its own to do
    connection = Connection(descriptor)
    try:
        model_dir, adapter_dir, config, use_gpu, merge = receive(connection)
    except (EOFError, OSError):  # no model was wanted
        return
    try:
        settings = parse(EngineConfig, config)
        engine = open_engine(Path(model_dir), Path(adapter_dir) if adapter_dir else None, settings, use_gpu, merge)
    except Exception as error:
        send(connection, [["error", 0, _reported(error)]])
        raise SystemExit(1) from error
    gc.collect()
    gc.freeze()  # what loading made stays
    send(connection, [["result", 0, [engine.max_request_tokens, engine.lacks]]])

    async def answer() -> None:
        await Answers(engine, connection).forever()

    asyncio.run(answer())


if __name__ == "__main__":
    main(int(sys.argv[1]))
