"""Tokens added to a model: what its tokenizer writes, what its embedding holds, and what is refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner

from forge_ray.cli.main import cli
from forge_ray.config.release import EngineConfig
from forge_ray.data.dataset.version import tokenizer_digest
from forge_ray.data.tokens.chat import load_tokenizer_dir
from forge_ray.errors import ConfigError, PolicyError
from forge_ray.inference.engine import GenerationRequest
from forge_ray.inference.load import load_engine
from forge_ray.models.import_model import import_model
from forge_ray.models.new_tokens import add_tokens, extend, read_tokens, with_rows
from forge_ray.records import Event, ModelVersion
from forge_ray.store.catalog import Catalog

pytestmark = pytest.mark.unit
TOKENS = ("<city>", "[street]", "Straßenbahn")


def opened(folder: Path) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, local_files_only=True).eval()


def folder_of(catalog: Catalog, version: ModelVersion) -> Path:
    return catalog.store.fetch_dir(f"models/{version.id}", files=version.files)


def variant(source: Path, target: Path, **settings: Any) -> Path:
    """The tiny model with these settings of its config, its weights drawn anew."""
    from transformers import AutoConfig, AutoModelForCausalLM

    folder = shutil.copytree(source, target)
    config = AutoConfig.from_pretrained(folder)
    for name, value in settings.items():
        setattr(config, name, value)
    torch.manual_seed(3)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    return folder


@pytest.mark.parametrize(("is_tied", "padding"), [(True, 0), (False, 2), (False, 64)])
def test_rows_are_the_means_of_the_old_pieces(
    tiny_model_dir: Path, tmp_path: Path, catalog: Catalog, is_tied: bool, padding: int
) -> None:
    old = load_tokenizer_dir(tiny_model_dir)
    num_tokens = json.loads((tiny_model_dir / "config.json").read_text())["vocab_size"]
    source = variant(tiny_model_dir, tmp_path / "m", tie_word_embeddings=is_tied, vocab_size=num_tokens + padding)
    parent = import_model(catalog, source, "tiny")
    version = add_tokens(catalog, parent, TOKENS, "tiny-more")
    assert (version.base_model, version.added_tokens) == (parent.id, TOKENS)
    assert parent.id in version.parents()
    assert tokenizer_digest(version) != tokenizer_digest(parent)
    folder = folder_of(catalog, version)
    tokenizer, before, after = load_tokenizer_dir(folder), opened(source), opened(folder)
    rows = max(num_tokens + padding, num_tokens + len(TOKENS))
    assert after.config.vocab_size == rows == json.loads((folder / "config.json").read_text())["vocab_size"]
    (old_text,), (new_text,) = old.text_ids(["a plain text"]), tokenizer.text_ids(["a plain text"])
    assert list(old_text) == list(new_text)
    for number, token in enumerate(TOKENS):
        (pieces,), (ids,) = old.text_ids([token]), tokenizer.text_ids([token])
        assert num_tokens + number in list(ids)
        assert len(ids) < len(pieces)
        pieces = [piece for piece in pieces if piece != old.pad_id][: len(pieces)]
        written = [piece for piece in pieces if piece not in set(ids)]  # what is around a text is there with both
        for get in ("get_input_embeddings", "get_output_embeddings"):
            weight, grown = (getattr(model, get)().weight for model in (before, after))
            assert torch.allclose(grown[num_tokens + number], weight[written].mean(dim=0), atol=1e-6)
            assert torch.equal(grown[:num_tokens], weight[:num_tokens])
    tied = after.get_input_embeddings().weight is after.get_output_embeddings().weight
    assert tied is is_tied
    with torch.no_grad():
        logits = [model(torch.tensor([list(old_text)])).logits[0, :, :num_tokens] for model in (before, after)]
    assert torch.equal(*logits)
    assert add_tokens(catalog, parent, TOKENS, "again").id == version.id


def test_weights_in_several_files_keep_their_index(tiny_model_dir: Path, tmp_path: Path, catalog: Catalog) -> None:
    source = shutil.copytree(tiny_model_dir, tmp_path / "sharded")
    (source / "model.safetensors").unlink()
    opened(tiny_model_dir).save_pretrained(source, max_shard_size="100KB")
    version = add_tokens(catalog, import_model(catalog, source, "sharded"), TOKENS, "more")
    folder = folder_of(catalog, version)
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    total = sum(weight.nbytes for weight in opened(folder).state_dict().values())
    assert len(set(index["weight_map"].values())) > 1
    assert index["metadata"]["total_size"] == total


def test_version_is_served(tiny_model_dir: Path, catalog: Catalog) -> None:
    version = add_tokens(catalog, import_model(catalog, tiny_model_dir, "tiny"), TOKENS, "more")
    folder = folder_of(catalog, version)
    tokenizer = load_tokenizer_dir(folder)
    prompt = tuple(tokenizer.prompt_ids([{"role": "user", "content": "Where is <city>?"}], None))
    (new,) = [int(number) for number in prompt if tokenizer.decode([number]) == "<city>"]
    engine = load_engine(folder, None, EngineConfig(precision="fp32", num_blocks=16), use_gpu=False)
    try:
        favoured = GenerationRequest(prompt, 2, logit_bias=((new, 1000.0),))
        (answer,) = engine.generate([favoured])
    finally:
        engine.close()
    assert answer.token_ids == (new, new)


@pytest.mark.parametrize(
    ("text", "tokens"),
    [
        ("<city>\n[street]\n", ("<city>", "[street]")),
        ('["<city>", " x y"]', ("<city>", " x y")),
        ("[a]\r\n[b]\r\n", ("[a]", "[b]")),
        ("\ufeff<city>\n<b>\n", ("<city>", "<b>")),  # a mark of UTF-8 is no part of the token
        ('\ufeff["<city>"]', ("<city>",)),
    ],
)
def test_file_is_a_token_a_line_or_a_list(tmp_path: Path, text: str, tokens: tuple[str, ...]) -> None:
    path = tmp_path / "tokens"
    path.write_bytes(text.encode())
    assert read_tokens(path) == tokens


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "token 1 is empty"),
        (b"<a>\n\n<b>\n", "token 2 is empty"),
        (b'["<a>", 7]', "token 2 is not a string"),
        (b"<a>\n<b>\n<a>\n", "'<a>' is listed 2 times"),
        (b"\xff\xfe", "cannot be read as tokens"),
        (b"[]", "lists no token"),
        (b'["<a>", "<b>",]', "begins as a JSON list and is none"),
        (b'[\n  "<a>",\n  "<b>"\n', "begins as a JSON list and is none"),
        (b'["<a>", "\\ud800"]', "token 2 has half of a character"),
        ("\n".join(f"<{n}>" for n in range(10_001)).encode(), "lists 10001 tokens, at most 10000"),
    ],
)
def test_file_that_is_no_list_of_tokens_is_refused(tmp_path: Path, content: bytes, reason: str) -> None:
    path = tmp_path / "tokens"
    path.write_bytes(content)
    with pytest.raises(ConfigError, match=reason) as caught:
        read_tokens(path)
    assert caught.value.hint


def test_tokens_that_are_there_are_refused(tiny_model_dir: Path, catalog: Catalog) -> None:
    parent = import_model(catalog, tiny_model_dir, "tiny")
    for token in ("<|im_end|>", "a"):
        with pytest.raises(ConfigError, match=r"has the token .* already"):
            add_tokens(catalog, parent, ("<new>", token), "more")
    assert [one.id for one in catalog.all(ModelVersion)] == [parent.id]
    assert [path.name for path in catalog.store.local("models").iterdir()] == [parent.id]


def test_nothing_is_made_of_a_version_out_of_use(tiny_model_dir: Path, catalog: Catalog) -> None:
    parent = import_model(catalog, tiny_model_dir, "tiny")
    version = add_tokens(catalog, parent, TOKENS, "more")
    catalog.store.delete_dir(f"models/{version.id}")
    assert add_tokens(catalog, parent, TOKENS, "more").id == version.id  # made again where its files are gone
    assert catalog.store.is_published(f"models/{version.id}")
    catalog.append(Event(kind="model", subject=parent.id, data={"state": "archived"}))
    with pytest.raises(PolicyError, match=f"{parent.id} is archived"):
        add_tokens(catalog, parent, TOKENS, "more")
    catalog.append(Event(kind="model", subject=parent.id, data={"state": "withdrawn", "erasure": "er_1"}))
    with pytest.raises(PolicyError, match=f"{parent.id} learned from rows that er_1 erased"):
        add_tokens(catalog, parent, TOKENS, "more")


@pytest.mark.parametrize("is_mistral", [True, False])
def test_tokenizers_that_cannot_grow_are_refused(tiny_model_dir: Path, tmp_path: Path, is_mistral: bool) -> None:
    folder = shutil.copytree(tiny_model_dir, tmp_path / "model")
    if is_mistral:
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | {"model_type": "mistral"}))
        (folder / "tekken.json").write_text("{}")
    else:
        (folder / "tokenizer.json").unlink()
    with pytest.raises(PolicyError, match=r"mv_1 has no tokenizer\.json that its ids follow from"):
        extend(folder, TOKENS, "mv_1")


def test_rows_in_bf16_are_rounded_once() -> None:
    weight = torch.randn(7, 5, generator=torch.Generator().manual_seed(0)).bfloat16()
    grown = with_rows(weight, {8: [0, 3, 6]})
    assert grown.shape == (9, 5)
    assert torch.equal(grown[8], weight[[0, 3, 6]].float().mean(dim=0).bfloat16())
    assert torch.equal(grown[:7], weight)


def test_command_imports_the_parent_and_the_version(tiny_model_dir: Path, tmp_path: Path) -> None:
    (tmp_path / "tokens.txt").write_text("\n".join(TOKENS))
    arguments = ["models", "import", str(tiny_model_dir), "--name", "tiny", "--store", str(tmp_path / "store"), "--json"]
    done = CliRunner().invoke(cli, [*arguments, "--alias", "more", "--add-tokens", str(tmp_path / "tokens.txt")])
    assert done.exit_code == 0, done.output
    record = json.loads(done.stdout)
    assert record["added_tokens"] == list(TOKENS)
    plain = json.loads(CliRunner().invoke(cli, arguments).stdout)
    assert plain["id"] == record["base_model"] != record["id"]
