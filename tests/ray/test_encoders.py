"""Datasets by the fast encoder: the bytes of the reference's, also where it errs or ends in the midst of a build."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from forge_ray.config.base import parse
from forge_ray.config.data import DataConfig
from forge_ray.data.build import build as building
from forge_ray.data.build import encoded
from forge_ray.data.build.build import build, index_sources
from forge_ray.data.build.map import Job, run_job
from forge_ray.data.build.prepare import Prepared
from forge_ray.data.build.summaries import MapSummary
from forge_ray.data.dataset.encoders import keep_proof, kept_proof, key_of
from forge_ray.data.tokens.equality import Proof
from forge_ray.records import DatasetManifest, ModelVersion
from forge_ray.store.catalog import Catalog
from forge_ray.store.files import Store

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("ray_cluster")]
WORDS = ["über", "naïve", "東京", "🙂", "e\u0301", "12,345", "don't", "\r\n", "  ", "<|im_end|>", "\u200d", "plain", "words"]
ADD = {"type": "function", "function": {"name": "add", "parameters": {"type": "object", "properties": {"a": {}}}}}


def text(rng: random.Random) -> str:
    return " ".join(rng.choices(WORDS, k=rng.randint(2, 30)))


def chat(rng: random.Random) -> dict[str, Any]:
    roles = ("user", "assistant") * rng.randint(1, 3)
    return {"messages": [{"role": role, "content": text(rng)} for role in roles]}


def tools(rng: random.Random) -> dict[str, Any]:
    call = {"id": "call_0001", "type": "function", "function": {"name": "add", "arguments": json.dumps({"a": text(rng)})}}
    asks = [{"role": "user", "content": text(rng)}, {"role": "assistant", "tool_calls": [call]}]
    result = {"role": "tool", "tool_call_id": "call_0001", "content": text(rng)}
    return {"messages": [*asks, result, {"role": "assistant", "content": text(rng)}], "tools": [ADD]}


def judged(rng: random.Random) -> dict[str, Any]:
    return {"prompt": text(rng), "chosen": text(rng), "rejected": text(rng)}


SHAPES: dict[str, tuple[Callable[[random.Random], dict[str, Any]], dict[str, Any]]] = {
    "chat": (chat, {}),
    "tools": (tools, {"tools": "text"}),
    "text": (lambda rng: {"text": text(rng)}, {}),
    "preference": (judged, {}),
    "labels": (lambda rng: {"text": text(rng), "label": rng.choice("ab")}, {"form": "labels"}),
}


def stores(tmp_path: Path, store: Store) -> tuple[ModelVersion, Store, Store]:
    with Catalog.open(store) as catalog:
        base = catalog.model("tiny")
    fresh = [Store(str(tmp_path / name)) for name in ("one", "other")]
    for one in fresh:
        folder = Path(one.root) / "models"
        folder.mkdir(parents=True)
        (folder / base.id).symlink_to(Path(store.root) / f"models/{base.id}")
    return base, *fresh


def config_of(folder: Path, shape: str, num_rows: int = 300) -> DataConfig:
    make, more = SHAPES[shape]
    rng, path = random.Random(shape), folder / f"{shape}.jsonl"
    path.write_text("".join(json.dumps(make(rng)) + "\n" for _ in range(num_rows)))
    values = {"sources": [{"path": str(path)}], "sequence_length": 4096, "block_rows": 4, "max_invalid_fraction": 1}
    return parse(DataConfig, values | more)


def made(config: DataConfig, base: ModelVersion, store: Store) -> DatasetManifest:
    return build("rows", config, base, store, index_sources(config))


def assert_same(one: DatasetManifest, other: DatasetManifest) -> None:
    assert one.id == other.id
    assert [entry.model_dump() for entry in one.files] == [entry.model_dump() for entry in other.files]


def test_all_shapes_have_the_bytes_of_the_reference(store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base, own, other = stores(tmp_path, store)
    for shape in SHAPES:
        config = config_of(tmp_path, shape)
        reference = made(config, base, other)
        with monkeypatch.context() as patch:
            patch.setattr(encoded, "FAST_BYTES", 0)
            fast = made(config, base, own)
        assert_same(fast, reference)
        assert fast.encoder["fastokens"]
        assert fast.encoder["num_proven"] > 40_000
        assert fast.encoder["num_compared"] >= encoded.FIRST
        assert reference.encoder == {}
    assert kept_proof(own, key_of(base)) == Proof(fast.encoder["num_proven"], fast.encoder["left"])


@pytest.mark.parametrize("fault", ["differs", "raises", "panics"])
def test_a_fault_in_a_build_has_the_bytes_of_the_reference(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], fault: str
) -> None:
    """At one record behind those that every job compares; the whole build is made again, and no later one asks it."""
    base, own, other = stores(tmp_path, store)
    config = config_of(tmp_path, "text")
    monkeypatch.setattr(encoded, "FAST_BYTES", 0)
    keep_proof(own, key_of(base), Proof(1))
    keep_proof(other, key_of(base), Proof(1, difference="not asked"))
    reference = made(config, base, other)
    assert reference.encoder["unused"] == "not asked"

    def faulty(job: Job, **more: Any) -> MapSummary:
        from forge_ray.data.build import encoded
        from forge_ray.data.tokens.fast import FastEncoder

        class PanicException(BaseException):
            """As pyo3 names it."""

        encode, one_in = FastEncoder._encoded, encoded.ONE_IN

        def erring(self: FastEncoder, texts: list[str], add_special_tokens: bool) -> Any:
            results = list(encode(self, texts, add_special_tokens))
            plain = [n for n, ids in enumerate(results) if n > encoded.FIRST and ids is not None and "<|" not in texts[n]]
            for number in plain[:1]:
                results[number] = results[number][:-1]
            return results

        def ending(texts: list[str], add_special_tokens: bool = False) -> Any:
            raise (PanicException if fault == "panics" else RuntimeError)("index out of bounds")

        def failing(self: FastEncoder, texts: list[str], add_special_tokens: bool) -> Any:
            self.native = type("Native", (), {"encode_batch_flat": staticmethod(ending)})
            return encode(self, texts, add_special_tokens)

        FastEncoder._encoded = erring if fault == "differs" else failing  # type: ignore[method-assign]
        encoded.ONE_IN = 1
        try:
            return run_job(job, **more)
        finally:
            FastEncoder._encoded, encoded.ONE_IN = encode, one_in  # type: ignore[method-assign]

    monkeypatch.setattr(building, "run_job", faulty)
    faulted = made(config, base, own)
    assert_same(faulted, reference)
    why = faulted.encoder["unused"]
    assert "rec_" in why
    assert ("make other tokens" in why) == (fault == "differs")
    assert f"error: {why}; the whole build is encoded again" in capfd.readouterr().err
    assert why in Prepared(faulted, is_new=True).summary
    assert kept_proof(own, key_of(base)) == Proof(1, difference=why)
