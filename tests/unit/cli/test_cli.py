"""The contract of the command line: one JSON object, exit codes, and a fixed set of commands and options."""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import click
import pytest
from click.testing import CliRunner, Result

from forge_ray.cli.main import cli
from forge_ray.config.base import load
from forge_ray.config.release import DeployConfig
from forge_ray.errors import ConfigError
from forge_ray.records import Event, FileEntry, ModelVersion, files_digest
from forge_ray.store.catalog import Catalog
from forge_ray.store.files import Store

pytestmark = pytest.mark.unit

BOUNDS = {"--model", "--scope", "--rpm", "--tpm", "--concurrency", "--expires"}  # of an API key
SURFACE = {
    "quickstart": {"--config", "--port", "--set"},
    "init": {"--task", "--data", "--base-model", "--name", "--force", "--from"},
    "feedback import": {"--out", "--form", "--good-from", "--contradictions", "--max-invalid", "--force"},
    "models import": {"--name", "--licence", "--alias", "--add-tokens"},
    "models check": set(),
    "models export": {"--out", "--form", "--precision"},
    "models shrink": {"--layers", "--out", "--alias"},
    "store du": {"--checkpoints", "--unreleased-days", "--caches", "--base-models"},
    "store prune": {"--checkpoints", "--unreleased-days", "--caches", "--base-models", "--apply"},
    "models list": set(),
    "models show": set(),
    "models promote": {"--alias"},
    "models archive": set(),
    "models restore": set(),
    "data prepare": {"--set"},
    "data list": set(),
    "data show": {"--rows", "--split"},
    "data card": set(),
    "data diff": set(),
    "data find": {"--subject", "--key-file"},
    "data export": {"--split"},
    "data canaries": {"--count", "--digits", "--seed"},
    "data clean": set(),
    "plan": {"--set", "--workers", "--memory-gb", "--tokens-per-s", "--cost-per-hour", "--rows"},
    "runs list": set(),
    "runs show": set(),
    "runs export": {"--step"},
    "runs authenticate": set(),
    "runs compare": {"--out"},
    "audit data": {"--step"},
    "audit log": {"--subject", "--action", "--last"},
    "audit verify": {"--head", "--every-signature"},
    "signers create": {"--role", "--out", "--algorithm", "--person"},
    "signers add": {"--public", "--role", "--person"},
    "signers list": set(),
    "signers change": {"--role"},
    "signers retire": {"--why"},
    "signers revoke": {"--why", "--since"},
    "policy show": set(),
    "policy set": {
        "--roles",
        "--signatures",
        "--protect",
        "--protect-none",
        "--no-export",
        "--endpoint",
        "--no-endpoints",
        "--refuse-licence",
        "--refuse-no-licence",
        "--independent-validation",
        "--why",
    },
    "approve": {"--alias", "--refuse", "--why", "--archive", "--restore"},
    "sign": {"--openssf", "--out"},
    "verify": {"--key"},
    "audit leak": {"--max-records", "--candidates", "--seed"},
    "erase": {
        "--subject",
        "--key-file",
        "--record",
        "--answer",
        "--file",
        "--no-near-duplicates",
        "--similarity",
        "--any-case",
        "--keep",
        "--plan",
        "--apply",
        "--deployments",
        "--retrain",
        "--remove-adapters",
        "--keep-weights",
        "--wait",
        "--stopped",
        "--why",
        "--yes",
    },
    "keys create": {"--name", *BOUNDS},
    "keys list": set(),
    "keys show": set(),
    "keys change": BOUNDS,
    "keys rotate": {"--grace"},
    "keys revoke": {"--reason"},
    "usage": {"--by", "--since"},
    "train": {"--set", "--force"},
    "eval": {
        *("--set", "--data", "--model"),
        *("--endpoint", "--endpoint-model", "--key-env", "--endpoint-option", "--concurrency", "--timeout", "--reuse"),
    },
    "release": {"--set"},
    "run": {"--set", "--force"},
    "submit": {"--address", "--set", "--no-wait"},
    "deploy": {"--address", "--set", "--status", "--serve-yaml"},
    "undeploy": {"--address"},
    "serve": {"--set", "--haproxy", "--tls-cert", "--tls-key"},
    "gateway": {
        "--to",
        "--host",
        "--port",
        "--tls-cert",
        "--tls-key",
        "--tries",
        "--retry-s",
        "--max-body-bytes",
        "--max-held-bytes",
        "--max-connections",
        "--max-connections-per-address",
        "--drain-s",
    },
    "chat": {"--url", "--api-key", "--model", "--system", "--max-tokens", "--temperature"},
    "doctor": {"--address"},
    "alias list": set(),
    "alias history": set(),
    "alias set": {"--to", "--shadow", "--fallback", "--file", "--why", "--url"},
    "alias canary": {"--to", "--percent", "--max-error-rate", "--max-latency-ratio", "--min-requests", "--why", "--url"},
    "alias promote": {"--why", "--url"},
    "alias rollback": {"--why", "--url"},
    "alias archive": {"--why"},
    "papers": {"--out", "--pack", "--power-w", "--base-flops"},
    "export mlflow": {"--uri", "--experiment", "--with-weights"},
    "trace": {"--file", "--subject"},
    "cycles": {"--out"},
    "lineage": {"--to", "--rows", "--svg", "--html"},
    "reproduce": {"--rebuild-data", "--keep"},
    "diff": set(),
    "catalog show": set(),
    "catalog trust": {"--id"},
    "catalog upgrade": {"--yes", "--without", "--why"},
}


