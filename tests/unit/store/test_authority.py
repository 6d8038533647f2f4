"""Roles, the two-person rule, signatures: who is refused, by which rule, and who could."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from signed_store import PEOPLE, add_people, allow, model, trained

from forge_ray.errors import ConfigError, NotFound, PolicyError
from forge_ray.governance import signers
from forge_ray.governance.verify import verify_record
from forge_ray.records import RECORD_TYPES, Event, canonical_json
from forge_ray.release import promotion
from forge_ray.serve.watcher import StoreWatcher
from forge_ray.store import signing
from forge_ray.store.authority import MAY, ROLES
from forge_ray.store.catalog import Catalog
from forge_ray.store.signatures import record_path, valid_signers

pytestmark = pytest.mark.unit


@pytest.fixture
def people(catalog: Catalog, tmp_path: Path) -> dict[str, Any]:
    """name → private key; all of them signers of the store."""
    return add_people(catalog, tmp_path / "keys")


def test_every_record_and_event_kind_has_roles() -> None:
    kinds = {record.kind for record in RECORD_TYPES} | {"imported models"}
    events = {f"{kind} events" for kind in Event.model_fields["kind"].annotation.__args__}  # type: ignore[union-attr]
    assert kinds | events <= set(MAY)
    assert {role for roles in MAY.values() for role in roles} <= set(ROLES)


def test_everything_is_allowed_without_signers_and_policy(catalog: Catalog) -> None:
    version = catalog.put(model("free"))
    promotion.promote(catalog, version.id, "prod")
    assert catalog.aliases() == {"prod": version.id}


def test_the_first_signer_is_an_owner_and_only_owners_add(catalog: Catalog, tmp_path: Path) -> None:
    with pytest.raises(PolicyError, match="the first signer must be an owner"):
        signers.create(catalog, "tina", ("trainer",), tmp_path, "ed25519")
    assert not (tmp_path / "tina.key").exists()
    signers.create(catalog, "olga", ("owner",), tmp_path, "ed25519")
    with pytest.raises(PolicyError, match="signer events are written by owner"):
        signers.create(catalog, "tina", ("trainer",), tmp_path, "ed25519")
    assert not (tmp_path / "tina.key").exists()
    with pytest.raises(PolicyError, match="only owner"), signing.acting(signing.load_private(tmp_path / "olga.key")):
        signers.end(catalog, "olga", compromised=False, why="")
    with pytest.raises(NotFound, match="no signer 'tina'"):
        signers.find(catalog, "tina")


def test_a_forged_signer_or_policy_event_changes_nothing(catalog: Catalog, people: dict[str, Any]) -> None:
    allow(catalog, people, roles=True)
    mallory = signing.generate()
    data = {"action": "added", "name": "mallory", "roles": ["owner"], "public_key": signing.public_pem(mallory.public_key())}
    from forge_ray.store.catalog import write_event

    with signing.acting(mallory):
        write_event(catalog.store, Event(kind="signer", subject=signing.key_id(mallory.public_key()), data=data))
        write_event(catalog.store, Event(kind="policy", subject="policy", data={"roles": False}))
    catalog.sync()
    assert "mallory" not in {signer.name for signer in catalog.authority().signers.values()}
    assert catalog.authority().policy.roles


@pytest.mark.parametrize(
    ("who", "may"),
    [("sam", "datasets"), ("tina", "runs"), ("vera", "evals"), ("rosa", "alias events"), ("olga", "policy events")],
)
def test_each_role_writes_only_its_kinds(catalog: Catalog, people: dict[str, Any], who: str, may: str) -> None:
    allow(catalog, people, roles=True)
    for what, roles in MAY.items():
        with signing.acting(people[who]):
            if set(PEOPLE[who]) & set(roles):
                catalog.check_may(what)
            else:
                with pytest.raises(PolicyError, match=f"{what} are written by"):
                    catalog.check_may(what)
    with pytest.raises(PolicyError, match="names no key"):
        catalog.check_may(may)


def test_a_refusal_names_the_rule_and_the_permitted_signers(catalog: Catalog, people: dict[str, Any]) -> None:
    allow(catalog, people, roles=True)
    version = trained(catalog, people)
    with signing.acting(people["tina"]), pytest.raises(PolicyError) as refused:
        promotion.promote(catalog, version.id, "prod")
    assert refused.value.message == "policy.roles: alias events are written by releaser; tina is trainer"
    assert refused.value.hint == "who could: rosa, rolf (`forge signers list`)"
    assert catalog.aliases() == {}
    with signing.acting(people["rosa"]):
        promotion.promote(catalog, version.id, "prod")
    assert catalog.aliases() == {"prod": version.id}


def test_a_protected_alias_needs_two_releasers_and_an_independent_validator(
    catalog: Catalog, people: dict[str, Any]
) -> None:
    allow(catalog, people, protected=["*@prod"], independent_validation=True)
    version = trained(catalog, people)
    with signing.acting(people["rosa"]):
        promotion.promote(catalog, version.id, "support@test")
        with pytest.raises(PolicyError, match=r"two releasers together; for mv_.* there is rosa") as refused:
            promotion.promote(catalog, version.id, "support@prod")
        assert "by rolf" in refused.value.hint
        signers.approve(catalog, version.id, "support@prod", False, "")  # her own yes is no second person's
        with pytest.raises(PolicyError, match="two releasers together"):
            promotion.promote(catalog, version.id, "support@prod")
    with signing.acting(people["rolf"]):
        signers.approve(catalog, version.id, "other@prod", False, "")  # of another move
    with signing.acting(people["rosa"]), pytest.raises(PolicyError, match="two releasers together"):
        promotion.promote(catalog, version.id, "support@prod")
    with signing.acting(people["rolf"]):
        signers.approve(catalog, version.id, "support@prod", False, "looks good")
    with signing.acting(people["rosa"]), pytest.raises(PolicyError, match=r"independent_validation.*no validator"):
        promotion.promote(catalog, version.id, "support@prod")
    with signing.acting(people["vera"]):
        signers.approve(catalog, version.id, "", False, "read 50 answers")
    with signing.acting(people["rosa"]):
        promotion.promote(catalog, version.id, "support@prod")
    assert catalog.aliases()["support@prod"] == version.id


def test_a_trainer_cannot_validate_the_own_version(catalog: Catalog, people: dict[str, Any]) -> None:
    allow(catalog, people, protected=["prod"], independent_validation=True)
    with signing.acting(people["olga"]):
        signers.change(catalog, "tina", ("trainer", "validator"))
    version = trained(catalog, people)
    for who in ("rolf", "tina"):
        with signing.acting(people[who]):
            signers.approve(catalog, version.id, "prod", False, "")
    with signing.acting(people["rosa"]), pytest.raises(PolicyError, match="who did not train") as refused:
        promotion.promote(catalog, version.id, "prod")
    assert "by vera" in refused.value.hint


def test_an_unsigned_version_or_report_is_neither_promoted_nor_deployed(catalog: Catalog, people: dict[str, Any]) -> None:
    from forge_ray.config.release import DeployConfig
    from forge_ray.serve.deploy import deployment_of

    unsigned = catalog.put(model("unsigned"))
    version = trained(catalog, people)
    allow(catalog, people, signatures=True)
    with signing.acting(people["rosa"]):
        promotion.promote(catalog, version.id, "prod")
        with pytest.raises(
            PolicyError, match=rf"no valid signature of a signer who may write models is on {unsigned.id}"
        ) as refused:
            promotion.promote(catalog, unsigned.id, "prod")
        assert refused.value.hint == f"`forge sign {unsigned.id}` by sam or tina"
        with pytest.raises(PolicyError, match="no valid signature"):
            deployment_of(DeployConfig(name="d", models=(unsigned.id,)), catalog)
        assert deployment_of(DeployConfig(name="d", models=("prod",)), catalog).model_version == version.id
    with signing.acting(people["olga"]):
        signers.end(catalog, "tina", compromised=True, why="laptop lost", since=0)
    with signing.acting(people["rosa"]), pytest.raises(PolicyError, match="no valid signature"):
        promotion.promote(catalog, version.id, "other")


def test_a_retired_signers_signatures_stay_valid_and_new_ones_are_rejected(catalog: Catalog, people: dict[str, Any]) -> None:
    version = trained(catalog, people)
    with signing.acting(people["olga"]):
        signers.end(catalog, "tina", compromised=False, why="left")
    allow(catalog, people, signatures=True)
    assert valid_signers(catalog.standing, version)
    with signing.acting(people["tina"]):
        later = catalog.put(model("later"))
    assert not valid_signers(catalog.standing, later)


def test_a_changed_record_does_not_verify(catalog: Catalog, people: dict[str, Any]) -> None:
    version = trained(catalog, people)
    with catalog.store.staged_dir(f"models/{version.id}"):
        pass  # a version of no files
    assert not next(one for one in verify_record(catalog, version.id) if one.id == version.id).problem
    path = record_path(version)
    changed = catalog.store.read_json(path) | {"reasons": ["none"]}
    catalog.store.write(path, canonical_json(changed))
    problems = {one.id: one.problem for one in verify_record(catalog, version.id)}
    assert problems[version.id] == "the record's content does not match its id: it was changed"
    changed = catalog.store.read_json(path) | {"reasons": [], "created_at": "2020-01-01T00:00:00.000+00:00"}
    catalog.store.write(path, canonical_json(changed))
    problems = {one.id: one.problem for one in verify_record(catalog, version.id)}
    assert problems[version.id] == "the signature of tina is not valid"


def test_an_endpoint_does_not_follow_a_forged_alias(catalog: Catalog, people: dict[str, Any]) -> None:
    """Somebody who can write into the store's files, and has no key."""
    from forge_ray.config.release import AliasRoute
    from forge_ray.store.aliases import alias_event

    good = trained(catalog, people)
    with signing.acting(people["tina"]):
        other = catalog.put(model("other"))
    allow(catalog, people, signatures=True)
    with signing.acting(people["rosa"]):
        promotion.promote(catalog, good.id, "prod")
        promotion.set_route(catalog, "prod", AliasRoute(versions={good.id: 95, other.id: 5}))
    published = StoreWatcher(catalog.store)
    published.refresh()
    assert set(published.routes()["prod"].versions) == {good.id, other.id}
    published.append(alias_event("prod", AliasRoute(versions={other.id: 1})))  # forged: it has no key
    published.refresh()
    assert published.routes()["prod"].stable == good.id
    published.append(alias_event("prod", AliasRoute(versions={good.id: 1.0}), "rolled back"))  # the endpoint's own
    published.refresh()
    assert dict(published.routes()["prod"].versions) == {good.id: 1.0}
    catalog.sync()
    assert catalog.aliases() == {"prod": good.id}


