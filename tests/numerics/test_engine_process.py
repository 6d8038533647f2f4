"""The engine in a process of its own: the contract of every engine, and what the death of either side does."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import psutil
import pytest

from forge_ray.config.release import DeployConfig, EngineConfig
from forge_ray.errors import EngineError, PolicyError, RequestError, StoreError
from forge_ray.inference.choose import begin_beside, open_beside
from forge_ray.inference.engine import GenerationRequest, Token
from forge_ray.inference.engine_process import _reported
from forge_ray.inference.engine_wire import from_error, from_token, to_error, to_token
from forge_ray.inference.load import load_engine
from forge_ray.inference.own_process import ProcessEngine
from forge_ray.serve.engines import EnginePool
from forge_ray.store.files import Store
from tests import engine_contract
from tests.engine_contract import PROMPTS, WAIT_S, Reference

pytestmark = pytest.mark.numerics

CONFIG = EngineConfig(precision="fp32", page_size=16, num_blocks=32, max_batch_tokens=64)
LONG = GenerationRequest((5, 6, 7), 400, temperature=1.0, seed=1)


def beside(folder: Path, config: EngineConfig = CONFIG) -> ProcessEngine:
    engine = open_beside(None, folder, None, config, use_gpu=False, merge=False)
    assert isinstance(engine, ProcessEngine)
    return engine


@pytest.fixture(scope="module")
def engine(tiny_model_dir: Path) -> Iterator[ProcessEngine]:
    engine = beside(tiny_model_dir)
    yield engine
    engine.close()


@pytest.fixture(scope="module")
def peers(tiny_model_dir: Path, tmp_path_factory: pytest.TempPathFactory, engine: ProcessEngine) -> Reference:
    contract_reference = engine_contract.reference(tiny_model_dir, tmp_path_factory.mktemp("adapters"))
    for name, folder in contract_reference.folders.items():
        engine.load_adapter(name, folder)
    return contract_reference


@pytest.mark.parametrize("check", engine_contract.CONTRACT, ids=lambda check: check.__name__)
def test_contract(check: Callable[[ProcessEngine, Reference], None], engine: ProcessEngine, peers: Reference) -> None:
    check(engine, peers)


def test_tokens_scores_and_vectors_are_those_of_the_engine_in_this_process(
    engine: ProcessEngine, tiny_model_dir: Path
) -> None:
    here = load_engine(tiny_model_dir, None, CONFIG, use_gpu=False)
    try:
        request = GenerationRequest(tuple(PROMPTS[0]), 12, temperature=0.9, seed=3, num_logprobs=2, logit_bias=((9, 1.5),))
        assert tokens_of(engine, request) == tokens_of(here, request)
        assert engine.generate([replace(request, num_logprobs=None)]) == here.generate([replace(request, num_logprobs=None)])
        questions = [((5, 6), [(7,), (8, 9)]), ((5,), [(1, 2, 3)])]
        assert engine.score_all(questions) == here.score_all(questions)
        assert engine.embed([[5, 6, 7], [8]]) == here.embed([[5, 6, 7], [8]])
        assert (engine.max_request_tokens, engine.lacks) == (here.max_request_tokens, here.lacks)
    finally:
        here.close()


def test_an_error_arrives_as_what_it_was(capfd: pytest.CaptureFixture[str]) -> None:
    for error in (StoreError("a", "b"), RequestError("c", "d"), PolicyError("e", "f")):
        again = to_error(from_error(error))
        assert (type(again), again.message, again.hint) == (type(error), error.message, error.hint)
    assert to_error(_reported(RequestError("c", "d"))).message == "c"
    assert not capfd.readouterr().err
    other = to_error(_reported(KeyError("x")))
    assert "KeyError: 'x'" in capfd.readouterr().err  # where its message says that the cause is
    assert (type(other), other.message) == (EngineError, "the engine failed: KeyError: 'x'")
    assert type(to_error(["Path", "no error of ours", ""])) is EngineError
    for token in (Token(5), Token(None, "stop"), Token(5, None, -float("inf"), ((5, -0.1), (6, -2.5)))):
        assert to_token(from_token(token)) == token


def test_what_cannot_be_opened_is_refused_as_in_this_process(tmp_path: Path) -> None:
    before = set(psutil.Process().children())
    with pytest.raises(PolicyError, match=r"has no \.safetensors weights") as caught:
        beside(tmp_path)
    assert "safetensors" in caught.value.hint
    assert set(psutil.Process().children()) <= before


def test_pending_requests_are_counted_and_a_cancelled_one_is_not(engine: ProcessEngine) -> None:
    async def first_of() -> None:
        stream = engine.stream(LONG)
        await anext(stream)
        health = engine.health()
        assert (health.num_running, health.num_waiting, health.num_tokens) == (1, 0, 403)
        await stream.aclose()  # type: ignore[attr-defined]
        assert engine.health().num_tokens == 0

    asyncio.run(first_of())
    deadline = time.monotonic() + WAIT_S
    while engine.health().detail != "idle" and time.monotonic() < deadline:
        time.sleep(0.05)
    assert engine.health().detail == "idle"  # it left the batch of the other process too


def test_a_killed_process_fails_what_waits_and_is_not_healthy(tiny_model_dir: Path) -> None:
    engine = beside(tiny_model_dir)
    try:

        async def killed() -> None:
            stream = engine.stream(LONG)
            await anext(stream)
            engine._process.kill()
            async for _ in stream:
                pass

        with pytest.raises(EngineError, match=r"the engine's process ended \(-9\)") as caught:
            asyncio.run(asyncio.wait_for(killed(), WAIT_S))
        assert "send the request again" in caught.value.hint
        health = engine.health()
        assert (health.ok, health.detail) == (False, "the engine's process ended (-9)")
        for use in (lambda: engine.generate([LONG]), lambda: engine.score([1], [[2]]), lambda: tokens_of(engine, LONG)):
            with pytest.raises(EngineError, match="the engine's process ended"):
                use()
    finally:
        engine.close()


def test_closing_ends_the_process_and_what_waits_for_it(tiny_model_dir: Path) -> None:
    engine = beside(tiny_model_dir)

    async def closed() -> None:
        stream = engine.stream(LONG)
        await anext(stream)
        await asyncio.to_thread(engine.close)
        async for _ in stream:
            pass

    with pytest.raises(EngineError, match="the engine was closed"):
        asyncio.run(asyncio.wait_for(closed(), WAIT_S))
    assert engine._process.poll() is not None
    engine.close()


def test_a_process_that_says_nothing_is_not_healthy(engine: ProcessEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    os.kill(engine._process.pid, signal.SIGSTOP)
    try:
        monkeypatch.setattr("forge_ray.inference.own_process.SILENT_AFTER_S", 0.2)
        time.sleep(1.5)
        health = engine.health()
        assert not health.ok
        assert f"process {engine._process.pid} has said nothing for" in health.detail
    finally:
        os.kill(engine._process.pid, signal.SIGCONT)
    deadline = time.monotonic() + WAIT_S
    monkeypatch.setattr("forge_ray.inference.own_process.SILENT_AFTER_S", 60.0)
    while not engine.health().ok and time.monotonic() < deadline:
        time.sleep(0.05)
    assert engine.health().ok


def test_one_that_was_begun_before_takes_the_model(tiny_model_dir: Path) -> None:
    begun = begin_beside(CONFIG)
    assert begun is not None
    engine = open_beside(begun, tiny_model_dir, None, CONFIG, use_gpu=False, merge=False)
    assert isinstance(engine, ProcessEngine)
    assert engine._process is begun.process
    assert len(engine.generate([GenerationRequest((5, 6, 7), 3)])[0].token_ids) == 3
    engine.close()
    assert begun.process.returncode == 0
    assert begin_beside(EngineConfig(kind="vllm")) is None


def test_one_that_no_version_took_ends_without_a_word(capfd: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    pool = EnginePool(DeployConfig(name="classes", models=("mv_0",)), Store(str(tmp_path)))
    pool.begin()
    begun = pool._begun
    assert begun is not None
    pool.end_begun()
    assert begun.process.returncode == 0
    assert pool._begun is None
    assert "Traceback" not in capfd.readouterr().err
    pool.begin()
    begun = pool._begun
    pool.close()
    assert begun is not None
    assert begun.process.returncode == 0


HOLDER = """
import sys, time
from pathlib import Path
from forge_ray.config.release import EngineConfig
from forge_ray.inference.choose import open_beside

config = EngineConfig(precision="fp32", num_blocks=32)
engine = open_beside(None, Path(sys.argv[1]), None, config, use_gpu=False, merge=False)
print(engine._process.pid, flush=True)
time.sleep(600)
"""


def test_it_ends_with_the_process_that_started_it(tiny_model_dir: Path) -> None:
    holder = subprocess.Popen([sys.executable, "-c", HOLDER, str(tiny_model_dir)], stdout=subprocess.PIPE, text=True)
    assert holder.stdout is not None
    child = psutil.Process(int(holder.stdout.readline()))
    holder.kill()
    holder.wait()
    child.wait(WAIT_S)
    assert not child.is_running()


def tokens_of(engine: object, request: GenerationRequest) -> list[Token]:
    async def collect() -> list[Token]:
        return [token async for token in engine.stream(request)]  # type: ignore[attr-defined]

    return asyncio.run(collect())
