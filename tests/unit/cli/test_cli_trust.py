"""Governance by the command line: signers, policy, promotion by two people, verification, a changed line in the log."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from forge_ray.cli.main import cli
from forge_ray.records import ModelVersion, files_digest
from forge_ray.store import audit_log, signing
from forge_ray.store.catalog import Catalog
from forge_ray.store.files import Store, hash_dir

pytestmark = pytest.mark.unit


class Shell:
    """`forge …` in one store, as one person."""

    def __init__(self, store: str, monkeypatch: pytest.MonkeyPatch) -> None:
        self.store, self.monkeypatch = store, monkeypatch

    def become(self, key: Path) -> None:
        self.monkeypatch.setenv(signing.SIGNER, str(key))

    def __call__(self, *arguments: str, code: int = 0) -> Any:
        result = CliRunner().invoke(cli, [*arguments, "--store", self.store, "--json"])
        assert result.exit_code == code, result.output
        printed = json.loads(result.stdout.strip().splitlines()[-1])
        return printed.get("results", printed)


def put_version(store: Store) -> ModelVersion:
    with store.staged_dir("models/.new") as folder:
        (folder / "config.json").write_text("{}")
        (folder / "model.safetensors").write_bytes(b"weights")
    files = hash_dir(store.local("models/.new"))
    version = ModelVersion(
        name="m", status="imported", weights="full", files=files, files_digest=files_digest(files), licence="mit"
    ).sealed()
    store.move_dir("models/.new", f"models/{version.id}")
    with Catalog.open(store) as catalog:
        return catalog.put(version)


def test_from_keys_to_audit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store, keys = Store(str(tmp_path / "store")), tmp_path / "keys"
    forge = Shell(store.uri, monkeypatch)
    roles = ("--role", "releaser", "--role", "trainer")
    first = forge("signers", "create", "olga", "--role", "owner", *roles, "--out", str(keys))
    assert (first["name"], first["state"]) == ("olga", "active")
    forge.become(keys / "olga.key")
    forge("signers", "create", "rolf", *roles, "--out", str(keys), "--algorithm", "p256")
    version = put_version(store)
    forge("policy", "set", "--signatures", "--protect", "*@prod", "--why", "a bank")
    assert forge("policy", "show")["protected"] == ["*@prod"]

    refused = forge("models", "promote", version.id, "--alias", "a@prod", code=3)
    assert "two releasers together" in refused["error"]["message"]
    forge.become(keys / "rolf.key")
    assert forge("approve", version.id, "--alias", "a@prod", "--why", "read")["by"] == "rolf"
    forge.become(keys / "olga.key")
    forge("models", "promote", version.id, "--alias", "a@prod")

    (checked,) = forge("verify", "a@prod")
    assert (checked["id"], checked["signed_by"], checked["problem"]) == (version.id, ["olga"], "")
    assert "it is not signed" in forge("verify", "a@prod", "--key", str(keys / "rolf.pub"), code=3)["error"]["message"]
    forge.become(keys / "rolf.key")
    assert forge("sign", version.id)["path"].startswith(f"signatures/{version.id}/sk_")
    assert forge("verify", "a@prod", "--key", str(keys / "rolf.pub"))[0]["signed_by"] == ["rolf"]
    forge("sign", version.id, "--openssf", "--out", str(tmp_path / "signed"))
    assert forge("verify", str(tmp_path / "signed"), "--key", str(keys / "rolf.pub"))["files"] == 2
    assert (
        "no trusted key"
        in (forge("verify", str(tmp_path / "signed"), "--key", str(keys / "olga.pub"), code=3)["error"]["message"])
    )

    lines = forge("audit", "log", "--subject", "a@prod")
    assert [(line["action"], line["key"]) for line in lines] == [("alias.set", first["id"])]
    report = forge("audit", "verify", "--every-signature")
    assert (report["num_lines"], report["num_signed"]) == (8, 8)
    head = report["head"]
    store.local(f"models/{version.id}/model.safetensors").write_bytes(b"weighty")
    assert "sha256" in forge("verify", "a@prod", code=3)["error"]["message"]

    log = store.read(audit_log.LOG)
    store.write(audit_log.LOG, log.replace(b"a bank", b"a barn"))
    assert "does not hold" in forge("audit", "verify", code=3)["error"]["message"]
    store.write(audit_log.LOG, log)
    forge("audit", "verify", "--head", head)
    forge.become(keys / "olga.key")
    assert forge("policy", "set", "--refuse-licence", "CC-BY-NC-4.0")["refused_licences"] == ["CC-BY-NC-4.0"]
    assert forge("policy", "set", "--refuse-licence", " MIT ", "--refuse-licence", "MIT")["refused_licences"] == ["MIT"]
    says = forge("policy", "set", "--refuse-licence", " ", code=2)["error"]["message"]
    assert "a refused licence is empty" in says
    assert forge("policy", "set", "--refuse-no-licence")["refused_licences"] == []
    forge("signers", "retire", "rolf", "--why", "left", code=0)
    states = {signer["name"]: signer["state"] for signer in forge("signers", "list")}
    assert states == {"olga": "active", "rolf": "retired"}


@pytest.mark.parametrize(
    ("arguments", "code", "says"),
    [
        (("policy", "set"), 2, "no policy setting to change"),
        (("policy", "set", "--protect", "a", "--protect-none"), 2, "contradict each other"),
        (("policy", "set", "--refuse-licence", "a", "--refuse-no-licence"), 2, "contradict each other"),
        (("models", "shrink", "base", "--layers", "0,x", "--out", "half"), 2, "'x' is not a number"),
        (("policy", "set", "--roles"), 3, "a policy needs an owner"),
        (("sign", "mv_x", "--openssf"), 2, "go together"),
        (("signers", "add", "bob", "--public", "none.pub", "--role", "trainer"), 2, "is not a file"),
        (("signers", "retire", "bob"), 2, "no signer 'bob'"),
        (("verify", "mv_nothing"), 2, "is no id, alias or fingerprint"),
        (("verify", "."), 2, "public keys that you trust"),
        (("verify", "x", "--key", "none.pub"), 2, "is not a file"),
    ],
)
def test_mistakes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: tuple[str, ...], code: int, says: str) -> None:
    monkeypatch.delenv(signing.SIGNER, raising=False)
    forge = Shell(str(tmp_path / "store"), monkeypatch)
    assert says in forge(*arguments, code=code)["error"]["message"]
