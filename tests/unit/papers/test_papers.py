"""Documents about a version: they contain every fact, conform to their standards, and mark what is not on record."""

from __future__ import annotations

import hashlib
import io
import json
import shutil
import tarfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml
from click.testing import CliRunner
from papers_store import ENVIRONMENT, STEPS, TOKENS, TRAINED, filled
from referencing import Registry, Resource

from forge_ray.cli.main import cli
from forge_ray.errors import ConfigError, NotFound
from forge_ray.papers.facts import BY_HAND, Facts, gather, spdx
from forge_ray.papers.write import pack, papers
from forge_ray.store import signing
from forge_ray.store.catalog import Catalog
from forge_ray.store.files import Store

pytestmark = pytest.mark.unit
SPEC = Path(__file__).parents[2] / "fixtures" / "openlineage"
DOCUMENT = 40  # tokens a record of the fabricated dataset


@pytest.fixture(scope="module")
def papers_store(tmp_path_factory: pytest.TempPathFactory, tiny_model_dir: Path) -> tuple[Store, dict[str, str]]:
    return filled(tmp_path_factory.mktemp("papers") / "store", tiny_model_dir)


@pytest.fixture(scope="module")
def facts(papers_store: tuple[Store, dict[str, str]]) -> Facts:
    with Catalog.open(papers_store[0]) as catalog:
        return gather(catalog, "support@prod", power_w=400.0, base_flops=1e12)


@pytest.fixture(scope="module")
def documents(facts: Facts) -> dict[str, bytes]:
    return papers(facts)


def as_json(documents: dict[str, bytes], name: str) -> Any:
    return json.loads(documents[name])


def test_every_fact_is_in_its_documents(
    facts: Facts, documents: dict[str, bytes], papers_store: tuple[Store, dict[str, str]]
) -> None:
    ids = papers_store[1]
    card = documents["model_card.md"].decode()
    for identifier in ids.values():
        assert identifier in card, identifier
    assert "79 records" in card
    assert "| personal_data | 99 | 99 | 11 | email 12 | none |" in card
    assert "| exact\\_match | 0.875 | 0.5 | passed | – |" in card
    assert "| latency\\_ms\\_per\\_token | 3.25 | 3.25 |" in card
    assert "| perplexity | no finite number | no finite number |" in card
    assert f"18, test of {ids['dataset']}; 16 general rows, test of {ids['general']}" in card
    assert "EPYC 9654" in card
    assert "restart at step 1" in card
    assert "step 0 on 2 workers, step 1 on 1 workers" in card
    assert "alias support@prod" in card
    assert "last state: up" in card

    sums = [entry.sha256 for entry in facts.version.files]
    statement = as_json(documents, "provenance.json")
    assert [subject["digest"]["sha256"] for subject in statement["subject"]] == sums
    bom = documents["bom.cdx.json"].decode()
    for sha256 in (*sums, "a1" * 32, *(entry.sha256 for entry in facts.origin.files)):
        assert sha256 in bom
    for name, value in ENVIRONMENT.items():
        is_listed = name != "machine" and value != "absent"
        assert (f'"name": "{name}"' in bom) == is_listed, name
    for name, version in (("left-pad", "1.3.0"), ("torch", "2.13.0%2Bcpu")):
        assert f"pkg:pypi/{name}@{version}" in bom
    assert "77" * 32 in bom
    for report in facts.own_evals:
        for name, value in report.metrics.items():
            rows = report.general if name == "general_loss" else report.dataset
            assert {"type": name, "value": f"{value:.10g}", "slice": f"{report.split} of {rows}; {report.id}"} in (
                as_json(documents, "bom.cdx.json")["metadata"]["component"]["modelCard"]["quantitativeAnalysis"][
                    "performanceMetrics"
                ]
            )
    assert "exposure\\_max 1.5, leak\\_auc 0.53 |" in documents["evidence-annex-iv.md"].decode()
    assert "answers to hostile prompts | not recorded" in documents["evidence-annex-iv.md"].decode()
    rows = documents["training-content-summary.md"].decode()
    assert "3,160 tokens: less than 1 billion tokens" in rows
    assert "none given 7, CC-BY-4.0 90" in rows


