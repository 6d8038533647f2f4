"""The audit log: whatever is done to it shows, and a crash between line and file costs nothing."""

from __future__ import annotations

import json
import multiprocessing
import random
from pathlib import Path

import pytest
from rechained import rechained

from forge_ray.errors import StoreError
from forge_ray.governance.verify import verify_log
from forge_ray.records import Event, ModelVersion, canonical_json
from forge_ray.release import promotion
from forge_ray.store import audit_log, log_check, signing
from forge_ray.store.authority import Authority, Signer
from forge_ray.store.catalog import Catalog
from forge_ray.store.files import Store

pytestmark = pytest.mark.unit

EDITS = 10_000


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(str(tmp_path / "store"))


def written(store: Store, count: int) -> list[bytes]:
    for number in range(count):
        content = canonical_json({"number": number})
        audit_log.publish(store, f"events/{number:03d}.json", content, "test.put", f"evt_{number}", why="a test")
    return audit_log.lines(store)


def version(name: str) -> ModelVersion:
    return ModelVersion(name=name, status="imported", weights="full", files=(), files_digest=name, licence="mit").sealed()


def test_an_unchanged_log_verifies(store: Store) -> None:
    key = signing.generate()
    with signing.acting(key):
        written(store, 20)
    report = log_check.verify(store, trusting(key), every_signature=True)
    assert (report.num_lines, report.num_signed, report.num_files, report.problems) == (20, 20, 20, ())
    assert report.head == audit_log.head(store)
    line = audit_log.read(store)[3]
    assert (line["n"], line["action"], line["subject"], line["why"]) == (4, "test.put", "evt_3", "a test")
    assert line["who"] == signing.who()


def trusting(key: signing.PrivateKey) -> Authority:
    """The authority of one signer, from the first line on."""
    public = key.public_key()
    signer = Signer(id=signing.key_id(public), name="olga", roles=("owner",), public_key=signing.public_pem(public))
    return Authority(signers={signer.id: signer})


def mutated(lines: list[bytes], rng: random.Random) -> tuple[str, list[bytes]]:
    """One random edit, insertion, deletion, exchange or truncation; the log differs from what it was."""
    lines = list(lines)
    place = rng.randrange(len(lines))
    kind = rng.choice(["edit", "insert", "delete", "swap", "truncate", "repeat"])
    match kind:
        case "edit":
            raw = bytearray(lines[place])
            raw[rng.randrange(len(raw))] ^= 1 << rng.randrange(8)
            lines[place] = bytes(raw)
        case "insert":
            forged = json.loads(lines[place]) | {"action": "model.forged"}
            lines.insert(place + rng.randrange(2), canonical_json(forged))
        case "delete":
            del lines[place]
        case "swap":
            other = rng.choice([n for n in range(len(lines)) if n != place])
            lines[place], lines[other] = lines[other], lines[place]
        case "truncate":
            lines = lines[:place]
        case _:
            lines.insert(place, lines[place])
    return kind, lines


def test_ten_thousand_random_changes_are_all_detected(store: Store) -> None:
    """The chain alone, without a key: of the log as it is, and of its end against the head."""
    lines = written(store, 40)
    head = store.read(audit_log.HEAD)
    rng, kinds = random.Random(0), set()
    assert log_check.check_chain(lines, head)[1] == []
    for number in range(EDITS):
        kind, changed = mutated(lines, rng)
        kinds.add(kind)
        assert log_check.check_chain(changed, head)[1], (number, kind)
    assert len(kinds) == 6


def test_a_rewritten_log_is_detected_by_signature_files_and_anchors(store: Store) -> None:
    key = signing.generate()
    keys = trusting(key)
    with signing.acting(key):
        written(store, 10)
    anchor = audit_log.head(store)
    lines = audit_log.read(store)
    rechained(store, [line | {"why": "another reason"} for line in lines])
    assert "was not signed by" in log_check.verify(store, keys).problems[0]
    rechained(
        store,
        [{name: value for name, value in line.items() if name not in ("sig", "key")} | {"key": ""} for line in lines[:-2]],
    )
    problems = log_check.verify(store, keys, {"mv_released": anchor}).problems
    assert problems == ("mv_released was written at line 10, and the log has 8: its end was cut off",)
    assert "2 files are in no line of the log" in log_check.verify(store, keys).problems[0]


