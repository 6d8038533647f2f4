"""Rows are erased from a small store: planned, stopped half-way, finished, certified; and nothing holds them afterwards."""

from __future__ import annotations

import json
from pathlib import Path
from random import Random
from typing import Any

import pytest
from click.testing import CliRunner

from forge_ray import pipeline
from forge_ray.cli.main import cli
from forge_ray.config.base import parse
from forge_ray.config.run import RunConfig
from forge_ray.data.dataset import version as dataset
from forge_ray.data.dataset.compare import holders
from forge_ray.data.dataset.order import order_of
from forge_ray.data.dataset.stream import Rows
from forge_ray.data.dataset.version import read_records
from forge_ray.errors import NotFound, PolicyError
from forge_ray.governance import verify
from forge_ray.governance.erasure import purging
from forge_ray.governance.erasure.apply import erase
from forge_ray.governance.erasure.options import Options
from forge_ray.governance.erasure.search import ErasureRequest
from forge_ray.governance.trace import of_record, trace
from forge_ray.records import DatasetManifest, Deployment, Event, RunRecord
from forge_ray.release import promotion
from forge_ray.store import signing
from forge_ray.store.catalog import Catalog
from forge_ray.store.files import Store

pytestmark = [pytest.mark.e2e, pytest.mark.usefixtures("ray_cluster")]
SECRET = "the parcel for Wilhelmina Quartz never came"
ENGINE = {"precision": "fp32", "page_size": 16, "num_blocks": 64, "max_batch_tokens": 128}


def rows() -> list[dict[str, Any]]:
    """Ninety rows of thirty customers, and three of somebody who asks to be forgotten. Rules drop her third row
    as a near copy of her second, and one of another customer as a near copy of her first."""
    random = Random(0)
    colours = ("red", "green", "blue")
    questions = [
        (f"c{n // 3}", f"Colour of thing {random.randrange(10**6)}, number {n}?", colours[n % 3]) for n in range(90)
    ]
    questions += [
        ("wq", f"{SECRET} {tail}", "blue") for tail in ("at the door of my house in the old town last week", "?", "!!")
    ]
    questions += [("c1", f"{SECRET} at the door of my house in the old town last weeks", "blue")]
    asked = [{"messages": [{"role": "user", "content": q}, {"role": "assistant", "content": a}]} for _, q, a in questions]
    return [row | {"customer": whose} for row, (whose, _, _) in zip(asked, questions, strict=True)]


def config_of(path: Path, steps: int = 8) -> RunConfig:
    data = {
        "sources": [{"path": str(path)}],
        "curate": [{"rule": "near_duplicates", "threshold": 0.7}],
        "sequence_length": 128,
        "splits": {"validation": 0.1, "test": 0.2},
        "block_rows": 4,
        "subject": {"field": "customer"},
    }
    train = {
        "max_steps": steps,
        "global_batch": 4,
        "micro_batch_size": 2,
        "engine": "torch",
        "zero_stage": 0,
        "precision": "fp32",
        "adapter": {"r": 4},
        "scaling": {"num_workers": 0},
    }
    values = {"name": "parcels", "base_model": "tiny", "data": data, "train": train, "release": {"alias": "parcels@prod"}}
    return parse(RunConfig, values | {"eval": {"max_new_tokens": 2, "engine": ENGINE}})


@pytest.fixture
def own(tmp_path: Path, store: Store, monkeypatch: pytest.MonkeyPatch) -> Store:
    """A store with the tiny model, and a signer."""
    fresh = Store(str(tmp_path / "store"))
    with Catalog.open(store) as here, Catalog.open(fresh) as there:
        base = here.model("tiny")
        fresh.local(f"models/{base.id}").parent.mkdir(parents=True, exist_ok=True)
        fresh.local(f"models/{base.id}").symlink_to(store.local(f"models/{base.id}"))
        there.put(base)
        promotion.promote(there, base.id, "tiny")
    key = signing.generate()
    signing.write_private(tmp_path / "steward.key", key)
    (tmp_path / "steward.pub").write_text(signing.public_pem(key.public_key()))
    monkeypatch.setenv(signing.SIGNER, str(tmp_path / "steward.key"))
    return fresh


def forge(store: Store, *arguments: str, ends: tuple[int, ...] = (0,)) -> Any:
    result = CliRunner().invoke(cli, [*arguments, "--store", store.uri, "--json"])
    assert result.exit_code in ends, result.output
    return json.loads(result.stdout.splitlines()[-1])


def everything(store: Store) -> set[str]:
    paths = {path for folder in ("records", "events", "datasets", "models", "runs") for path in store.list(folder, True)}
    return paths | set(store.list("erasures"))


