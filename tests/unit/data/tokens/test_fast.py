"""The fast encoder: proven where it is equal, refused where it is not, and never a reason for other ids."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from forge_ray.data.dataset.encoders import encoder_key, keep_proof, with_proven
from forge_ray.data.tokens import equality
from forge_ray.data.tokens.chat import inner_tokenizer, load_tokenizer_dir, with_fast
from forge_ray.data.tokens.equality import CONTINUED, Proof, prove
from forge_ray.data.tokens.fast import FastEncoder, open_fast
from forge_ray.data.tokens.hf import HfTokenizer
from forge_ray.store.files import Store, sha256_file

pytestmark = pytest.mark.unit
USER = [{"role": "user", "content": "Hello, wörld 🙂 1,234"}]
CHAT = [*USER, {"role": "assistant", "content": "Hi."}, {"role": "user", "content": "More?"}]
Change = Callable[[str, list[int]], list[int]]


class Changed:
    """A native encoder whose ids a test changes."""

    def __init__(self, native: Any, change: Change) -> None:
        self.native, self.change = native, change

    def encode_batch_flat(self, texts: list[str], add_special_tokens: bool = False) -> tuple[bytes, bytes]:
        flat, bounds = self.native.encode_batch_flat(texts, add_special_tokens=add_special_tokens)
        pieces = np.split(np.frombuffer(flat, np.uint32), np.frombuffer(bounds, np.uint64)[1:-1].astype(int))
        ids = [self.change(text, piece.tolist()) for text, piece in zip(texts, pieces, strict=True)]
        ends = np.cumsum([0, *map(len, ids)]).astype(np.uint64)
        return np.array([i for one in ids for i in one], np.uint32).tobytes(), ends.tobytes()


@pytest.fixture
def model(tiny_model_dir: Path) -> HfTokenizer:
    loaded = load_tokenizer_dir(tiny_model_dir)
    assert isinstance(loaded, HfTokenizer)
    return loaded


@pytest.fixture
def fast(model: HfTokenizer) -> FastEncoder:
    opened = open_fast(model.encoder.backend)
    assert isinstance(opened, FastEncoder)
    return opened


@pytest.fixture
def few_characters(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(equality, "swept", lambda: iter("aéß東🙂\u0301\u200d1 \n"))
    monkeypatch.setattr(equality, "NUM_MIXTURES", 300)
    monkeypatch.setattr(equality, "NUM_SHARED", 12)
    monkeypatch.setattr(equality, "LENGTHS", (*equality.LENGTHS[:13], 255))


def proof_of(model: HfTokenizer, fast: FastEncoder, change: Change | None = None) -> Proof:
    tried = FastEncoder(Changed(fast.native, change)) if change else fast
    return prove(model.encoder.backend, tried, sorted(model.special.ids))


def test_all_assigned_characters_are_looked_at_or_one_of_eight() -> None:
    characters = set(equality.swept())
    assert set(map(chr, [*range(0xD7FF)][:0x3000])) <= characters
    assert {"\u0301", "\uf900", "\U0001f642", "\U00010000", "\U000e0001"} <= characters
    assert 40_000 < len(characters) < 90_000
    "".join(characters).encode()


@pytest.mark.usefixtures("few_characters")
def test_an_equal_encoder_is_proven(model: HfTokenizer, fast: FastEncoder) -> None:
    proof = proof_of(model, fast)
    assert (proof.left, proof.difference) == ("", "")
    assert proof.num_texts > 1000


@pytest.mark.usefixtures("few_characters")
def test_a_character_at_which_they_differ_is_left_to_the_reference(model: HfTokenizer, fast: FastEncoder) -> None:
    def change(text: str, ids: list[int]) -> list[int]:
        return ids[::-1] if "ß" in text else ids

    proof = proof_of(model, fast, change)
    assert (proof.left, proof.difference) == ("ß", "")
    used = with_fast(model, FastEncoder(Changed(fast.native, change), proof.left))
    for text in ("Straße, wet", "a street"):
        assert used.written_ids(text) == model.written_ids(text)


@pytest.mark.usefixtures("few_characters")
@pytest.mark.parametrize(
    "is_wrong",
    [
        lambda text, before: text == "<|im_end|>a",  # beside a token
        lambda text, before: text == " " * 17,  # a run of one length
        lambda text, before: len(text) > CONTINUED and text[:CONTINUED] == before[:CONTINUED] != text,  # what it remembers
    ],
)
def test_an_encoder_that_differs_anywhere_else_is_refused(
    model: HfTokenizer, fast: FastEncoder, is_wrong: Callable[[str, str], bool]
) -> None:
    before = [""]

    def change(text: str, ids: list[int]) -> list[int]:
        last, before[0] = before[0], text
        return ids[:-1] if is_wrong(text, last) else ids

    assert "make other ids" in proof_of(model, fast, change).difference


def test_prompts_and_texts_have_the_ids_of_the_reference(model: HfTokenizer, fast: FastEncoder) -> None:
    asked: list[str] = []

    def change(text: str, ids: list[int]) -> list[int]:
        asked.append(text)
        return ids

    used = with_fast(model, FastEncoder(Changed(fast.native, change)))
    for messages in (USER, CHAT):
        assert used.prompt_ids(messages) == model.prompt_ids(messages)
    texts = ["Hello.", "", "a <|im_end|> b", "\x00\x04", "e\u0301 🙂"]
    assert used.text_ids(texts) == model.text_ids(texts)
    assert [used.piece_ids(text) for text in texts] == [model.piece_ids(text) for text in texts]
    assert any("More?" in text for text in asked), "a prompt with an earlier answer needs no offsets"


def test_a_text_that_it_refuses_is_encoded_by_the_reference(model: HfTokenizer, fast: FastEncoder) -> None:
    def change(text: str, ids: list[int]) -> list[int]:
        if "?" in text:
            raise ValueError("not supported")
        return ids

    refusing = FastEncoder(Changed(fast.native, change))
    texts = ["one", "two?", "three", "four?", "five"]
    assert with_fast(model, refusing).text_ids(texts) == model.text_ids(texts)
    assert (refusing.num_refused, refusing.failure) == (2, "")


def test_one_that_ends_is_not_asked_again(model: HfTokenizer, fast: FastEncoder, capsys: pytest.CaptureFixture[str]) -> None:
    class PanicException(BaseException):
        """As pyo3 names it."""

    num_asked = []

    def change(text: str, ids: list[int]) -> list[int]:
        num_asked.append(1)
        raise PanicException("index out of bounds")

    ending = FastEncoder(Changed(fast.native, change))
    used = with_fast(model, ending)
    for _ in range(2):
        assert used.prompt_ids(CHAT) == model.prompt_ids(CHAT)
    assert len(num_asked) == 1
    assert capsys.readouterr().err == f"error: {ending.failure}; tokenizers encodes from now on\n"
    assert "PanicException" in ending.failure


def test_endpoints_use_it_where_the_store_has_the_proof(model: HfTokenizer, tiny_model_dir: Path, tmp_path: Path) -> None:
    store = Store(str(tmp_path))
    key = encoder_key((file.name, sha256_file(file)) for file in tiny_model_dir.iterdir())

    def opened() -> FastEncoder | None:
        inner = inner_tokenizer(with_proven(model, store, tiny_model_dir))
        assert isinstance(inner, HfTokenizer)
        return inner.fast

    assert opened() is None
    keep_proof(store, key, Proof(10, "ß"))
    assert (chosen := opened()) is not None
    assert chosen.left == "ß"
    keep_proof(store, key, Proof(10, difference="one text differs"))
    assert opened() is None
