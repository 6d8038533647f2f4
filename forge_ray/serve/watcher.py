"""Watches the facts of a store that serving follows: aliases, archived versions, versions (no ray, no SQLite)."""

from __future__ import annotations

from collections.abc import Iterator

from forge_ray.config.release import AliasRoute
from forge_ray.records import Event, ModelVersion
from forge_ray.store import paths
from forge_ray.store.aliases import route_of
from forge_ray.store.authority import accepted_moves, folded
from forge_ray.store.catalog import OUT_OF_USE, write_event
from forge_ray.store.event_tail import EventTail
from forge_ray.store.files import Store


class StoreWatcher:
    """The store's current facts; `refresh` reads the new events."""

    def __init__(self, store: Store) -> None:
        self.store = store
        self.last: dict[tuple[str, str], Event] = {}
        self.tail = EventTail(store, "alias", "model", "signer", "policy")
        self._events: list[Event] = []
        self._versions: dict[str, ModelVersion] = {}

    def refresh(self) -> list[Event]:
        """The new events. Under `policy.signatures`, alias moves without a releaser's signature are ignored."""
        events = self.tail.new()
        if events:
            self._events = sorted((*self._events, *events), key=lambda event: (event.at, event.id))
            authority = folded(event for event in self._events if event.kind in ("signer", "policy"))
            moves = accepted_moves(authority, [event for event in self._events if event.kind == "alias"])
            states = [event for event in self._events if event.kind == "model"]
            self.last = {(event.kind, event.subject): event for event in (*moves, *states)}
        return events

    def of(self, kind: str) -> Iterator[tuple[str, Event]]:
        """(subject, its last event) of one kind."""
        return ((subject, event) for (of_kind, subject), event in self.last.items() if of_kind == kind)

    def routes(self) -> dict[str, AliasRoute]:
        return {name: route for name, event in self.of("alias") if (route := route_of(event))}

    def archived(self) -> set[str]:
        """Aliases and versions out of use."""
        names = {name for name, event in self.of("alias") if route_of(event) is None}
        return names | {version for version, event in self.of("model") if event.data["state"] in OUT_OF_USE}

    def version(self, identifier: str) -> ModelVersion | None:
        """A model version's record, with the dataset of its run; None where the store has none."""
        path = paths.record("models", identifier)
        if identifier not in self._versions:
            if not self.store.exists(path):
                return None
            version = ModelVersion.model_validate(self.store.read_json(path))
            self._versions[identifier] = version.model_copy(
                update={"dataset": version.dataset or self._dataset(version.run)}
            )
        return self._versions[identifier]

    def _dataset(self, run: str) -> str:
        path = paths.record("runs", run)
        return str(self.store.read_json(path)["dataset"]) if run and self.store.exists(path) else ""

    def append(self, event: Event) -> Event:
        """Write an event after the last one of its subject."""
        previous = self.last.get((event.kind, event.subject))
        return write_event(self.store, event, previous.at if previous else None)
