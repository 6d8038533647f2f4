"""One set of counters in an actor, asked by several replicas at once: the limit holds for all of them together."""

from __future__ import annotations

import asyncio
from itertools import chain
from typing import Any

import pytest
import ray

from forge_ray.serve.keys import ApiKey
from forge_ray.serve.limits import Counters

pytestmark = pytest.mark.ray

KEY = ApiKey(id="fk_0", name="app", sha256="", models=("*",), rpm=50, tpm=500, concurrency=60)


@ray.remote(num_cpus=0.5)
def replica(counters: Any, name: str, num_requests: int) -> list[str]:
    """Asks for many requests at once, as a replica's clients do; what each was answered."""
    from types import SimpleNamespace

    from forge_ray.serve.context import Caller, Chosen
    from forge_ray.serve.limits import admission
    from forge_ray.serve.metrics import Metrics
    from forge_ray.serve.openai import ApiError

    admit = admission(counters.take.remote, counters.settle.remote, name, Metrics("bot", name))
    chosen = Chosen("support", SimpleNamespace(version="mv_1"))  # type: ignore[arg-type]

    async def one() -> str:
        try:
            admitted = await admit(Caller("r", KEY), chosen, 4, 6)
        except ApiError as error:
            return error.message.partition(" is limited to ")[2].partition(";")[0]
        await asyncio.sleep(0.05)
        admitted.close(4, 1, 200)
        return ""

    async def all_of_them() -> list[str]:
        answers = await asyncio.gather(*(one() for _ in range(num_requests)))
        await asyncio.sleep(0.2)  # what was not used is on its way back
        return answers

    return asyncio.run(all_of_them())


def test_replicas_share_one_limit(ray_cluster: None) -> None:
    counters: Any = ray.remote(Counters).options(num_cpus=0).remote()
    answers = list(chain(*ray.get([replica.remote(counters, f"r{number}", 40) for number in range(3)])))
    assert len(answers) == 120
    assert answers.count("") == 50
    assert {refusal for refusal in answers if refusal} <= {
        "50 requests a minute",
        "500 tokens a minute, and this request may need 10",
    }
    # 50 answers used 5 tokens each of the 10 that were reserved
    verdict = ray.get(counters.take.remote(KEY.model_copy(update={"rpm": 0}), "last", "r0", 10))
    assert verdict.headers["x-ratelimit-remaining-tokens"] == str(500 - 50 * 5 - 10)
