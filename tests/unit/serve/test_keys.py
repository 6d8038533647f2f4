"""API keys: what is stored of them, what their events make of them, and how a replica learns of it."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from forge_ray.cli.main import cli
from forge_ray.errors import ConfigError, NotFound
from forge_ray.records import Event
from forge_ray.serve import keys
from forge_ray.serve.keys import KeyTail, keys_of, sha256_of
from forge_ray.store.catalog import Catalog
from forge_ray.store.files import Store
from forge_ray.store.log_reader import Line, LogReader

pytestmark = pytest.mark.unit


def everything_stored(catalog: Catalog) -> str:
    return "".join(path.read_text(errors="replace") for path in Path(catalog.store.root).rglob("*") if path.is_file())


def test_a_secret_is_256_random_bits_and_nowhere_in_the_store(catalog: Catalog) -> None:
    key, text = keys.create(catalog, "app", models=("support@prod",))
    assert keys.PATTERN.fullmatch(text)
    assert text.startswith(key.id + "_")
    assert text.rsplit(key.id + "_", 1)[1] not in everything_stored(catalog)
    assert key.sha256 == sha256_of(text)
    assert keys.create(catalog, "app2", models=("*",))[1] != text
    assert keys_of(catalog)[sha256_of(text)] == key


def test_grants_are_patterns_on_the_name_that_is_sent(catalog: Catalog) -> None:
    key, _ = keys.create(catalog, "app", models=("support@prod", "team-*", "ft:base:*"))
    assert all(map(key.grants, ("support@prod", "team-a", "team-", "ft:base:org/x:7")))
    assert not any(map(key.grants, ("support@test", "Team-a", "a-team-a", "support@prod2", "")))
    assert not keys.ApiKey(id="fk_0", name="m", sha256="", scopes=("metrics",)).grants("anything")


def test_revoked_and_expired_keys_are_refused_and_say_so(catalog: Catalog) -> None:
    now = datetime.now(UTC)
    key, _ = keys.create(catalog, "app", models=("*",), expires_at=keys.moment("2d"))
    assert key.refusal(now) == ""
    assert "expired on" in key.refusal(now + timedelta(days=2, seconds=1))
    revoked = keys.revoke(catalog, "app", "laptop lost")
    assert "was revoked" in revoked.refusal(datetime.now(UTC) + timedelta(seconds=1))
    assert keys.revoke(catalog, key.id) == revoked
    assert len(catalog.events("key", key.id)) == 2
    for act in (lambda: keys.change(catalog, key.id, rpm=1), lambda: keys.rotate(catalog, key.id)):
        with pytest.raises(ConfigError, match="was revoked"):
            act()
    keys.create(catalog, "app", models=("*",))  # the name is free again
    assert keys.find(catalog, "app").id != key.id


def test_rotating_keeps_grants_and_the_old_secret_for_its_grace(catalog: Catalog) -> None:
    key, old = keys.create(catalog, "app", models=("a",), rpm=7, expires_at=keys.moment("90d"))
    rotated, new = keys.rotate(catalog, "app", timedelta(hours=1))
    assert (rotated.id, rotated.rpm, rotated.models) == (key.id, 7, ("a",))
    by_sha256 = keys_of(catalog)
    now = datetime.now(UTC)
    assert by_sha256[sha256_of(new)].refusal(now + timedelta(hours=2)) == ""
    assert by_sha256[sha256_of(old)].refusal(now) == ""
    assert "expired" in by_sha256[sha256_of(old)].refusal(now + timedelta(hours=2))
    _, newest = keys.rotate(catalog, "app")
    by_sha256 = keys_of(catalog)
    assert "expired" in by_sha256[sha256_of(new)].refusal(datetime.now(UTC) + timedelta(seconds=1))
    keys.revoke(catalog, "app")
    later = datetime.now(UTC) + timedelta(seconds=1)
    assert all("revoked" in key.refusal(later) for key in keys_of(catalog).values())
    assert set(keys_of(catalog)) == {sha256_of(text) for text in (old, new, newest)}


def test_a_change_leaves_the_rest(catalog: Catalog) -> None:
    key, _ = keys.create(catalog, "app", models=("a",), rpm=7, tpm=100)
    assert keys.change(catalog, "app", tpm=0, models=("b", "c")) == key.model_copy(update={"tpm": 0, "models": ("b", "c")})
    assert [event.data["action"] for event in catalog.events("key", key.id)] == ["created", "changed"]


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"name": "has space"}, "up to 64 letters"),
        ({"name": "fk_0123456789ab"}, "not beginning with fk_"),
        ({"models": ()}, "scope chat but no model"),
        ({"scopes": ("root",)}, "not one of chat, metrics, admin"),
        ({"rpm": -1}, "rpm=-1 of key 'app' is negative"),
    ],
)
def test_invalid_keys_are_refused(catalog: Catalog, fields: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words) as caught:
        keys.create(catalog, **{"name": "app", "models": ("a",), **fields})
    assert caught.value.hint
    assert keys.list_keys(catalog) == []


def test_key_names_are_unique_and_unknown_ones_are_reported(catalog: Catalog) -> None:
    keys.create(catalog, "app", models=("a",))
    with pytest.raises(ConfigError, match="a key named 'app' exists already"):
        keys.create(catalog, "app", models=("a",))
    with pytest.raises(ConfigError, match="no change given for fk_"):
        keys.change(catalog, "app")
    with pytest.raises(NotFound, match="no API key 'nobody'"):
        keys.find(catalog, "nobody")


def test_moments_and_durations() -> None:
    assert keys.duration("90d") == timedelta(days=90)
    assert keys.moment("2999-01-01") == "2999-01-01T00:00:00.000+00:00"
    assert keys.moment("2999-01-01T12:00:00+02:00") == "2999-01-01T10:00:00.000+00:00"
    assert keys.moment("") == ""
    for text, words in {
        "90": "not a duration",
        "-1d": "not a duration",
        "2999-13-01": "not a date",
        "2020-01-01": "not in the future",
        "0s": "not in the future",
        "999999999d": "is too long",
    }.items():
        with pytest.raises(ConfigError, match=words):
            keys.moment(text)


def test_a_replica_reads_only_what_is_new(catalog: Catalog) -> None:
    store = Store(catalog.store.uri)
    tail = KeyTail(store)
    assert tail.refresh() == {}
    catalog.append(Event(kind="alias", subject="support", data={"model_version": "mv_0"}))
    store.write("events/9~evt_0.json", b'{"kind": "of a newer version", "subject": "x"}')
    key, text = keys.create(catalog, "app", models=("a",))
    first = tail.refresh()
    assert first == {sha256_of(text): key}
    assert tail.refresh() is first
    keys.revoke(catalog, "app")
    assert tail.refresh()[sha256_of(text)].revoked_at
    assert tail.standing.reader.number == 3
    assert first[sha256_of(text)].revoked_at == ""


def test_key_tail_survives_an_unreachable_store(
    catalog: Catalog, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("forge_ray.store.standing.LOCAL_POLL_S", 0.01)
    tail, closing, away = KeyTail(Store(catalog.store.uri)), threading.Event(), threading.Event()
    real = LogReader.new

    def read(self: LogReader) -> list[Line]:
        if away.is_set() and self is tail.standing.reader:
            raise OSError("the store is away")
        return real(self)

    def until(holds: Callable[[], bool]) -> None:
        deadline = time.monotonic() + 20
        while not holds():
            assert time.monotonic() < deadline
            time.sleep(0.01)

    monkeypatch.setattr(LogReader, "new", read)
    follower = threading.Thread(target=tail.follow, args=(closing,))
    follower.start()
    _, first = keys.create(catalog, "first", models=("*",))
    until(lambda: sha256_of(first) in tail.keys)
    away.set()
    _, second = keys.create(catalog, "second", models=("*",))
    until(lambda: "keys cannot be read" in caplog.text)
    assert set(tail.keys) == {sha256_of(first)}
    away.clear()
    until(lambda: sha256_of(second) in tail.keys)
    closing.set()
    follower.join(timeout=20)
    assert not follower.is_alive()


def forge(store: str, *arguments: str) -> Result:
    return CliRunner().invoke(cli, [*arguments, "--store", store])


def test_keys_commands(tmp_path: Path) -> None:
    store = str(tmp_path / "store")
    bounds = ("--model", "support@prod", "--model", "team-*", "--scope", "chat", "--scope", "metrics", "--rpm", "60")
    created = forge(store, "keys", "create", "--name", "app", *bounds, "--expires", "90d")
    assert created.exit_code == 0, created.output
    secret = created.stdout.strip()
    assert keys.PATTERN.fullmatch(secret)
    key_id = secret[: len("fk_0123456789ab")]
    listed = forge(store, "keys", "list", "--json").stdout
    assert secret not in listed
    (entry,) = json.loads(listed)["results"]
    assert (entry["id"], entry["state"], entry["rpm"], entry["tpm"]) == (key_id, "valid", 60, 0)
    assert entry["models"] == ["support@prod", "team-*"]
    assert entry["scopes"] == ["chat", "metrics"]
    assert "support@prod, team-*" in forge(store, "keys", "list").stdout
    assert json.loads(forge(store, "keys", "change", "app", "--rpm", "0", "--json").stdout)["rpm"] == 0
    rotated = json.loads(forge(store, "keys", "rotate", "app", "--grace", "1h", "--json").stdout)
    assert rotated["id"] == key_id
    assert sha256_of(rotated["secret"]) == rotated["sha256"] != entry["sha256"]
    assert forge(store, "keys", "revoke", key_id, "--reason", "done").exit_code == 0
    details = json.loads(forge(store, "keys", "show", key_id, "--json").stdout)
    assert details["state"] == "revoked"
    assert [event["action"] for event in details["history"]] == ["created", "changed", "changed", "revoked"]
    assert details["history"][-1]["reason"] == "done"
    assert "revoked" in forge(store, "keys", "show", key_id).output
    unknown = forge(store, "keys", "revoke", "nobody")
    assert (unknown.exit_code, "no API key 'nobody'" in unknown.output) == (2, True)