def test_the_bill_of_materials_is_cyclonedx(facts: Facts, documents: dict[str, bytes]) -> None:
    from cyclonedx.schema import SchemaVersion
    from cyclonedx.validation.json import JsonStrictValidator

    check = JsonStrictValidator(SchemaVersion.V1_6)
    assert check.validate_str(documents["bom.cdx.json"].decode()) is None
    broken = as_json(documents, "bom.cdx.json")
    broken["metadata"]["component"]["hashes"] = [{"alg": "SHA-256", "content": "no hash"}]
    assert check.validate_str(json.dumps(broken)) is not None
    odd = replace(facts, version=facts.version.model_copy(update={"licence": "our own, ask legal"}))
    assert check.validate_str(papers(odd)["bom.cdx.json"].decode()) is None
    bom = as_json(documents, "bom.cdx.json")
    refs = [bom["metadata"]["component"]["bom-ref"], *(part["bom-ref"] for part in bom["components"])]
    assert {row["ref"] for row in bom["dependencies"]} <= set(refs)
    assert {name for row in bom["dependencies"] for name in row["dependsOn"]} <= set(refs)


def test_datasets_are_croissant(
    documents: dict[str, bytes], papers_store: tuple[Store, dict[str, str]], tmp_path: Path
) -> None:
    import mlcroissant

    of_general = as_json(documents, f"croissant-{papers_store[1]['general']}.json")
    assert f"judged by {papers_store[1]['own']} (test split)" in json.dumps(of_general)
    name = f"croissant-{papers_store[1]['dataset']}.json"
    (tmp_path / name).write_bytes(documents[name])
    read = mlcroissant.Dataset(jsonld=str(tmp_path / name)).metadata
    assert not read.ctx.issues.errors
    assert read.name == "tickets"
    assert {each.uuid for each in read.record_sets} == {"train", "test"}
    assert {each.sha256 for each in read.distribution if getattr(each, "sha256", None)} == {"b2" * 32, "c3" * 32, "d4" * 32}
    value = as_json(documents, name)
    assert value["license"] == ["CC-BY-4.0"]
    assert [source["@id"] for source in value["prov:wasDerivedFrom"]] == [f"urn:sha256:{'a1' * 32}"]
    assert value["rai:personalSensitiveInformation"] == ["personal_data: email 12; 11 records masked, 0 dropped"]
    assert value["rai:dataBiases"] == "not recorded"


def test_events_are_openlineage(
    facts: Facts, documents: dict[str, bytes], papers_store: tuple[Store, dict[str, str]]
) -> None:
    schemas = [json.loads(path.read_text()) for path in sorted(SPEC.glob("*.json"))]
    registry: Any = Registry().with_resources([(each["$id"], Resource.from_contents(each)) for each in schemas])

    def check(value: Any, url: str) -> None:
        jsonschema.Draft202012Validator(
            {"$ref": url}, registry=registry, format_checker=jsonschema.FormatChecker()
        ).validate(value)

    events = [json.loads(line) for line in documents["openlineage.jsonl"].decode().splitlines()]
    for event in events:
        check(event, event["schemaURL"])
        assert not any("outputFacets" in each for each in event["inputs"])
        facets = [each["facets"]["version"] for each in (*event["inputs"], *event["outputs"])]
        facets += [each["outputFacets"]["outputStatistics"] for each in event["outputs"] if "outputFacets" in each]
        for facet in (*facets, event["job"]["facets"]["jobType"]):
            check(facet, facet["_schemaURL"])
    with pytest.raises(jsonschema.ValidationError):
        check(events[0] | {"eventType": "FINISHED"}, events[0]["schemaURL"])
    assert [event["eventTime"] for event in events] == sorted(event["eventTime"] for event in events)
    ended = {event["run"]["facets"]["forge_record"]["id"]: event for event in events if event["eventType"] == "COMPLETE"}
    ids = papers_store[1]
    assert set(ended) == {value for key, value in ids.items() if key != "deployed"}
    trained = ended[ids["second"]]
    assert {each["name"] for each in trained["inputs"]} == {ids["dataset"], ids["middle"]}
    assert trained["run"]["facets"]["forge_record"]["order_digest"] == facts.trainings[0].run.order_digest


