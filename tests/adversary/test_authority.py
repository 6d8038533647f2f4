"""Against somebody who can write every file of the store, with no key, an old key, or one releaser's key.

Commands (`Catalog`) and endpoints (`StoreWatcher`, `KeyTail`) are asked side by side: they follow the same facts.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from rechained import rechained
from signed_store import PEOPLE, add_people, allow, model, trained

from forge_ray.config.release import AliasRoute, DeployConfig, Rule
from forge_ray.errors import ConfigError, ForgeError, PolicyError, StoreError
from forge_ray.governance import signers
from forge_ray.governance.verify import verify_log, verify_record
from forge_ray.records import Event, ModelVersion, canonical_json
from forge_ray.release import promotion
from forge_ray.serve import keys as api_keys
from forge_ray.serve.coordinator import read_table
from forge_ray.serve.keys import KeyTail
from forge_ray.serve.watcher import StoreWatcher
from forge_ray.store import audit_log, paths, pins, signing
from forge_ray.store.aliases import alias_event
from forge_ray.store.catalog import Catalog, event_path, write_event
from forge_ray.store.files import Store
from forge_ray.store.signatures import record_path, signed_event

pytestmark = pytest.mark.unit
ALIAS = "support@prod"


@pytest.fixture
def people(catalog: Catalog, tmp_path: Path) -> dict[str, Any]:
    return add_people(catalog, tmp_path / "keys")


@pytest.fixture
def strict(catalog: Catalog, people: dict[str, Any]) -> dict[str, ModelVersion]:
    """Everything switched on; `prod` answers under ALIAS by two people's hands, `other` is signed and approved by nobody."""
    prod = trained(catalog, people)
    other = trained(catalog, people, name="other")
    allow(catalog, people, roles=True, signatures=True, protected=["*@prod"], independent_validation=True)
    with signing.acting(people["rolf"]):
        signers.approve(catalog, prod.id, ALIAS, False, "")
    with signing.acting(people["vera"]):
        signers.approve(catalog, prod.id, "", False, "")
    with signing.acting(people["rosa"]):
        promotion.promote(catalog, prod.id, ALIAS)
    return {"prod": prod, "other": other}


def routes(store: Store) -> list[dict[str, AliasRoute]]:
    """What a new command and a new endpoint follow."""
    watcher = StoreWatcher(store)
    watcher.refresh()
    with Catalog.read_only(store) as catalog:
        return [catalog.routes(), watcher.routes()]


def owner_event(at: str, key: Any, **more: Any) -> Event:
    data = {"action": "added", "name": "mallory", "roles": ["owner", "releaser"], "public_key": pem(key)} | more
    return Event(at=at, kind="signer", subject=signing.key_id(key.public_key()), data=data)


def pem(key: Any) -> str:
    return signing.public_pem(key.public_key())


def lay(store: Store, event: Event) -> None:
    """A file in events/, and nothing else."""
    store.write(event_path(event), event.stored())


DATES = ("2001-01-01T00:00:00.000+00:00", "9999-12-31T23:59:59.999+00:00", "no date", "")


@pytest.mark.parametrize("at", DATES)
@pytest.mark.parametrize("with_line", [False, True], ids=["file", "line"])
def test_no_date_makes_a_stranger_an_owner(
    catalog: Catalog, people: dict[str, Any], strict: dict[str, ModelVersion], at: str, with_line: bool
) -> None:
    running = StoreWatcher(catalog.store)
    running.refresh()
    mallory = signing.generate()
    with signing.acting(mallory):
        for event in (
            owner_event(at, mallory),
            Event(at=at, kind="policy", subject="policy", data={}),
            alias_event(ALIAS, AliasRoute(versions={strict["other"].id: 1})).model_copy(update={"at": at}),
        ):
            if with_line:
                signed = signed_event(event)
                audit_log.publish(catalog.store, event_path(signed), signed.stored(), f"{event.kind}.set", event.subject)
            else:
                lay(catalog.store, signed_event(event))
    running.refresh()
    assert running.routes()[ALIAS].stable == strict["prod"].id
    assert all(facts[ALIAS].stable == strict["prod"].id for facts in routes(catalog.store))
    with Catalog.read_only(catalog.store) as anew:
        assert {signer.name for signer in anew.authority().signers.values()} == set(PEOPLE)
        report = verify_log(anew.store, every_signature=False)
        assert report.problems  # a line of a stranger, or a file without a line, is named
        if with_line:
            assert len(anew.standing.all_ignored()) == 3


