"""`forge catalog upgrade`: a store whose signers are from an earlier version works on, once an owner has vouched for it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from signed_store import add_people, model, trained

from forge_ray.cli.main import cli
from forge_ray.config.release import AliasRoute
from forge_ray.errors import NotFound, PolicyError
from forge_ray.governance import upgrade
from forge_ray.records import Event
from forge_ray.release import promotion
from forge_ray.serve import keys as api_keys
from forge_ray.serve.watcher import StoreWatcher
from forge_ray.store import log_reader, paths, signing
from forge_ray.store.aliases import alias_event
from forge_ray.store.catalog import Catalog, write_event
from forge_ray.store.files import Store
from forge_ray.store.signatures import sign_record

pytestmark = pytest.mark.unit
ALIAS = "support@prod"


@pytest.fixture
def older(catalog: Catalog, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Store, dict[str, Any], str]:
    """A strict store as an earlier version left it: lines without a format, approvals without a digest, an unsigned API key,
    a second signature without a line."""
    with monkeypatch.context() as patch:
        patch.setattr("forge_ray.store.audit_log.FORMAT", 1)
        patch.setattr("forge_ray.store.catalog.Catalog.check_may", lambda *_: None)
        people = add_people(catalog, tmp_path / "keys")
        version = trained(catalog, people)
        with signing.acting(people["olga"]):
            catalog.append(Event(kind="policy", subject="policy", data={"signatures": True, "protected": ["*@prod"]}))
        for who, data in (("rolf", {"alias": ALIAS}), ("vera", {"alias": ""})):
            with signing.acting(people[who]):
                data |= {"decision": "approve", "why": ""}
                write_event(catalog.store, Event(kind="approval", subject=version.id, data=data))
        with signing.acting(people["rosa"]):
            write_event(catalog.store, alias_event(ALIAS, AliasRoute(versions={version.id: 1})))
        data = {"action": "created", "name": "app", "sha256": "0" * 64, "models": ["*"], "scopes": ["chat"]}
        write_event(catalog.store, Event(kind="key", subject="fk_000000000000", data=data))
        unsigned = catalog.put(model("unsigned", status="accepted"))
        content = catalog.store.read(paths.record("models", unsigned.id))
        sign_record(catalog.store, unsigned, content, people["vera"])
    return catalog.store, people, version.id


def followed(store: Store) -> dict[str, AliasRoute]:
    watcher = StoreWatcher(store)
    watcher.refresh()
    return watcher.routes()


def test_nothing_is_written_until_an_owner_has_vouched(older: tuple[Store, dict[str, Any], str]) -> None:
    store, people, version = older
    with Catalog.open(store) as catalog:
        assert catalog.standing.needs_upgrade
        assert followed(store) == {}
        with signing.acting(people["rosa"]), pytest.raises(PolicyError, match="from before the log decided") as refused:
            promotion.promote(catalog, version, "team@test")
        assert "`forge catalog upgrade`" in refused.value.hint
        with signing.acting(people["rosa"]), pytest.raises(PolicyError, match="signed by an owner"):
            upgrade.apply(catalog, upgrade.plan(catalog), (), "")


def test_what_an_owner_signs_counts_where_it_stands(older: tuple[Store, dict[str, Any], str]) -> None:
    store, people, version = older
    with Catalog.open(store) as catalog, signing.acting(people["olga"]):
        listed = upgrade.plan(catalog)
        assert [(one.what, one.by) for one in listed] == [
            ("approval.approve", "rolf"),
            ("approval.approve", "vera"),
            ("alias.set", "rosa"),
            ("key.created", "nobody"),
            ("signature", "vera"),
        ]
        with pytest.raises(NotFound, match="no such line"):
            upgrade.apply(catalog, listed, [99], "")
        upgrade.apply(catalog, listed, (), "new version")
        assert catalog.aliases() == {ALIAS: version}
        assert [key.name for key in api_keys.list_keys(catalog)] == ["app"]
        assert upgrade.plan(catalog) == []
    assert followed(store)[ALIAS].stable == version
    with Catalog.open(store) as catalog, signing.acting(people["rosa"]):
        promotion.promote(catalog, version, "team@test")
        other = next(one for one in catalog.all(type(catalog.get(version))) if one.name == "unsigned")  # type: ignore[attr-defined]
        promotion.promote(catalog, other.id, "other@test")


def test_an_upgrade_counts_once_and_for_lines_of_the_old_format(
    older: tuple[Store, dict[str, Any], str], monkeypatch: pytest.MonkeyPatch
) -> None:
    store, people, version = older
    with Catalog.open(store) as catalog:
        with signing.acting(people["olga"]):
            key_line = next(one.line for one in upgrade.plan(catalog) if one.what == "key.created")
            upgrade.apply(catalog, upgrade.plan(catalog), [key_line], "")
        assert api_keys.list_keys(catalog) == []
        other = next(one for one in catalog.standing.files.values() if one.path.startswith("records/models/"))
        with signing.acting(people["rosa"]):
            forged = write_event(store, alias_event(ALIAS, AliasRoute(versions={other.subject: 1})))
        catalog.sync()
        digest = log_reader.hash_of(forged.stored())
        with signing.acting(people["olga"]):
            catalog.append(Event(kind="upgrade", subject="store", data={"events": [digest]}))
        assert catalog.aliases() == {ALIAS: version}
        assert "needed none" in " ".join(catalog.standing.all_ignored().values())


def test_the_command_shows_the_list_and_signs_it(
    older: tuple[Store, dict[str, Any], str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    store, _, version = older
    monkeypatch.setenv(signing.SIGNER, str(tmp_path / "keys/olga.key"))

    def forge(*words: str) -> Any:
        outcome = CliRunner().invoke(cli, [*words, "--store", store.uri, "--json"])
        assert outcome.exit_code == 0, outcome.output
        return json.loads(outcome.stdout)

    shown_list = forge("catalog", "upgrade")
    assert (shown_list["needed"], shown_list["signed"], len(shown_list["listed"])) == (True, False, 5)
    assert forge("catalog", "show")["needs_upgrade"]
    assert forge("catalog", "upgrade", "--yes")["signed"]
    assert list(forge("alias", "list")[ALIAS]["versions"]) == [version]
    assert forge("catalog", "upgrade", "--yes") | {"status": ""} == {
        "needed": False,
        "signed": False,
        "listed": [],
        "status": "",
    }


def test_a_store_without_signers_needs_no_upgrade(catalog: Catalog, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr("forge_ray.store.audit_log.FORMAT", 1)
        version = catalog.put(model("m"))
        promotion.promote(catalog, version.id, "prod")
    assert not catalog.standing.needs_upgrade
    promotion.promote(catalog, version.id, "other")
    assert set(followed(catalog.store)) == {"prod", "other"}
