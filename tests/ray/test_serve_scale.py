"""Replicas that come and go under load: from none, up, down, and a rollout, without one broken stream."""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import httpx
import pytest
from serving import MESSAGES, config, free_port

from forge_ray.serve.deploy import base_url, deploy, undeploy
from forge_ray.store.catalog import Catalog
from forge_ray.store.endpoint_state import state_of
from forge_ray.store.files import Store

pytestmark = pytest.mark.ray

WAIT_S = 240
# Ten clients are 1,150 tokens while the engine has them, which on a busy machine is a part of the time; one is 115.
SCALING = {"min": 0, "max": 2, "target_tokens": 200, "upscale_delay_s": 0, "downscale_delay_s": 10}


def replica_states() -> Counter[str]:
    from ray import serve

    (application,) = serve.status().applications.values()
    (deployment,) = application.deployments.values()
    return Counter({str(state): count for state, count in deployment.replica_states.items()})


def wait_for(condition: Any, what: str) -> None:
    deadline = time.monotonic() + WAIT_S
    while not condition():
        assert time.monotonic() < deadline, f"{what}: {replica_states()}"
        time.sleep(0.2)


@contextmanager
def streams(url: str, clients: int, pause_s: float = 0) -> Iterator[Counter[str]]:
    """So many clients that stream one answer after the other; how each stream ended."""
    ends: Counter[str] = Counter()
    stop = threading.Event()
    body = {"model": "tiny", "messages": MESSAGES, "temperature": 0, "max_tokens": 100, "stream": True}

    def run() -> None:
        with httpx.Client(timeout=WAIT_S) as client:
            while not stop.is_set():
                try:
                    text = client.post(f"{url}/v1/chat/completions", json=body).text
                    ends["whole" if text.rstrip().endswith("data: [DONE]") else text[-200:]] += 1
                except httpx.HTTPError as error:
                    ends[repr(error)] += 1
                stop.wait(pause_s)

    threads = [threading.Thread(target=run) for _ in range(clients)]
    for thread in threads:
        thread.start()
    try:
        yield ends
    finally:
        stop.set()
        for thread in threads:
            thread.join()


def test_scaling_and_rollout_break_no_stream(ray_cluster: None, store: Store) -> None:
    deploy_config = config(free_port(), replicas=SCALING, limits={"max_new_tokens": 100, "max_wait_share": 1000})
    url = base_url(deploy_config)
    with Catalog.open(store) as catalog:
        first_deployment = deploy(deploy_config, catalog, wait_s=WAIT_S)
        assert replica_states()["RUNNING"] == 0
        assert state_of(catalog, first_deployment.id).state == "running"
        began = time.monotonic()
        first = httpx.post(
            f"{url}/v1/chat/completions", json={"model": "tiny", "messages": MESSAGES, "max_tokens": 4}, timeout=WAIT_S
        )
        assert first.status_code == 200  # it waited for a replica to start
        assert time.monotonic() - began > 1

        with streams(url, 10) as ends:
            wait_for(lambda: replica_states()["RUNNING"] == 2, "up")
            time.sleep(2)
        assert set(ends) == {"whole"}

        with streams(url, 1, 0.2) as ends:  # too little for two: one leaves while it answers
            wait_for(lambda: replica_states()["RUNNING"] == 1, "down")
            changed = config(
                deploy_config.port, replicas=SCALING | {"min": 1}, limits={"max_new_tokens": 101, "max_wait_share": 1000}
            )
            second = deploy(changed, catalog, wait_s=WAIT_S)  # a rollout: new replicas first
            served_by: set[str] = set()
            wait_for(
                lambda: (
                    served_by.add(httpx.get(f"{url}/health", timeout=WAIT_S).headers["x-forge-deployment"])
                    or second.id in served_by
                ),
                "rollout",
            )
            wait_for(lambda: sum(replica_states().values()) == 1, "old replicas leave")
        assert set(ends) == {"whole"}
        replaced = catalog.last("deployment")[first_deployment.id].data
        assert (replaced["state"], replaced["reason"]) == ("ended", f"replaced by {second.id}")
        undeploy(deploy_config.name, catalog)
