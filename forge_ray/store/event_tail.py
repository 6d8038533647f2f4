"""The new events of a store, read without the catalogue: for processes that poll every second, without SQLite."""

from __future__ import annotations

import os

from forge_ray.records import Event
from forge_ray.store import paths
from forge_ray.store.files import Store

LOCAL_POLL_S, REMOTE_POLL_S = 0.5, 3.0  # listing an object store costs a request


class EventTail:
    """The events of some kinds. Only files that were not read before are read, for they never change."""

    def __init__(self, store: Store, *kinds: str) -> None:
        self.store, self.kinds = store, kinds
        self.poll_s = LOCAL_POLL_S if store.is_local else REMOTE_POLL_S
        self._seen: set[str] = set()

    def new(self) -> list[Event]:
        """The events since the last call, oldest first; the first call reads all."""
        events = []
        for name in sorted(_names(self.store) - self._seen):
            content = self.store.read_json(paths.event(name))
            if content["kind"] in self.kinds:  # others may be of a kind that only a newer version knows
                events.append(Event.model_validate(content))
            self._seen.add(name)
        return events


def _names(store: Store) -> set[str]:
    if not store.is_local:
        return {path.rsplit("/", 1)[-1] for path in store.list(paths.EVENTS)}
    try:
        # not `Store.list`, which reads the size of each file: this runs every second
        return {name for name in os.listdir(store.local(paths.EVENTS)) if not name.startswith(".")}
    except FileNotFoundError:
        return set()