def commands(group: click.Group, prefix: str = "") -> dict[str, click.Command]:
    by_name: dict[str, click.Command] = {}
    for name, command in group.commands.items():
        if isinstance(command, click.Group):
            by_name |= commands(command, f"{prefix}{name} ")
        else:
            by_name[prefix + name] = command
    return by_name


def forge(*words: str) -> Result:
    return CliRunner().invoke(cli, list(words))


@pytest.fixture
def filled(tmp_path: Path) -> str:
    """A store with an accepted and a rejected version."""
    with Catalog.open(Store(str(tmp_path / "store"))) as catalog:
        for status, reasons in (("accepted", ()), ("rejected", ("exact_match=0.1 is below the minimum 0.4",))):
            files = (FileEntry(path="model.safetensors", size=1, sha256=status),)
            version = ModelVersion(
                name=status,
                status=status,  # type: ignore[arg-type]
                reasons=reasons,
                weights="full",
                files=files,
                files_digest=files_digest(files),
                licence="apache-2.0",
            )
            catalog.put(version.sealed())
    return str(tmp_path / "store")


def version_of(store: str, name: str) -> str:
    listed = json.loads(forge("models", "list", "--store", store, "--json").stdout)["results"]
    return next(str(version["id"]) for version in listed if version["name"] == name)


def test_the_surface_is_what_is_promised() -> None:
    flags_by_verb = {
        name: {flag for p in command.params for flag in p.opts if isinstance(p, click.Option)}
        for name, command in commands(cli).items()
    }
    assert flags_by_verb == {name: flags | {"--store", "--json"} for name, flags in SURFACE.items()}


@pytest.mark.parametrize("name", SURFACE)
def test_every_verb_has_help(name: str) -> None:
    done = forge(*name.split(), "--help")
    assert done.exit_code == 0
    assert "--json" in done.output


def test_promote_moves_the_alias_and_a_rejected_version_is_refused(filled: str) -> None:
    good, bad = version_of(filled, "accepted"), version_of(filled, "rejected")
    done = forge("models", "promote", good, "--alias", "prod", "--store", filled, "--json")
    assert done.exit_code == 0
    assert json.loads(done.stdout) == {"alias": "prod", "model_version": good}

    refused = forge("models", "promote", bad, "--alias", "prod", "--store", filled, "--json")
    assert refused.exit_code == 3
    assert json.loads(refused.stdout)["error"]["code"] == "policy"
    assert "exact_match=0.1 is below the minimum 0.4" in refused.stderr
    promoted = json.loads(forge("models", "show", "prod", "--store", filled, "--json").stdout)
    assert promoted["id"] == good


def test_an_alias_moves_by_its_verbs(filled: str, tmp_path: Path) -> None:
    good, bad = version_of(filled, "accepted"), version_of(filled, "rejected")

    def alias(*words: str, code: int = 0) -> Any:
        done = forge("alias", *words, "--store", filled, "--json")
        assert done.exit_code == code, done.output
        return json.loads(done.stdout)

    moved = alias("set", "support@prod", "--to", good, "--fallback", "base", "--why", "first")
    assert moved == {"alias": "support@prod", "route": {"versions": {good: 1}, "fallback": "base"}}
    assert alias("list") == {"support@prod": moved["route"]}
    assert alias("set", "support@prod", "--to", bad, code=3)["error"]["code"] == "policy"
    assert "--to mv_a=95" in alias("set", "support@prod", "--to", f"{good}=many", code=2)["error"]["hint"]
    assert "give --to VERSION" in alias("set", "support@prod", code=2)["error"]["message"]
    assert "stable version already" in alias("canary", "support@prod", "--to", good, code=2)["error"]["message"]
    route = tmp_path / "route.yaml"
    route.write_text(f"versions: {{{good}: 1}}\nrules: [{{to: base, user: [guest]}}]\n")
    assert alias("set", "support@prod", "--file", str(route))["route"]["rules"] == [{"to": "base", "user": ["guest"]}]
    assert alias("rollback", "support@prod")["route"] == moved["route"]
    alias("archive", "support@prod")
    assert alias("list") == {}
    assert [
        move["why"]
        for move in json.loads(forge("alias", "history", "support@prod", "--store", filled, "--json").stdout)["results"]
    ] == ["first", "", "rolled back", ""]
    assert json.loads(forge("models", "archive", good, "--store", filled, "--json").stdout)["state"] == "archived"
    assert json.loads(forge("models", "restore", good, "--store", filled, "--json").stdout)["state"] == "active"
    table = forge("alias", "history", "support@prod", "--store", filled)
    assert "archived" in table.output