def test_provenance_names_what_the_weights_came_from(facts: Facts, papers_store: tuple[Store, dict[str, str]]) -> None:
    store, ids = papers_store
    key = signing.generate()
    signed = papers(facts, key)
    value = json.loads(signing.opened(json.loads(signed["provenance.dsse.json"]), [key.public_key()]))
    assert value == json.loads(signed["provenance.json"])
    assert (value["_type"], value["predicateType"]) == ("https://in-toto.io/Statement/v1", "https://slsa.dev/provenance/v1")
    build, details = value["predicate"]["buildDefinition"], value["predicate"]["runDetails"]
    needed = {each["name"]: each.get("digest", {}).get("sha256") for each in build["resolvedDependencies"] if "name" in each}
    assert needed[ids["middle"]] == facts.chain[1].files_digest.removeprefix("sha256:")
    assert f"ds_{needed[ids['dataset']][:16]}" == ids["dataset"]
    assert f"sha256:{needed['environment lock']}" == facts.trainings[0].run.environment_digest
    (code,) = [each for each in build["resolvedDependencies"] if each.get("name") == "forge-ray"]
    assert code["digest"]["gitCommit"] == facts.trainings[0].run.code_commit
    assert needed["forge-ray"] == facts.trainings[0].run.code_digest.removeprefix("sha256:")
    assert build["externalParameters"]["config"] == facts.trainings[0].run.config
    assert details["metadata"]["invocationId"] == ids["second"]
    assert details["metadata"]["startedOn"] == "2026-11-25T01:16:58.654Z"
    with Catalog.open(store) as catalog:  # weights that came from outside say so
        imported = json.loads(papers(gather(catalog, "tiny"))["provenance.json"])["predicate"]["buildDefinition"]
    assert imported["buildType"] == "urn:forge-ray:import:1"
    assert imported["resolvedDependencies"][0]["digest"]["sha256"] == facts.origin.source.rpartition("sha256:")[2]


def test_compute_is_that_of_the_formula(facts: Facts) -> None:
    blocks = 2 * (4096 + 2048 + 2048 + 4096 + 3 * 64 * 128)  # q, k, v, o, and three of the MLP, in two layers
    lora, head, attention = 32_768, 400 * 64, 6 * 2 * 64 * DOCUMENT
    full = TOKENS * (6 * blocks + attention) + TRAINED * head * 6
    adapted = TOKENS * (4 * (blocks + lora) + 2 * lora + attention) + TRAINED * head * 4
    second, first = facts.trainings
    assert second.compute.flops == adapted
    assert first.compute.flops == full
    assert facts.flops == full + adapted
    assert facts.share == (full + adapted) / 1e12
    hours = 9.0 * (2 + STEPS - 1) / 3600  # the first step had two workers
    assert first.compute.worker_hours == pytest.approx(hours)
    assert facts.energy_kwh == pytest.approx(2 * hours * 0.4)
    assert first.compute.device_hours == ("CPU core", pytest.approx(hours))
    assert facts.parameters == {facts.version.id: 6, facts.chain[1].id: 125_248, facts.origin.id: 125_248}