@pytest.mark.parametrize("how", ["retired", "revoked"])
def test_a_former_key_signs_nothing_more_however_it_is_dated(
    catalog: Catalog, people: dict[str, Any], strict: dict[str, ModelVersion], how: str
) -> None:
    with signing.acting(people["olga"]):
        signers.create(catalog, "otto", ("owner", "releaser", "trainer"), Path(catalog.store.root).parent / "k", "ed25519")
    otto = signing.load_private(Path(catalog.store.root).parent / "k/otto.key")
    before = catalog.standing.reader.number
    with signing.acting(people["olga"]):
        signers.end(catalog, "otto", compromised=how == "revoked", why="")
    ended = catalog.events("signer", "")  # none: signers are no events that a catalogue lists
    assert ended == []
    mallory = signing.generate()
    early = "2026-01-01T00:00:00.000+00:00"
    with signing.acting(otto):
        write_event(catalog.store, owner_event(early, mallory))
        write_event(catalog.store, Event(at=early, kind="policy", subject="policy", data={"roles": False}))
        forged = alias_event("team@test", AliasRoute(versions={strict["other"].id: 1})).model_copy(update={"at": early})
        write_event(catalog.store, forged)
        late = model("late").model_copy(update={"created_at": early}).sealed()
        audit_log.publish(
            catalog.store, record_path(late), canonical_json(late.model_dump(mode="json")), "models.put", late.id
        )
    catalog.sync()
    assert "mallory" not in {signer.name for signer in catalog.authority().signers.values()}
    assert catalog.authority().policy.roles
    assert all("team@test" not in facts for facts in routes(catalog.store))
    with pytest.raises(PolicyError, match="no valid signature"), signing.acting(people["rosa"]):
        promotion.promote(catalog, late.id, "team@test")
    problems = verify_log(catalog.store, every_signature=True).problems
    assert len(problems) == 4
    assert all(f"otto, whose signature counts from line {before}" in problem for problem in problems)


def test_an_honest_revocation_is_no_forgery_and_strands_no_alias(
    catalog: Catalog, people: dict[str, Any], strict: dict[str, ModelVersion]
) -> None:
    with signing.acting(people["olga"]):
        signers.end(catalog, "rosa", compromised=True, why="laptop lost")
    assert verify_log(catalog.store, every_signature=True).problems == ()
    assert all(facts[ALIAS].stable == strict["prod"].id for facts in routes(catalog.store))


def test_a_revocation_reaches_back_to_the_line_that_it_names(
    catalog: Catalog, people: dict[str, Any], strict: dict[str, ModelVersion]
) -> None:
    stolen_after = catalog.standing.reader.number
    with signing.acting(people["rosa"]):
        promotion.promote(catalog, strict["other"].id, "team@test")
        api_keys.create(catalog, "thief", models=("*",))
    tail = KeyTail(catalog.store)
    assert len(tail.refresh()) == 1
    with signing.acting(people["olga"]):
        signers.end(catalog, "rosa", compromised=True, why="stolen yesterday", since=stolen_after)
    assert all("team@test" not in facts and ALIAS in facts for facts in routes(catalog.store))
    assert tail.refresh() == {}
    assert api_keys.list_keys(catalog) == []


