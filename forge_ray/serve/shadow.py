"""Shadows: versions that answer the same request unseen (no ray).

Nobody reads their answers. They never delay or fail the real one: they start once it was admitted, and what cannot start
at once is dropped.
"""

from __future__ import annotations

import asyncio
import logging
import time
from contextlib import aclosing

from forge_ray.errors import EngineError
from forge_ray.serve.choice import answer_choice
from forge_ray.serve.fields import ChatRequest, CompletionRequest
from forge_ray.serve.loaded import Loaded
from forge_ray.serve.openai import ApiError
from forge_ray.serve.prompt import choices_of, prompts_of
from forge_ray.serve.served import Chosen, Served

MOST_AT_ONCE = 4  # of a replica; each takes a place in the engine's batch

log = logging.getLogger(__name__)


class Shadows:
    """Those of one replica; the metrics count them apart, by outcome (200, 400, 503; 429: there was no room)."""

    def __init__(self, served: Served, most: int = MOST_AT_ONCE) -> None:
        self._served = served
        self._most = most
        self._running: set[asyncio.Task[None]] = set()

    def start(self, wanted: ChatRequest | CompletionRequest, chosen: Chosen) -> None:
        """Begin the answers of `chosen.shadows` in the background; drop those for which there is no room."""
        for loaded in chosen.shadows:
            if len(self._running) >= self._most:
                self._served.metrics.shadowed(chosen.name, loaded.version, 0.0, 429, 0)
                continue
            task = asyncio.create_task(self._answer(wanted, chosen.name, loaded))
            self._running.add(task)
            task.add_done_callback(self._running.discard)

    async def _answer(self, wanted: ChatRequest | CompletionRequest, name: str, loaded: Loaded) -> None:
        started, status, num_tokens = time.monotonic(), 200, 0
        try:
            loop = asyncio.get_running_loop()
            prompts = await loop.run_in_executor(self._served.tokenising, prompts_of, loaded.tokenizer, wanted)
            # The first choice stands for all: a shadow is there to be measured, not to double the load
            choice = choices_of(self._served.config.limits, loaded, wanted, prompts)[0]
            async with aclosing(answer_choice(loaded, wanted, choice)) as parts:
                async for part in parts:
                    num_tokens = part.num_tokens
        except ApiError as error:
            status = error.status
        except EngineError:
            status = 503
        except Exception:
            status = 500
            log.exception("a shadow of %s failed", loaded.version)
        self._served.metrics.shadowed(name, loaded.version, time.monotonic() - started, status, num_tokens)