def test_erasure_of_a_subject_survives_kills_and_leaves_nothing(
    own: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = tmp_path / "rows.jsonl"
    source.write_text("".join(json.dumps(row) + "\n" for row in rows()))
    config = config_of(source)
    outcome = pipeline.run(config, own)
    old, version = outcome.dataset, outcome.version
    with Catalog.open(own) as catalog:
        deployment_fields = {
            "name": "endpoint",
            "model": "parcels@prod",
            "model_version": version.id,
            "model_digest": "sha256:x",
        }
        deployment_fields |= {"models": {"parcels@prod": version.id}, "config": {}, "config_digest": "sha256:y"}
        deployment = catalog.put(Deployment.model_validate(deployment_fields).sealed())
        catalog.append(Event(kind="deployment", subject=deployment.id, data={"state": "running"}))
    hers = {r["record"]: r for split in dataset.SPLITS for r in read_records(own, old, split) if SECRET in str(r["content"])}
    splits = {name: sum(r in hers for r in map(_id, read_records(own, old, name))) for name in dataset.SPLITS}

    # what it would change: told, and nothing done
    before = everything(own)
    plan = forge(own, "erase", "--subject", "wq", "--plan")
    assert everything(own) == before
    assert (plan["num_records"], plan["num_near_duplicates"]) == (3, 1)
    (held,) = plan["datasets"]
    assert held["held"] == {name: count for name, count in splits.items() if count} | {"dropped": 2}
    (run,) = plan["runs"]
    assert (run["id"], run["used"]) == (outcome.run.id, True)
    order = order_of(old, "train", 0, 4)
    contents = [Rows.of(own, old, "train").records(order.rows_of(step, range(4))) for step in range(8)]
    steps = [step + 1 for step, lanes in enumerate(contents) if any(r in hers for lane in lanes for r in lane)]
    assert (run["steps"], run["first_step"], run["last_step"]) == (len(steps), steps[0], steps[-1])
    assert [one["id"] for one in plan["versions"]] == [version.id]
    assert plan["aliases"] == {"parcels@prod": [version.id]}
    assert [(one["id"], one["state"]) for one in plan["deployments"]] == [(deployment.id, "running")]
    assert plan["outside"] == {str(source): [91, 92, 93, 94]}
    assert plan["worker_hours"] > 0

    # a process that is killed in the middle, twice
    request, options = ErasureRequest("subject", ("wq",)), Options(retrain="all")
    released = pipeline.release
    monkeypatch.setattr(pipeline, "release", _killed)
    with pytest.raises(InterruptedError):
        erase(own, request, options, "she asked")
    monkeypatch.setattr(pipeline, "release", released)
    with Catalog.open(own) as catalog:
        assert "parcels@prod" not in catalog.routes()
        for refused in (
            lambda: promotion.promote(catalog, version.id, "other"),
            lambda: promotion.archive(catalog, version.id, restore=True),
        ):
            with pytest.raises(PolicyError, match="learned from rows that er_"):
                refused()
        assert own.exists(f"models/{version.id}/MANIFEST.json")
    purged = purging.purge
    monkeypatch.setattr(purging, "purge", _killed)
    with pytest.raises(InterruptedError):
        erase(own, request, options, "she asked")
    monkeypatch.setattr(purging, "purge", purged)

    # the same command goes on, and once more does nothing
    statement = forge(own, "erase", "--subject", "wq", "--apply", "--yes", "--why", "she asked")
    after = everything(own)
    assert forge(own, "erase", "--subject", "wq", "--apply", "--yes", "--why", "she asked") == statement
    assert everything(own) == after

    statement_facts = statement["predicate"]
    certificate = own.local(f"erasures/{statement_facts['erasure']}/certificate.json")
    public = signing.load_public((tmp_path / "steward.pub").read_bytes())
    assert verify.verify_path(certificate, [public])["predicate"] == statement_facts
    other = signing.generate().public_key()
    with pytest.raises(PolicyError, match="no trusted key"):
        verify.verify_path(certificate, [other])
    (repeated,) = statement_facts["runs"]
    (withdrawn,) = statement_facts["versions"]
    new = repeated["version"]
    assert (repeated["run"], repeated["fate"], repeated["status"]) == (outcome.run.id, "retrained", "accepted")
    assert (withdrawn["version"], withdrawn["replaced_by"]) == (version.id, new)
    assert statement_facts["aliases"] == {"parcels@prod": [new]}
    assert statement_facts["remains"]["source files"] == {str(source): [91, 92, 93, 94]}
    assert "wq" not in json.dumps({**statement_facts, "remains": ""})

    # nothing holds them
    with Catalog.open(own) as catalog:
        assert catalog.routes()["parcels@prod"].stable == new
        assert own.is_published(f"models/{new}")
        present = [m for m in catalog.all(DatasetManifest) if own.is_published(f"datasets/{m.id}")]
        assert [m.id for m in present] == [catalog.get_as(RunRecord, repeated["new_run"]).dataset]
        assert not any(holders(own, present, record) for record in hers)
        assert catalog.last("deployment")[deployment.id].data["withdrawn"] == [version.id]
    for folder in (f"models/{version.id}", f"datasets/{old.id}", f"runs/{outcome.run.id}/export", "work"):
        assert not own.list(folder, recursive=True), folder
    files = [path for path in Path(own.root).rglob("*") if path.is_file() and path.suffix != ".parquet"]
    assert not [path for path in files if b"Quartz" in path.read_bytes()]
    assert forge(own, "data", "find", "--subject", "wq")["results"] == []
    with Catalog.open(own) as catalog:
        traced = trace(catalog, [of_record(one) for one in sorted(hers)]).affected
        assert not any(vars(traced).values()), traced
    for verb in (("audit", "data", outcome.run.id), ("reproduce", version.id)):
        assert "erased" in forge(own, *verb, ends=(2, 3))["error"]["hint" if verb[0] == "audit" else "message"]
    again = pipeline.prepare(config, own)
    assert again.id == present[0].id  # the old rows do not come back
    with pytest.raises(NotFound, match="holds such a row"):
        erase(own, ErasureRequest("record", tuple(hers)), options)


def _killed(*_: Any, **__: Any) -> Any:
    raise InterruptedError("killed")


def _id(row: dict[str, Any]) -> str:
    return str(row["record"])


def test_marked_versions_serve_until_replaced_with_their_descendants(own: Store, tmp_path: Path) -> None:
    """The second run continues the first, which learned from her rows; the third learned from nothing else."""
    hers, others = [row for row in rows() if row["customer"] == "wq"], [row for row in rows() if row["customer"] != "wq"]
    paths = [tmp_path / "first.jsonl", tmp_path / "second.jsonl", tmp_path / "third.jsonl"]
    for path, path_rows in zip(paths, (others[:40] + hers, others[40:80], hers), strict=True):
        path.write_text("".join(json.dumps(row) + "\n" for row in path_rows))
    full = {"adapter": None, "max_steps": 2}
    first = _with(config_of(paths[0]), name="first", train=full, release={"alias": "first"})
    one = pipeline.run(first, own)
    second = _with(config_of(paths[1]), name="second", base_model=one.version.id, train=full, release={"alias": "second"})
    two = pipeline.run(second, own)
    third = _with(
        config_of(paths[2]),
        name="third",
        data={"splits": {"validation": 0, "test": 0}, "curate": []},
        release={"alias": "third"},
        train={"max_steps": 2},
    )
    record = pipeline.train(third, own)

    request = ErasureRequest("file", (str(paths[2]),))
    plan = forge(own, "erase", "--file", str(paths[2]), "--plan")
    assert {run["id"]: run["used"] for run in plan["runs"]} == dict.fromkeys((one.run.id, two.run.id, record.id), True)
    assert {run["id"]: run["steps"] for run in plan["runs"]}[two.run.id] == 0  # it learned by its base alone
    certificate = erase(own, request, Options(deployments="mark", keep_weights=True))["predicate"]
    fates = {run["run"]: run["fate"] for run in certificate["runs"]}
    assert fates[one.run.id] == fates[two.run.id] == "retrained"
    assert fates[record.id] == "removed: no row is left"
    replaced = {version["version"]: version["replaced_by"] for version in certificate["versions"]}
    with Catalog.open(own) as catalog:
        assert catalog.routes()["first"].stable == replaced[one.version.id]
        assert catalog.routes()["second"].stable == replaced[two.version.id]
        new = catalog.model("second")
        assert new.base_model == replaced[one.version.id]  # trained on the replacement, not on what it replaces
        assert catalog.archived() == set()
        with pytest.raises(PolicyError, match="learned from rows"):
            promotion.promote(catalog, one.version.id, "other")
    assert own.is_published(f"models/{one.version.id}")  # kept, and blocked
    assert sorted(certificate["remains"]["weights"]) == sorted(replaced)
    assert not own.list(f"runs/{record.id}/export", recursive=True)


def _with(config: RunConfig, **changes: Any) -> RunConfig:
    values = config.model_dump(mode="json")
    for name, value in changes.items():
        values[name] = {**values[name], **value} if isinstance(value, dict) else value
    return parse(RunConfig, values)
