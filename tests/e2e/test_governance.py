"""An auditor's afternoon: one signed run, and every question about it asked by its command (docs/guides/governance.md)."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from forge_ray.cli.main import cli
from forge_ray.store import signing

pytestmark = pytest.mark.e2e
ROOT = Path(__file__).parents[2]
RUN = ROOT / "tests/e2e/run.yaml"
# as the shared cluster has it: no workers, no endpoint
SETTINGS = (
    f"data.sources=[{{path: {ROOT}/tests/e2e/colours.jsonl}}]",
    "train.engine=torch",
    "train.zero_stage=0",
    "train.scaling.num_workers=0",
    "deploy=null",
    "eval.slices=[label]",
)


class Forge:
    """`forge … --json` on a store of its own."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.outcome: dict[str, Any] = {}

    def __call__(self, *arguments: str, code: int = 0) -> Any:
        done = CliRunner().invoke(cli, [*arguments, "--store", str(self.folder / "store"), "--json"])
        assert done.exit_code == code, done.output[-3000:]
        answer = json.loads(done.stdout.strip().splitlines()[-1])
        return answer.get("results", answer)


@pytest.fixture(scope="module")
def forge(tmp_path_factory: pytest.TempPathFactory, ray_cluster: None, tiny_model_dir: Path) -> Iterator[Forge]:
    """As Olga, who has every role; her run is done."""
    call = Forge(tmp_path_factory.mktemp("governed"))
    folder, patch = call.folder, pytest.MonkeyPatch()
    roles = [word for role in ("owner", "data_steward", "trainer", "validator", "releaser") for word in ("--role", role)]
    call("signers", "create", "olga", *roles, "--out", str(folder))
    patch.setenv(signing.SIGNER, str(folder / "olga.key"))
    call("policy", "set", "--roles", "--signatures")
    call("models", "import", str(tiny_model_dir), "--name", "tiny", "--licence", "apache-2.0", "--alias", "tiny")
    overrides = [word for setting in SETTINGS for word in ("--set", setting)]
    call.outcome = call("run", str(RUN), *overrides)
    yield call
    patch.undo()


def test_lineage_of_a_version_to_its_rows(forge: Forge) -> None:
    version = forge.outcome["version"]["id"]
    answer = forge("lineage", version, "--rows", "2", "--html", str(forge.folder / "lineage.html"))
    text = json.dumps(answer)
    for kind in ("dataset", "run", "report"):
        assert forge.outcome[kind]["id"] in text
    assert "colours.jsonl" in text
    page = (forge.folder / "lineage.html").read_text()
    assert version in page
    assert "http://" not in page.replace("http://www.w3.org/", "")
    digest = forge.outcome["version"]["files_digest"].removeprefix("sha256:")[:16]
    assert forge("lineage", digest)["id"] == version  # what an answer carries


def test_trace_of_a_row_to_its_models(forge: Forge) -> None:
    rows = (ROOT / "tests/e2e/colours.jsonl").read_text().splitlines()
    (forge.folder / "asked.jsonl").write_text(rows[0] + "\n")
    text = json.dumps(forge("trace", "--file", str(forge.folder / "asked.jsonl")))
    for thing in ("dataset", "run", "version"):
        assert forge.outcome[thing]["id"] in text
    (forge.folder / "other.jsonl").write_text(rows[0].replace("green", "grey").replace("number 1", "number 999") + "\n")
    assert forge.outcome["version"]["id"] not in json.dumps(forge("trace", "--file", str(forge.folder / "other.jsonl")))


def test_signatures_and_audit_log_verify(forge: Forge) -> None:
    checked = forge("verify", "colours")
    assert len(checked) == 6
    assert all(one["signed_by"] == ["olga"] and not one["problem"] for one in checked)
    log_report = forge("audit", "verify", "--every-signature")
    assert log_report["num_lines"] == log_report["num_signed"] > 8
    assert forge("audit", "data", forge.outcome["run"]["id"])["problems"] == []


def test_reproduce_and_diff(forge: Forge) -> None:
    assert forge("reproduce", "colours", "--rebuild-data")["verdict"] == "equal"
    difference = forge("diff", "tiny", "colours")
    assert difference["evaluation"][0]["wrong_to_right"]  # the untrained one names no colour


def test_documents_from_the_same_records(forge: Forge) -> None:
    out = forge.folder / "papers"
    forge("papers", "colours", "--out", str(out))
    assert forge.outcome["version"]["id"] in (out / "model_card.md").read_text()
    key = str(forge.folder / "olga.pub")
    assert "slsa" in forge("verify", str(out / "provenance.dsse.json"), "--key", key)["what"]


def test_erasure_of_a_row_is_certified(forge: Forge) -> None:
    """Last: it changes the store."""
    row = (ROOT / "tests/e2e/colours.jsonl").read_text().splitlines()[2]
    asked = forge.folder / "erase.jsonl"
    asked.write_text(row + "\n")
    before = forge.outcome["version"]["id"]
    assert before in json.dumps(forge("erase", "--file", str(asked), "--plan"))
    done = forge("erase", "--file", str(asked), "--apply", "--yes", "--why", "asked to")
    key = str(forge.folder / "olga.pub")
    certificate = str(forge.folder / "store/erasures" / done["predicate"]["erasure"] / "certificate.json")
    assert forge("verify", certificate, "--key", key)["predicate"]
    refused = forge("models", "promote", before, "--alias", "colours", code=3)
    assert "eras" in refused["error"]["message"]
    assert forge("models", "show", "colours")["id"] != before
    assert forge("audit", "verify")["problems"] == []
