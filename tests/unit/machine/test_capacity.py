"""What Ray cannot place is refused at once on a Ray of one's own, and waited for on a cluster, with a line and an end."""

from __future__ import annotations

from typing import Any

import pytest

from forge_ray.errors import ClusterError, ConfigError
from forge_ray.machine import capacity
from forge_ray.machine.capacity import Demand, is_short, refuse_oversized, wait_for, wait_limit

pytestmark = pytest.mark.unit


class FakeGroup:
    """A placement group that is there after `waits` looks; each look takes as long as it is asked to."""

    def __init__(self, waits: int, clock: list[float]) -> None:
        self.waits, self.clock = waits, clock

    def wait(self, seconds: float) -> bool:
        self.waits -= 1
        if self.waits < 0:
            return int(seconds) > 0  # Ray counts whole seconds, and in none of them it does not look
        self.clock[0] += seconds
        return False


@pytest.fixture
def cluster(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Ray with 4 CPUs and 1 GPU, of which another holds the GPU; returns a function that sets how it answers."""
    import ray
    import ray.util

    clock, removed = [0.0], list[Any]()
    group = {"state": "CREATED", "name": "theirs", "bundles": {0: {"GPU": 1.0, "CPU": 1.0}}}
    old = {"state": "REMOVED", "name": "gone", "bundles": {0: {"GPU": 1.0}}}
    monkeypatch.setattr(ray, "cluster_resources", lambda: {"CPU": 4.0, "GPU": 1.0})
    monkeypatch.setattr(ray, "available_resources", lambda: {"CPU": 3.0})
    monkeypatch.setattr(ray.util, "placement_group_table", lambda: {"a" * 32: group, "b" * 32: old})
    monkeypatch.setattr(ray.util, "remove_placement_group", removed.append)
    monkeypatch.setattr(capacity.time, "monotonic", lambda: clock[0])

    def answers(waits: int, ours: bool = False) -> list[Any]:
        clock[0] = 0.0
        monkeypatch.setattr(ray.util, "placement_group", lambda bundles: FakeGroup(waits, clock))
        monkeypatch.setattr(capacity, "started_here", lambda: ours)
        return removed

    return answers


def demand(count: int = 1, cpus: float = 1, gpus: float = 0) -> Demand:
    return Demand("training", count, cpus, gpus, "train.scaling")


@pytest.mark.parametrize(
    ("asked", "words"),
    [
        (demand(count=8, cpus=2), "training needs 8 × 2 CPU, and this machine has 4 CPU"),
        (demand(gpus=2), "training needs 1 CPU and 2 GPU"),
        (demand(cpus=64), "64 CPU"),
        (demand(count=2, gpus=1), "1 GPU"),
        (demand(count=5), "5 × 1 CPU"),
    ],
)
def test_more_than_there_is_is_refused_at_once(cluster: Any, asked: Demand, words: str) -> None:
    cluster(waits=99, ours=True)
    for check in (refuse_oversized, wait_for):
        with pytest.raises(ConfigError) as error:
            check(asked)
        assert words in error.value.message
        assert "train.scaling" in error.value.hint


@pytest.mark.parametrize("asked", [demand(count=4), demand(count=40, cpus=0.1), demand(gpus=1), demand(count=0, cpus=9)])
def test_what_there_is_is_not_refused(cluster: Any, asked: Demand) -> None:
    cluster(waits=0, ours=True)
    refuse_oversized(asked)
    wait_for(asked)


def test_a_cluster_is_waited_for_with_a_line_every_ten_seconds(cluster: Any, capsys: pytest.CaptureFixture[str]) -> None:
    """More than it has now may come, for clusters grow; who holds what is missing is said."""
    removed = cluster(waits=3)
    wait_for(demand(count=2, gpus=1))
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 3
    assert "training needs 2 × 1 CPU and 1 GPU" in lines[0]
    assert "3 of 4 CPU are free and 0 of 1 GPU are free" in lines[0]
    assert "held: 1 CPU and 1 GPU by placement group theirs" in lines[0]
    assert "gone" not in lines[0]
    assert "30 of at most 1800 s" in lines[2]
    assert len(removed) == 1


def test_what_is_free_is_told_from_what_is_held(cluster: Any) -> None:
    cluster(waits=0)
    assert [is_short(demand(cpus=cpus, gpus=gpus)) for cpus, gpus in ((3, 0), (4, 0), (1, 1))] == [False, True, True]


def test_the_wait_ends_after_the_time_that_is_stated(cluster: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    removed = cluster(waits=10**6)
    monkeypatch.setenv("FORGE_WAIT_S", "25")
    with pytest.raises(ClusterError) as error:
        wait_for(demand(gpus=1))
    assert "waited 25 s (FORGE_WAIT_S=25)" in error.value.message
    assert "placement group theirs" in error.value.message
    assert "FORGE_WAIT_S" in error.value.hint
    assert len(removed) == 1


@pytest.mark.parametrize("most", ["0", "0.5", "1", "1.5"])
def test_a_short_wait_is_long_enough_to_look(most: str, cluster: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FORGE_WAIT_S", most)
    cluster(waits=0)
    wait_for(demand())
    cluster(waits=10**6)
    with pytest.raises(ClusterError) as error:
        wait_for(demand())
    assert f"FORGE_WAIT_S={most}" in error.value.message


@pytest.mark.parametrize("text", ["soon", "-1", "nan", "inf", "1 h"])
def test_a_time_that_is_not_one_is_refused(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FORGE_WAIT_S", text)
    with pytest.raises(ConfigError) as error:
        wait_limit()
    assert repr(text) in error.value.message


@pytest.mark.large
def test_a_real_cluster_says_who_holds_what(
    ray_cluster: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import ray
    from ray.util import placement_group, remove_placement_group

    num_cpus = ray.cluster_resources()["CPU"]
    held: Any = placement_group([{"CPU": num_cpus}], name="theirs")
    assert held.wait(60)
    monkeypatch.setattr(capacity, "started_here", lambda: False)
    monkeypatch.setattr(capacity, "SAY_EVERY_S", 0.2)
    monkeypatch.setenv("FORGE_WAIT_S", "1")
    with pytest.raises(ClusterError) as error:
        wait_for(demand(cpus=1))
    assert f"held: {num_cpus:g} CPU by placement group theirs" in error.value.message
    assert len(capsys.readouterr().err.splitlines()) >= 3
    remove_placement_group(held)
    monkeypatch.setenv("FORGE_WAIT_S", "60")
    wait_for(demand(cpus=num_cpus))
    wait_for(demand(count=2, cpus=num_cpus / 2))  # the first group holds nothing any more
