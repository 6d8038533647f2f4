"""Rights to erase: every right that an erasure needs is checked before anything is written."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from fabricated import dataset, deployment, record_of, run, store_at, version

from forge_ray.config.data import Splits
from forge_ray.config.release import AliasRoute
from forge_ray.data.dataset.version import split_of
from forge_ray.errors import PolicyError
from forge_ray.governance import signers
from forge_ray.governance.erasure import purging
from forge_ray.governance.erasure.apply import erase
from forge_ray.governance.erasure.certificate import path_of
from forge_ray.governance.erasure.options import Options
from forge_ray.governance.erasure.routes import move
from forge_ray.governance.erasure.search import ErasureRequest
from forge_ray.records import Erasure
from forge_ray.release import promotion
from forge_ray.store import signing
from forge_ray.store.catalog import Catalog
from forge_ray.store.files import Store

pytestmark = pytest.mark.unit
PEOPLE = {
    "olga": ("owner",),
    "sam": ("data_steward",),
    "tina": ("trainer",),
    "rosa": ("releaser",),
    "edda": ("data_steward", "trainer", "releaser"),
}
TRAINED = [n for n in range(30) if split_of(bytes.fromhex(record_of(n).id[4:]), Splits()) == 0]
HERS = record_of(TRAINED[0]).id


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return store_at(tmp_path / "store")


@pytest.fixture
def keys(store: Store, tmp_path: Path) -> dict[str, Any]:
    """Name → private key, under a policy with roles."""
    loaded: dict[str, Any] = {}
    with Catalog.open(store) as catalog:
        for name, roles in PEOPLE.items():
            with signing.acting(loaded.get("olga")):
                signers.create(catalog, name, roles, tmp_path / "keys", "ed25519")
            loaded[name] = signing.load_private(tmp_path / "keys" / f"{name}.key")
        with signing.acting(loaded["olga"]):
            signers.set_policy(catalog, {"roles": True}, "")
    return loaded


def fallback_and_alias(store: Store, key: Any) -> tuple[str, str]:
    """A base, and an adapter of it that was trained on her row; the alias falls back to the base."""
    with Catalog.open(store) as catalog, signing.acting(key):
        data = dataset(catalog, [record_of(n) for n in TRAINED])
        base = version(catalog, "base")
        first_run = run(catalog, "one", data.id, base.id, export_kind="adapter")
        tuned = version(catalog, "tuned", first_run.id, base.id, weights="adapter")
        promotion.set_route(catalog, "letters", AliasRoute(versions={tuned.id: 1.0}, fallback="base"))
        deployment(catalog, "endpoint", tuned.id)
    return base.id, tuned.id


def everything(store: Store) -> list[str]:
    return [path for folder in ("records", "events", "erasures") for path in store.list(folder, recursive=True)]


def test_erase_requires_all_rights_before_it_starts(store: Store, keys: dict[str, Any]) -> None:
    _, tuned = fallback_and_alias(store, keys["edda"])
    request = ErasureRequest("record", (HERS,))
    before = everything(store)
    for who, missing in {
        "sam": ("alias events, deployment events are written by releaser", "runs, run events are written by trainer"),
        "tina": ("erasures, erasure events, datasets are written by data_steward",),
    }.items():
        with signing.acting(keys[who]), pytest.raises(PolicyError) as refused:
            erase(store, request, Options())
        assert all(part in refused.value.message for part in missing)
        assert refused.value.hint == "who could: edda (`forge signers list`)"
    assert everything(store) == before
    with pytest.raises(PolicyError, match="names no key"):
        erase(store, request, Options())
    with signing.acting(keys["edda"]):
        done = erase(store, request, Options(retrain="none"))
    assert store.exists(path_of(done["predicate"]["erasure"]))
    with Catalog.open(store) as catalog:
        assert tuned in catalog.withdrawn()
        (event,) = [
            event for event in catalog.events("erasure", done["predicate"]["erasure"]) if event.data["state"] == "finished"
        ]
        assert event.key == signing.key_id(keys["edda"].public_key())


def test_resume_requires_same_roles(store: Store, keys: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    fallback_and_alias(store, keys["edda"])
    request, options = ErasureRequest("record", (HERS,)), Options(retrain="none")
    purge = purging.purge
    monkeypatch.setattr(purging, "purge", _stopped)
    with signing.acting(keys["edda"]), pytest.raises(InterruptedError):
        erase(store, request, options)
    monkeypatch.setattr(purging, "purge", purge)
    with (
        signing.acting(keys["sam"]),
        pytest.raises(PolicyError, match="alias events, deployment events are written by releaser"),
    ):
        erase(store, request, options)
    with signing.acting(keys["edda"]):
        assert erase(store, request, options)["predicate"]["versions"]


def _stopped(*_: Any) -> None:
    raise InterruptedError


def test_protected_alias_is_archived_and_waits_for_two_releasers(store: Store, keys: dict[str, Any]) -> None:
    base, tuned = fallback_and_alias(store, keys["edda"])
    with Catalog.open(store) as catalog:
        with signing.acting(keys["olga"]):
            signers.set_policy(catalog, {"roles": True, "protected": ["letters"]}, "")
        with signing.acting(keys["edda"]):
            replacement = version(catalog, "again", "run_two", base, weights="adapter").id
    with signing.acting(keys["edda"]):
        done = erase(store, ErasureRequest("record", (HERS,)), Options(retrain="none"))
        with Catalog.open(store) as catalog:
            assert "letters" not in catalog.routes()  # its base, to which it would fall back, has no two releasers either
            record = catalog.get_as(Erasure, done["predicate"]["erasure"])
            was = {"letters": AliasRoute(versions={tuned: 1.0}).model_dump(mode="json") | {"versions": [(tuned, 1.0)]}}
            moved = move(catalog, record, was, {tuned: replacement})
        assert moved["aliases"] == {}
        assert f"{replacement}: policy.protected: 'letters' is moved by two releasers" in moved["waiting"]["letters"]
    with Catalog.open(store) as catalog, signing.acting(keys["rosa"]):
        signers.approve(catalog, replacement, "letters", False, "")
    with Catalog.open(store) as catalog, signing.acting(keys["edda"]):
        assert move(catalog, record, was, {tuned: replacement}) == {
            "aliases": {"letters": [replacement]},
            "waiting": {},
        }
