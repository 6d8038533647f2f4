"""Which encoder makes the ids of a tokenizer's texts: `tokenizers`, or a faster one that is proven to make the same.

    work/encoders/<digest>.json    the proof (`tokens/equality.py`) of one tokenizer's files with these versions

A dataset build proves, which takes some seconds once; endpoints and evaluations read what is proven. A difference that a
build sees later is kept in the place of the proof, so nobody uses that encoder again.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import asdict
from functools import lru_cache
from pathlib import Path

from forge_ray.data.dataset.version import load_tokenizer
from forge_ray.data.tokens.chat import inner_tokenizer, with_fast
from forge_ray.data.tokens.equality import EDITION, Proof, prove
from forge_ray.data.tokens.fast import REFERENCE, open_fast, versions
from forge_ray.data.tokens.hf import HfTokenizer
from forge_ray.data.tokens.template import ChatTokenizer
from forge_ray.data.tokens.text_tools import Tools
from forge_ray.records import ModelVersion, canonical_json, digest, hex_of
from forge_ray.store import paths
from forge_ray.store.files import Store, sha256_file

FOLDER = "encoders"
ID_FILES = ("tokenizer", "special_tokens_map", "added_tokens", "vocab", "merges")  # templates decide no ids of a text


def encoder_key(files: Iterable[tuple[str, str]]) -> str:
    """Of what decides whether the encoders agree: a tokenizer's files as (path, sha256), the versions, the texts."""
    of_tokenizer = sorted((path, hex_of(sha256)) for path, sha256 in files if path.startswith(ID_FILES))
    return hex_of(digest([EDITION, versions(), of_tokenizer]))[:32]


def key_of(model: ModelVersion) -> str:
    return encoder_key((entry.path, entry.sha256) for entry in model.files)


def kept_proof(store: Store, key: str) -> Proof | None:
    """What was proven of this tokenizer; None where nobody has looked."""
    path = paths.work(FOLDER, f"{key}.json")
    return Proof(**json.loads(store.read(path))) if store.exists(path) else None


def keep_proof(store: Store, key: str, proof: Proof) -> Proof:
    store.write(paths.work(FOLDER, f"{key}.json"), canonical_json(asdict(proof)))
    return proof


def prove_tokenizer(store: Store, model: str, key: str) -> Proof:
    """Compare the encoders on a model version's tokenizer, and keep the result."""
    return kept_proof(store, key) or keep_proof(store, key, _proof(load_tokenizer(store, model)))


def _proof(tokenizer: ChatTokenizer) -> Proof:
    inner = inner_tokenizer(tokenizer)
    if not isinstance(inner, HfTokenizer):
        return Proof(0, difference="mistral-common makes the ids of this tokenizer")
    if inner.encoder.backend is None:
        return Proof(0, difference=f"{REFERENCE} does not make the ids of this tokenizer")
    inner.encoder.reset()
    fast = open_fast(inner.encoder.backend)
    if isinstance(fast, str):
        return Proof(0, difference=fast)
    return prove(inner.encoder.backend, fast, sorted(inner.special.ids))


def with_proven(tokenizer: ChatTokenizer, store: Store, folder: Path) -> ChatTokenizer:
    """The tokenizer of a model's folder with the fast encoder, where the store has the proof that it is equal."""
    files = [file for file in folder.iterdir() if file.name.startswith(ID_FILES) and file.is_file()]
    proof = kept_proof(store, encoder_key((file.name, sha256_file(file)) for file in files))
    return tokenizer if proof is None or proof.difference else _with_fast(tokenizer, proof.left)


@lru_cache(maxsize=2)
def load_fast(store: Store, model: str, date: str, tools: Tools, left: str) -> ChatTokenizer:
    """`load_tokenizer` with the fast encoder, opened once a process. `left`: as in `Proof`."""
    return _with_fast(load_tokenizer(store, model, date, tools), left)


def _with_fast(tokenizer: ChatTokenizer, left: str) -> ChatTokenizer:
    inner = inner_tokenizer(tokenizer)
    if not isinstance(inner, HfTokenizer) or inner.encoder.backend is None:
        return tokenizer
    inner.encoder.reset()
    fast = open_fast(inner.encoder.backend, left)
    return tokenizer if isinstance(fast, str) else with_fast(tokenizer, fast)
