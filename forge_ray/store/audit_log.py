"""The audit log: one line per record and event, each holding the hash of the line before it.

    audit/log.jsonl     the lines; on object stores, which cannot append, audit/lines/<n>.json, one object each
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
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from forge_ray.errors import StoreError
from forge_ray.records import canonical_json, utc_now
from forge_ray.store import paths, signing
from forge_ray.store.files import Store

FOLDER, LOG, HEAD, LINES = paths.AUDIT, *map(paths.audit, ("log.jsonl", "head.json", "lines"))
LOGGED = (paths.RECORDS, paths.EVENTS, paths.TOMBSTONES)  # folders of which every file has its line
START = "0" * 64
REDONE = 8  # lines of the end whose files are looked for; writers that were killed at once leave no more


@dataclass(frozen=True)
class Verified:
    """What `verify` found. `problems` is empty when nothing was changed, added, moved or taken away."""

    num_lines: int
    head: str  # `<n>:<sha256 of the last line>`: written down elsewhere, it proves the log up to there
    num_signed: int
    num_files: int
    problems: tuple[str, ...]


def hash_of(line: bytes) -> str:
    return hashlib.sha256(line).hexdigest()


def publish(store: Store, path: str, content: bytes, action: str, subject: str, why: str = "") -> None:
    """Write `content`, canonical JSON, to `path`, once, with its line in the log."""
    if not store.exists(path):
        _append(store, path, content, action, subject, why)
    store.write_once(path, content)


def _append(store: Store, path: str, content: bytes, action: str, subject: str, why: str) -> None:
    with _alone(store):
        before = _healed(store)
        if not before and (earlier := _digests(store)):
            body = {"files": len(earlier), "digest": _digest_of(earlier)}
            before = _write(store, _line(before, "", canonical_json(body), "begin", "", "there were files before the log"))
        _write(store, _line(before, path, content, action, subject, why))


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
    }
    if key:
        line["sig"] = base64.b64encode(signing.sign(canonical_json(line), key)).decode()
    return canonical_json(line)


def _write(store: Store, line: bytes) -> bytes:
    store.write(HEAD, line)
    _extend(store, line)
    return line


def _extend(store: Store, line: bytes) -> None:
    if store.is_local:
        import os

        with open(store.path(LOG), "ab") as stream:
            stream.write(line + b"\n")
            stream.flush()
            os.fsync(stream.fileno())
    else:
        store.write(f"{LINES}/{json.loads(line)['n']:012d}.json", line)


@contextlib.contextmanager
def _alone(store: Store) -> Iterator[None]:
    """One writer at a time on a file system. Object stores give no such promise: two at once can take the same number there,
    which `verify` then reports."""
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
    if not store.exists(HEAD):
        if _has_lines(store):
            raise StoreError(
                f"{HEAD} is missing in {store.place}", hint="`forge audit verify` says what else is; restore it"
            )
        return b""
    head = store.read(HEAD)
    last = _last_line(store)
    if last == head:
        return head
    if json.loads(head)["previous"] == (hash_of(last) if last else START):
        _extend(store, head)
        return head
    raise StoreError(
        f"the audit log of {store.place} does not end with its head; nothing is written behind a log that was changed",
        hint="`forge audit verify` says where; restore audit/ from a backup",
    )


def _has_lines(store: Store) -> bool:
    return store.exists(LOG) if store.is_local else bool(store.list(LINES))


def _last_line(store: Store) -> bytes:
    if not store.is_local:
        names = store.list(LINES)
        return store.read(names[-1]) if names else b""
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
        return [store.read(name) for name in store.list(LINES)]
    return store.read(LOG).removesuffix(b"\n").split(b"\n") if store.exists(LOG) else []


def read(store: Store) -> list[dict[str, Any]]:
    return [json.loads(line) for line in lines(store)]


def head(store: Store) -> str:
    """`<n>:<hash>` of the last line; "" where there is no log."""
    if not store.exists(HEAD):
        return ""
    last = store.read(HEAD)
    return f"{json.loads(last)['n']}:{hash_of(last)}"


def redo(store: Store) -> None:
    """Write the files of the last lines that a killed writer left unwritten."""
    for path, content in unwritten(store).items():
        store.write_once(path, content)


def unwritten(store: Store) -> dict[str, bytes]:
    """Path → content of the files of the last lines that are not there."""
    if not store.exists(HEAD):
        return {}
    recent = [store.read(HEAD)]
    if store.is_local and store.exists(LOG):
        with open(store.path(LOG), "rb") as stream:
            size = stream.seek(0, 2)
            stream.seek(max(0, size - (1 << 16)))
            recent += [line for line in stream.read().split(b"\n")[1:] if line][-REDONE:]
    missing = {}
    for raw in recent:
        with contextlib.suppress(ValueError):
            line = json.loads(raw)
            content = canonical_json(line["body"])
            if line["path"] and not store.exists(line["path"]) and hashlib.sha256(content).hexdigest() == line["sha256"]:
                missing[line["path"]] = content
    return missing


def check_chain(stored: list[bytes], last: bytes | None) -> tuple[list[dict[str, Any]], list[str]]:
    """The lines, without the content that they hold, and what is wrong with their chain. `last`: the head, None where it is
    missing."""
    parsed: list[dict[str, Any]] = []
    problems: list[str] = []
    previous = START
    for number, raw in enumerate(stored, start=1):
        try:
            line = json.loads(raw)
            if line["n"] != number:
                problems.append(f"line {number} calls itself {line['n']}: lines are missing, added or moved")
            elif line["previous"] != previous:
                problems.append(f"line {number} does not follow the line before it: one of the two was changed")
            elif line["action"] != "begin":
                del line["body"]  # kept, it would make up half of the time here
        except (ValueError, LookupError, TypeError):
            problems.append(f"line {number} is no line of a log")
            line = {}
        parsed.append(line)
        previous = hash_of(raw)
        if problems:
            break  # what follows a break proves nothing
    if last is None and stored:
        problems.append(f"{HEAD} is missing")
    elif last is not None and not problems and last != (stored[-1] if stored else None):
        problems.append(f"the log ends at line {len(stored)}, not where its head says: the end was cut off or changed")
    return parsed, problems


def verify(
    store: Store,
    keys: Mapping[str, signing.PublicKey] | None = None,
    anchors: Mapping[str, str] | None = None,
    every_signature: bool = False,
) -> Verified:
    """Check chain, head, signatures, files, and the heads that released versions carry.

    keys: key id → public key, of the signers that are trusted; anchors: name → `<n>:<hash>`. The signature of the last line
    stands for all before it; `every_signature` checks each, some 10,000 a second.
    """
    raw = lines(store)
    parsed, problems = check_chain(raw, store.read(HEAD) if store.exists(HEAD) else None)
    for name, anchor in (anchors or {}).items():
        number, _, line_hash = anchor.partition(":")
        if not number.isdecimal() or not 1 <= int(number) <= len(raw):
            problems.append(f"{name} was written at line {number}, and the log has {len(raw)}: its end was cut off")
        elif hash_of(raw[int(number) - 1]) != line_hash:
            problems.append(f"{name} was written at another line {number} than the log has: the log was changed before it")
    signed = [place for place, line in enumerate(parsed) if line.get("sig")]
    for place in signed if every_signature else signed[-1:]:
        if trouble := _signature_trouble(json.loads(raw[place]), keys or {}):
            problems.append(f"line {place + 1} {trouble}")
    num_files = 0
    if not problems:
        num_files, more = _check_files(store, parsed)
        problems += more
    last = f"{len(raw)}:{hash_of(raw[-1])}" if raw else ""
    return Verified(len(raw), last, len(signed), num_files, tuple(problems))


def _signature_trouble(line: dict[str, Any], keys: Mapping[str, signing.PublicKey]) -> str:
    if line["key"] not in keys:
        return f"is signed by {line['key']}, which is no key of a signer"
    payload = {name: value for name, value in line.items() if name != "sig"}
    try:
        ok = signing.is_signed(canonical_json(payload), base64.b64decode(line["sig"]), keys[line["key"]])
    except ValueError:
        ok = False
    return "" if ok else f"was not signed by {line['key']} as it stands"


def _digests(store: Store) -> dict[str, str]:
    return {
        path: hashlib.sha256(store.read(path)).hexdigest()
        for folder in LOGGED
        for path in store.list(folder, recursive=True)
    }


def _digest_of(files: Mapping[str, str]) -> str:
    return hashlib.sha256(canonical_json(sorted(files.items()))).hexdigest()


def _check_files(store: Store, parsed: list[dict[str, Any]]) -> tuple[int, list[str]]:
    """Every record and event has its line, and every line its file, with the same content."""
    digests, problems = _digests(store), []
    logged = {line["path"]: line["sha256"] for line in parsed if line["path"]}
    restorable = unwritten(store)
    for path, sha256 in logged.items():
        if path not in digests:
            remedy = "; the next command that writes restores it" if path in restorable else ""
            problems.append(f"{path}, of which the log tells, is not there{remedy}")
        elif digests[path] != sha256:
            problems.append(f"{path} is not what the log says: it was changed")
    begin: dict[str, Any] = {"files": 0, "digest": _digest_of({})}
    if parsed and parsed[0]["action"] == "begin":
        begin = parsed[0]["body"]
    others = {path: sha256 for path, sha256 in digests.items() if path not in logged}
    if begin["digest"] != _digest_of(others):
        if len(others) > begin["files"]:
            problems.append(
                f"{len(others) - begin['files']} files are in no line of the log, among {', '.join(sorted(others)[:3])}"
            )
        else:
            problems.append("files from before the log began were changed or taken away")
    return len(digests), problems