def test_what_is_not_on_record_is_not_claimed(
    facts: Facts, papers_store: tuple[Store, dict[str, str]], tmp_path: Path
) -> None:
    with Catalog.open(papers_store[0]) as catalog:
        unstated = gather(catalog, papers_store[1]["tuned"])
    assert unstated.energy_kwh is None
    assert unstated.share is None
    card = papers(unstated)["model_card.md"].decode()
    assert "| energy | not recorded" in card
    assert "| share of the base model's | not recorded |" in card

    store = Store(str(tmp_path / "part"))  # a version that was copied without what it came from
    with Catalog.open(store) as catalog:
        catalog.put(facts.version)
        alone = gather(catalog, facts.version.id)
    assert set(alone.missing) == {facts.version.run, facts.version.base_model, *facts.version.evals}
    assert alone.flops is None
    alone_documents = papers(alone)
    assert all(name in alone_documents["INDEX.md"].decode() for name in alone.missing)
    for name in ("evidence-annex-xi.md", "evidence-annex-iv.md", "training-content-summary.md"):
        assert alone_documents[name].decode().count(BY_HAND) >= 12
    assert "FLOPs, estimated" not in alone_documents["evidence-annex-xi.md"].decode()


def test_evidence_names_its_record_or_a_gap_and_never_a_verdict(facts: Facts, documents: dict[str, bytes]) -> None:
    record_ids = {record.id for record in facts.records}
    for name in ("evidence-annex-xi.md", "evidence-annex-iv.md", "training-content-summary.md"):
        text = documents[name].decode()
        assert text.startswith("# Evidence for ")
        rows = [cells(line) for line in text.splitlines() if line.startswith("| ") and "---" not in line][1:]
        assert rows
        for _, _, evidence, source in rows:
            gap = evidence == BY_HAND
            assert gap == (source == "–"), (evidence, source)
            assert gap or set(source.split(", ")) <= record_ids
        filled_rows = sum(evidence != BY_HAND for _, _, evidence, _ in rows)
        assert f"{filled_rows} of {len(rows)} rows" in text
    for name, content in documents.items():
        text = content.decode().lower()
        assert "complies" not in text, name
        assert "compliant" not in text, name


def cells(line: str) -> list[str]:
    return [cell.strip().replace("\\|", "|") for cell in line[1:-1].replace("\\|", "\0").split("|")]


def test_text_of_records_is_escaped(documents: dict[str, bytes]) -> None:
    for name, content in documents.items():
        if name.endswith(".md"):
            text = content.decode()
            assert "\n# heading" not in text
            assert "<script>" not in text.replace("\\<script\\>", "")
            for block in text.split("\n\n"):
                widths = {len(cells(line)) for line in block.splitlines() if line.startswith("|")}
                assert len(widths) <= 1, (name, block)
    front = documents["model_card.md"].decode().split("---\n")[1]
    assert yaml.safe_load(front)["license"] == "apache-2.0"


def test_hugging_face_reads_the_card(documents: dict[str, bytes], papers_store: tuple[Store, dict[str, str]]) -> None:
    from huggingface_hub import ModelCard

    data = ModelCard(documents["model_card.md"].decode()).data
    assert (data.license, data.library_name, data.base_model) == ("apache-2.0", "peft", papers_store[1]["middle"])
    dataset, general = papers_store[1]["dataset"], papers_store[1]["general"]
    assert {(result.dataset_type, result.metric_type, result.metric_value) for result in data.eval_results} == {
        (dataset, "exact_match", 0.875),
        (dataset, "loss", 0.1256),
        (general, "general_loss", 2.5),
        (dataset, "leak_auc", 0.53),
        (dataset, "exposure_max", 1.5),
    }


