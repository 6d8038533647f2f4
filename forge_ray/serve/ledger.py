"""The usage ledger: one line per answer, in the store (no ray).

    usage/<YYYY-MM-DD>/<replica>-<n>.jsonl

Each replica writes its own files, so replicas do not wait for each other. The newest is rewritten as a whole every few
seconds while lines are added; at `SEGMENT_BYTES`, or at midnight UTC, the next begins. No line holds anything of a prompt or
an answer. A replica that is killed loses the lines of its last `FLUSH_S` seconds.
"""

from __future__ import annotations

import json
import logging
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from itertools import groupby
from typing import Literal

from forge_ray.errors import ConfigError
from forge_ray.records import Frozen, utc_now
from forge_ray.serve.statuses import CLIENT_CLOSED
from forge_ray.store import paths
from forge_ray.store.files import Store

FLUSH_S = 2.0
SEGMENT_BYTES = 256 << 10  # some thousand lines: the most that is rewritten every few seconds
LOG = logging.getLogger(__name__)

By = Literal["key", "model", "version", "day"]


class Used(Frozen):
    """One answer. `status` 499: the client left, and the tokens until then are charged. `key` is "" without keys."""

    at: str = ""
    request_id: str
    key: str
    model: str
    model_version: str
    prompt_tokens: int
    completion_tokens: int
    status: int
    ms: int


class Ledger:
    """A replica's own lines. `add` only appends to a list; a thread writes."""

    def __init__(self, store: Store, replica: str, now: Callable[[], str] = utc_now, flush_s: float = FLUSH_S) -> None:
        self._store, self._replica, self._now = store, replica, now
        self._added: list[str] = []
        self._day, self._number, self._lines, self._size = "", -1, list[str](), 0
        self._lock = threading.Lock()  # of the segment; `flush` is called by the thread and by `close`
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._run, args=(flush_s,), name="ledger", daemon=True)
        self._thread.start()

    def add(self, used: Used) -> None:
        """Add an answer that ended now."""
        self._added.append(used.model_copy(update={"at": self._now()}).model_dump_json())

    def flush(self) -> None:
        """Write the added lines. Lines that cannot be written are kept for the next flush."""
        with self._lock:
            for day, group in groupby(self._added[:], key=lambda line: str(json.loads(line)["at"][:10])):
                lines = list(group)
                self._put(day, lines)
                del self._added[: len(lines)]

    def close(self) -> None:
        """Write the remaining lines and stop the thread. May be called again."""
        self._closing.set()
        self._thread.join()
        self.flush()

    def _run(self, flush_s: float) -> None:
        while not self._closing.wait(flush_s):
            try:
                self.flush()
            except Exception:  # the store may be unreachable for a moment
                LOG.exception("usage could not be written; it is kept and written later")

    def _put(self, day: str, lines: list[str]) -> None:
        if day != self._day or self._size >= SEGMENT_BYTES:
            number = self._number + 1 if day == self._day else 0
            # an earlier replica may have had this name
            while self._store.exists(self._path(day, number)):
                number += 1
            self._day, self._number, self._lines, self._size = day, number, [], 0
        text = "".join(line + "\n" for line in (*self._lines, *lines))
        self._store.write(self._path(day, self._number), text.encode())
        self._lines += lines
        self._size = len(text)

    def _path(self, day: str, number: int) -> str:
        return paths.usage(day, f"{self._replica}-{number}.jsonl")


def lines(store: Store, since: str = "") -> Iterator[Used]:
    """Every line since the day `since` (YYYY-MM-DD)."""
    for path in store.list(paths.usage(), recursive=True):
        day = path.split("/")[1]
        if day >= since and path.endswith(".jsonl"):
            for line in store.read(path).splitlines():  # of bytes: U+2028 in a name ends no line
                yield Used.model_validate_json(line)


def usage(store: Store, by: By = "key", since: str = "") -> list[dict[str, str | int]]:
    """Sums by key, name, version or day, the largest first (days in order).

    `cancelled`: answers whose client left; `failed`: answers that the engine did not finish.
    """
    if since:
        try:
            since = datetime.strptime(since, "%Y-%m-%d").replace(tzinfo=UTC).date().isoformat()
        except ValueError:
            raise ConfigError(f"{since!r} is not a date", hint="for example --since 2027-06-30") from None
    sums: dict[str, Counter[str]] = {}
    for used in lines(store, since):
        group = {"key": used.key, "model": used.model, "version": used.model_version, "day": used.at[:10]}[by]
        sums.setdefault(group, Counter()).update(
            requests=1,
            prompt_tokens=used.prompt_tokens,
            completion_tokens=used.completion_tokens,
            cancelled=int(used.status == CLIENT_CLOSED),
            failed=int(used.status >= 500),
        )
    rows: list[dict[str, str | int]] = [{by: group, **counts} for group, counts in sums.items()]
    if by == "day":
        return sorted(rows, key=lambda row: str(row["day"]))
    return sorted(rows, key=lambda row: -int(row["prompt_tokens"]) - int(row["completion_tokens"]))
