"""The transformers engine in a process of its own, as vLLM's engine core is one (imports no torch).

`engine_process.py` is the other side. Here are the requests that have not ended, and where their callers wait. Its death is
an error to all of them, and an unhealthy engine.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import os
import socket
import subprocess
import sys
import threading
import time
from collections import defaultdict
from collections.abc import AsyncIterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Self

from forge_ray.config.release import EngineConfig
from forge_ray.errors import EngineError, ForgeError
from forge_ray.inference.engine import EngineHealth, Generation, GenerationRequest, Question, Score, Token
from forge_ray.inference.engine_wire import from_requests, receive, send, to_error, to_token

SILENT_AFTER_S = 300.0  # it reports every second, and loading an adapter may hold its lock for a while
CLOSE_AFTER_S = 60.0
SEND_AGAIN = "send the request again; if it fails again, look at the engine's log"
Waiting = asyncio.Queue[Token | ForgeError]


@dataclass
class _Stream:
    """A request that has not ended, and where its caller waits."""

    request: GenerationRequest
    queue: Waiting
    loop: asyncio.AbstractEventLoop
    running: bool = False

    @property
    def num_tokens(self) -> int:
        return len(self.request.prompt_ids) + self.request.max_new_tokens


@dataclass(frozen=True)
class EngineProcess:
    """A process that imports what an engine needs, and waits to be told which model."""

    process: subprocess.Popen[bytes]
    connection: Connection

    @classmethod
    def start(cls) -> Self:
        ours, theirs = socket.socketpair()
        with theirs:
            process = subprocess.Popen(
                [sys.executable, "-m", "forge_ray.inference.engine_process", str(theirs.fileno())],
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                start_new_session=True,  # a key pressed in a terminal is for the process that answers requests
                env=os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
            )
        return cls(process, Connection(ours.detach()))

    def end(self) -> None:
        """Have it end, and wait for that."""
        with contextlib.suppress(OSError), socket.socket(fileno=os.dup(self.connection.fileno())) as end:
            end.shutdown(socket.SHUT_RDWR)  # it ends when nothing more can come
        try:
            self.process.wait(CLOSE_AFTER_S)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()


class ProcessEngine:
    """`Engine` over one that `open_engine` makes, with these arguments, in another process."""

    def __init__(
        self,
        begun: EngineProcess,
        model_dir: Path,
        adapter_dir: Path | None,
        config: EngineConfig,
        use_gpu: bool | None,
        merge: bool,
    ) -> None:
        self._begun, self._process, self._connection = begun, begun.process, begun.connection
        self._numbers = itertools.count(1)
        self._streams: dict[int, _Stream] = {}
        self._calls: dict[int, Future[Any]] = {0: Future()}
        self._lock = threading.Lock()  # of the three above, and of sending
        self._failure = ""
        self._health, self._heard_at = (True, "starting"), time.monotonic()
        settings = [str(model_dir), str(adapter_dir or ""), config.model_dump(mode="json"), use_gpu, merge]
        started = self._calls[0]
        self._send(settings)
        threading.Thread(target=self._receive, name="engine-messages", daemon=True).start()
        try:
            self.max_request_tokens, self.lacks = started.result()
        except ForgeError:
            self.close()
            raise

    def generate(self, requests: Sequence[GenerationRequest]) -> list[Generation]:
        """Continue all `requests` as one continuous batch; results in the same order."""
        return [Generation(tuple(ids), reason) for ids, reason in self._call("generate", from_requests(requests))]

    async def stream(self, request: GenerationRequest) -> AsyncIterator[Token]:
        """Tokens as they are made, the end last. Closing the iterator cancels the request."""
        stream = _Stream(request, asyncio.Queue(), asyncio.get_running_loop())
        (values,) = from_requests([request])
        with self._lock:
            self._raise_if_failed()
            number = next(self._numbers)
            self._streams[number] = stream
            self._send(["stream", number, values])
        try:
            while True:
                token = await stream.queue.get()
                if isinstance(token, ForgeError):
                    raise token
                yield token
                if token.token_id is None:
                    return
        finally:
            with self._lock:
                if self._streams.pop(number, None):
                    self._send(["cancel", number])

    def score(self, prompt_ids: Sequence[int], continuations: Sequence[Sequence[int]]) -> list[Score]:
        """Log-probability of each continuation after the same prompt."""
        return self.score_all([(prompt_ids, continuations)])[0]

    def score_all(self, questions: Sequence[Question]) -> list[list[Score]]:
        """As `score`, of many prompts together; results in the same order."""
        values = [[list(prompt), [list(ids) for ids in continuations]] for prompt, continuations in questions]
        return [[Score(*score) for score in scores] for scores in self._call("score_all", values)]

    def embed(self, inputs: Sequence[Sequence[int]], adapter: str = "") -> list[list[float]]:
        """One vector of unit length per input: the mean of the last hidden states of its tokens."""
        vectors: list[list[float]] = self._call("embed", [list(ids) for ids in inputs], adapter)
        return vectors

    def load_adapter(self, name: str, folder: Path) -> None:
        """Make a PEFT LoRA folder available under `name`; blocks until it is usable."""
        self._call("load_adapter", name, str(folder))

    def unload_adapter(self, name: str) -> None:
        """Unload an adapter that no pending request names."""
        self._call("unload_adapter", name)

    def health(self) -> EngineHealth:
        """Whether the process lives and its engine moves, and how many requests run and wait."""
        with self._lock:
            streams, failure, (ok, detail) = list(self._streams.values()), self._failure, self._health
            silent_s = time.monotonic() - self._heard_at
        if not failure and silent_s > SILENT_AFTER_S:
            failure = f"the engine's process {self._process.pid} has said nothing for {silent_s:.0f} s"
        running, num_tokens = sum(stream.running for stream in streams), sum(stream.num_tokens for stream in streams)
        return EngineHealth(ok and not failure, failure or detail, running, len(streams) - running, num_tokens)

    def close(self) -> None:
        """End the process; requests that are still pending fail with `EngineError`."""
        self._fail("the engine was closed")
        self._begun.end()

    def _call(self, what: str, *arguments: Any) -> Any:
        result: Future[Any] = Future()
        with self._lock:
            self._raise_if_failed()
            number = next(self._numbers)
            self._calls[number] = result
            self._send([what, number, *arguments])
        return result.result()

    def _send(self, message: Sequence[Any]) -> None:
        """The lock is held. What cannot be sent any more is answered by `_receive`, which sees the end too."""
        with contextlib.suppress(OSError):
            send(self._connection, message)

    def _receive(self) -> None:
        """The thread of messages: each to the caller that waits for it, with one wake-up per event loop."""
        while True:
            try:
                message = receive(self._connection)
            except (EOFError, OSError):
                self._fail(f"the engine's process ended ({self._process.wait()})")
                return
            by_loop: dict[asyncio.AbstractEventLoop, list[tuple[Waiting, Token | ForgeError]]] = defaultdict(list)
            with self._lock:
                self._heard_at = time.monotonic()
                for what, number, value in message:
                    if what == "health":
                        self._health = (bool(value[0]), str(value[1]))
                    elif stream := self._streams.get(number):
                        stream.running = True
                        item = to_token(value) if what == "token" else to_error(value)
                        if isinstance(item, ForgeError) or item.token_id is None:
                            del self._streams[number]
                        by_loop[stream.loop].append((stream.queue, item))
                    elif call := self._calls.pop(number, None):
                        call.set_exception(to_error(value)) if what == "error" else call.set_result(value)
            for loop, items in by_loop.items():
                with contextlib.suppress(RuntimeError):  # the loop closed: nobody waits any more
                    loop.call_soon_threadsafe(_put_all, items)

    def _fail(self, reason: str) -> None:
        with self._lock:
            self._failure = self._failure or reason
            streams, calls = list(self._streams.values()), list(self._calls.values())
            self._streams.clear()
            self._calls.clear()
        error = EngineError(self._failure, hint=SEND_AGAIN)
        for stream in streams:
            with contextlib.suppress(RuntimeError):
                stream.loop.call_soon_threadsafe(stream.queue.put_nowait, error)
        for call in calls:
            call.set_exception(error)

    def _raise_if_failed(self) -> None:
        if self._failure:
            raise EngineError(self._failure, hint="the replica must be restarted; its log has the cause")


def _put_all(items: list[tuple[Waiting, Token | ForgeError]]) -> None:
    for queue, item in items:
        queue.put_nowait(item)
