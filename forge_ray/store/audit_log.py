"""The audit log: one line per record and event, each holding the hash of the line before it.

    audit/log.jsonl     the lines; on object stores, which cannot append, one object each (`log_objects.py`)
    audit/head.json     the last line once more, written first: what was cut off the end of the log is still there

A line is written before the file that it tells of, and holds its content: a crash between the two is made good when the
store is next opened for writing. Lines are signed where the writer has a key, so each is a signed head too: the counter
`n`, and by `previous` all before it. Model versions carry the head that they were released at, so cutting the log back
behind one shows.
"""

from __future__ import annotations

import base64
import contextlib
import fcntl
import hashlib
import json
import os
from collections.abc import Container, Iterator, Mapping
from typing import Any

from forge_ray.errors import StoreError
from forge_ray.records import canonical_json, utc_now
from forge_ray.store import log_objects, paths, signing
from forge_ray.store.files import Store
from forge_ray.store.log_reader import FORMAT, HEAD, LOG, START, Line, hash_of, previous_of

FOLDER = paths.AUDIT
LOGGED = (paths.RECORDS, paths.EVENTS, paths.TOMBSTONES)  # folders of which every file has its line
TRIES = 100  # for a line of its own, where other hosts write too; of writers at once one succeeds each time
REDONE = 8  # lines of the end whose files are looked for; writers that were killed at once leave no more


def publish(store: Store, path: str, content: bytes, action: str, subject: str, why: str = "") -> None:
    """Write `content`, canonical JSON, to `path`, once, with its line in the log."""
    if not store.exists(path):
        _append(store, path, content, action, subject, why)
    store.write_once(path, content)


def enter(store: Store, path: str, action: str, subject: str) -> None:
    """A line for a JSON file that is there and has none; the file becomes canonical, as what its line holds is."""
    content = canonical_json(store.read_json(path))
    _append(store, path, content, action, subject, "")
    store.write(path, content)


def _append(store: Store, path: str, content: bytes, action: str, subject: str, why: str) -> None:
    with _alone(store):
        for _ in range(TRIES):
            before = _healed(store)
            if not before and (earlier := digests_of(store)):
                body = canonical_json({"files": len(earlier), "digest": digest_of(earlier)})
                _written(store, _line(before, "", body, "begin", "", "there were files before the log"))
            elif _written(store, _line(before, path, content, action, subject, why)):
                return
    raise StoreError(
        f"{TRIES} times another host wrote the next line of the audit log of {store.place} first", hint="try again"
    )


def _line(before: bytes, path: str, content: bytes, action: str, subject: str, why: str) -> bytes:
    key = signing.private_key()
    line = {
        "n": json.loads(before)["n"] + 1 if before else 1,
        "previous": hash_of(before) if before else START,
        "at": utc_now(),
        "who": signing.who(),
        "key": signing.key_id(key.public_key()) if key else "",
        "action": action,
        "subject": subject,
        "why": why,
        "path": path,
        "sha256": hashlib.sha256(content).hexdigest(),
        "body": json.loads(content),
        "format": FORMAT,
    }
    if key:
        line["sig"] = base64.b64encode(signing.sign(canonical_json(line), key)).decode()
    return canonical_json(line)


def _written(store: Store, line: bytes) -> bool:
    """Write a line behind the last one; False where another host was faster."""
    if not store.is_local:
        return log_objects.add(store, line)
    store.write(HEAD, line)
    _extend(store, line)
    return True


def _extend(store: Store, line: bytes) -> None:
    with open(store.path(LOG), "ab") as stream:
        stream.write(line + b"\n")
        stream.flush()
        os.fsync(stream.fileno())


@contextlib.contextmanager
def _alone(store: Store) -> Iterator[None]:
    """One writer at a time on a file system; on object stores a line is created, which only one of two can."""
    if not store.is_local:
        yield
        return
    folder = store.local(FOLDER)
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / ".lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _healed(store: Store) -> bytes:
    """The last line, after the end of the log is whole again: a writer may have been killed between head and log."""
    if not store.is_local:
        return log_objects.whole(store)
    if not store.exists(HEAD):
        if store.exists(LOG):
            raise StoreError(
                f"{HEAD} is missing in {store.place}", hint="`forge audit verify` says what else is; restore it"
            )
        return b""
    head = store.read_json_bytes(HEAD)
    last = _last_line(store)
    if last != head and previous_of(head) == (hash_of(last) if last else START):
        _extend(store, head)
    elif last != head and not _cleared(store, head):
        raise StoreError(
            f"the audit log of {store.place} does not end with its head; nothing is written behind a log that was changed",
            hint="`forge audit verify` says where; restore audit/ from a backup",
        )
    return head


