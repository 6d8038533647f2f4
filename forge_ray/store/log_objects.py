"""The audit log on an object store, which cannot append or lock: one object per line, audit/lines/<n>.json.

A line is an object that did not exist before: of two writers that chose the same number one succeeds, and the other reads
what came before it and writes the next one. The head follows the line: a writer that was killed in between, or overtaken,
leaves a head that is behind, which the next writer brings up to the last line.
"""

from __future__ import annotations

import json

from forge_ray.errors import StoreError
from forge_ray.store.files import Store
from forge_ray.store.log_reader import HEAD, LINES, hash_of, object_name, object_of, previous_of


def add(store: Store, line: bytes) -> bool:
    """Write a line at its number; False where another line is there."""
    number = _number_of(line)
    if not store.create(object_name(number), line) and object_of(store, number) != line:  # ours: its reply was lost
        return False
    if not store.exists(HEAD) or _number_of(store.read_json_bytes(HEAD)) < number:
        store.write(HEAD, line)
    return True


def lines(store: Store) -> list[bytes]:
    return [store.read(name) for name in store.list(LINES)]


def whole(store: Store) -> bytes:
    """The last line, b"" before any, after the head was brought up to it. Raises `StoreError` where the lines do not go on
    from the head."""
    if not store.exists(HEAD):
        names = store.list(LINES)
        if not names:
            return b""
        if names == [object_name(1)]:  # its writer was killed, or is about to write the head
            first = store.read(names[0])
            store.write(HEAD, first)
            return first
        if not store.exists(HEAD):  # still: others may have written meanwhile
            raise StoreError(
                f"{HEAD} is missing in {store.place}", hint="`forge audit verify` says what else is; restore it"
            )
    head = last = store.read_json_bytes(HEAD)
    number = _number_of(head)
    if object_of(store, number) is None and _goes_on(store, number, head):  # by a version that wrote the head first
        store.create(object_name(number), head)
    if object_of(store, number) != head:
        raise _changed(store)
    while (line := object_of(store, number + 1)) is not None:
        if previous_of(line) != hash_of(last):
            raise _changed(store)
        number, last = number + 1, line
    if last != head:
        store.write(HEAD, last)
    return last


def recent(store: Store, count: int) -> list[bytes]:
    """The last `count` lines up to the head, and those behind it."""
    number = _number_of(store.read_json_bytes(HEAD)) if store.exists(HEAD) else 0
    lines_to_head = [
        line for n in range(max(1, number - count + 1), number + 1) if (line := object_of(store, n)) is not None
    ]
    while (line := object_of(store, number + 1)) is not None:
        number += 1
        lines_to_head.append(line)
    return lines_to_head


def _goes_on(store: Store, number: int, head: bytes) -> bool:
    before = object_of(store, number - 1) if number > 1 else None
    return number == 1 or (before is not None and previous_of(head) == hash_of(before))


def _number_of(line: bytes) -> int:
    try:
        return int(json.loads(line)["n"])
    except (ValueError, LookupError, TypeError, RecursionError):
        raise StoreError(f"{HEAD} is no line of a log", hint="`forge audit verify` says what else differs") from None


def _changed(store: Store) -> StoreError:
    return StoreError(
        f"the audit log of {store.place} does not go on from its head; nothing is written behind a log that was changed",
        hint="`forge audit verify` says where; restore audit/ from a backup",
    )