def test_equal_stores_give_equal_bytes(
    documents: dict[str, bytes], facts: Facts, papers_store: tuple[Store, dict[str, str]], tmp_path: Path
) -> None:
    store = Store(str(shutil.copytree(papers_store[0].root, tmp_path / "elsewhere")))
    with Catalog.open(store) as catalog:
        again = gather(catalog, papers_store[1]["tuned"], power_w=400.0, base_flops=1e12)
    assert papers(again) == documents
    first = pack(tmp_path / "a.tar", papers_store[0], facts, documents)
    assert pack(tmp_path / "b.tar", store, again, papers(again)) == first
    with tarfile.open(tmp_path / "a.tar") as archive:
        content = {member.name: archive.extractfile(member).read() for member in archive}  # type: ignore[union-attr]
    sums = dict(reversed(line.split("  ", 1)) for line in content.pop("SHA256SUMS").decode().splitlines())
    assert sums == {name: hashlib.sha256(data).hexdigest() for name, data in content.items()}
    for record in facts.records:
        name = f"records/{record.kind}/{record.id}.json"
        assert content[name] == papers_store[0].read(name)
    assert sum(name.startswith("events/") for name in content) == len(facts.events) == 2
    lines = [json.loads(line) for line in content["audit/lines.jsonl"].splitlines()]
    stored = {name for name in content if name.startswith(("records/", "events/"))}
    assert {line["path"] for line in lines} == stored
    assert f"--head {head_of(papers_store[0])}" in content["README.md"].decode()
    assert f"environments/{facts.trainings[0].run.environment_digest.removeprefix('sha256:')}.json" in content


def head_of(store: Store) -> str:
    lines = store.read("audit/log.jsonl").splitlines()
    return f"{json.loads(lines[-1])['n']}:{hashlib.sha256(lines[-1]).hexdigest()}"


@pytest.fixture
def signer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    path = tmp_path / "alice.key"
    signing.write_private(path, signing.generate())
    monkeypatch.setenv(signing.SIGNER, str(path))
    yield path
    monkeypatch.delenv(signing.SIGNER)


def forge(*words: str) -> Any:
    return CliRunner().invoke(cli, list(words))


def test_papers_command_writes_signs_and_packs(
    papers_store: tuple[Store, dict[str, str]], tmp_path: Path, signer: Path
) -> None:
    store, ids = str(shutil.copytree(papers_store[0].root, tmp_path / "store")), papers_store[1]
    folder, archive = tmp_path / "out", tmp_path / "pack.tar"
    named = forge(
        "signers",
        "add",
        "alice",
        "--public",
        str(public_half(signer)),
        "--role",
        "owner",
        "--role",
        "releaser",
        "--role",
        "trainer",
        "--store",
        store,
    )
    assert named.exit_code == 0, named.output
    for words in (("sign", ids["tuned"]), ("approve", ids["tuned"], "--why", "scores read")):
        result = forge(*words, "--store", store)
        assert result.exit_code == 0, result.output
    done = forge("papers", "support@prod", "--out", str(folder), "--pack", str(archive), "--store", store, "--json")
    assert done.exit_code == 0, done.output
    output = json.loads(done.stdout)
    assert output["model_version"] == ids["tuned"]
    for name, sha256 in output["papers"].items():
        assert hashlib.sha256((folder / name).read_bytes()).hexdigest() == sha256
        assert name == "INDEX.md" or sha256 in (folder / "INDEX.md").read_text()
    assert hashlib.sha256(archive.read_bytes()).hexdigest() == output["pack"]["sha256"]
    evidence = (folder / "evidence-annex-iv.md").read_text()
    assert "signed by alice (sk\\_" in evidence
    assert "| approve by alice (sk\\_" in evidence
    assert "not hold" not in evidence
    assert ": scores read | " in evidence
    checked = forge("verify", str(folder / "provenance.dsse.json"), "--key", str(public_half(signer)), "--store", store)
    assert checked.exit_code == 0, checked.output
    with tarfile.open(fileobj=io.BytesIO(archive.read_bytes())) as opened:
        assert any(name.startswith(f"signatures/{ids['tuned']}/") for name in opened.getnames())

    other = forge("papers", "tiny", "--out", str(folder), "--store", store)
    assert other.exit_code == 2
    assert "of a different version" in other.output
    for flag in ("--power-w", "--base-flops"):
        wrong = forge("papers", "support@prod", "--out", str(folder), flag, "-1", "--store", store)
        assert (wrong.exit_code, "not a positive number" in wrong.output) == (2, True)
    assert forge("papers", "nobody", "--out", str(folder), "--store", store).exit_code == 2


