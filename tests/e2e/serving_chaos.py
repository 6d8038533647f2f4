"""An endpoint behind HAProxy and the gateway, under load while its replicas are killed and its alias moves: a program of its
own, because HAProxy's switches count only for a Ray that starts after them.

    python tests/e2e/serving_chaos.py STORE --kills 10 --swaps 20 --clients 16

Prints one JSON object: requests, failures with their kinds, kills, swaps, how often the gateway sent a request again and
why, and whether each answer was its version's own. `--streams N`: so many clients stream. A stream that has begun when its
replica dies cannot be saved: where it ends with an error event it is counted apart from the failures. `--direct`: without
the gateway. `--plain`: Serve's own proxy, which sends nothing again, in place of HAProxy.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import re
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

from forge_ray.serve.haproxy import set_haproxy

if "--plain" not in sys.argv:
    set_haproxy()  # before ray is imported: it reads the switches then

import httpx
import ray
from conftest import make_tiny_model
from serving import MESSAGES, make_adapter, register

from forge_ray.config.base import parse
from forge_ray.config.release import AliasRoute, DeployConfig
from forge_ray.machine.cluster import connect
from forge_ray.models.import_model import import_model
from forge_ray.release import promotion
from forge_ray.store.catalog import Catalog
from forge_ray.store.files import Store

OK, TOLD = "ok", "stream ended by an error"


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def prepare(store: Store) -> list[str]:
    """A store with the tiny model and two adapters; returns the adapters' versions."""
    with tempfile.TemporaryDirectory() as folder, Catalog.open(store) as catalog:
        model = make_tiny_model(Path(folder) / "tiny")
        base = import_model(catalog, model, "tiny", licence="apache-2.0")
        promotion.promote(catalog, base.id, "tiny")
        return [register(catalog, make_adapter(model, Path(folder) / str(seed), seed), base, "a").id for seed in (1, 2)]


async def load(
    url: str, clients: int, streams: int, pause_s: float, stop: asyncio.Event
) -> tuple[Counter[str], dict[str, set[str]]]:
    """Clients that ask until `stop`; how their requests ended, and the texts that each version gave."""
    ends: Counter[str] = Counter()
    texts: dict[str, set[str]] = {}

    async def one(client: httpx.AsyncClient, stream: bool) -> None:
        body: dict[str, Any] = {
            "model": "bot@prod",
            "messages": MESSAGES,
            "temperature": 0,
            "max_tokens": 24,
            "stream": stream,
        }
        while not stop.is_set():
            await asyncio.sleep(pause_s)
            try:
                response = await client.post(f"{url}/v1/chat/completions", json=body)
            except httpx.HTTPError as error:
                ends[f"{type(error).__name__}: {error}"] += 1
                continue
            if response.status_code != 200:
                ends[f"{response.status_code} {response.text[:200]}"] += 1
            elif stream:
                ends[stream_end(response.text)] += 1
            else:
                ends[OK] += 1
                version = response.headers["x-forge-model-version"]
                texts.setdefault(version, set()).add(response.json()["choices"][0]["message"]["content"])

    limits = httpx.Limits(max_connections=clients, max_keepalive_connections=clients)
    async with httpx.AsyncClient(timeout=120, trust_env=False, limits=limits) as client:
        await asyncio.gather(*(one(client, number < streams) for number in range(clients)))
    return ends, texts


def stream_end(text: str) -> str:
    """Whole, ended by an error that says so, or broken."""
    if text.rstrip().endswith("data: [DONE]"):
        return OK
    last = text.rstrip().rpartition("\n")[2]
    return (
        TOLD
        if last.startswith("data: ") and "error" in json.loads(last.removeprefix("data: "))
        else f"broken: {text[-200:]}"
    )


