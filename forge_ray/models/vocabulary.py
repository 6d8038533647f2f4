"""Whether a model's tokenizer and its embedding agree: an id without a row ends a training after minutes, or an endpoint."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from forge_ray.errors import PolicyError


def refuse_rowless_tokens(folder: Path) -> None:
    """Raise `PolicyError` where the tokenizer of a folder has a token whose id the embedding has no row for. More rows than
    tokens are padding, and fine."""
    rows, tokens = num_rows(_json(folder / "config.json")), _tokens(folder)
    if rows is None or not tokens:
        return
    beyond = sorted((token_id, token) for token, token_id in tokens.items() if token_id >= rows)
    if beyond:
        token_id, token = beyond[0]
        raise PolicyError(
            f"{folder.name}: the token {token!r} has the id {token_id}, and the embedding has {rows} rows"
            f" ({len(beyond)} tokens are beyond it)",
            hint="resize the embedding (`model.resize_token_embeddings(len(tokenizer))`) and save the model again,"
            " or take the tokenizer that belongs to it",
        )


def num_rows(config: dict[str, Any]) -> int | None:
    """Of the embedding, as a model's `config.json` says; None where it does not."""
    for part in (config, config.get("text_config")):
        if isinstance(part, dict) and type(part.get("vocab_size")) is int:
            return int(part["vocab_size"])
    return None


def _tokens(folder: Path) -> dict[str, int]:
    """Token → id, of a `tokenizer.json` and the tokens added to it."""
    tokenizer = _json(folder / "tokenizer.json")
    added = [token for token in tokenizer.get("added_tokens", ()) if isinstance(token, dict)]
    tokens = {str(token.get("content")): token["id"] for token in added if type(token.get("id")) is int}
    for token_id, token in (_json(folder / "tokenizer_config.json").get("added_tokens_decoder") or {}).items():
        if str(token_id).isdecimal() and isinstance(token, dict):
            tokens[str(token.get("content"))] = int(token_id)
    model: Any = tokenizer.get("model")
    vocab = model.get("vocab") if isinstance(model, dict) else None
    if isinstance(vocab, dict):
        tokens |= {str(token): token_id for token, token_id in vocab.items() if type(token_id) is int}
    elif isinstance(vocab, list):
        tokens |= {str(entry[0]): number for number, entry in enumerate(vocab) if isinstance(entry, list) and entry}
    return tokens


def _json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError):
        return {}
    return value if isinstance(value, dict) else {}
