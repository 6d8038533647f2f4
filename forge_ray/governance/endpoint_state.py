"""Whether an endpoint runs, as far as the store and this machine know."""

from __future__ import annotations

from forge_ray.records import Event
from forge_ray.store.owner import is_alive


def state_of(last: Event | None) -> str:
    """The state that a deployment's last event states; "" without one. An endpoint that ends with its process, of which
    that process is gone and wrote no end, has `crashed`. Only the machine that it ran on can tell, until it is started
    again: elsewhere it stays `running`."""
    if last is None:
        return ""
    state = str(last.data["state"])
    has_ended = state == "running" and is_alive(str(last.data.get("process", ""))) is False
    return "crashed" if has_ended else state
