"""The state of an endpoint by its last event, its process and its lease, and what each reader makes of it."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
from collections.abc import Callable

import pytest
from click.testing import CliRunner
from fabricated import deployment, version

from forge_ray.cli.main import cli
from forge_ray.governance.erasure import endpoints
from forge_ray.governance.space import holds
from forge_ray.records import Deployment, Event
from forge_ray.serve import endings
from forge_ray.store import lease, paths
from forge_ray.store.catalog import Catalog
from forge_ray.store.endpoint_state import VALID_S, EndpointState, state_of
from forge_ray.store.lease import Lease
from forge_ray.store.owner import owner_mark

pytestmark = pytest.mark.unit
ELSEWHERE = Lease(token="t", host="elsewhere", boot="b", pid=7, started="1", at="2026-01-01T00:00:00Z")


def ended_process(expression: str) -> str:
    """What an expression of the store's owner or lease gives in a process of this machine that has ended."""
    code = (
        "from forge_ray.store.owner import owner_mark; from forge_ray.store.lease import new_lease; print("
        + expression
        + ")"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return done.stdout.splitlines()[-1]


def started(catalog: Catalog, name: str = "support", process: str = "", url: str = "") -> Deployment:
    record: Deployment = deployment(catalog, name, version(catalog, name).id)
    more = {key: value for key, value in (("process", process), ("url", url)) if value}
    catalog.append(Event(kind="deployment", subject=record.id, data={"state": "running", "name": name, **more}))
    return record


def beat(catalog: Catalog, record: Deployment, seconds: float, holder: Lease = ELSEWHERE) -> None:
    """The lease of an endpoint, renewed so many seconds ago."""
    path = paths.endpoint(record.id)
    lease.write(catalog.store, path, holder)
    at = time.time() - seconds
    os.utime(catalog.store.path(path), (at, at))


def test_a_fresh_lease_is_running_and_an_old_one_silent(catalog: Catalog) -> None:
    record = started(catalog)
    assert state_of(catalog, record.id) == EndpointState("running")
    beat(catalog, record, 12)
    now = state_of(catalog, record.id)
    assert (now.state, now.lives) == ("running", True)
    assert re.fullmatch(r"last seen \d\d s ago", now.seen)
    beat(catalog, record, VALID_S + 20)
    now = state_of(catalog, record.id)
    assert (now.state, now.lives) == ("silent", False)
    assert re.fullmatch(r"last seen 2\d\d s ago", now.seen)


def test_crashed_is_said_only_of_a_process_that_is_known_to_have_ended(catalog: Catalog) -> None:
    """A lost network looks like a crash."""
    ended = ended_process("owner_mark()")
    record = started(catalog, "ended", ended)
    assert state_of(catalog, record.id).state == "crashed"
    beat(catalog, record, 5, Lease.model_validate_json(ended_process("new_lease().model_dump_json()")))
    assert state_of(catalog, record.id).state == "crashed"  # its coordinator has ended too
    beat(catalog, record, 5)
    assert state_of(catalog, record.id).state == "running"  # it was started elsewhere, from a Serve config file
    beat(catalog, record, VALID_S + 1)
    assert state_of(catalog, record.id).state == "crashed"
    for name, process in (("lives", owner_mark()), ("elsewhere", "~00000000.1.1~"), ("cluster", "")):
        other = started(catalog, name, process)
        beat(catalog, other, VALID_S + 1)
        assert state_of(catalog, other.id).state == "silent"


def test_a_coordinator_that_was_killed_here_is_not_seen_to_live(catalog: Catalog) -> None:
    """Ray starts it again, so the endpoint counts as running until its lease is out of date."""
    record = started(catalog)
    beat(catalog, record, 5, Lease.model_validate_json(ended_process("new_lease().model_dump_json()")))
    now = state_of(catalog, record.id)
    assert (now.state, now.lives) == ("running", False)


@pytest.mark.parametrize("content", [b"", b'{"tok', b"[]", b'{"token": "t"}'])
def test_an_unreadable_lease_changes_no_state(catalog: Catalog, content: bytes) -> None:
    record = started(catalog)
    catalog.store.write(paths.endpoint(record.id), content)
    os.utime(catalog.store.path(paths.endpoint(record.id)), (1, 1))
    assert state_of(catalog, record.id) == EndpointState("running")


def test_an_end_on_record_is_not_undone_by_a_lease_but_a_silent_endpoint_may_come_back(catalog: Catalog) -> None:
    for state, data in (("stopped", {}), ("failed", {}), ("ended", {"was": "running"}), ("ended", {"was": "crashed"})):
        record = started(catalog)
        catalog.append(Event(kind="deployment", subject=record.id, data={"state": state, "reason": "x", **data}))
        beat(catalog, record, 5)
        assert state_of(catalog, record.id) == EndpointState(state)
    record = started(catalog)
    catalog.append(Event(kind="deployment", subject=record.id, data={"state": "ended", "was": "silent", "reason": "x"}))
    beat(catalog, record, 5)
    assert state_of(catalog, record.id).state == "running"
    beat(catalog, record, VALID_S + 1)
    assert state_of(catalog, record.id).state == "ended"


def test_reading_a_state_writes_nothing_where_the_catalogue_may_not(catalog: Catalog) -> None:
    record = started(catalog)
    beat(catalog, record, 12)
    os.utime(catalog.store.path("work/endpoints"), (1, 1))
    with Catalog.read_only(catalog.store) as reading:
        assert state_of(reading, record.id).state == "running"
    assert os.stat(catalog.store.path("work/endpoints")).st_mtime == 1


# ---------------------------------------------------------------- ends on record


def test_the_next_start_records_the_end_of_a_silent_endpoint_with_when_it_was_seen(catalog: Catalog) -> None:
    silent, crashed = started(catalog), started(catalog, "other", ended_process("owner_mark()"))
    beat(catalog, silent, VALID_S + 20)
    assert endings.note_unsaid_ends(catalog, "support", served=silent.id) == []
    assert endings.note_unsaid_ends(catalog, "support") == [silent.id]
    assert endings.note_unsaid_ends(catalog, "support") == []
    data = catalog.last("deployment")[silent.id].data
    assert (data["state"], data["was"]) == ("ended", "silent")
    assert data["reason"].startswith("silent, last seen at 20")
    assert not catalog.store.exists(paths.endpoint(silent.id))
    assert endings.note_unsaid_ends(catalog, "other") == [crashed.id]
    assert catalog.last("deployment")[crashed.id].data["reason"] == "its process ended without a word"


def test_an_endpoint_that_lives_or_has_no_lease_is_not_recorded_as_ended(catalog: Catalog) -> None:
    fresh, without = started(catalog, "fresh"), started(catalog, "without")
    beat(catalog, fresh, 5)
    assert [endings.note_unsaid_ends(catalog, record.name) for record in (fresh, without)] == [[], []]


def test_a_roll_out_records_what_it_replaced(catalog: Catalog) -> None:
    before, after = started(catalog, "support"), started(catalog, "later")
    endings.note_replaced(catalog, before, after)
    data = catalog.last("deployment")[before.id].data
    assert (data["state"], data["was"], data["reason"]) == ("ended", "running", f"replaced by {after.id}")
    endings.note_replaced(catalog, before, after)
    assert len(catalog.events("deployment", before.id)) == 3


def forge(catalog: Catalog, monkeypatch: pytest.MonkeyPatch, *words: str) -> tuple[int, str]:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    done = CliRunner().invoke(cli, [*words, "--store", catalog.store.uri])
    return done.exit_code, done.output


def test_undeploy_without_a_cluster_records_an_end_that_nobody_saw(
    catalog: Catalog, monkeypatch: pytest.MonkeyPatch
) -> None:
    record = started(catalog)
    code, text = forge(catalog, monkeypatch, "undeploy", "support")
    assert (code, "no endpoint 'support' of the store crashed or is silent" in text) == (2, True)
    beat(catalog, record, VALID_S + 20)
    code, text = forge(catalog, monkeypatch, "undeploy", "support")
    assert (code, f"the end of {record.id} is on record" in text) == (0, True)


def test_status_without_a_cluster_shows_what_the_store_knows(catalog: Catalog, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, seconds in (("fresh", 5), ("quiet", VALID_S + 20)):
        beat(catalog, started(catalog, name, url="http://h:1"), seconds)
    started(catalog, "crash", ended_process("owner_mark()"))
    code, text = forge(catalog, monkeypatch, "deploy", "--status")
    assert code == 0
    for line in (
        r"fresh  running  http://h:1  last seen \d+ s ago",
        r"quiet  silent  http://h:1  last seen 2\d\d s ago",
        r"crash  crashed    by its last event",
    ):
        assert re.search(f"^{line}$", text, re.MULTILINE), text
    assert "Aliases" not in text


# ---------------------------------------------------------------- readers


def test_a_prune_releases_what_crashed_and_holds_what_is_silent(catalog: Catalog) -> None:
    silent, crashed = started(catalog, "quiet"), started(catalog, "crash", ended_process("owner_mark()"))
    ended, back = started(catalog, "ended"), started(catalog, "back")
    for record in (silent, ended, back):
        beat(catalog, record, VALID_S + 20)
    for record in (ended, back):
        endings.note_unsaid_ends(catalog, record.name)
    beat(catalog, back, 5)
    held = [record.id for record in holds._deployed(catalog)]
    assert sorted(held) == sorted([silent.id, back.id])
    assert crashed.id not in held


@pytest.fixture
def reasons(catalog: Catalog, monkeypatch: pytest.MonkeyPatch) -> Callable[[Deployment], str]:
    """Why an erasure does not confirm an endpoint; "" where it does. No cluster is in reach, and no address answers."""
    monkeypatch.setattr(endpoints, "_state", lambda deployment: None)

    def reason(record: Deployment) -> str:
        ids = [record.id]
        return endpoints.wait_until_released(catalog, [record.model_version], ids, 0.0, ()).get(record.id, "")

    return reason


def test_an_erasure_does_not_trust_an_old_lease(
    catalog: Catalog, reasons: Callable[[Deployment], str], monkeypatch: pytest.MonkeyPatch
) -> None:
    here, crashed = started(catalog, "here"), started(catalog, "crash", ended_process("owner_mark()"))
    assert (reasons(here), reasons(crashed)) == ("", "")  # both were started on this machine, and nothing answers
    beat(catalog, here, 5)
    assert reasons(here).startswith("its coordinator is running (last seen ")
    beat(catalog, here, VALID_S + 20)
    monkeypatch.setattr(endpoints, "_host", lambda catalog, deployment: "elsewhere")
    assert re.search(r"it was last seen 2\d\d s ago$", reasons(here))
    endings.note_unsaid_ends(catalog, "here")
    assert reasons(here).startswith("nobody saw it end: silent, last seen at 20")
    assert endpoints.wait_until_released(catalog, [here.model_version], [here.id], 0.0, [here.id]) == {}
    later = deployment(catalog, "here", here.model_version, port=8001)
    assert later.id != here.id  # the next start of the name does not prove that the one before has ended
    assert reasons(here).startswith("nobody saw it end")
