"""An event at its place in the log, and what makes one out of the content of a line (pure)."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

from pydantic import ValidationError

from forge_ray.errors import ForgeError
from forge_ray.records import Event
from forge_ray.store import signing
from forge_ray.store.aliases import route_of
from forge_ray.store.files import Store
from forge_ray.store.log_reader import Line

WITHDRAWN = ("withdrawn", "erased")  # states of a version that learned from erased rows: still there, and gone


@dataclass(frozen=True)
class Placed:
    """An event at its place in the log. `source` None: it is from before the log began, and nobody's."""

    event: Event
    source: Line | None

    @property
    def line(self) -> int:
        return self.source.number if self.source else 0

    @property
    def digest(self) -> str:
        """sha256 of the event as it is stored."""
        return self.source.sha256 if self.source else ""


def event_of(content: Any, path: str) -> Event | None:
    """The event that is stored at `path`; None where the content is none, or another."""
    try:
        event = Event.model_validate(content)
        return event if path.endswith(f"~{event.id}.json") else None
    except (ValidationError, ValueError, TypeError, RecursionError):
        return None


def is_readable(event: Event) -> bool:
    """Whether the content is what its kind has, so that nobody who reads it stumbles."""
    data = event.data
    try:
        match event.kind:
            case "alias":
                route_of(event)
            case "model":
                return isinstance(data["state"], str) and (
                    data["state"] not in WITHDRAWN or isinstance(data["erasure"], str)
                )
            case "approval":
                return data["decision"] in ("approve", "refuse") and isinstance(data["alias"], str)
            case "key":
                return isinstance(data["action"], str)
            case "export":
                files = data["files"]
                texts = [data[name] for name in ("form", "precision", "to", "by", "digest")] + [*files, *files.values()]
                return all(isinstance(text, str) for text in texts)
            case "disclosure" if data["action"] == "began":
                texts = [data[name] for name in ("split", "to", "model", "by")]
                return all(isinstance(text, str) for text in texts) and isinstance(data["num_rows"], int)
            case "disclosure":
                return data["action"] == "ended" and isinstance(data["began"], str) and isinstance(data["num_sent"], int)
            case "removal":
                return all(isinstance(data[name], str) for name in ("action", "by", "why"))
            case "erasure" | "deployment" | "run":
                return isinstance(data["state"], str)
    except (ForgeError, ValidationError, LookupError, TypeError, ValueError, AttributeError):
        return False
    return True


def names(line: Line, event: Event) -> bool:
    """Whether a line says of what kind and subject its event is as the event does."""
    return line.action.partition(".")[0] == event.kind and line.subject == event.subject


def is_envelope_of(envelope: Line, record: Line, key: signing.PublicKey) -> bool:
    """Whether the envelope that one line holds is signed by `key`, over the record that the other holds."""
    try:
        stated = json.loads(signing.opened(envelope.body(), [key]))
        return bool(stated["subject"] == [{"name": record.path, "digest": {"sha256": record.sha256}}])
    except (ForgeError, ValueError, LookupError, TypeError):
        return False


def content_of(store: Store, path: str) -> Any:
    """The JSON of a file; None where it is none."""
    try:
        return store.read_json(path)
    except ForgeError:
        return None
