"""Shadow traffic: versions that answer copies of real requests (no ray).

Their answers are measured and discarded. They never delay or fail the real answer: they start once it is admitted, and one
that cannot start at once is dropped.
"""

from __future__ import annotations

import asyncio
import logging
import time
from contextlib import aclosing

from forge_ray.errors import EngineError
from forge_ray.serve.admission import counted, sent_seats
from forge_ray.serve.choice import answer_choice
from forge_ray.serve.class_fields import ClassifyingRequest
from forge_ray.serve.class_results import logits_of_group, refuse_unreadable
from forge_ray.serve.context import Chosen, ServingContext
from forge_ray.serve.fields import ChatRequest, CompletionRequest
from forge_ray.serve.loaded import Loaded
from forge_ray.serve.openai import ApiError
from forge_ray.serve.prologue import refuse_other_kind, sizes_of, tokenise
from forge_ray.serve.prompt import choices_of, prompts_of

SHADOWS = "(shadows)"  # whose turn it is when they are tokenised
Shadowed = ChatRequest | CompletionRequest | ClassifyingRequest
MAX_CONCURRENT = 4  # per replica; each takes a place in the engine's batch

log = logging.getLogger(__name__)


class Shadows:
    """The shadows of one replica; the metrics count them separately, by status (200, 400, 503; 429: dropped)."""

    def __init__(self, context: ServingContext, max_concurrent: int = MAX_CONCURRENT) -> None:
        self._context = context
        self._max_concurrent = max_concurrent
        self._running: set[asyncio.Task[None]] = set()

    def start(self, body: Shadowed, chosen: Chosen) -> None:
        """Start the answers of `chosen.shadows` in the background; drop those beyond the limit."""
        for loaded in chosen.shadows:
            if len(self._running) >= self._max_concurrent:
                self._context.metrics.shadowed(chosen.name, loaded.version, 0.0, 429, 0)
                continue
            task = asyncio.create_task(self._answer(body, chosen.name, loaded))
            self._running.add(task)
            task.add_done_callback(self._running.discard)

    async def _answer(self, body: Shadowed, name: str, loaded: Loaded) -> None:
        started, status, num_tokens = time.monotonic(), 200, 0
        size = sum(characters for _, characters, _ in sizes_of(body))
        try:
            refuse_other_kind(loaded, body)
            prompts = await tokenise(self._context, loaded, prompts_of, body, SHADOWS, size)
            # The first choice, or text, represents all: a shadow is there to be measured, not to double the load
            if isinstance(body, ClassifyingRequest):
                document = prompts[0].ids
                refuse_unreadable(loaded, [document], self._context.config.limits.max_prompt_tokens)
                await logits_of_group(loaded, [document], SHADOWS)
            else:
                choice = choices_of(self._context.config.limits, loaded, body, prompts)[0]
                seats = sent_seats(self._context, SHADOWS, None, loaded, [choice])
                async with aclosing(counted(seats, 0, answer_choice(loaded, body, choice))) as parts:
                    async for part in parts:
                        num_tokens = part.num_tokens
        except ApiError as error:
            status = error.status
        except EngineError:
            status = 503
        except Exception:
            status = 500
            log.exception("a shadow of %s failed", loaded.version)
        self._context.metrics.shadowed(name, loaded.version, time.monotonic() - started, status, num_tokens)
