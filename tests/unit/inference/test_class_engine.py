"""The engine of classifiers: texts of several callers share passes, in turns; what is cancelled or closed does not run."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import CancelledError
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from forge_ray.errors import EngineError
from forge_ray.inference import class_engine as module
from forge_ray.inference.class_engine import FAILURES, ClassEngine

pytestmark = pytest.mark.unit


class Passes:
    """Stands for forward passes: the logit of a text is its first token. The first pass waits until `go` is set."""

    def __init__(self) -> None:
        self.go, self.began = threading.Event(), threading.Event()
        self.sizes: list[list[int]] = []
        self.fails = 0

    def __call__(self, classifier: Any, documents: list[tuple[int, ...]]) -> Any:
        self.sizes.append([ids[0] for ids in documents])
        self.began.set()
        self.go.wait(30)
        if self.fails:
            self.fails -= 1
            raise RuntimeError("secret text")
        return np.array([[float(ids[0])] for ids in documents])


@pytest.fixture
def passes(monkeypatch: pytest.MonkeyPatch) -> Passes:
    passes = Passes()
    monkeypatch.setattr(module, "logits_of_pass", passes)
    return passes


@pytest.fixture
def engine(passes: Passes) -> Iterator[ClassEngine]:
    engine = ClassEngine(SimpleNamespace(max_text_tokens=64, max_batch_tokens=8))  # type: ignore[arg-type]
    yield engine
    passes.go.set()
    engine.close()


def test_callers_take_turns_and_share_passes(engine: ClassEngine, passes: Passes) -> None:
    first = engine.submit([(1, 0)], "a")
    assert passes.began.wait(30)
    many = [engine.submit([(n, 0)], "a") for n in range(2, 8)]
    other = engine.submit([(20, 0)], "b")
    health = engine.health()
    assert (health.num_running, health.num_waiting, health.num_tokens) == (1, 7, 16)
    passes.go.set()
    assert [float(future.result(30)[0, 0]) for future in (first, *many, other)] == [1, 2, 3, 4, 5, 6, 7, 20]
    assert passes.sizes == [[1], [2, 20, 3, 4], [5, 6, 7]]  # at most 8 tokens a pass, b's text before a's third
    assert engine.max_request_tokens == 64


def test_padding_counts_and_a_long_text_goes_alone(engine: ClassEngine, passes: Passes) -> None:
    futures = [engine.submit([(1,)])]
    assert passes.began.wait(30)
    futures += [engine.submit([(2,) * length]) for length in (2, 3, 5, 60)]
    passes.go.set()
    for future in futures:
        future.result(30)
    assert [len(one) for one in passes.sizes] == [1, 2, 1, 1]


def test_requests_that_all_left_before_their_turn_end_no_engine(engine: ClassEngine, passes: Passes) -> None:
    passes.go.set()
    deadline = time.monotonic() + 60
    for _ in range(sys.getrecursionlimit() + 50):  # more than nested calls could hold
        with engine._changed:
            assert engine.submit([(1,)]).cancel()
        while engine.health().num_waiting or engine._waiting:
            assert time.monotonic() < deadline
            time.sleep(0)
    assert float(engine.submit([(5,)]).result(30)[0, 0]) == 5


def test_what_is_cancelled_is_not_run(engine: ClassEngine, passes: Passes) -> None:
    first = engine.submit([(1,)])
    assert passes.began.wait(30)
    left, kept = engine.submit([(2,)]), engine.submit([(3,)])
    assert left.cancel()
    assert engine.health().num_waiting == 1
    passes.go.set()
    assert kept.result(30)[0, 0] == 3
    first.result(30)
    assert passes.sizes == [[1], [3]]
    with pytest.raises(CancelledError):
        left.result()


def test_a_failed_pass_fails_its_texts_alone_and_several_make_it_unhealthy(engine: ClassEngine, passes: Passes) -> None:
    passes.go.set()
    passes.fails = 1
    with pytest.raises(EngineError, match="the classifier failed: RuntimeError") as caught:
        engine.submit([(1,)]).result(30)
    assert "secret" not in str(caught.value)
    assert engine.submit([(2,)]).result(30)[0, 0] == 2
    assert engine.health().ok
    passes.fails = FAILURES
    for _ in range(FAILURES):
        with pytest.raises(EngineError):
            engine.submit([(1,)]).result(30)
    assert not engine.health().ok


def test_a_closed_engine_answers_nobody(engine: ClassEngine, passes: Passes) -> None:
    running = engine.submit([(1,)])
    assert passes.began.wait(30)
    waiting = engine.submit([(2,)])
    closer = threading.Thread(target=engine.close)
    closer.start()
    while not engine._is_closed:
        pass
    passes.go.set()
    closer.join(30)
    assert running.result(30)[0, 0] == 1
    with pytest.raises(EngineError, match="closed"):
        waiting.result(30)
    with pytest.raises(EngineError, match="closed"):
        engine.submit([(3,)])
