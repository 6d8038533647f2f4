"""Shadows: versions that answer the same request unseen (level 4; no ray).

Nobody reads their answers. They never delay or fail the real one: they start once it was admitted, and what cannot start
at once is dropped.
"""

from __future__ import annotations

import asyncio
import logging
import time
from contextlib import aclosing

from prometheus_client import CollectorRegistry, Counter, Histogram

from forge_ray.errors import EngineError
from forge_ray.serve.fields import ChatRequest, CompletionRequest
from forge_ray.serve.metrics import WHOLE_REQUEST_S
from forge_ray.serve.openai import ApiError
from forge_ray.serve.prompt import choices_of, prompts_of
from forge_ray.serve.served import Loaded, Served

MOST_AT_ONCE = 4  # of a replica; each takes a place in the engine's batch

log = logging.getLogger(__name__)


class Shadows:
    """Those of one replica; `forge_shadow_*` count them by version and outcome (200, 400, 503, dropped)."""

    def __init__(self, served: Served, registry: CollectorRegistry, most: int = MOST_AT_ONCE) -> None:
        self._served = served
        self._most = most
        self.running: set[asyncio.Task[None]] = set()
        self.requests = Counter("forge_shadow_requests", "Answers of shadows", ("version", "status"), registry=registry)
        self.tokens = Counter("forge_shadow_tokens", "Tokens that shadows generated", ("version",), registry=registry)
        self.latency = Histogram(
            "forge_shadow_seconds", "Time of a shadow's answer", ("version",), buckets=WHOLE_REQUEST_S, registry=registry
        )

    def start(self, wanted: ChatRequest | CompletionRequest, shadows: tuple[Loaded, ...]) -> None:
        """Begin the answers of `shadows` in the background; drop those for which there is no room."""
        for loaded in shadows:
            if len(self.running) >= self._most:
                self.requests.labels(loaded.version, "dropped").inc()
                continue
            task = asyncio.create_task(self._answer(wanted, loaded))
            self.running.add(task)
            task.add_done_callback(self.running.discard)

    async def _answer(self, wanted: ChatRequest | CompletionRequest, loaded: Loaded) -> None:
        started, status = time.monotonic(), "200"
        try:
            loop = asyncio.get_running_loop()
            prompts = await loop.run_in_executor(self._served.tokenising, prompts_of, loaded.tokenizer, wanted)
            # The first choice stands for all: a shadow is there to be measured, not to double the load
            choice = choices_of(self._served.config.limits, loaded, wanted, prompts)[0]
            async with aclosing(loaded.engine.stream(choice.generation)) as tokens:  # type: ignore[type-var]
                async for token in tokens:
                    if token.token_id is not None:
                        self.tokens.labels(loaded.version).inc()
            self.latency.labels(loaded.version).observe(time.monotonic() - started)
        except ApiError as error:
            status = str(error.status)
        except EngineError:
            status = "503"
        except Exception:
            status = "500"
            log.exception("a shadow of %s failed", loaded.version)
        self.requests.labels(loaded.version, status).inc()
