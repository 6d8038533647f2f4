"""`forge serve` with a name instead of a file, and how an endpoint's end is recorded."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from click.testing import CliRunner, Result
from fabricated import deployment, version

from forge_ray.cli.main import cli
from forge_ray.records import Deployment
from forge_ray.release import promotion
from forge_ray.serve import deploy
from forge_ray.store.catalog import Catalog

pytestmark = pytest.mark.unit


@pytest.fixture
def served(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The settings that would be deployed; the endpoint ends at once."""
    configs: list[Any] = []

    def start(config: Any, store: Any, gateway: Any = None) -> Any:
        configs.append(config)
        return SimpleNamespace(name=config.name)

    monkeypatch.setattr("forge_ray.pipeline.deploy", start)
    monkeypatch.setattr("forge_ray.cli.serve.wait_for_ctrl_c", lambda name: None)
    monkeypatch.setattr(deploy, "note_end", lambda deployment, store: None)
    return configs


def serve(catalog: Catalog, *words: str) -> Result:
    return CliRunner().invoke(cli, ["serve", *words, "--store", catalog.store.uri])


def test_an_alias_or_a_version_is_served_on_loopback(catalog: Catalog, served: list[Any]) -> None:
    model = version(catalog, "support")
    promotion.promote(catalog, model.id, "Support@Prod")
    for name in ("Support@Prod", model.id):
        done = serve(catalog, name, "--set", "port=8011")
        assert done.exit_code == 0, done.output
    assert [(one.name, one.models, one.host, one.port) for one in served] == [
        ("support-prod", ("Support@Prod",), "127.0.0.1", 8011),
        (model.id, (model.id,), "127.0.0.1", 8011),
    ]


def test_a_name_that_is_not_in_the_store_is_refused(catalog: Catalog, served: list[Any]) -> None:
    done = serve(catalog, "nobody")
    assert (done.exit_code, served) == (2, [])
    assert "nobody" in done.stderr
    missing = serve(catalog, "absent.yaml")
    assert missing.exit_code == 2
    assert "absent.yaml" in missing.stderr


def test_the_end_of_an_endpoint_of_this_process_is_recorded(catalog: Catalog, monkeypatch: pytest.MonkeyPatch) -> None:
    """One on a cluster keeps running when the command ends."""
    record: Deployment = deployment(catalog, "support", version(catalog, "support").id)
    for ours, state in ((False, "running"), (True, "stopped")):
        monkeypatch.setattr(deploy, "started_here", lambda ours=ours: ours)
        deploy.note_end(record, catalog.store)
        catalog.sync()
        assert catalog.last("deployment")[record.id].data["state"] == state


def test_a_run_says_before_it_starts_that_it_serves(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    printed: list[str] = []
    monkeypatch.setattr("forge_ray.cli.main.echo", lambda text, err=False: printed.append(text))

    def run(config: Any, store: Any) -> Any:
        printed.append("started")
        return SimpleNamespace(version=SimpleNamespace(status="accepted"), deployment=None)

    monkeypatch.setattr("forge_ray.pipeline.run", run)
    file = tmp_path / "run.yaml"
    file.write_text(
        "name: a\nbase_model: b\ndata: {sources: [{path: rows.jsonl}]}\nrelease: {alias: c}\n"
        "deploy: {name: support, models: [c], port: 8012}\n"
    )
    for words in ((), ("--set", "deploy=null")):
        done = CliRunner().invoke(cli, ["run", str(file), *words, "--store", str(tmp_path / "store")])
        assert done.exit_code == 0, done.output
    assert "'support' at its end on http://127.0.0.1:8012/v1" in printed[0]
    assert printed[1:] == ["started", "started"]
