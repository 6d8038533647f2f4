"""What a person sees of a run: while it goes on, and in one line when it is over."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress

from forge_ray.errors import ForgeError
from forge_ray.progress import Stage
from forge_ray.records import RunRecord
from forge_ray.store import paths
from forge_ray.store.files import Store
from forge_ray.train import incidents, metrics, status, validation
from forge_ray.train.sinks import Sinks

PROGRESS = "reference.json"  # in a run's folder, while a frozen model is asked about its rows


@contextmanager
def followed(it: Stage, store: Store, run: str, sinks: Sinks) -> Iterator[None]:
    """Show the workers' own metrics while they train; only where the store is a folder that this machine sees."""
    over = threading.Event()

    def follow() -> None:
        while not over.wait(0.5):
            lines = metrics.read(store.local(paths.run(run, metrics.METRICS)))
            sinks.write()
            if lines:
                last = lines[-1]
                is_shown = it.is_live  # elsewhere nobody sees them, and each look reads two folders
                details = status.details(lines, validation.read(store, run), incidents.read(store, run)) if is_shown else ()
                it.update(last["step"], last["of"], status.progress_line(last), details)
            else:
                _show_reference(it, store, run)

    thread = threading.Thread(target=follow, daemon=True)
    if store.is_local:
        thread.start()
    try:
        yield
    finally:
        over.set()
        if store.is_local:
            thread.join()


def _show_reference(it: Stage, store: Store, run: str) -> None:
    """How far a frozen model has been asked about the rows, where it is being asked."""
    with suppress(ForgeError, OSError):  # it has just ended, or not begun
        passed = store.read_json(paths.run(run, PROGRESS))
        it.update(passed["done"], passed["total"], f"{passed['what']}: {passed['done']}/{passed['total']} parts of the rows")


def closing_line(record: RunRecord) -> str:
    """What a person reads when a run has ended."""
    early = f" of {record.stopped_early['of']} (stopped early)" if record.stopped_early else ""
    scores = f"loss {record.metrics['loss']:.3f}, {record.metrics['tokens_per_s']:.0f} tokens/s"
    return f"{record.num_steps} steps{early}, {scores}{trouble(record)}"


def trouble(record: RunRecord) -> str:
    """What a person must know of a run that ended well: nobody finds out later that rows were not used."""
    rows = sum(len(incident["rows"]) for incident in record.incidents if incident["kind"] == "quarantine")
    parts = []
    if record.metrics["steps_left_out"]:
        parts.append(f"{record.metrics['steps_left_out']:.0f} steps left out")
    if rows:
        parts.append(f"{rows} rows put aside")
    if record.incidents:
        parts.append(f"{len(record.incidents)} incidents: `forge runs show {record.id}`")
    return f" ({', '.join(parts)})" if parts else ""
