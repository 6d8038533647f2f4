"""The tiny model's tokenizer, and the grammars over its vocabulary."""

from __future__ import annotations

from pathlib import Path

import pytest
from tokenizers import Tokenizer

from forge_ray.inference.grammar import Grammars, load_grammars


@pytest.fixture(scope="module")
def tokenizer(tiny_model_dir: Path) -> Tokenizer:
    return Tokenizer.from_file(str(tiny_model_dir / "tokenizer.json"))


@pytest.fixture(scope="module")
def grammars(tiny_model_dir: Path, tokenizer: Tokenizer) -> Grammars:
    grammars = load_grammars(tiny_model_dir, tokenizer.get_vocab_size())
    assert isinstance(grammars, Grammars)
    return grammars
