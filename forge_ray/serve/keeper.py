"""What an endpoint keeps of its answers: a bounded queue that a thread writes to the store (no ray).

An answer never waits for it: what does not fit into the queue is dropped and counted. A replica that is killed loses the
answers of its last `FLUSH_S` seconds. Nothing of them is in a log.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import date, timedelta

from forge_ray.config.endpoint import KeepAnswers
from forge_ray.records import utc_now
from forge_ray.serve.context import Caller, Chosen
from forge_ray.serve.fields import ChatRequest
from forge_ray.serve.metrics import Metrics
from forge_ray.serve.prologue import sizes_of
from forge_ray.serve.reply import Part, joined, message_of
from forge_ray.store import kept_answers, paths
from forge_ray.store.files import Store
from forge_ray.store.kept_answers import KeptAnswer, KeptChoice

FLUSH_S = 10.0
REMOVE_S = 600.0  # between two looks for batches that are too old or too many
MAX_QUEUED = 2048  # answers
MAX_QUEUED_CHARACTERS = 64 << 20
BATCH_CHARACTERS = 16 << 20  # of one file
LOG = logging.getLogger(__name__)


@dataclass(frozen=True)
class Ended:
    """An answer that ended, as it was handled: what is written of it is made by the thread."""

    id: str
    at: str
    body: ChatRequest
    caller: Caller
    chosen: Chosen
    choices: tuple[tuple[Part, ...], ...]
    num_characters: int

    def kept(self, deployment: str) -> KeptAnswer:
        """What is written. A prefix that the answer begins with is part of the answer, not of the question."""
        messages = [message for message in self.body.messages if not message.prefix]
        choices = [(message_of(part), part.finish_reason or "length") for part in map(joined, self.choices)]
        return KeptAnswer(
            id=self.id,
            request_id=self.caller.request_id,
            at=self.at,
            deployment=deployment,
            key=self.caller.key.id if self.caller.key else "",
            model=self.chosen.name,
            model_version=self.chosen.loaded.version,
            user=self.body.user or "",
            metadata=self.body.metadata or {},
            messages=[message.for_template() for message in messages],
            tools=[tool.for_template() for tool in self.body.offered],
            choices=tuple(KeptChoice(message=message, finish_reason=reason) for message, reason in choices),
        )


class Keeper:
    """A replica's queue of answers to keep. `add` only appends to it; a thread writes and removes what is too old."""

    def __init__(
        self,
        store: Store,
        settings: KeepAnswers,
        deployment: str,
        replica: str,
        metrics: Metrics,
        now: Callable[[], str] = utc_now,
        flush_s: float = FLUSH_S,
    ) -> None:
        self._store, self._settings, self._now = store, settings, now
        self._deployment, self._replica, self._metrics = deployment, replica, metrics
        self._queue: deque[Ended] = deque()
        self._num_characters = 0
        self._number = 0
        self._removed_at = float("-inf")
        self._size_lock = threading.Lock()  # of the number of characters, held for an addition
        self._writing = threading.Lock()  # `flush` is called by the thread and by `close`
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._run, args=(flush_s,), name="kept-answers", daemon=True)
        self._thread.start()

    def add(
        self, answer_id: str, body: ChatRequest, caller: Caller, chosen: Chosen, choices: Sequence[Sequence[Part]]
    ) -> None:
        """Keep an answer that ended now, or count it as dropped where the queue is full."""
        parts = [part for choice in choices for part in choice]
        texts = (len(part.text) + len(part.reasoning) + sum(len(call.arguments) for call in part.calls) for part in parts)
        size = sum(characters for _, characters, _ in sizes_of(body)) + sum(texts)
        with self._size_lock:
            fits = len(self._queue) < MAX_QUEUED and self._num_characters + size <= MAX_QUEUED_CHARACTERS
            self._num_characters += size if fits else 0
        if not fits:
            self._metrics.kept("dropped")
            return
        self._queue.append(Ended(answer_id, self._now(), body, caller, chosen, tuple(map(tuple, choices)), size))

    def unfinished(self) -> None:
        """Count an answer that the client left or the engine broke off: it is not kept."""
        self._metrics.kept("unfinished")

    def flush(self) -> None:
        """Write the queue, in batches. A batch that cannot be written stays in the queue, which may become full."""
        with self._writing:
            while self._queue:
                self._write_batch()
            if time.monotonic() - self._removed_at >= REMOVE_S:
                self._remove_old()

    def _remove_old(self) -> None:
        """Delete the batches that are not kept any longer."""
        removed = kept_answers.remove_old(self._store, self._now()[:10], self._settings.max_mib << 20)
        for reason, count in removed.items():
            self._metrics.kept(f"removed_{reason}", count)
        self._removed_at = time.monotonic()

    def close(self) -> None:
        """Write the rest and stop the thread. May be called again."""
        self._closing.set()
        self._thread.join()
        self.flush()

    def _write_batch(self) -> None:
        """Write the oldest answers of the queue that ended on one day and fit into one file."""
        day = self._queue[0].at[:10]
        batch: list[Ended] = []
        size = 0
        for ended in list(self._queue):
            size += ended.num_characters
            if ended.at[:10] != day or (batch and size > BATCH_CHARACTERS):
                break
            batch.append(ended)
        last_day = (date.fromisoformat(day) + timedelta(days=self._settings.days)).isoformat()
        while self._store.exists(path := paths.answers(last_day, f"{self._replica}-{self._number}.jsonl")):
            self._number += 1  # an earlier replica may have had this name
        kept_answers.write_batch(self._store, path, [ended.kept(self._deployment).model_dump_json() for ended in batch])
        self._number += 1
        for ended in batch:
            self._queue.popleft()
            with self._size_lock:
                self._num_characters -= ended.num_characters
        self._metrics.kept("kept", len(batch))

    def _run(self, flush_s: float) -> None:
        while not self._closing.wait(flush_s):
            try:
                self.flush()
            except Exception as error:  # the store may be unreachable for a moment; the error's text could quote an answer
                LOG.error("answers could not be kept: %s; they stay in the queue", type(error).__name__)