def test_what_a_stolen_owner_key_added_goes_with_it(catalog: Catalog, people: dict[str, Any], tmp_path: Path) -> None:
    with signing.acting(people["olga"]):
        signers.create(catalog, "otto", ("owner",), tmp_path, "ed25519")
    since = catalog.standing.reader.number
    with signing.acting(signing.load_private(tmp_path / "otto.key")):
        signers.create(catalog, "mallory", ("owner",), tmp_path, "ed25519")
        allow(catalog, people | {"olga": signing.load_private(tmp_path / "otto.key")}, roles=True)
    with (
        signing.acting(signing.load_private(tmp_path / "mallory.key")),
        pytest.raises(ConfigError, match="would void what made mallory a signer"),
    ):
        signers.end(catalog, "otto", compromised=True, why="", since=since)
    with signing.acting(people["olga"]):
        signers.end(catalog, "otto", compromised=True, why="", since=since)
    assert "mallory" not in {signer.name for signer in catalog.authority().signers.values()}
    assert not catalog.authority().policy.roles


MOVES = {
    "versions": lambda prod, other: {"versions": {other: 1}},
    "canary": lambda prod, other: {"versions": {prod: 99, other: 1}},
    "rule": lambda prod, other: {"versions": {prod: 1}, "rules": (Rule(to=other, prompt_tokens_from=1),)},
    "rule to the base": lambda prod, other: {"versions": {prod: 1}, "rules": (Rule(to="base", prompt_tokens_from=1),)},
    "classifier": lambda prod, other: {"versions": {prod: 1}, "rules": (Rule(to=prod, classifier=other, label="a"),)},
    "shadow": lambda prod, other: {"versions": {prod: 1}, "shadow": (other,)},
    "fallback": lambda prod, other: {"versions": {prod: 1}, "fallback": "base"},
    "archive": lambda prod, other: None,
}


