"""A token without a row in the embedding is refused when the model is imported, by name."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from click.testing import CliRunner

from forge_ray.cli.main import cli
from forge_ray.data.tokens.lost import AS_TEXT
from forge_ray.data.tokens.text_tools import write_form
from forge_ray.errors import PolicyError
from forge_ray.models.import_model import import_model
from forge_ray.store.catalog import Catalog

pytestmark = pytest.mark.unit


def test_token_beyond_the_embedding_is_named(tiny_model_dir: Path, tmp_path: Path, catalog: Catalog) -> None:
    folder = shutil.copytree(tiny_model_dir, tmp_path / "grown")
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    rows = json.loads((folder / "config.json").read_text())["vocab_size"]
    tokenizer["added_tokens"].append(
        {"id": rows, "content": "<|mine|>", "special": True, "single_word": False, "lstrip": False, "rstrip": False}
        | {"normalized": False}
    )
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    with pytest.raises(PolicyError, match=rf"the token '<\|mine\|>' has the id {rows}, and the embedding has {rows} rows"):
        import_model(catalog, folder, "grown")
    assert not catalog.store.exists("models") or not catalog.store.list("models")


def test_padded_embedding_is_fine(tiny_model_dir: Path, tmp_path: Path, catalog: Catalog) -> None:
    folder = shutil.copytree(tiny_model_dir, tmp_path / "padded")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"vocab_size": config["vocab_size"] + 64}))
    assert import_model(catalog, folder, "padded").name == "padded"


def test_check_says_what_a_template_supports(tiny_model_dir: Path, tmp_path: Path) -> None:
    store = str(tmp_path / "store")
    checked = CliRunner().invoke(cli, ["models", "check", str(tiny_model_dir), "--store", store, "--json"])
    assert checked.exit_code == 0, checked.output
    support = json.loads(checked.stdout)
    assert {"one turn", "several turns", "system prompt"} <= set(support["supported"])
    assert support["reasons"]["tool calls"] == "this model's template has no place for tool calls"
    assert support["ends"] == ["<|im_end|>"]
    assert "⟦Four.<|im_end|>⟧" in support["rendered"]
    printed = CliRunner().invoke(cli, ["models", "check", str(tiny_model_dir), "--store", store])
    assert "tool calls           no: this model's template has no place for tool calls" in printed.stdout
    imported = CliRunner().invoke(cli, ["models", "import", str(tiny_model_dir), "--name", "tiny", "--store", store])
    assert "its template has no place for: reasoning, tools" in imported.output
    assert AS_TEXT in printed.stdout
    assert AS_TEXT in imported.output
    folder = shutil.copytree(tiny_model_dir, tmp_path / "as-text")
    write_form(folder, "text")
    printed = CliRunner().invoke(cli, ["models", "check", str(folder), "--store", store])
    assert "parallel calls       yes" in printed.stdout
    assert "tool calls: hermes" in printed.stdout
    assert "⟦<tool_call>" in printed.stdout
    assert AS_TEXT not in printed.stdout
