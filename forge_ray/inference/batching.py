"""transformers' continuous batching with this project's way to run a step.

transformers keeps the cache, admits requests and cuts prompts; what happens between the tokens of a step and the next token
of each request is here: attention over pages, the adapters of each row, and each request's own way to draw.
"""

from __future__ import annotations

import contextlib
import hashlib
import struct
import threading
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import ContinuousBatchingConfig, GenerationConfig
from transformers.generation.continuous_batching.continuous_api import (
    ContinuousBatchingManager,
    ContinuousBatchProcessor,
    OutputRouter,
)
from transformers.generation.continuous_batching.model_runner import ModelRunner
from transformers.generation.continuous_batching.requests import (
    FutureRequestState,
    GenerationOutput,
    RequestState,
    RequestStatus,
)

from forge_ray.config.release import EngineConfig
from forge_ray.inference.adapters import Adapters
from forge_ray.inference.attention import PAGED, can_page, step_of
from forge_ray.inference.pace import LONG_PROMPT, Pace
from forge_ray.inference.sampling import Drawing, draw

Deliver = Callable[[Sequence[GenerationOutput]], None]


class Batching(ContinuousBatchingManager):
    """The generation thread. `deliver` is called in that thread, once a step."""

    def __init__(self, model: Any, config: EngineConfig, adapters: Adapters, deliver: Deliver) -> None:
        batching = ContinuousBatchingConfig(
            page_size=config.page_size,
            num_blocks=config.num_blocks,
            max_batch_tokens=config.max_batch_tokens,
            max_requests_per_batch=min(config.max_running, config.max_batch_tokens),
            # Both would let a step be prepared before the last one's tokens are known, which drawing needs
            use_cuda_graph=False,
            use_async_batching=False,
            auto_switch_to_flash=False,  # it may fetch kernels from a hub
        )
        super().__init__(model, GenerationConfig(do_sample=False, eos_token_id=-1, pad_token_id=0), batching)
        self.output_router = Router(deliver)
        self.adapters = adapters
        self.logit_processor.supported_keys = {"drawing": Drawing}  # what comes with a request and stays with it
        self.pages = can_page(model)
        if self.pages:
            model.set_attn_implementation(PAGED)

    def _create_batch_processor(self) -> ContinuousBatchProcessor:
        name_thread("forge-engine")  # this is the generation thread, and what torch starts for it inherits the name
        processor = super()._create_batch_processor()
        processor.model_runner = Runner(processor, self)
        salt_prefixes(processor.cache)
        if processor.model_device.type == "cpu":
            read_in_pieces(processor.scheduler, Pace())
        return processor


def name_thread(name: str) -> None:
    """The calling thread's name for `top -H`, where the system has one: at most 15 characters."""
    with contextlib.suppress(OSError):
        Path(f"/proc/self/task/{threading.get_native_id()}/comm").write_text(name)


def read_in_pieces(scheduler: Any, pace: Pace) -> None:
    """From now on a long prompt is read at this pace where an answer is streamed, whose reader waits for it."""
    schedule = scheduler.schedule_batch

    def schedule_batch(token_budget: int, cache_budget: int) -> Any:
        active = list(scheduler.active_requests.values())
        states = [state for state in active if state.status == RequestStatus.DECODING]
        answering, is_waited_for = {state.request_id for state in states}, any(state.streaming for state in states)
        unread = [state for state in (*active, *scheduler.waiting_requests.values()) if state.request_id not in answering]
        is_long = any(len(state.initial_tokens) > LONG_PROMPT for state in unread)  # its last tokens cost most
        pace.end(answering)
        is_paced = is_waited_for and is_long
        scheduled = schedule(min(token_budget, len(states) + pace.piece) if is_paced else token_budget, cache_budget)
        requests: list[FutureRequestState] = scheduled[0] or []
        pace.begin(answering, sum(one.query_length for one in requests if one.state.request_id not in answering))
        return scheduled

    scheduler.schedule_batch = schedule_batch


def drawing_of(state: RequestState) -> Drawing:
    drawing: Drawing = state.logit_processor_kwargs["drawing"]
    return drawing


def request_name(number: int, adapter: str) -> str:
    """Names a request so that `salt_prefixes` knows its adapter."""
    return f"{number}:{adapter}"


def salt_prefixes(cache: Any) -> None:
    """Share the blocks of a common prefix among requests of one adapter only: another one's keys are other numbers.

    transformers finds blocks by a hash that chains from a prompt's first tokens; these are changed by the adapter's name.
    """
    search = cache.search_prefix_match
    cache.search_prefix_match = lambda name, ids: search(name, salted(name, ids))
    for allocator in cache.cache_allocators.values():
        mark = allocator.mark_complete_blocks
        allocator.mark_complete_blocks = partial(_mark_salted, mark)


def _mark_salted(mark: Callable[[str, list[int], int], None], name: str, ids: list[int], num_blocks: int) -> None:
    mark(name, salted(name, ids), num_blocks)


def salted(name: str, ids: list[int]) -> list[int]:
    adapter = name.partition(":")[2]
    if not adapter:
        return ids
    salt = struct.unpack("<4I", hashlib.blake2b(adapter.encode(), digest_size=16).digest())
    return [token ^ (word >> 1) for token, word in zip(ids, salt, strict=False)] + ids[4:]  # they are hashed as int32


class Router(OutputRouter):
    """Hands the results of a step over in one call."""

    def __init__(self, deliver: Deliver) -> None:
        super().__init__()
        self._deliver = deliver

    def deliver(self, output: GenerationOutput) -> None:
        self._deliver([output])

    def deliver_batch(self, outputs: list[GenerationOutput]) -> None:
        self._deliver(outputs)


class Runner(ModelRunner):
    """One step: forward pass, then a token for each request whose prompt is done."""

    def __init__(self, processor: ContinuousBatchProcessor, batching: Batching) -> None:
        super().__init__(
            logit_processor=processor.logit_processor,
            cb_config=processor.cb_config,
            inputs_and_outputs=processor.inputs_and_outputs,
            cache=processor.cache,
            do_sample=False,
            return_logprobs=False,
        )
        self._adapters = batching.adapters
        self._pages = batching.pages

    def _forward_process_and_sample(self, model: Any, batch_data: Any, *outputs: torch.Tensor) -> None:
        requests: list[FutureRequestState] = self.inputs_and_outputs.requests_in_batch  # type: ignore[union-attr]
        adapters = [drawing_of(request.state).adapter for request in requests]
        self._adapters.use(adapters, [request.query_length for request in requests])
        states = [request.state for request in requests if request.has_new_token]
        logits_indices = batch_data["logits_indices"][: len(states)]
        if self._pages:
            batch_data["step"] = step_of(requests, self.cache, model.dtype)
            # Four dimensions, so that no mask is made for the packed tokens; `paged_attention` does not read it
            batch_data["attention_mask"] = logits_indices.new_zeros((1, 1, 1, 1), dtype=torch.bool)
        if "logits_to_keep" in batch_data:
            batch_data["logits_to_keep"] = logits_indices
            logits = model(**batch_data).logits[0]
        else:
            logits = model(**batch_data).logits[0, logits_indices]
        # Counted from the start of the prompt: unchanged when a request is preempted and prefilled again
        positions = [len(state.initial_tokens) + state.generated_len() for state in states]
        drawn = draw(logits, [drawing_of(state) for state in states], positions)
        outputs[-1][0, : len(states)].copy_(drawn)
