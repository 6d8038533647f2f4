"""How long the audit log takes to check and to write.

    python benchmarks/audit_log.py --lines 100000

Prints the seconds for the chain (hashes, counters, head), for each signature, and per line that is appended with fsync. The
limit of the chain is what one core hashes and parses: `floor` is sha256 and json.loads over the same lines, nothing else.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from forge_ray.governance import signers
from forge_ray.records import Event
from forge_ray.store import audit_log, log_check, log_reader, signing
from forge_ray.store.catalog import Catalog, event_path
from forge_ray.store.files import Store
from forge_ray.store.signatures import signed_event


def chain(count: int, key: signing.PrivateKey, before: bytes = b"") -> list[bytes]:
    """`count` lines of alias moves as the catalogue writes them, signed, behind the line `before`."""
    lines = []
    with signing.acting(key):
        for number in range(count):
            event = Event(kind="alias", subject=f"team-{number % 50}@prod", data={"model_version": f"mv_{number:016x}"})
            event = signed_event(event)
            before = audit_log._line(before, event_path(event), event.stored(), "alias.set", event.subject, "")
            lines.append(before)
    return lines


def timed(call: Callable[[], object]) -> float:
    started = time.perf_counter()
    call()
    return time.perf_counter() - started


def opened(folder: Path, count: int) -> None:
    """How long a command takes to know what 50 aliases stand for, in a strict store of so many lines; and an endpoint to see
    one line more."""
    store = Store(str(folder / "store"))
    with Catalog.open(store) as catalog:
        signers.create(catalog, "olga", ("owner", "releaser"), folder, "ed25519")
        key = signing.load_private(folder / "olga.key")
        with signing.acting(key):
            signers.set_policy(catalog, {"signatures": True}, "")
    lines = chain(count, key, audit_log.lines(store)[-1])
    with open(store.path(log_reader.LOG), "ab") as stream:
        stream.write(b"".join(line + b"\n" for line in lines))
    store.write(log_reader.HEAD, lines[-1])
    catalog = Catalog(store, is_writable=False)
    folded = timed(catalog.sync)
    judged = timed(catalog.routes)
    (line,) = chain(1, key, lines[-1])
    with open(store.path(log_reader.LOG), "ab") as stream:
        stream.write(line + b"\n")
    one = timed(catalog.sync)
    print(f"a catalogue: folded {folded:.2f} s, every move judged {judged:.2f} s; one line more {one * 1e3:.1f} ms")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lines", type=int, default=100_000)
    parser.add_argument("--appends", type=int, default=200)
    options = parser.parse_args()
    key = signing.generate()
    lines = chain(options.lines, key)
    size = sum(map(len, lines))
    print(f"{len(lines):,} lines, {size / 1e6:.1f} MB")
    floor = timed(lambda: any(not (hashlib.sha256(line).hexdigest() and json.loads(line)) for line in lines))
    checked = timed(lambda: log_check.check_chain(lines, lines[-1]))
    print(f"chain {checked:.2f} s, floor {floor:.2f} s, ratio {checked / floor:.2f}")
    parsed, _ = log_check.check_chain(lines[:20_000], None)
    signatures = timed(lambda: all(line.is_signed(key.public_key()) for line in parsed))
    print(f"every signature: {len(parsed) / signatures:,.0f} a second")
    with tempfile.TemporaryDirectory() as folder:
        opened(Path(folder), options.lines)
    with tempfile.TemporaryDirectory() as folder, signing.acting(key):
        store = Store(str(Path(folder) / "store"))

        def append() -> None:
            for number in range(options.appends):
                audit_log.publish(store, f"events/{number}.json", b"{}", "a", "s")

        seconds = timed(append)
    print(f"append: {seconds / options.appends * 1e3:.1f} ms a line, with its file, three times synced")


if __name__ == "__main__":
    main()