@contextmanager
def gateway(to: str) -> Iterator[str]:
    """`forge gateway` in front of an endpoint; gives its URL."""
    words = [sys.executable, "-m", "forge_ray.cli", "gateway", "--to", to, "--port", "0", "--json"]
    process = subprocess.Popen(words, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        yield json.loads(process.stdout.readline())["url"]
        process.terminate()
        assert process.wait(30) == 0
    finally:
        process.kill()
        process.wait()


def sent_again(url: str) -> dict[str, int]:
    """Retries of the gateway by reason."""
    text = httpx.get(f"{url}/-/gateway/metrics", trust_env=False).text
    retries = re.findall(r'forge_gateway_retries_total\{reason="(\w+)"\} (\d+)', text)
    return {reason: int(number) for reason, number in retries}


async def chaos(arguments: argparse.Namespace, store: Store, versions: list[str]) -> dict[str, Any]:
    from forge_ray.serve.coordinator import find_coordinator
    from forge_ray.serve.deploy import base_url, deploy

    engine = {"precision": "fp32", "page_size": 16, "num_blocks": 256, "max_batch_tokens": 128}
    with Catalog.open(store) as catalog, ExitStack() as context:
        promotion.set_route(catalog, "bot@prod", AliasRoute(versions={versions[0]: 1}))
        config = parse(
            DeployConfig,
            {"name": "bot", "models": ["tiny"], "port": free_port(), "auth": "none", "engine": engine}
            | {"replicas": {"min": arguments.replicas, "max": arguments.replicas}},
        )
        deployment = deploy(config, catalog, wait_s=180)
        coordinator = find_coordinator(deployment.id)
        front = nullcontext(base_url(config)) if arguments.direct else gateway(base_url(config))
        url = context.enter_context(front)
        stop, random_ = asyncio.Event(), random.Random(arguments.seed)
        started = time.monotonic()
        loading = asyncio.create_task(load(url, arguments.clients, arguments.streams, arguments.pause_s, stop))
        kills = swaps = 0
        while kills < arguments.kills or swaps < arguments.swaps:
            await asyncio.sleep(0.5)
            if swaps < arguments.swaps:
                swaps += 1
                promotion.set_route(catalog, "bot@prod", AliasRoute(versions={versions[swaps % 2]: 1}))
            state = await coordinator.state.remote()
            seen_now = state["replicas"].values()
            whole = len(seen_now) >= arguments.replicas and all(seen["live"] and "pid" in seen for seen in seen_now)
            if kills < arguments.kills and whole:  # one at a time: an endpoint whose every replica is dead cannot answer
                kills += 1
                pid = random_.choice(sorted(seen["pid"] for seen in seen_now))
                os.kill(pid, signal.SIGKILL)
                while any(seen.get("pid") == pid for seen in (await coordinator.state.remote())["replicas"].values()):
                    await asyncio.sleep(0.2)
        await asyncio.sleep(2)
        stop.set()
        ends, texts = await loading
        again = {} if arguments.direct else sent_again(url)
    return {
        "requests": sum(ends.values()),
        "failed": sum(count for end, count in ends.items() if end not in (OK, TOLD)),
        "ends": dict(ends),
        "sent_again": again,
        "answers_per_version": {version: len(version_texts) for version, version_texts in texts.items()},
        "kills": kills,
        "swaps": swaps,
        "seconds": round(time.monotonic() - started, 1),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("store")
    parser.add_argument("--kills", type=int, default=10)
    parser.add_argument("--swaps", type=int, default=20)
    parser.add_argument("--clients", type=int, default=16)
    parser.add_argument("--streams", type=int, default=0)
    parser.add_argument("--pause", type=float, default=0, dest="pause_s", help="seconds between the requests of a client")
    parser.add_argument("--direct", action="store_true")
    parser.add_argument("--plain", action="store_true")
    parser.add_argument("--replicas", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    store = Store(arguments.store)
    versions = prepare(store)
    connect()
    try:
        result = asyncio.run(chaos(arguments, store, versions))
    finally:
        from ray import serve

        serve.shutdown()
        ray.shutdown()
    print(json.dumps(result))


if __name__ == "__main__":
    main()