def test_a_mistake_ends_with_2_and_says_key_value_rule_and_remedy(tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text("name: a\nbase_model: b\ndata: {sources: [{path: c}]}\nrelease: {alias: d}\ntrain: {epoch: 1}\n")
    done = forge("train", str(file), "--store", str(tmp_path / "s"), "--json")
    assert done.exit_code == 2
    error = json.loads(done.stdout)["error"]
    assert error["code"] == "config"
    assert "train.epoch" in error["message"]
    assert "epochs" in error["hint"]
    assert "error: " in done.stderr
    assert "hint: " in done.stderr


def test_unknown_ids_and_missing_clusters_are_mistakes(tmp_path: Path) -> None:
    store = str(tmp_path / "s")
    assert forge("lineage", "mv_0000000000000000", "--store", store).exit_code == 2
    assert forge("data", "show", "ds_0000000000000000", "--store", store).exit_code == 2
    assert forge("models", "import", str(tmp_path / "absent"), "--store", store).exit_code == 2
    deploy = tmp_path / "deploy.yaml"
    deploy.write_text("name: a\nmodels: [b]\n")
    done = forge("deploy", str(deploy), "--store", store, "--json")
    assert done.exit_code == 2
    assert "--address" in json.loads(done.stdout)["error"]["hint"]


def test_runs_list_comes_from_the_store_alone(filled: str) -> None:
    with Catalog.open(Store(filled)) as catalog:
        catalog.append(Event(kind="run", subject="run_1", data={"state": "running"}))
        catalog.append(Event(kind="run", subject="run_1", data={"state": "failed", "why": "no disk"}))
    (run,) = json.loads(forge("runs", "list", "--store", filled, "--json").stdout)["results"]
    assert (run["id"], run["state"], run["why"]) == ("run_1", "failed", "no disk")


def test_the_store_is_named_by_flag_then_environment(filled: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FORGE_STORE", filled)
    assert len(json.loads(forge("models", "list", "--json").stdout)["results"]) == 2


def test_the_command_that_an_export_prints_is_a_deployment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    version = ModelVersion.model_construct(id="mv_0123456789abcdef")
    monkeypatch.setattr("forge_ray.release.candidates.export_run", lambda store, run_id, step: version)
    printed = CliRunner().invoke(cli, ["runs", "export", "run_1", "--store", str(tmp_path)]).output
    (line,) = [line for line in printed.splitlines() if line.startswith("serve it: ")]
    _, _, *words = shlex.split(line.removeprefix("serve it: "))
    assert words[1] == "--set"
    assert load(DeployConfig, words[0], words[2:]).models == (version.id,)


def test_plan_says_which_rows_the_gate_needs(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    estimate = SimpleNamespace(problem="", dataset="8 rows, as stated", is_assumed=True, to_json=lambda: {"steps": 3})
    monkeypatch.setattr("forge_ray.pipeline.plan", lambda *arguments: estimate)
    monkeypatch.setattr("forge_ray.cli.show.print_plan", lambda value: None)
    run_file = tmp_path / "run.yaml"
    run_file.write_text(
        "name: a\nbase_model: b\ndata: {sources: [{path: rows.jsonl}]}\n"
        "release: {alias: c, gate: {better_than: [{margin: 0.1, confidence: 0.95}], no_worse_than: [{metric: loss}]}}\n"
    )
    arguments = ["plan", str(run_file), "--rows", "8", "--store", str(tmp_path / "store")]
    result = CliRunner().invoke(cli, [*arguments, "--json"])
    assert result.exit_code == 0, result.output
    printed = json.loads(result.stdout)
    (rule,) = printed.pop("gate")  # a rule without a confidence judges what was measured, on however many rows
    assert printed["steps"] == 3
    assert (rule["rule"], rule["num_rows"]) == ("exact_match better than base by 0.1 at 95%", 297)
    assert rule["num_held_out"] is None
    lines = CliRunner().invoke(cli, arguments).output.splitlines()
    assert [
        line for line in lines if line.startswith("gate exact_match better than base by 0.1 at 95%: needs about 297 held-")
    ]


def test_a_plan_that_cannot_fit_ends_as_its_training_would(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """`forge train` refuses it with a `ConfigError`."""
    estimate = SimpleNamespace(problem="a worker needs 9 GB and has 8", remedy="set train.micro_batch_size=1")
    monkeypatch.setattr("forge_ray.pipeline.plan", lambda *arguments: estimate)
    monkeypatch.setattr("forge_ray.cli.show.print_plan", lambda value: None)
    run_file = tmp_path / "run.yaml"
    run_file.write_text("name: a\nbase_model: b\ndata: {sources: [{path: rows.jsonl}]}\nrelease: {alias: c}\n")
    result = CliRunner().invoke(cli, ["plan", str(run_file), "--store", str(tmp_path / "store"), "--json"])
    assert result.exit_code == ConfigError("").exit_code == 2
    assert json.loads(result.stdout)["error"] == {
        "code": "config",
        "message": estimate.problem,
        "hint": estimate.remedy,
    }
