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

from forge_ray.records import Event
from forge_ray.store import audit_log, signing
from forge_ray.store.files import Store


def chain(count: int, key: signing.PrivateKey) -> list[bytes]:
    """`count` lines of alias moves as the catalogue writes them, signed."""
    lines, before = [], b""
    with signing.acting(key):
        for number in range(count):
            event = Event(kind="alias", subject=f"team-{number % 50}@prod", data={"model_version": f"mv_{number:016x}"})
            before = audit_log._line(before, f"events/{number}.json", event.stored(), "alias.set", event.subject, "")
            lines.append(before)
    return lines


def timed(call: Callable[[], object]) -> float:
    started = time.perf_counter()
    call()
    return time.perf_counter() - started


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lines", type=int, default=100_000)
    parser.add_argument("--appends", type=int, default=200)
    options = parser.parse_args()
    key = signing.generate()
    keys = {signing.key_id(key.public_key()): key.public_key()}
    lines = chain(options.lines, key)
    size = sum(map(len, lines))
    print(f"{len(lines):,} lines, {size / 1e6:.1f} MB")
    floor = timed(lambda: any(not (hashlib.sha256(line).hexdigest() and json.loads(line)) for line in lines))
    checked = timed(lambda: audit_log.check_chain(lines, lines[-1]))
    print(f"chain {checked:.2f} s, floor {floor:.2f} s, ratio {checked / floor:.2f}")
    parsed = [json.loads(line) for line in lines[: min(len(lines), 20_000)]]
    signatures = timed(lambda: [audit_log._signature_trouble(line, keys) for line in parsed])
    print(f"every signature: {len(parsed) / signatures:,.0f} a second")
    with tempfile.TemporaryDirectory() as folder, signing.acting(key):
        store = Store(str(Path(folder) / "store"))
        seconds = timed(
            lambda: [audit_log.publish(store, f"events/{n}.json", b"{}", "a", "s") for n in range(options.appends)]
        )
    print(f"append: {seconds / options.appends * 1e3:.1f} ms a line, with its file, three times synced")


if __name__ == "__main__":
    main()
