"""Any order of events, dates, signers and revocations gives what a small model says; any change of a finished store is
harmless or named."""

from __future__ import annotations

import random
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from signed_store import add_people, allow, trained

from forge_ray.config.release import AliasRoute, DeployConfig
from forge_ray.errors import ForgeError
from forge_ray.governance import signers
from forge_ray.governance.verify import verify_log, verify_record
from forge_ray.records import Event
from forge_ray.release import promotion
from forge_ray.serve.coordinator import read_table
from forge_ray.serve.engines import fetch_version
from forge_ray.serve.keys import KeyTail
from forge_ray.serve.watcher import StoreWatcher
from forge_ray.store import paths, pins, signing
from forge_ray.store.aliases import alias_event
from forge_ray.store.catalog import Catalog, write_event
from forge_ray.store.files import MANIFEST, Store
from forge_ray.store.standing import Standing

pytestmark = pytest.mark.unit

KEYS = {name: signing.generate() for name in ("ada", "ben", "cid", "dot")}
DATES = ("2001-01-01T00:00:00.000+00:00", "2026-06-01T00:00:00.000+00:00", "9999-12-31T23:59:59.000+00:00")


def key_of(name: str) -> str:
    return signing.key_id(KEYS[name].public_key())


@dataclass
class Person:
    roles: frozenset[str]
    from_line: int
    to_line: int | None = None
    revoked: bool = False


@dataclass
class Model:
    """What should hold, in the plainest words: every event is judged again from the first, after each one."""

    log: list[tuple[str, Event]] = field(default_factory=list)  # who signed, what

    def outcome(self) -> tuple[dict[str, tuple[bool, frozenset[str]]], bool, dict[str, str]]:
        limits: dict[str, int] = {}
        while True:
            people, strict, aliases, revoked = self.pass_over(limits)
            if revoked == limits:
                active = {name: (one.to_line is None, one.roles) for name, one in people.items()}
                return active, strict, aliases
            limits = revoked

    def pass_over(self, limits: dict[str, int]) -> Any:
        people: dict[str, Person] = {}
        strict, aliases, revoked = False, {}, dict(limits)

        def could(name: str, line: int, role: str) -> bool:
            one = people.get(name)
            ends = [end for end in (one and one.to_line, limits.get(name)) if end is not None]
            return bool(one and role in one.roles and all(line <= end for end in ends))

        for line, (who, event) in enumerate(self.log, start=1):
            data = event.data
            if event.kind == "alias":
                if not strict or could(who, line, "releaser"):
                    aliases[event.subject] = data["model_version"]
                continue
            subject = next((name for name in KEYS if key_of(name) == event.subject), "")
            is_first = not people and data.get("action") == "added" and who == subject and "owner" in data["roles"]
            is_revocation = data.get("action") == "revoked"
            entitled = could(who, line, "owner") or (is_revocation and revoked.get(subject) == data.get("since", line))
            if not (is_first or (people and entitled)):
                continue
            match event.kind, data.get("action"):
                case "policy", _:
                    strict = data["signatures"]
                case _, "added" if subject not in people:
                    people[subject] = Person(frozenset(data["roles"]), line)
                case _, "changed" if subject in people and people[subject].to_line is None:
                    people[subject].roles = frozenset(data["roles"])
                case _, "retired" if subject in people and people[subject].to_line is None:
                    people[subject].to_line = line
                case _, "revoked" if subject in people:
                    end = min(line, data.get("since", line), *filter(None, [people[subject].to_line]))
                    people[subject].to_line = end
        return people, strict, aliases, revoked


ACTIONS = st.one_of(
    st.tuples(
        st.just("added"),
        st.sampled_from(sorted(KEYS)),
        st.sampled_from([["owner"], ["releaser"], ["owner", "releaser"], ["auditor"]]),
    ),
    st.tuples(st.just("changed"), st.sampled_from(sorted(KEYS)), st.sampled_from([["owner"], ["releaser"]])),
    st.tuples(st.just("retired"), st.sampled_from(sorted(KEYS)), st.none()),
    st.tuples(st.just("revoked"), st.sampled_from(sorted(KEYS)), st.none()),
    st.tuples(st.just("policy"), st.booleans(), st.none()),
    st.tuples(st.just("alias"), st.sampled_from(["a", "b"]), st.sampled_from(["mv_1", "mv_2", "mv_3"])),
)
STEP = st.tuples(st.sampled_from([*sorted(KEYS), ""]), ACTIONS, st.sampled_from(DATES))


def event_of(action: tuple[Any, Any, Any], at: str) -> Event:
    what, which, value = action
    if what == "alias":
        return Event(at=at, kind="alias", subject=which, data={"model_version": value})
    if what == "policy":
        return Event(at=at, kind="policy", subject="policy", data={"signatures": which})
    data: dict[str, Any] = {"action": what}
    if what in ("added", "changed"):
        data["roles"] = value
    if what == "added":
        data |= {"name": which, "public_key": signing.public_pem(KEYS[which].public_key())}
    return Event(at=at, kind="signer", subject=key_of(which), data=data)


