"""Rows that were sent to another system: may they be, and which were.

Sending is a `disclosure` event of the dataset version, written before the first row leaves: who sends how many rows of which
split to which host and model. A second one says how many were sent and answered. A killed command leaves the first alone,
which counts as all of its rows: one too many on record, never one too few.
"""

from __future__ import annotations

from collections.abc import Collection

from forge_ray.errors import PolicyError
from forge_ray.records import Event, Frozen
from forge_ray.store import signing
from forge_ray.store.catalog import Catalog


class SentRows(Frozen):
    """Rows of one split that were sent to `to` (a URL). `num_rows`: how many were to be sent; `num_sent`: how many were,
    None where the command that sent them was killed."""

    dataset: str
    split: str
    to: str
    model: str
    by: str
    at: str
    num_rows: int
    num_sent: int | None = None

    def __str__(self) -> str:
        sent = f"up to {self.num_rows}" if self.num_sent is None else str(self.num_sent)
        return f"{sent} rows of {self.split} of {self.dataset} to {self.model} at {self.to}, at {self.at[:19]} by {self.by}"


def refuse_host(catalog: Catalog, origin: str) -> None:
    """Raise `PolicyError` where the policy does not name the host, or this process may not write such events."""
    authority = catalog.authority()
    if origin not in authority.policy.endpoints:
        owners = ", ".join(signer.name for signer in authority.active("owner"))
        first = "" if owners else "`forge signers create NAME --role owner`, then "
        raise PolicyError(
            f"policy.endpoints: no rows of this store are sent to {origin}; it names"
            f" {', '.join(authority.policy.endpoints) or 'no host'}",
            hint=f"an owner ({owners or 'there is nobody yet'}) can allow it: {first}`forge policy set --endpoint {origin}`",
        )
    catalog.check_may("disclosure events")


def begin(catalog: Catalog, dataset: str, split: str, num_rows: int, origin: str, url: str, model: str) -> Event:
    """Write the event of rows that are about to be sent. Raises `PolicyError` as `refuse_host` does."""
    refuse_host(catalog, origin)
    by = signing.who()
    data = {"action": "began", "split": split, "to": url, "model": model, "by": by, "num_rows": num_rows}
    data["why"] = f"evaluation: {num_rows} rows of {split} to {model} at {url}"
    return catalog.append(Event(kind="disclosure", subject=dataset, data=data))


def end(catalog: Catalog, began: Event, num_sent: int, num_answered: int) -> None:
    """Write how it ended."""
    data = {"action": "ended", "began": began.id, "num_sent": num_sent, "num_answered": num_answered}
    data["why"] = f"{num_sent} of {began.data['num_rows']} rows sent, {num_answered} answered"
    catalog.append(Event(kind="disclosure", subject=began.subject, data=data))


def sent(catalog: Catalog, splits: Collection[tuple[str, str]]) -> tuple[SentRows, ...]:
    """What was sent of these (dataset version, split), oldest first. Which rows of a split is not on record: the items of
    the report say it, where there is one."""
    listed = []
    for dataset in sorted({dataset for dataset, _ in splits}):
        events = catalog.events("disclosure", dataset)
        ends = {event.data["began"]: event.data["num_sent"] for event in events if event.data["action"] == "ended"}
        for event in events:
            if event.data["action"] == "began" and (dataset, event.data["split"]) in splits:
                facts = {name: event.data[name] for name in ("split", "to", "model", "by", "num_rows")}
                listed.append(SentRows(dataset=dataset, at=event.at, num_sent=ends.get(event.id), **facts))
    return tuple(sorted(listed, key=lambda one: (one.at, one.dataset)))
