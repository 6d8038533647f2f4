"""New events of a store, without the catalogue's index: for processes that look every second, without SQLite."""

from __future__ import annotations

import os

from forge_ray.records import Event
from forge_ray.store import paths
from forge_ray.store.files import Store

LOCAL_POLL_S, REMOTE_POLL_S = 0.5, 3.0  # listing an object store costs a request


class EventTail:
    """The events of some kinds. Names are listed, and only files that were not seen are read: they never change."""

    def __init__(self, store: Store, *kinds: str) -> None:
        self.store, self.kinds = store, kinds
        self.poll_s = LOCAL_POLL_S if store.is_local else REMOTE_POLL_S
        self._seen: set[str] = set()

    def new(self) -> list[Event]:
        """Those that came since the last call, oldest first; the first call reads all."""
        found = []
        for name in sorted(_names(self.store) - self._seen):
            read = self.store.read_json(paths.event(name))
            if read["kind"] in self.kinds:  # others may be of a kind that only a newer version knows
                found.append(Event.model_validate(read))
            self._seen.add(name)
        return found


def _names(store: Store) -> set[str]:
    if not store.is_local:
        return {path.rsplit("/", 1)[-1] for path in store.list(paths.EVENTS)}
    try:
        # not `Store.list`, which asks for the size of each: this is done every second
        return {name for name in os.listdir(store.local(paths.EVENTS)) if not name.startswith(".")}
    except FileNotFoundError:
        return set()
