"""The Engine over transformers' own continuous batching: one model, one paged cache, CPU and GPU (level 2).

Three threads touch the model's life: transformers' *generation thread* runs it, our *delivery thread* hands each result to
the request that waits for it and notices when the generation thread dies, and callers submit or (in `score`) hold the
generation thread still. Greedy answers equal `model.generate`; how a request samples is in `sampling.py`.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import queue
import secrets
import threading
import time
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import ContinuousBatchingConfig, GenerationConfig, PreTrainedModel
from transformers.generation.continuous_batching.continuous_api import ContinuousBatchingManager
from transformers.generation.continuous_batching.requests import GenerationOutput

from forge_ray.architecture import open_model
from forge_ray.config.release import EngineConfig
from forge_ray.errors import EngineError, PolicyError
from forge_ray.hardware import resolve_precision
from forge_ray.inference.engine import EngineHealth, Generation, GenerationRequest, Score, Token
from forge_ray.inference.sampling import Sampling, seeded_sampling_processors
from forge_ray.inference.scoring import score_continuations

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
POLL_S = 0.1  # how soon the delivery thread sees a dead generation thread
STALLED_AFTER_S = 300.0  # one forward pass of a full batch on a slow CPU takes well under a minute
CLOSE_AFTER_S = 60.0
SEED_BITS = 62


def load_engine(
    model_dir: Path, adapter_dir: Path | None, config: EngineConfig, use_gpu: bool | None = None
) -> TransformersEngine:
    """Load safetensors from local folders and start generating; `use_gpu` None: if the process sees a GPU."""
    on_gpu = torch.cuda.is_available() if use_gpu is None else use_gpu
    if on_gpu and not torch.cuda.is_available():
        raise EngineError(
            "the engine was given a GPU, but this process sees none", hint="set gpus to 0, or check the driver"
        )
    precision = resolve_precision(config.precision, on_gpu)
    model = load_model(model_dir, adapter_dir, DTYPES[precision], torch.device("cuda" if on_gpu else "cpu"))
    return TransformersEngine(model, config)


def load_model(model_dir: Path, adapter_dir: Path | None, dtype: torch.dtype, device: torch.device) -> PreTrainedModel:
    """The base model, with a PEFT adapter left unmerged: merging into bf16 weights would round the adapter away."""
    if not list(model_dir.glob("*.safetensors")):
        raise PolicyError(f"{model_dir} has no .safetensors weights", hint="convert the weights to safetensors first")
    model: Any = open_model(model_dir, dtype)
    if adapter_dir is not None:
        if not (adapter_dir / "adapter_model.safetensors").is_file():
            raise PolicyError(f"{adapter_dir} has no adapter_model.safetensors", hint="export the adapter as safetensors")
        from peft import PeftModel

        model = PeftModel.from_pretrained(model, adapter_dir, is_trainable=False).get_base_model()
    return model.to(device).eval().requires_grad_(False)


@dataclass(frozen=True)
class _Inbox:
    """Where one caller waits: a plain queue, or an asyncio queue that belongs to `loop`."""

    queue: Any
    loop: asyncio.AbstractEventLoop | None = None

    def put(self, item: GenerationOutput | EngineError) -> None:
        if self.loop is None:
            self.queue.put(item)
        else:
            with contextlib.suppress(RuntimeError):  # the loop closed: nobody waits any more
                self.loop.call_soon_threadsafe(self.queue.put_nowait, item)


class TransformersEngine:
    """`Engine` over one loaded model; made by `load_engine`."""

    def __init__(self, model: PreTrainedModel, config: EngineConfig) -> None:
        if config.page_size < 4:
            raise EngineError(f"engine.page_size={config.page_size} is less than 4", hint="use 16 or 32")
        self._model = model
        positions = int(getattr(model.config.get_text_config(), "max_position_embeddings", 0) or config.cache_tokens)
        self.max_positions = positions
        self.max_request_tokens = min(config.cache_tokens, positions)
        self.lacks: dict[str, str] = {}
        self._cache_tokens = config.cache_tokens
        self._numbers = itertools.count()
        self._inboxes: dict[str, _Inbox] = {}
        self._lock = threading.Lock()
        self._failure = ""
        self._closing = False
        self._progress = (-1, time.monotonic())
        self._manager = _start_manager(model, config)
        self._delivery = threading.Thread(target=self._deliver, name="engine-delivery", daemon=True)
        self._delivery.start()

    def generate(self, requests: Sequence[GenerationRequest]) -> list[Generation]:
        """Continue all `requests` as one continuous batch; results in the same order."""
        for request in requests:
            self._check(request)
        inbox = _Inbox(queue.SimpleQueue())
        order: list[str] = []
        done: dict[str, Generation] = {}
        try:
            for request in requests:
                order.append(self._submit(request, inbox, streaming=False))
            stops = dict(zip(order, (request.stop_token_ids for request in requests), strict=True))
            while len(done) < len(requests):
                output = _unwrap(inbox.queue.get())
                done[output.request_id] = _generation(output, stops[output.request_id])
        finally:
            self._forget([name for name in order if name not in done])
        return [done[name] for name in order]

    async def stream(self, request: GenerationRequest) -> AsyncIterator[Token]:
        """Tokens as they are made, the end last. Closing the iterator cancels the request."""
        self._check(request)
        inbox = _Inbox(asyncio.Queue(), asyncio.get_running_loop())
        name = self._submit(request, inbox, streaming=True)
        sent, finished = 0, False
        try:
            while not finished:
                output = _unwrap(await inbox.queue.get())
                finished = output.is_finished()
                generation = _generation(output, request.stop_token_ids if finished else ())
                for token_id in generation.token_ids[sent:]:
                    yield Token(token_id)
                sent = len(generation.token_ids)
            yield Token(None, generation.finish_reason)
        finally:
            if not finished:
                self._forget([name])

    def score(self, prompt_ids: Sequence[int], continuations: Sequence[Sequence[int]]) -> list[Score]:
        """Log-probability of each continuation after the same prompt: one prefill, then one padded batch."""
        longest = len(prompt_ids) + max((len(ids) for ids in continuations), default=0)
        if not prompt_ids:
            raise EngineError("the prompt has 0 tokens; there is nothing to continue", hint="give at least one token")
        if longest > self.max_positions:
            raise EngineError(
                f"prompt and longest continuation have {longest} tokens; the model has {self.max_positions} positions",
                hint="shorten the prompt",
            )
        self._raise_if_failed()
        try:
            with self._manager.pause():
                return score_continuations(self._model, prompt_ids, continuations)
        except RuntimeError as error:
            raise EngineError(f"scoring failed: {error}", hint="look for the cause in the log of this process") from error

    def health(self) -> EngineHealth:
        """Whether the generation thread lives and moves, and how many requests run and wait."""
        running, waiting = self._load()
        with self._lock:
            failure = self._failure
        if not failure and not self._manager.is_running():
            failure = "the generation thread is not running"
        idle_s = time.monotonic() - self._progress[1]
        if not failure and idle_s > STALLED_AFTER_S:
            failure = f"{running + waiting} requests are pending and no step ended for {idle_s:.0f} s"
        return EngineHealth(not failure, failure or ("generating" if running else "idle"), running, waiting)

    def close(self) -> None:
        """Stop generating; requests that are still pending fail with `EngineError`."""
        self._closing = True
        if self._manager.is_running():
            self._manager.stop(block=True, timeout=CLOSE_AFTER_S, hard_stop=True)
        self._fail("the engine was closed")
        self._delivery.join(timeout=CLOSE_AFTER_S)

    def _check(self, request: GenerationRequest) -> None:
        """Refuse what cannot be generated before anything of it is queued."""
        prompt, wanted = len(request.prompt_ids), request.max_new_tokens
        if prompt < 1 or wanted < 1:
            raise EngineError(
                f"prompt of {prompt} tokens, max_new_tokens={wanted}: both must be at least 1", hint="give a prompt"
            )
        if request.temperature < 0 or not 0 <= request.top_p <= 1:
            raise EngineError(
                f"temperature={request.temperature}, top_p={request.top_p}: want temperature >= 0 and top_p in 0..1",
                hint="temperature 0 is greedy, top_p 1 keeps every token",
            )
        if prompt + wanted > self.max_request_tokens:
            raise EngineError(
                f"prompt of {prompt} + max_new_tokens of {wanted} = {prompt + wanted} tokens exceed"
                f" {self.max_request_tokens} (cache: {self._cache_tokens}, positions of the model: {self.max_positions})",
                hint="shorten the prompt, lower max_new_tokens, or raise engine.num_blocks",
            )

    def _submit(self, request: GenerationRequest, inbox: _Inbox, streaming: bool) -> str:
        name = f"request-{next(self._numbers)}"
        seed = request.seed if request.seed is not None else secrets.randbits(SEED_BITS)
        with self._lock:
            self._raise_if_failed()
            self._inboxes[name] = inbox
        accepted = self._manager.add_request(
            list(request.prompt_ids),
            request_id=name,
            max_new_tokens=request.max_new_tokens,
            streaming=streaming,
            eos_token_id=list(request.stop_token_ids),
            sampling=Sampling(request.temperature, request.top_p, seed),
        )
        if accepted is None:
            self._forget([name])
            raise EngineError("the engine takes no more requests", hint="it is stopping: send the request again")
        return name

    def _forget(self, names: list[str]) -> None:
        """Stop waiting for these requests and take them out of the batch."""
        with self._lock:
            abandoned = [name for name in names if self._inboxes.pop(name, None)]
        for name in abandoned:
            self._manager.cancel_request(name)

    def _raise_if_failed(self) -> None:
        if self._failure:
            raise EngineError(self._failure, hint="the replica must be restarted; its log has the cause")

    def _load(self) -> tuple[int, int]:
        processor = self._manager.batch_processor
        queued = self._manager.input_queue.qsize()
        if processor is None:
            return 0, queued
        scheduler = processor.scheduler
        return len(scheduler.active_requests), len(scheduler.waiting_requests) + queued

    def _deliver(self) -> None:
        """The delivery thread: every result to its inbox; when generation ends, an error to those that still wait."""
        while True:
            output = self._manager.get_result(timeout=POLL_S)
            if output is not None:
                self._progress = (self._progress[0], time.monotonic())
                with self._lock:
                    inbox = self._inboxes.pop(output.request_id, None) if output.is_finished() else None
                    inbox = inbox or self._inboxes.get(output.request_id)
                if inbox is not None:  # none: cancelled while this result was under way
                    inbox.put(output)
                continue
            steps = getattr(self._manager, "current_batch", 0)
            if steps != self._progress[0] or not any(self._load()):
                self._progress = (steps, time.monotonic())
            if not self._manager.is_running() or self._manager.background_thread_status.fatal_error is not None:
                cause = self._manager.background_thread_status.fatal_error
                self._fail(f"the generation thread died: {cause}" if cause else "the engine was closed")
                return
            # The generation thread is not a daemon: without this, a program that forgot close() would never exit
            if not threading.main_thread().is_alive() and not self._closing:
                self._manager.stop(block=False, hard_stop=True)
                self._closing = True

    def _fail(self, reason: str) -> None:
        with self._lock:
            self._failure = self._failure or reason
            pending = list(self._inboxes.values())
            self._inboxes.clear()
        for inbox in pending:
            inbox.put(EngineError(reason, hint="send the request again; if it fails again, look at the engine's log"))


def _start_manager(model: Any, config: EngineConfig) -> ContinuousBatchingManager:
    batching = ContinuousBatchingConfig(
        page_size=config.page_size,
        num_blocks=config.num_blocks,
        max_batch_tokens=config.max_batch_tokens,
        # Both would let a step be prepared before the last one's tokens are known; sampling.py needs them
        use_cuda_graph=False,
        use_async_batching=False,
        auto_switch_to_flash=False,  # it may fetch kernels from a hub
    )
    greedy = GenerationConfig(do_sample=False, eos_token_id=-1, pad_token_id=0)
    manager: ContinuousBatchingManager = model.init_continuous_batching(greedy, batching)
    manager.logit_processor = seeded_sampling_processors()
    manager.start()
    return manager


def _unwrap(item: GenerationOutput | EngineError) -> GenerationOutput:
    if isinstance(item, EngineError):
        raise item
    if item.error is not None:
        raise EngineError(f"the request failed: {item.error}", hint="look for the cause in the log of this process")
    return item


def _generation(output: GenerationOutput, stop_token_ids: Sequence[int]) -> Generation:
    token_ids = tuple(output.generated_tokens)
    if token_ids and token_ids[-1] in stop_token_ids:
        return Generation(token_ids[:-1], "stop")
    return Generation(token_ids, "length")
