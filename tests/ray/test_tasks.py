"""Work in tasks of Ray: every result is handed over, as many at once as asked, and what goes wrong is named."""

from __future__ import annotations

import itertools
import os
import sys
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import ray
from ray import cloudpickle

from forge_ray.errors import ClusterError, DataError
from forge_ray.machine import tasks
from forge_ray.machine.tasks import in_tasks

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("ray_cluster")]


@pytest.fixture(autouse=True)
def by_value() -> Iterator[None]:
    """Workers cannot import the modules of tests."""
    module = sys.modules[__name__]
    cloudpickle.register_pickle_by_value(module)
    yield
    cloudpickle.unregister_pickle_by_value(module)


def square(number: int) -> int:
    return number * number


def timed(number: int) -> tuple[float, float]:
    began = time.time()
    time.sleep(0.1)
    return began, time.time()


def lost(number: int, folder: Path, times: int) -> int:
    """The process of piece 1 ends, the first `times` it is tried; each try leaves a file."""
    if number == 1 and len(list(folder.iterdir())) < times:
        (folder / str(time.time_ns())).touch()
        os._exit(1)
    return number


def failing(number: int, folder: Path) -> int:
    if number == 0:
        raise DataError("row 3 is torn", hint="mend it")
    time.sleep(0.3)
    (folder / str(number)).touch()
    return number


def test_every_piece_has_its_result() -> None:
    results: list[int] = []
    in_tasks(square, range(20), results.append)
    assert sorted(results) == [number * number for number in range(20)]
    in_tasks(square, [], results.append)
    assert len(results) == 20


def test_no_more_at_once_than_asked() -> None:
    spans: list[tuple[float, float]] = []
    in_tasks(timed, range(4), spans.append, at_once=1)
    spans.sort()
    assert all(ended <= began for (_, ended), (began, _) in itertools.pairwise(spans))


def test_local_ray_with_more_slots_than_cores_is_not_filled(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tasks, "cpus", lambda: 1)
    assert tasks._slots(None)() == 1


def test_cluster_has_tasks_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tasks, "started_here", lambda: False)
    monkeypatch.setattr(ray, "cluster_resources", lambda: {"CPU": 6.0})
    monkeypatch.setattr(tasks, "COUNTED_FOR_S", 0.0)
    slots = tasks._slots(None)
    assert slots() == 12
    monkeypatch.setattr(ray, "cluster_resources", dict)  # its machines were taken away: what waits brings others
    assert slots() == 2
    assert tasks._slots(3)() == 3


OTHER_ENDS = (
    ray.exceptions.OutOfMemoryError("memory ran out\nby 3 GB"),
    ray.exceptions.ObjectLostError("00" * 28, None, ""),
)


@pytest.mark.parametrize("error", OTHER_ENDS, ids=lambda error: type(error).__name__)
def test_other_ends_of_a_piece_are_named(error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    def get(_: Any) -> Any:
        raise error

    monkeypatch.setattr(ray, "get", get)
    with pytest.raises(ClusterError, match=r"a piece of work \(square\) did not end: ") as caught:
        in_tasks(square, [1], lambda _: None)
    assert "finished pieces are kept" in str(caught.value.hint)


def test_errors_of_a_piece_are_its_own_and_nothing_runs_after_them(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="row 3 is torn") as caught:
        in_tasks(partial(failing, folder=tmp_path), range(6), lambda _: None, at_once=2)
    assert type(caught.value) is DataError
    assert caught.value.hint == "mend it"
    left = sorted(tmp_path.iterdir())
    time.sleep(0.5)
    assert sorted(tmp_path.iterdir()) == left


def test_errors_of_the_taker_end_it(tmp_path: Path) -> None:
    def refuse(number: int) -> None:
        raise DataError(f"not {number}")

    with pytest.raises(DataError, match="not 0"):
        in_tasks(square, [0], refuse)


def test_lost_process_is_tried_again(tmp_path: Path) -> None:
    results: list[int] = []
    in_tasks(partial(lost, folder=tmp_path, times=2), range(3), results.append)
    assert sorted(results) == [0, 1, 2]
    assert len(list(tmp_path.iterdir())) == 2


def test_piece_that_ends_every_process_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tasks, "RETRIES", 1)
    with pytest.raises(ClusterError, match=r"a piece of work \(lost\) was lost 2 times") as caught:
        in_tasks(partial(lost, folder=tmp_path, times=99), range(3), lambda _: None)
    assert caught.value.hint
    assert "the kernel's log" in caught.value.hint
    assert len(list(tmp_path.iterdir())) == 2
