"""Add tokens to a model: a version of its own, whose tokenizer has them and whose embedding has rows for them.

The row of a new token is the mean of the rows of the pieces that the tokenizer wrote it with before, in fp32, rounded once;
so is its row of an output projection with a weight of its own. An embedding that has more rows than the tokenizer has tokens
is filled first. The rows are where training begins: a LoRA trains them with `train.adapter.modules_to_save`.
"""

from __future__ import annotations

import json
import re
import shutil
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from forge_ray.errors import ConfigError, PolicyError
from forge_ray.models.dequantise import INDEX
from forge_ray.models.derived import make_version
from forge_ray.models.model_files import mistral_file, refuse_unsafe
from forge_ray.models.sandbox import refuse_bombs
from forge_ray.models.vocabulary import refuse_rowless_tokens
from forge_ray.records import ModelVersion, digest
from forge_ray.store import paths
from forge_ray.store.catalog import Catalog
from forge_ray.store.out_of_use import refuse_archived, refuse_withdrawn

if TYPE_CHECKING:
    from torch import Tensor

MAX_TOKENS = 10_000
MAX_BYTES = 4 << 20  # of the file that lists them
BEGINS_A_LIST = re.compile(r'\s*\[\s*(?:"|\n|$)')
TOKENIZER, CONFIG = "tokenizer.json", "config.json"
Pieces = dict[str, list[int]]  # token → ids of what it was written with


def read_tokens(path: Path) -> tuple[str, ...]:
    """The tokens of a file: a JSON list of strings, or one a line. Raises `ConfigError` for one that is empty or listed
    twice."""
    try:
        if path.stat().st_size > MAX_BYTES:
            raise ConfigError(f"{path} is larger than {MAX_BYTES} bytes", hint="give the new tokens alone, one a line")
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} cannot be read as tokens: {error}", hint="give a UTF-8 file, one token a line") from error
    values: Any = text.removesuffix("\n").split("\n")
    if text.lstrip().startswith("["):
        try:
            values = json.loads(text)
        except ValueError as error:
            if BEGINS_A_LIST.match(text):  # tokens such as [CITY] may stand one a line
                raise ConfigError(f"{path} begins as a JSON list and is none: {error}", hint="correct the list") from error
    tokens = [value.removesuffix("\r") if isinstance(value, str) else value for value in values]
    for number, token in enumerate(tokens, start=1):
        if not isinstance(token, str) or not token.strip():
            raise ConfigError(
                f"{path}: token {number} is {'empty' if isinstance(token, str) else 'not a string'}",
                hint="give one token a line, or a JSON list of strings",
            )
        if any("\ud800" <= char <= "\udfff" for char in token):
            raise ConfigError(
                f"{path}: token {number} has half of a character, {token!r}", hint="write it as UTF-8, without \\u escapes"
            )
    if not tokens:
        raise ConfigError(f"{path} lists no token", hint="give one token a line, or a JSON list of strings")
    (twice, count), *_ = Counter(tokens).most_common(1)
    if count > 1:
        raise ConfigError(f"{path}: {twice!r} is listed {count} times", hint="list each token once")
    if len(tokens) > MAX_TOKENS:
        raise ConfigError(f"{path} lists {len(tokens)} tokens, at most {MAX_TOKENS}", hint="list the tokens that rows need")
    return tuple(tokens)


def add_tokens(catalog: Catalog, parent: ModelVersion, tokens: Sequence[str], name: str) -> ModelVersion:
    """The version of `parent` with these tokens; the same call again returns the same version. Raises `ConfigError` where it
    has one of them already, `PolicyError` where the parent is out of use, or its files have no place for them."""
    if parent.weights != "full":
        raise ConfigError(f"{parent.id} is an adapter, which has no vocabulary", hint="add the tokens to its base model")
    refuse_withdrawn(catalog, parent.id)
    refuse_archived(catalog, parent.id)
    store, added = catalog.store, tuple(tokens)
    for version in catalog.all(ModelVersion):
        is_same = version.base_model == parent.id and version.added_tokens == added and not version.run
        if is_same and store.is_published(paths.model(version.id)):
            return version
    catalog.check_may("imported models")
    base = store.fetch_dir(paths.model(parent.id), files=parent.files)

    def write(folder: Path) -> None:
        shutil.copytree(base, folder, dirs_exist_ok=True)
        extend(folder, added, parent.id)
        refuse_unsafe(folder)
        refuse_bombs(folder)
        refuse_rowless_tokens(folder)

    source = f"{parent.id} with {len(added)} new tokens {digest(list(added))}"
    return make_version(catalog, [parent], write, "imported", name, source, added)


def extend(folder: Path, tokens: Sequence[str], model: str) -> None:
    """Add the tokens to a model's folder, in place; `model` is what errors call it."""
    if mistral_file(folder) is not None or not (folder / TOKENIZER).is_file():
        raise PolicyError(
            f"{model} has no {TOKENIZER} that its ids follow from, so no token can be added (Mistral's own tokenizers, and"
            " SentencePiece models alone)",
            hint="import the model with a tokenizer.json, or write the new words with the tokens that it has",
        )
    ids, pieces = _extend_tokenizer(folder, tokens, model)
    _extend_weights(folder, {ids[token]: pieces[token] for token in tokens}, model)