def _cleared(store: Store, head: bytes) -> bool:
    """Take what is no line away from behind the head, into audit/refused/: it costs itself and nothing else. False where
    the log does not hold the head, or what stands behind it is a line: then the head was changed."""
    before, is_there, behind = (b"\n" + store.read(LOG)).partition(b"\n" + head + b"\n")
    if not is_there or any(previous_of(line) == hash_of(head) for line in behind.split(b"\n")):
        return False
    store.write(paths.audit("refused", f"{hash_of(behind)}.jsonl"), behind)
    os.truncate(store.path(LOG), len(before) + len(head) + 1)
    return True


def _last_line(store: Store) -> bytes:
    if not store.exists(LOG):
        return b""
    with open(store.path(LOG), "r+b") as stream:
        size = end = stream.seek(0, 2)
        tail = b""
        while end and tail.count(b"\n") < 2:
            start = max(0, end - (1 << 16))
            stream.seek(start)
            tail, end = stream.read(end - start) + tail, start
        whole = tail[: tail.rfind(b"\n") + 1]
        if torn := len(tail) - len(whole):  # a write that was cut off; the head has the line
            stream.truncate(size - torn)
    return whole[:-1].rpartition(b"\n")[2]


def lines(store: Store) -> list[bytes]:
    """Every line as it is stored, oldest first."""
    if not store.is_local:
        return log_objects.lines(store)
    return store.read(LOG).removesuffix(b"\n").split(b"\n") if store.exists(LOG) else []


def read(store: Store) -> list[dict[str, Any]]:
    return [json.loads(line) for line in lines(store)]


def head(store: Store) -> str:
    """`<n>:<hash>` of the last line; "" where there is no log."""
    if not store.exists(HEAD):
        return ""
    last = store.read_json_bytes(HEAD)
    return f"{json.loads(last)['n']}:{hash_of(last)}"


def redo(store: Store) -> None:
    """Make the end of the log whole, and write the files of the last lines that a killed writer left unwritten."""
    if not store.is_local or store.exists(LOG) or store.exists(HEAD):
        with _alone(store):
            _healed(store)
    for path, content in unwritten(store).items():
        store.write_once(path, content)


def _recent(store: Store) -> list[bytes]:
    """The head, and the last lines before it."""
    if not store.exists(HEAD):
        return []
    recent = [store.read(HEAD)]
    if store.exists(LOG):
        with open(store.path(LOG), "rb") as stream:
            size = stream.seek(0, 2)
            stream.seek(max(0, size - (1 << 16)))
            recent += [line for line in stream.read().split(b"\n")[1:] if line][-REDONE:]
    return recent


def unwritten(store: Store) -> dict[str, bytes]:
    """Path → content of the files of the last lines that are not there."""
    recent = log_objects.recent(store, REDONE) if not store.is_local else _recent(store)
    missing = {}
    for raw in recent:
        with contextlib.suppress(ValueError, LookupError, TypeError, AttributeError, StoreError):
            line = json.loads(raw)
            path, content = line["path"], canonical_json(line["body"])
            is_logged = path.partition("/")[0] in (*LOGGED, paths.SIGNATURES)
            if is_logged and hashlib.sha256(content).hexdigest() == line["sha256"] and not store.exists(path):
                missing[path] = content
    return missing


def digests_of(store: Store) -> dict[str, str]:
    """Path → sha256 of every record and event."""
    return {
        path: hashlib.sha256(store.read(path)).hexdigest()
        for folder in LOGGED
        for path in store.list(folder, recursive=True)
    }


def digest_of_file(store: Store, path: str) -> str:
    """sha256 of a file; "" where there is none."""
    return hashlib.sha256(store.read(path)).hexdigest() if store.exists(path) else ""


def digest_of(files: Mapping[str, str]) -> str:
    return hashlib.sha256(canonical_json(sorted(files.items()))).hexdigest()


def are_older(store: Store, first: Line, logged: Container[str]) -> bool:
    """Whether the files without a line are those that the first line of the log counts, with the same content."""
    begin = first.body()
    older = {path: sha256 for path, sha256 in digests_of(store).items() if path not in logged}
    return isinstance(begin, dict) and begin.get("digest") == digest_of(older)