def test_invalid_requests_name_the_problem(catalog: Catalog, people: dict[str, Any], tmp_path: Path) -> None:
    with signing.acting(people["olga"]):
        with pytest.raises(ConfigError, match="role 'boss' is not one of"):
            signers.create(catalog, "bob", ("boss",), tmp_path, "ed25519")
        with pytest.raises(ConfigError, match="there is already a signer named 'rosa'"):
            signers.create(catalog, "rosa", ("trainer",), tmp_path, "ed25519")
        with pytest.raises(ConfigError, match=r"protected.*list|protected"):
            signers.set_policy(catalog, {"protected": 3}, "")
        with pytest.raises(PolicyError, match="olga is not a data steward"):
            signers.approve(catalog, trained(catalog, people).id, "", False, "")
    with pytest.raises(PolicyError, match="an approval needs a key"):
        signers.approve(catalog, "mv_x", "", False, "")
    with pytest.raises(PolicyError, match="no key to sign with"):
        signers.sign(catalog, "mv_x")


def test_a_signature_policy_is_refused_while_an_alias_move_is_unsigned(catalog: Catalog, people: dict[str, Any]) -> None:
    with signing.acting(people["tina"]):
        version = catalog.put(model("m"))
    promotion.promote(catalog, version.id, "prod")
    with (
        signing.acting(people["olga"]),
        pytest.raises(PolicyError, match="no releaser signed the current route of prod") as refused,
    ):
        signers.set_policy(catalog, {"signatures": True}, "")
    assert f"forge alias set prod --to {version.id}" in refused.value.hint
    assert not catalog.authority().policy.signatures
    with signing.acting(people["rosa"]):
        promotion.set_route(catalog, "prod", catalog.routes()["prod"])
    allow(catalog, people, signatures=True)
    assert catalog.aliases() == {"prod": version.id}


def test_missing_rights_are_reported_before_the_work(catalog: Catalog, people: dict[str, Any], tiny_model_dir: Path) -> None:
    from forge_ray.models.import_model import import_model

    allow(catalog, people, roles=True)
    with signing.acting(people["rosa"]), pytest.raises(PolicyError, match="imported models are written by"):
        import_model(catalog, tiny_model_dir, "tiny")
    assert not catalog.store.exists("models")