def _extend_tokenizer(folder: Path, tokens: Sequence[str], model: str) -> tuple[dict[str, int], Pieces]:
    """(id of each new token, the pieces that wrote it before)."""
    from tokenizers import AddedToken, Tokenizer

    tokenizer = Tokenizer.from_file(str(folder / TOKENIZER))
    pieces = {token: list(tokenizer.encode(token, add_special_tokens=False).ids) for token in tokens}
    for token, before in pieces.items():
        if tokenizer.token_to_id(token) is not None or len(before) == 1:
            raise ConfigError(f"{model} has the token {token!r} already", hint="remove it from the file of new tokens")
        if not before:
            raise ConfigError(
                f"{model} writes {token!r} with no piece at all, so there is nothing to begin its row with",
                hint="give a token of letters that its tokenizer keeps",
            )
    tokenizer.add_tokens([AddedToken(token, normalized=False) for token in tokens])
    tokenizer.save(str(folder / TOKENIZER))
    vocabulary = tokenizer.get_vocab(with_added_tokens=True)
    ids = {token: int(vocabulary[token]) for token in tokens}
    config = _json(folder / "tokenizer_config.json")
    if isinstance(config.get("added_tokens_decoder"), dict):
        own = {"lstrip": False, "normalized": False, "rstrip": False, "single_word": False, "special": False}
        config["added_tokens_decoder"] |= {str(ids[token]): {"content": token, **own} for token in tokens}
        _write(folder / "tokenizer_config.json", config)
    if (folder / "added_tokens.json").is_file():
        _write(folder / "added_tokens.json", _json(folder / "added_tokens.json") | ids)
    _require_in_use(folder, ids, model)
    return ids, pieces


def _require_in_use(folder: Path, ids: dict[str, int], model: str) -> None:
    """What opens the folder must write each token with its id alone, also within a text."""
    from transformers import AutoTokenizer

    tokenizer: Any = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    for token, number in ids.items():
        if tokenizer(f"a{token}b", add_special_tokens=False)["input_ids"].count(number) != 1:
            raise PolicyError(
                f"{model}: its tokenizer does not write {token!r} as the new token {number}",
                hint="give a token that no other token of the model is part of",
            )


def _extend_weights(folder: Path, pieces: dict[int, list[int]], model: str) -> None:
    """Rows of the embedding, and of an output projection with a weight of its own, for the new ids."""
    from safetensors import safe_open
    from safetensors.torch import load_file, save_file

    names = _vocabulary_weights(folder, model)
    places: dict[Path, list[str]] = {}
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            if held := sorted(names & set(file.keys())):
                places[path] = held
    if not places:
        raise PolicyError(
            f"{model} has none of the weights {', '.join(sorted(names))} in its files, so rows cannot be added",
            hint="save the model again with this release of transformers, and import that",
        )
    num_more = 0
    for path, held in places.items():
        weights = load_file(path)
        for name in held:
            before = weights[name].nbytes
            weights[name] = with_rows(weights[name], pieces)
            num_more += weights[name].nbytes - before
            num_rows = len(weights[name])
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata()
        save_file(weights, path, metadata)
    config = _json(folder / CONFIG)
    for part in (config, config.get("text_config")):
        if isinstance(part, dict) and "vocab_size" in part:
            part["vocab_size"] = num_rows
    _write(folder / CONFIG, config)
    index = _json(folder / INDEX)
    if "total_size" in index.get("metadata", {}):
        index["metadata"]["total_size"] += num_more
        _write(folder / INDEX, index)


def with_rows(weight: Tensor, pieces: dict[int, list[int]]) -> Tensor:
    """The weight, [V, …] or longer, with the mean of its rows `pieces[i]` at each row i, in its own dtype."""
    rows = max(len(weight), max(pieces) + 1)
    grown = weight.new_zeros((rows, *weight.shape[1:]))
    grown[: len(weight)] = weight
    for number, before in pieces.items():
        grown[number] = weight[before].float().mean(dim=0).to(weight.dtype)
    return grown


def _vocabulary_weights(folder: Path, model: str) -> set[str]:
    """Names of the weights that have a row for each token. `PolicyError` where there are more than an embedding and an
    output projection."""
    from forge_ray.models.architecture import empty_model

    opened = empty_model(folder)
    named = dict(opened.named_parameters(remove_duplicate=False))
    modules = [module for module in (opened.get_input_embeddings(), opened.get_output_embeddings()) if module is not None]
    own = {name for name, weight in named.items() for module in modules for one in module.parameters() if one is weight}
    rows = len(opened.get_input_embeddings().weight)
    others = sorted(name for name, weight in named.items() if name not in own and len(weight) == rows)
    if others:
        raise PolicyError(
            f"{model}: {others[0]} has a row for each token too, which is neither its embedding nor its output",
            hint="add tokens to a model whose vocabulary is in these two alone",
        )
    return own


def _json(path: Path) -> dict[str, Any]:
    value = json.loads(path.read_bytes()) if path.is_file() else {}
    return value if isinstance(value, dict) else {}


def _write(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