def public_half(private: Path) -> Path:
    path = private.with_suffix(".pub")
    path.write_text(signing.public_pem(signing.load_private(private).public_key()))
    return path


def test_invalid_envelope_is_not_a_signature(
    papers_store: tuple[Store, dict[str, str]], tmp_path: Path, signer: Path
) -> None:
    """Its key is one that the store does not know."""
    store = Store(str(shutil.copytree(papers_store[0].root, tmp_path / "store")))
    assert forge("sign", papers_store[1]["tuned"], "--store", store.root).exit_code == 0
    assert store.list(f"signatures/{papers_store[1]['tuned']}")
    with Catalog.open(store) as catalog:
        documents = gather(catalog, papers_store[1]["tuned"])
    assert documents.signatures == {}


def test_mlflow_export_errors(papers_store: tuple[Store, dict[str, str]]) -> None:
    from forge_ray.papers.mlflow_export import export

    with Catalog.open(papers_store[0]) as catalog:
        with pytest.raises(NotFound, match="it was imported"):
            export(catalog, "tiny", "sqlite://", "", False)
        with pytest.raises(ConfigError, match="its weights belong to a version"):
            export(catalog, papers_store[1]["second"], "sqlite://", "", True)
        with pytest.raises(ConfigError, match="failed"):
            export(catalog, "support@prod", "http://127.0.0.1:1", "", False)


def test_licences_are_spdx_or_nothing() -> None:
    assert [spdx(text) for text in ("apache-2.0", "mit or apache-2.0", "llama licence", "")] == [
        "Apache-2.0",
        "MIT OR Apache-2.0",
        "",
        "",
    ]


def test_teacher_is_named_in_every_document(facts: Facts) -> None:
    """With its licence, which the distillate carries."""
    assert facts.training
    teacher = facts.version.model_copy(
        update={"id": "mv_0123456789abcdef", "name": "large", "licence": "llama3.3", "base_model": "", "run": ""}
    )
    digest = "sha256:" + "7" * 64
    run = facts.training.run.model_copy(update={"method": "distil", "frozen_model": teacher.id, "frozen_digest": digest})
    version = facts.version.model_copy(update={"licence": "Apache-2.0 AND llama3.3"})
    distilled = replace(
        facts,
        version=version,
        chain=(version, *facts.chain[1:]),
        trainings=(replace(facts.training, run=run), *facts.trainings[1:]),
        frozen=(teacher,),
    )
    documents = papers(distilled)
    card = documents["model_card.md"].decode()
    assert f"It is a distillate of large ({teacher.id}, licence llama3.3): a student that learned" in card
    assert f"| teacher | large ({teacher.id}), llama3.3 |" in card
    assert "license_name: Apache-2.0 AND llama3.3" in card
    for name, document in documents.items():
        if name in ("model_card.md", "bom.cdx.json", "provenance.json", "openlineage.jsonl", "training-content-summary.md"):
            assert teacher.id in document.decode(), name
    (component,) = [one for one in as_json(documents, "bom.cdx.json")["components"] if one["bom-ref"] == teacher.id]
    assert component["type"] == "machine-learning-model"
    (depends,) = [one for one in as_json(documents, "bom.cdx.json")["dependencies"] if one["ref"] == facts.version.id]
    assert teacher.id in depends["dependsOn"]
    compared = replace(distilled, trainings=(replace(facts.training, run=run.model_copy(update={"method": "dpo"})),))
    assert f"Its answers were compared with those of large ({teacher.id}" in papers(compared)["model_card.md"].decode()
