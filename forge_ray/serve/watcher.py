"""Watches the facts of a store that serving follows: aliases, archived versions, versions (no ray).

It follows the audit log, line by line, by the rules of `store/standing.py`: a file that somebody lays into the store, or a
line that nobody signed who could, moves nothing.
"""

from __future__ import annotations

from typing import Any

from pydantic import ValidationError

from forge_ray.config.release import AliasRoute
from forge_ray.errors import StoreError
from forge_ray.records import Event, ModelVersion
from forge_ray.store import paths, pins
from forge_ray.store.catalog import OUT_OF_USE, write_event
from forge_ray.store.files import Store
from forge_ray.store.log_reader import Line
from forge_ray.store.signatures import require_signed
from forge_ray.store.standing import Standing


class StoreWatcher:
    """The store's current facts; `refresh` reads what is new. `genesis`, `log_head`: what the deployment holds of the store;
    `PolicyError` where it is another one, or an earlier day of it."""

    def __init__(self, store: Store, genesis: str = "", log_head: str = "") -> None:
        self.store = store
        self.standing = Standing(store, "alias", "model", "approval", paths.RECORDS, paths.SIGNATURES)
        self._held = genesis, log_head

    def refresh(self) -> list[Line]:
        """The new lines of the log."""
        is_first = not self.standing.reader.number
        lines = self.standing.refresh()
        if is_first:
            pins.require(self.standing, *self._held, "the deployment holds")
        return lines

    def routes(self) -> dict[str, AliasRoute]:
        return self.standing.routes()

    def archived(self) -> set[str]:
        """Aliases and versions out of use."""
        names = set(self.standing.last("alias")) - set(self.routes())
        states = self.standing.last("model")
        return names | {version for version, event in states.items() if event.data["state"] in OUT_OF_USE}

    def version(self, identifier: str) -> ModelVersion | None:
        """A model version's record as the log holds it, with the dataset of its run; None where the store has none. Raises
        `ForgeError` for one that may not be served: changed, or not signed where the policy wants signatures."""
        content = self._content(paths.record(ModelVersion.kind, identifier))
        if content is None:
            return None
        try:
            version = ModelVersion.model_validate(content)
        except ValidationError:
            raise StoreError(f"the record of {identifier} is none", hint="restore the store from a backup") from None
        if version.id != identifier or version.sealed().id != identifier:
            raise StoreError(
                f"the record of {identifier} is another's: its content gives {version.sealed().id}",
                hint="restore the store from a backup",
            )
        if self.standing.authority.policy.signatures:
            require_signed(self.standing, version)
        return version.model_copy(update={"dataset": version.dataset or self._dataset(version.run)})

    def _content(self, path: str) -> Any:
        """A record as the log holds it, or, from before the log, the file."""
        line = self.standing.line_of(path)
        if line:
            return line.body()
        return self.store.read_json(path) if self.standing.is_older and self.store.exists(path) else None

    def _dataset(self, run: str) -> str:
        record = self._content(paths.record("runs", run)) if run else None
        return str(record.get("dataset", "")) if isinstance(record, dict) else ""

    def append(self, event: Event) -> Event:
        """Write an event of the endpoint itself."""
        return write_event(self.store, event)