@settings(max_examples=60, deadline=None)
@given(st.lists(STEP, min_size=1, max_size=14))
def test_any_order_of_events_gives_what_a_small_model_says(
    tmp_path_factory: pytest.TempPathFactory, steps: list[Any]
) -> None:
    """Read line by line as an endpoint does, and at once as a command does."""
    store = Store(str(tmp_path_factory.mktemp("order")))
    expected, growing = Model(), Standing(store)
    first = ("ada", ("added", "ada", ["owner", "releaser"]), DATES[1])
    for who, action, at in [first, *steps]:
        event = event_of(action, at)
        if who:
            with signing.acting(KEYS[who]):
                event = write_event(store, event)
        else:
            event = write_event(store, event)
        expected.log.append((who, event))
        growing.refresh()
        growing.routes()  # judged now, and again when something is revoked
    anew = Standing(store)
    anew.refresh()
    people, strict, aliases = expected.outcome()
    for standing in (growing, anew):
        authority = standing.authority
        listed = {key_of(name): (is_active, roles) for name, (is_active, roles) in people.items()}
        assert {one.id: (one.is_active, frozenset(one.roles)) for one in authority.signers.values()} == listed
        assert authority.policy.signatures == strict
        assert {name: route.stable for name, route in standing.routes().items()} == aliases


def served(store: Store, *held: str) -> Any:
    """What an endpoint that starts now would answer with: table, keys, and the bytes of each version's files. `held`: id and
    head of the store in its deployment."""
    watcher, tail = StoreWatcher(store, *held), KeyTail(store, *held)
    watcher.refresh()
    table = read_table(DeployConfig(name="d", models=("support@prod",)), watcher, {})
    files = {}
    for version in table.versions:
        record, folder = fetch_version(store, version)
        files[version] = (
            {path.name: path.read_bytes() for path in sorted(folder.iterdir()) if path.name != MANIFEST},
            record.identity(),
        )
    return table.routes, sorted(table.versions), files, tail.refresh(), watcher.archived()


@pytest.mark.slow
@pytest.mark.parametrize("count", [600, pytest.param(10_000, marks=pytest.mark.large)])
def test_any_change_of_a_finished_store_is_harmless_or_refused_and_named(tmp_path: Path, count: int) -> None:
    """Of every file, in every way: an endpoint serves what it served, or refuses; what it refuses, verification names."""
    store = Store(str(tmp_path / "store"))
    with Catalog.open(store) as catalog:
        people = add_people(catalog, tmp_path / "keys")
        allow(catalog, people, roles=True, signatures=True, protected=["*@prod"], independent_validation=True)
        version = finished(catalog, people)
        held = catalog.authority().genesis, catalog.standing.reader.head
    genuine, rng = served(store, *held), random.Random(0)
    files = [path for path in sorted(Path(store.root).rglob("*")) if path.is_file() and path.name != ".lock"]
    outcomes = {"harmless": 0, "refused": 0}
    for number in range(count):
        path = rng.choice(files)
        content = path.read_bytes()
        how = rng.choice(["flip", "cut", "empty", "remove", "swap", "repeat"])
        change(path, content, how, rng, files)
        try:
            assert served(store, *held) == genuine, (number, path, how)
            outcomes["harmless"] += 1
        except ForgeError:
            outcomes["refused"] += 1
            assert is_named(store, version, held[1]), (number, path, how)
        path.write_bytes(content)
    assert min(outcomes.values()) > count // 20


def change(path: Path, content: bytes, how: str, rng: random.Random, files: list[Path]) -> None:
    match how:
        case "flip":
            raw = bytearray(content)
            raw[rng.randrange(len(raw))] ^= 1 << rng.randrange(8)
            path.write_bytes(bytes(raw))
        case "cut":
            path.write_bytes(content[: rng.randrange(len(content))])
        case "empty":
            path.write_bytes(b"")
        case "remove":
            path.unlink()
        case "swap":
            path.write_bytes(rng.choice([one for one in files if one != path]).read_bytes())
        case _:
            path.write_bytes(content + content)


def is_named(store: Store, version: str, head: str) -> bool:
    """Whether `forge audit verify --head`, or `forge verify`, says that something is wrong."""
    try:
        pins.forget(store)
        with Catalog.read_only(store) as catalog:
            return bool(verify_log(store, False, head).problems) or any(
                one.problem for one in verify_record(catalog, version)
            )
    except ForgeError:
        return True


def finished(catalog: Catalog, people: dict[str, Any]) -> str:
    """A version under a protected alias, with files; keys, approvals, a second alias."""
    from forge_ray.serve import keys
    from forge_ray.store.files import hash_dir

    store = catalog.store
    with store.staged_dir("models/.new") as folder:
        (folder / "config.json").write_text("{}")
        (folder / "model.safetensors").write_bytes(b"weights of a model")
    files = hash_dir(store.local("models/.new"))
    version = trained(catalog, people, files=files)
    store.move_dir("models/.new", paths.model(version.id))
    for who, alias in (("rolf", "support@prod"), ("vera", "")):
        with signing.acting(people[who]):
            signers.approve(catalog, version.id, alias, False, "")
    with signing.acting(people["rosa"]):
        promotion.promote(catalog, version.id, "support@prod")
        catalog.append(alias_event("team@test", AliasRoute(versions={version.id: 1})))
        keys.create(catalog, "app", models=("*",))
    return version.id