@pytest.mark.parametrize("way", MOVES)
def test_one_releaser_moves_no_request_of_a_protected_alias(
    catalog: Catalog, people: dict[str, Any], strict: dict[str, ModelVersion], way: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By the command, which refuses, and by an event that she makes by hand, which nobody follows."""
    if way in ("rule to the base", "fallback"):  # an adapter, whose base nobody approved
        with signing.acting(people["tina"]):
            adapter = catalog.put(model("adapter", weights="adapter", base_model=strict["other"].id, status="accepted"))
        for who, alias in (("rolf", ALIAS), ("vera", "")):
            with signing.acting(people[who]):
                signers.approve(catalog, adapter.id, alias, False, "")
        strict |= {"prod": adapter}
        with signing.acting(people["rosa"]):
            promotion.promote(catalog, adapter.id, ALIAS)
    values = MOVES[way](strict["prod"].id, strict["other"].id)
    route = None if values is None else AliasRoute(**values)
    before = catalog.routes()[ALIAS]
    running = StoreWatcher(catalog.store)
    running.refresh()
    with signing.acting(people["rosa"]):
        with pytest.raises(PolicyError, match=r"policy\.protected") as refused:
            promotion.set_route(catalog, ALIAS, route)
        assert "by rolf" in refused.value.hint
        write_event(catalog.store, alias_event(ALIAS, route))
    running.refresh()
    catalog.sync()
    assert [facts[ALIAS] for facts in (catalog.routes(), running.routes(), *routes(catalog.store))] == [before] * 4
    assert any("policy.protected" in reason for reason in catalog.standing.all_ignored().values())


@pytest.mark.parametrize("state", ["archived", "active"])
def test_one_releaser_takes_no_version_out_of_use_or_back(
    catalog: Catalog, people: dict[str, Any], strict: dict[str, ModelVersion], state: str
) -> None:
    version, is_back = strict["prod"].id, state == "active"
    if is_back:
        with signing.acting(people["rolf"]):
            signers.approve(catalog, version, ALIAS, False, "", "archive")
        with signing.acting(people["rosa"]):
            promotion.archive(catalog, version)
        assert catalog.archived() == {version}
    with signing.acting(people["rosa"]):
        with pytest.raises(PolicyError, match=r"policy\.protected"):
            promotion.archive(catalog, version, restore=is_back)
        write_event(catalog.store, Event(kind="model", subject=version, data={"state": state}))
    catalog.sync()
    assert catalog.archived() == ({version} if is_back else set())
    watcher = StoreWatcher(catalog.store)
    watcher.refresh()
    assert watcher.archived() == catalog.archived()


def test_two_keys_of_one_person_are_one_person(
    catalog: Catalog, people: dict[str, Any], strict: dict[str, ModelVersion], tmp_path: Path
) -> None:
    with signing.acting(people["olga"]):
        signers.create(catalog, "rosa2", ("releaser",), tmp_path, "ed25519", person="rosa")
    with signing.acting(signing.load_private(tmp_path / "rosa2.key")):
        signers.approve(catalog, strict["other"].id, ALIAS, False, "")
    with signing.acting(people["rosa"]), pytest.raises(PolicyError, match=r"there is rosa\n"):
        promotion.promote(catalog, strict["other"].id, ALIAS)


@pytest.mark.parametrize("who", ["rolf", "vera", "sam"])
def test_a_no_counts_until_whoever_gave_it_says_yes(
    catalog: Catalog, people: dict[str, Any], strict: dict[str, ModelVersion], who: str
) -> None:
    other = strict["other"].id
    for name, alias in (("rolf", ALIAS), ("vera", "")):
        with signing.acting(people[name]):
            signers.approve(catalog, other, alias, False, "")
    with signing.acting(people[who]):
        signers.approve(catalog, other, "", True, "it insults clients")
    with signing.acting(people["rosa"]):
        with pytest.raises(PolicyError, match=f"{who} refused {other}"):
            promotion.promote(catalog, other, ALIAS)
        write_event(catalog.store, alias_event(ALIAS, AliasRoute(versions={other: 1})))
    assert all(facts[ALIAS].stable == strict["prod"].id for facts in routes(catalog.store))
    with signing.acting(people[who]):
        signers.approve(catalog, other, ALIAS if who == "rolf" else "", False, "it was repaired")
    with signing.acting(people["rosa"]):
        promotion.promote(catalog, other, ALIAS)
    assert catalog.aliases()[ALIAS] == other


def test_an_approval_names_the_digest_of_what_was_approved(
    catalog: Catalog, people: dict[str, Any], strict: dict[str, ModelVersion]
) -> None:
    """Two records of one 64-bit id cost 2^32 hashes: an approval of the id alone, or of another digest, counts for none."""
    for digest in ({}, {"digest": "0" * 64}):
        for who, alias in (("rolf", ALIAS), ("vera", "")):
            data = {"decision": "approve", "alias": alias, "why": "", **digest}
            with signing.acting(people[who]):
                write_event(catalog.store, Event(kind="approval", subject=strict["other"].id, data=data))
    catalog.sync()
    with signing.acting(people["rosa"]), pytest.raises(PolicyError, match="there is rosa"):
        promotion.promote(catalog, strict["other"].id, ALIAS)


def test_who_trained_is_known_by_the_log_not_by_files_beside_it(
    catalog: Catalog, people: dict[str, Any], tmp_path: Path
) -> None:
    with signing.acting(people["olga"]):
        signers.change(catalog, "tina", ("trainer", "validator"))
    version = trained(catalog, people)
    allow(catalog, people, protected=["*@prod"], independent_validation=True)
    catalog.store.delete_dir(paths.signatures(version.run))
    for who, alias in (("rolf", ALIAS), ("tina", "")):
        with signing.acting(people[who]):
            signers.approve(catalog, version.id, alias, False, "")
    with signing.acting(people["rosa"]), pytest.raises(PolicyError, match="independent_validation"):
        promotion.promote(catalog, version.id, ALIAS)


@pytest.mark.parametrize("who", ["sam", "rosa", "olga", "auditor"])
def test_only_a_role_that_may_write_a_record_signs_it(
    catalog: Catalog, people: dict[str, Any], who: str, tmp_path: Path
) -> None:
    with signing.acting(people["olga"]):
        signers.create(catalog, "auditor", ("auditor",), tmp_path, "ed25519")
        unsigned = catalog.store and model("unsigned", status="accepted")
    unsigned = catalog.put(unsigned)
    with catalog.store.staged_dir(paths.model(unsigned.id)):
        pass
    key = signing.load_private(tmp_path / "auditor.key") if who == "auditor" else people[who]
    with signing.acting(key), pytest.raises(PolicyError, match="counts from trainer or validator"):
        signers.sign(catalog, unsigned.id)
    allow(catalog, people, signatures=True)
    with signing.acting(key):
        from forge_ray.store.signatures import add_signature

        add_signature(catalog.store, unsigned, catalog.store.read(record_path(unsigned)), key)
    catalog.sync()
    with signing.acting(people["rosa"]), pytest.raises(PolicyError, match="no valid signature"):
        promotion.promote(catalog, unsigned.id, "team@test")
    with signing.acting(people["vera"]):
        signers.sign(catalog, unsigned.id)
    with signing.acting(people["rosa"]):
        promotion.promote(catalog, unsigned.id, "team@test")


def test_an_endpoint_takes_no_key_or_archiving_that_nobody_signed(
    catalog: Catalog, people: dict[str, Any], strict: dict[str, ModelVersion]
) -> None:
    data = {"action": "created", "name": "thief", "sha256": "0" * 64, "models": ["*"], "scopes": ["chat", "admin"]}
    key = Event(kind="key", subject="fk_000000000000", data=data)
    lay(catalog.store, key)
    write_event(catalog.store, key.model_copy(update={"at": "2026-01-01T00:00:00.000+00:00"}))
    write_event(catalog.store, Event(kind="model", subject=strict["prod"].id, data={"state": "archived"}))
    watcher, tail = StoreWatcher(catalog.store), KeyTail(catalog.store)
    watcher.refresh()
    assert tail.refresh() == {}
    assert watcher.archived() == set()
    with pytest.raises(PolicyError, match=r"policy\.roles: key events are written by releaser or owner"):
        api_keys.create(catalog, "unsigned", models=("*",))


def test_a_revocation_counts_at_once_whatever_the_clocks_say(catalog: Catalog) -> None:
    key, text = api_keys.create(catalog, "app", models=("*",))
    tail = KeyTail(catalog.store)
    assert tail.refresh()
    ahead = Event(at="9999-01-01T00:00:00.000+00:00", kind="key", subject=key.id, data={"action": "changed", "rpm": 3})
    write_event(catalog.store, ahead)
    catalog.sync()
    api_keys.revoke(catalog, "app")
    for keys in (tail.refresh(), api_keys.keys_of(catalog)):
        assert "was revoked" in keys[api_keys.sha256_of(text)].refusal(datetime.now(UTC))


BROKEN = {
    "no JSON": b"{",
    "an alias without content": canonical_json({"kind": "alias", "subject": "a", "data": {}}),
    "a key without content": canonical_json({"kind": "key", "subject": "fk_1", "data": {}}),
    "a signer of 2001": canonical_json({"at": DATES[0], "kind": "signer", "subject": "x", "data": {}}),
    "a kind of tomorrow": canonical_json({"kind": "tomorrow", "subject": "x", "data": {}}),
    "deep": b'{"kind":"alias","subject":"a","data":' + b"[" * 900 + b"]" * 900 + b"}",
}


@pytest.mark.parametrize("what", BROKEN)
@pytest.mark.parametrize("with_line", [False, True], ids=["file", "line"])
def test_a_broken_event_costs_itself_and_hides_nothing_behind_it(catalog: Catalog, what: str, with_line: bool) -> None:
    _, text = api_keys.create(catalog, "app", models=("*",))
    tail, watcher = KeyTail(catalog.store), StoreWatcher(catalog.store)
    tail.refresh(), watcher.refresh()
    if with_line and what != "no JSON":
        kind = json.loads(BROKEN[what])["kind"]
        audit_log.publish(catalog.store, f"events/x~evt_{what}.json", BROKEN[what], f"{kind}.set", "fk_1")
    else:
        catalog.store.write("events/2001~evt_0123456789abcdef.json", BROKEN[what])
    version = catalog.put(model("later"))
    promotion.promote(catalog, version.id, "later")
    api_keys.revoke(catalog, "app")
    watcher.refresh()
    assert watcher.routes()["later"].stable == version.id
    assert tail.refresh()[api_keys.sha256_of(text)].revoked_at
    with Catalog.read_only(catalog.store) as anew:
        assert anew.aliases() == {"later": version.id}
        assert api_keys.list_keys(anew)[0].revoked_at
        report = verify_log(anew.store, every_signature=False)
        assert report.problems or report.ignored


def test_bytes_behind_the_head_are_set_aside_by_the_next_writer(catalog: Catalog) -> None:
    first = catalog.put(model("first"))
    watcher = StoreWatcher(catalog.store)
    watcher.refresh()
    with open(catalog.store.path(audit_log.LOG), "ab") as stream:
        stream.write(b"no line\n{}\n")
    with pytest.raises(StoreError, match="line 2 is no line of a log"):
        watcher.refresh()
    with pytest.raises(StoreError, match="line 2"):
        Catalog.read_only(catalog.store)
    promotion.promote(catalog, first.id, "prod")
    watcher.refresh()
    assert watcher.routes()["prod"].stable == first.id
    assert catalog.store.list("audit/refused")
    assert verify_log(catalog.store, every_signature=False).problems == ()


def test_a_read_error_loses_nothing(catalog: Catalog, monkeypatch: pytest.MonkeyPatch) -> None:
    """The kind of failure that a network file system has, at each line of a remote log."""
    _, text = api_keys.create(catalog, "app", models=("*",))
    tail = KeyTail(catalog.store)
    tail.refresh()
    api_keys.revoke(catalog, "app")
    from forge_ray.store import log_reader

    def failing(self: Any) -> Iterator[bytes]:
        raise StoreError("the disk does not answer")
        yield b""

    with monkeypatch.context() as patch:
        patch.setattr(log_reader.LogReader, "_appended", failing)
        with pytest.raises(StoreError):
            tail.refresh()
    assert tail.refresh()[api_keys.sha256_of(text)].revoked_at


def test_a_changed_record_is_served_under_no_id(
    catalog: Catalog, people: dict[str, Any], strict: dict[str, ModelVersion]
) -> None:
    config = DeployConfig(name="d", models=(ALIAS,))
    prod, other = strict["prod"], strict["other"]
    for content in (
        prod.model_copy(update={"files_digest": "sha256:" + "0" * 64}).model_dump(mode="json"),
        other.model_dump(mode="json"),
        other.model_copy(update={"id": prod.id}).model_dump(mode="json"),
    ):
        catalog.store.write(record_path(prod), canonical_json(content))
        watcher = StoreWatcher(catalog.store)
        watcher.refresh()
        table = read_table(config, watcher, {})
        assert table.versions[prod.id].digest == prod.files_digest  # as the log holds it
        from forge_ray.serve.engines import fetch_version

        with pytest.raises(ForgeError):
            fetch_version(catalog.store, prod.id)
        with Catalog.read_only(catalog.store) as anew:
            assert anew.get(prod.id).identity() == prod.identity()
            assert next(one for one in verify_record(anew, prod.id) if one.id == prod.id).problem


def test_a_rejected_version_does_not_become_accepted_by_a_file(catalog: Catalog) -> None:
    rejected = catalog.put(model("bad", status="rejected", reasons=("too bad",)))
    content = rejected.model_copy(update={"status": "accepted"}).model_dump(mode="json")
    catalog.store.write(record_path(rejected), canonical_json(content))
    with Catalog.open(catalog.store) as anew, pytest.raises(PolicyError, match="was rejected"):
        promotion.promote(anew, rejected.id, "prod")
    audit_log.publish(catalog.store, "records/models/mv_hostile.json", b"[1]", "models.put", "mv_hostile")
    with Catalog.read_only(catalog.store) as anew:  # one hostile record costs itself
        assert [version.id for version in anew.all(ModelVersion)] == [rejected.id]
        assert "mv_hostile" in anew.unreadable


@pytest.mark.parametrize("lines_left", [3, 9])
def test_a_running_endpoint_keeps_what_it_read_of_a_log_that_is_cut(
    catalog: Catalog, people: dict[str, Any], strict: dict[str, ModelVersion], lines_left: int
) -> None:
    running = StoreWatcher(catalog.store)
    running.refresh()
    lines = audit_log.lines(catalog.store)[:lines_left]
    catalog.store.write(audit_log.LOG, b"".join(line + b"\n" for line in lines))
    catalog.store.write(audit_log.HEAD, lines[-1])
    with pytest.raises(StoreError, match="was cut or rewritten"):
        running.refresh()
    assert running.routes()[ALIAS].stable == strict["prod"].id
    with pytest.raises(PolicyError, match="was cut, rewritten or put back"):  # what this machine holds
        Catalog.read_only(catalog.store)


def test_another_store_in_its_place_is_refused_by_name(
    catalog: Catalog, people: dict[str, Any], strict: dict[str, ModelVersion], monkeypatch: pytest.MonkeyPatch
) -> None:
    genesis, head = catalog.authority().genesis, catalog.standing.reader.head
    mallory = signing.generate()
    for path in ("audit", "events", "signatures", "records"):
        catalog.store.delete_dir(path)
    with signing.acting(mallory):
        write_event(catalog.store, owner_event("2026-01-01T00:00:00.000+00:00", mallory))
    with pytest.raises(PolicyError, match="is not the store that") as refused:
        Catalog.read_only(catalog.store)
    assert genesis in refused.value.message
    with pytest.raises(PolicyError, match="the deployment holds"):
        StoreWatcher(catalog.store, genesis, head).refresh()
    with pytest.raises(PolicyError, match="the deployment holds"):
        KeyTail(catalog.store, genesis, head).refresh()
    assert pins.forget(catalog.store)
    Catalog.read_only(catalog.store)
    monkeypatch.setenv(pins.STORE_ID, genesis)
    with pytest.raises(PolicyError, match="FORGE_STORE_ID holds"):
        Catalog.read_only(catalog.store)


def test_events_keep_their_order_only_in_the_log_that_was_signed(
    catalog: Catalog, people: dict[str, Any], strict: dict[str, ModelVersion]
) -> None:
    """Lines moved, left out or repeated, with hashes made anew: nothing that somebody signed counts at another place."""
    genuine = audit_log.read(catalog.store)
    rng = random.Random(0)
    for _ in range(20):
        lines = list(genuine)
        place = rng.randrange(1, len(lines) - 1)
        match rng.choice(["move", "drop", "repeat"]):
            case "move":
                lines.insert(rng.randrange(1, len(lines)), lines.pop(place))
            case "drop":
                del lines[place]
            case _:
                lines.append(lines[place])
        rechained(catalog.store, lines)
        pins.forget(catalog.store)
        for facts in routes(catalog.store):
            assert facts.get(ALIAS, AliasRoute(versions={strict["prod"].id: 1})).versions == {strict["prod"].id: 1}
        with Catalog.read_only(catalog.store) as anew:
            names = {signer.name for signer in anew.authority().signers.values()}
            assert names <= set(PEOPLE)