def test_a_changed_or_missing_or_added_file_is_named(store: Store) -> None:
    written(store, 3)
    store.write("events/001.json", b'{"number":7}')
    assert log_check.verify(store).problems == ("events/001.json is not what the log says: it was changed",)
    store.delete("events/001.json")
    missing = "events/001.json, of which the log tells, is not there; the next command that writes restores it"
    assert log_check.verify(store).problems == (missing,)
    store.write("events/001.json", canonical_json({"number": 1}))
    assert log_check.verify(store).problems == ()
    store.write("events/forged.json", b"{}")
    assert "forged.json" in log_check.verify(store).problems[0]


def test_files_older_than_the_log_are_covered_by_its_first_line(store: Store) -> None:
    store.write("events/old.json", b"{}")
    written(store, 2)
    assert [line["action"] for line in audit_log.read(store)] == ["begin", "test.put", "test.put"]
    assert log_check.verify(store).problems == ()
    store.write("events/old.json", b'{"changed":1}')
    assert log_check.verify(store).problems == ("files from before the log began were changed or taken away",)


def test_the_log_recovers_from_a_killed_writer(store: Store) -> None:
    """Between head and line, inside the line, and between line and file."""
    lines = written(store, 3)
    log, head = store.read(audit_log.LOG), store.read(audit_log.HEAD)
    for torn in (log[: -len(lines[-1]) - 1], log[:-7]):
        store.write(audit_log.LOG, torn)
        assert log_check.verify(store).problems
        audit_log.publish(store, f"events/more{len(torn)}.json", b"{}", "test.put", "evt")
        assert log_check.verify(store).problems == ()
        store.delete(f"events/more{len(torn)}.json")
        store.write(audit_log.LOG, log)
        store.write(audit_log.HEAD, head)
    store.delete("events/002.json")
    audit_log.redo(store)
    assert store.read("events/002.json") == canonical_json({"number": 2})


def test_a_changed_log_is_not_extended(store: Store) -> None:
    lines = written(store, 4)
    store.write(audit_log.LOG, b"".join(line + b"\n" for line in lines[:2]))
    with pytest.raises(StoreError, match="does not end with its head"):
        audit_log.publish(store, "events/next.json", b"{}", "test.put", "evt")
    assert not store.exists("events/next.json")


def _write_some(uri: str, name: str) -> None:
    for number in range(20):
        audit_log.publish(Store(uri), f"events/{name}-{number}.json", canonical_json({"of": name}), "test.put", name)


def test_concurrent_writers_make_one_chain(store: Store) -> None:
    context = multiprocessing.get_context("spawn")
    writers = [context.Process(target=_write_some, args=(store.uri, name)) for name in ("a", "b")]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join(60)
    report = log_check.verify(store)
    assert (report.num_lines, report.problems) == (40, ())


def test_the_catalogue_logs_what_it_writes_and_versions_carry_the_head(store: Store) -> None:
    with Catalog.open(store) as catalog:
        first = catalog.put(version("first"))
        promotion.promote(catalog, first.id, "prod")
        second = catalog.put(version("second"))
        promotion.set_route(catalog, "prod", None, why="not used")
        catalog.append(Event(kind="run", subject="run_x", data={"state": "running"}))
        assert (first.log_head, second.log_head.partition(":")[0]) == ("", "2")
        actions = [(line["action"], line["why"]) for line in audit_log.read(store)]
        assert actions == [
            ("models.put", ""),
            ("alias.set", ""),
            ("models.put", ""),
            ("alias.set", "not used"),
            ("run.running", ""),
        ]
        assert verify_log(catalog.store, every_signature=True).problems == ()
        head = audit_log.head(store)
        assert verify_log(catalog.store, False, head=head).problems == ()
        assert "was changed before it" in verify_log(catalog.store, False, head="3:" + "0" * 64).problems[0]
