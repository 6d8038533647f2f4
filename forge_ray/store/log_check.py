"""What `forge audit verify` checks: chain, head, signatures, files, and every head that was noted elsewhere."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from forge_ray.errors import StoreError
from forge_ray.store import audit_log
from forge_ray.store.authority import Authority
from forge_ray.store.files import Store
from forge_ray.store.governing import GOVERNING
from forge_ray.store.log_reader import HEAD, START, Line, hash_of, parse
from forge_ray.store.signing import load_public


@dataclass(frozen=True)
class Verified:
    """The result of `verify`. `problems` is empty when nothing was changed, added, moved or taken away. `ignored`: lines
    that hold and have no effect, with the reason: nobody who could signed them."""

    num_lines: int
    head: str  # `<n>:<sha256 of the last line>`: written down elsewhere, it proves the log up to there
    num_signed: int
    num_files: int
    problems: tuple[str, ...]
    ignored: tuple[str, ...] = ()


def check_chain(stored: list[bytes], last: bytes | None, may_be_behind: bool = False) -> tuple[list[Line], list[str]]:
    """The lines, and what is wrong with their chain. `last`: the head, None where it is missing; on object stores it may be
    behind the last line (`log_objects.py`)."""
    lines: list[Line] = []
    problems: list[str] = []
    previous = START
    for number, raw in enumerate(stored, start=1):
        try:
            lines.append(parse(raw, number, previous))
        except StoreError as error:
            problems.append(error.message)
            break  # what follows a break proves nothing
        previous = lines[-1].hash
    if last is None and stored:
        problems.append(f"{HEAD} is missing")
    elif last is not None and not problems and last not in (stored if may_be_behind else stored[-1:]):
        problems.append(f"the log ends at line {len(stored)}, not where its head says: the end was cut off or changed")
    return lines, problems


def verify(
    store: Store,
    authority: Authority | None = None,
    anchors: Mapping[str, str] | None = None,
    every_signature: bool = False,
) -> Verified:
    """Check chain, head, signatures, files, and the heads that were noted elsewhere.

    anchors: where a head was noted → `<n>:<hash>`. The signature of the last line stands for all before it, and those of
    signers and policy are always checked; `every_signature` checks each, some 10,000 a second.
    """
    raw = audit_log.lines(store)
    lines, problems = check_chain(raw, store.read(HEAD) if store.exists(HEAD) else None, not store.is_local)
    for name, anchor in (anchors or {}).items():
        number, _, line_hash = anchor.partition(":")
        if not number.isdecimal() or not 1 <= int(number) <= len(raw):
            problems.append(f"{name} was written at line {number}, and the log has {len(raw)}: its end was cut off")
        elif hash_of(raw[int(number) - 1]) != line_hash:
            problems.append(f"{name} was written at another line {number} than the log has: the log was changed before it")
    signed = [line for line in lines if line.key]
    governing = [line for line in signed if line.action.partition(".")[0] in GOVERNING]
    for line in signed if every_signature else dict.fromkeys([*governing, *signed[-1:]]):
        if trouble := _signature_trouble(line, authority or Authority()):
            problems.append(f"line {line.number} {trouble}")
    num_files = 0
    if not problems:
        num_files, more = _check_files(store, lines)
        problems += more
    last = f"{len(raw)}:{hash_of(raw[-1])}" if raw else ""
    return Verified(len(raw), last, len(signed), num_files, tuple(problems))


def _signature_trouble(line: Line, authority: Authority) -> str:
    signer = authority.signers.get(line.key)
    if signer is None:
        return f"is signed by {line.key}, which is no key of a signer"
    if not signer.could_sign(line.number):
        return f"is signed by {signer.name}, whose signature counts from line {signer.added_line} to {signer.valid_to}"
    return "" if line.is_signed(load_public(signer.public_key)) else f"was not signed by {line.key} as it stands"


def _check_files(store: Store, lines: list[Line]) -> tuple[int, list[str]]:
    """Every record and event has its line, and every line its file, with the same content."""
    digests, problems = audit_log.digests_of(store), []
    logged: dict[str, str] = {}
    for line in lines:
        if line.path:
            logged.setdefault(line.path, line.sha256)
    restorable = audit_log.unwritten(store)
    for path, sha256 in logged.items():
        digest = digests.get(path) or audit_log.digest_of_file(store, path)
        if not digest:
            remedy = "; the next command that writes restores it" if path in restorable else ""
            problems.append(f"{path}, of which the log tells, is not there{remedy}")
        elif digest != sha256:
            problems.append(f"{path} is not what the log says: it was changed")
    begin: Any = {"files": 0, "digest": audit_log.digest_of({})}
    if lines and lines[0].action == "begin":
        begin = lines[0].body() or begin
    others = {path: sha256 for path, sha256 in digests.items() if path not in logged}
    if begin["digest"] != audit_log.digest_of(others):
        if len(others) > begin["files"]:
            problems.append(
                f"{len(others) - begin['files']} files are in no line of the log, among {', '.join(sorted(others)[:3])}"
            )
        else:
            problems.append("files from before the log began were changed or taken away")
    return len(digests), problems
