"""The Engine over transformers' own continuous batching: one model, one paged cache, CPU and GPU.

Three threads touch the model's life: the *generation thread* runs it and hands each result to the request that waits for it
(`batching.py`), our *watching thread* notices when that one dies, and callers submit or (in `score` and `embed`) hold the
generation thread still. Greedy answers equal `model.generate`, under each adapter those of PEFT.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import queue
import secrets
import threading
import time
from collections import defaultdict
from collections.abc import AsyncIterator, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel
from transformers.generation.continuous_batching.requests import GenerationOutput

from forge_ray.config.release import EngineConfig
from forge_ray.errors import EngineError, RequestError
from forge_ray.inference.adapters import Adapters, Lora, read_adapter
from forge_ray.inference.batching import Batching, request_name
from forge_ray.inference.embedding import MAX_INPUTS, mean_states
from forge_ray.inference.engine import EngineHealth, Generation, GenerationRequest, Question, Score, Token
from forge_ray.inference.grammar import Grammars
from forge_ray.inference.projection import AdapterRows, project
from forge_ray.inference.sampling import Drawing, check_drawing
from forge_ray.inference.scoring import score_questions

POLL_S = 0.1  # how soon the watching thread sees a dead generation thread
STALLED_AFTER_S = 300.0  # one forward pass of a full batch on a slow CPU takes well under a minute
CLOSE_AFTER_S = 60.0
SEED_BITS = 62
OWN = "(own)"  # the adapter that an engine was started with, among those of its model


@dataclass(frozen=True)
class _Pending:
    """A request under way, and where its caller waits: a plain queue, or an asyncio queue that belongs to `loop`."""

    drawing: Drawing
    queue: Any
    loop: asyncio.AbstractEventLoop | None = None

    @property
    def num_tokens(self) -> int:
        request = self.drawing.request
        return len(request.prompt_ids) + request.max_new_tokens


class TransformersEngine:
    """`Engine` over one loaded model; made by `load.load_engine`. `own`: the adapter of requests that name none."""

    def __init__(
        self, model: PreTrainedModel, config: EngineConfig, grammars: Grammars | str, own: Lora | None = None
    ) -> None:
        if config.page_size < 4:
            raise EngineError(f"engine.page_size={config.page_size} is less than 4", hint="use 16 or 32")
        self._model = model
        self._config = config
        text = model.config.get_text_config()
        positions = int(getattr(text, "max_position_embeddings", 0) or config.cache_tokens)
        self.vocab_size = int(text.vocab_size)
        self.max_positions = positions
        self.max_request_tokens = min(config.cache_tokens, positions)
        self._grammars = grammars
        self.lacks: dict[str, str] = {} if isinstance(grammars, Grammars) else {"json_schema": f"vllm ({grammars})"}
        self._numbers = itertools.count()
        self._pending: dict[str, _Pending] = {}
        self._num_tokens = 0
        self._lock = threading.Lock()
        self._alone = threading.Lock()
        self._loading = threading.Lock()
        self._failure = ""
        self._closing = False
        self._progress = (-1, time.monotonic())
        rows = AdapterRows()
        products = project(model, rows)
        self._layers: dict[str, Any] = {name: model.get_submodule(name) for one in products for name in one.names}
        self._adapters = Adapters(products, rows)
        self._own = ""
        if own is not None:
            self._own = OWN
            self._adapters.load(OWN, own)
        self._batching = Batching(model, config, self._adapters, self._deliver)
        self._batching.start()
        self._watching = threading.Thread(target=self._watch, name="engine-watching", daemon=True)
        self._watching.start()

    def generate(self, requests: Sequence[GenerationRequest]) -> list[Generation]:
        """Continue all `requests` as one continuous batch; results in the same order."""
        drawings = [self._drawing(request) for request in requests]
        results: queue.SimpleQueue[GenerationOutput | EngineError] = queue.SimpleQueue()
        order: list[str] = []
        done: dict[str, Generation] = {}
        try:
            for drawing in drawings:
                order.append(self._submit(_Pending(drawing, results), streaming=False))
            stops = dict(zip(order, (request.stop_token_ids for request in requests), strict=True))
            while len(done) < len(requests):
                output = _unwrap(results.get())
                done[output.request_id] = _generation(output, stops[output.request_id])
        finally:
            self._forget([name for name in order if name not in done])
        return [done[name] for name in order]

    async def stream(self, request: GenerationRequest) -> AsyncIterator[Token]:
        """Tokens as they are made, the end last. Closing the iterator cancels the request."""
        if request.json_schema:  # may take a moment to compile
            drawing = await asyncio.to_thread(self._drawing, request)
        else:
            drawing = self._drawing(request)
        results: asyncio.Queue[GenerationOutput | EngineError] = asyncio.Queue()
        name = self._submit(_Pending(drawing, results, asyncio.get_running_loop()), streaming=True)
        sent, finished = 0, False
        try:
            while not finished:
                output = _unwrap(await results.get())
                finished = output.is_finished()
                generation = _generation(output, request.stop_token_ids if finished else ())
                for at in range(sent, len(generation.token_ids)):
                    yield drawing.tokens[at] if drawing.tokens else Token(generation.token_ids[at])
                sent = len(generation.token_ids)
            yield Token(None, generation.finish_reason)
        finally:
            if not finished:
                self._forget([name])

    def score(self, prompt_ids: Sequence[int], continuations: Sequence[Sequence[int]]) -> list[Score]:
        """Log-probability of each continuation after the same prompt: one prefill, then one padded batch."""
        return self.score_all([(prompt_ids, continuations)])[0]

    def score_all(self, questions: Sequence[Question]) -> list[list[Score]]:
        """As `score`, prompts of like length together; generation waits meanwhile."""
        for prompt_ids, continuations in questions:
            longest = len(prompt_ids) + max((len(ids) for ids in continuations), default=0)
            if not prompt_ids:
                raise EngineError("the prompt has 0 tokens; there is nothing to continue", hint="give at least one token")
            if longest > self.max_positions:
                raise EngineError(
                    f"prompt and longest continuation have {longest} tokens; the model has {self.max_positions} positions",
                    hint="shorten the prompt",
                )
            self._check_ids(itertools.chain(prompt_ids, *continuations))
        with self._model_alone(self._own):
            return score_questions(self._model, questions)

    def embed(self, inputs: Sequence[Sequence[int]], adapter: str = "") -> list[list[float]]:
        """One vector of unit length per input: the mean of the last hidden states of its tokens."""
        for ids in inputs:
            if not 1 <= len(ids) <= self.max_positions:
                raise EngineError(
                    f"an input of {len(ids)} tokens cannot be embedded: the model has {self.max_positions} positions",
                    hint="give at least one token; shorten the input",
                )
            self._check_ids(ids)
        vectors: list[list[float]] = []
        for start in range(0, len(inputs), MAX_INPUTS):  # generation continues between two batches
            with self._model_alone(adapter or self._own):
                vectors += mean_states(self._model, inputs[start : start + MAX_INPUTS])
        return vectors

    def load_adapter(self, name: str, folder: Path) -> None:
        """Make a PEFT LoRA folder available under `name`. Requests that run are not disturbed: what is read here is first
        looked at by a step that has a request for it."""
        with self._loading:  # the bound is counted before the files are read
            if name in self._adapters.names:
                return
            others = len(self._adapters.names) - bool(self._own)
            if others >= self._config.max_adapters:
                raise EngineError(
                    f"adapter {name!r}: {others} are loaded already, engine.max_adapters={self._config.max_adapters}",
                    hint="unload one, or raise engine.max_adapters",
                )
            if not name or name == OWN:
                raise EngineError(f"an adapter cannot be named {name!r}", hint="use the digest of its files")
            like = torch.empty(0, dtype=self._model.dtype, device=self._model.device)
            self._adapters.load(name, read_adapter(folder, self._layers, self._config.max_lora_rank, like))

    def unload_adapter(self, name: str) -> None:
        """Unload an adapter; `EngineError` while a pending request names it."""
        with self._model_alone(""), self._lock:  # a request that was cancelled has left the batch by then
            if any(pending.drawing.adapter == name for pending in self._pending.values()):
                raise EngineError(f"adapter {name!r} still has requests", hint="unload it when they have ended")
            self._adapters.unload(name)

    def health(self) -> EngineHealth:
        """Whether the generation thread lives and moves, and how many requests run and wait."""
        running, waiting = self._load()
        with self._lock:
            failure, num_tokens = self._failure, self._num_tokens
        if not failure and not self._batching.is_running():
            failure = "the generation thread is not running"
        idle_s = time.monotonic() - self._progress[1]
        if not failure and idle_s > STALLED_AFTER_S:
            failure = f"{running + waiting} requests are pending and no step ended for {idle_s:.0f} s"
        detail = failure or ("generating" if running else "idle")
        return EngineHealth(not failure, detail, running, waiting, num_tokens)

    def close(self) -> None:
        """Stop generating; requests that are still pending fail with `EngineError`."""
        self._closing = True
        if self._batching.is_running():
            self._batching.stop(block=True, timeout=CLOSE_AFTER_S, hard_stop=True)
        self._fail("the engine was closed")
        self._watching.join(timeout=CLOSE_AFTER_S)

    def _drawing(self, request: GenerationRequest) -> Drawing:
        """The sampling of `request`; refuses what cannot be generated before anything of it is queued."""
        num_prompt, num_new = len(request.prompt_ids), request.max_new_tokens
        if num_prompt < 1 or num_new < 1:
            raise EngineError(
                f"prompt of {num_prompt} tokens, max_new_tokens={num_new}: both must be at least 1", hint="give a prompt"
            )
        if num_prompt + num_new > self.max_request_tokens:
            raise EngineError(
                f"prompt of {num_prompt} + max_new_tokens of {num_new} = {num_prompt + num_new} tokens exceed"
                f" {self.max_request_tokens} (cache: {self._config.cache_tokens}, positions of the model:"
                f" {self.max_positions})",
                hint="shorten the prompt, lower max_new_tokens, or raise engine.num_blocks",
            )
        self._check_ids(itertools.chain(request.prompt_ids, (token for token, _ in request.logit_bias)))
        check_drawing(request)
        self._check_adapter(request.adapter)
        grammar = None
        if request.json_schema:
            if not isinstance(self._grammars, Grammars):
                raise EngineError(f"json_schema: {self._grammars}", hint="use the vllm engine")
            grammar = self._grammars.matcher(request.json_schema, request.stop_token_ids)
        seed = request.seed if request.seed is not None else secrets.randbits(SEED_BITS)
        return Drawing(request, seed, request.adapter or self._own, grammar)

    def _check_ids(self, ids: Iterator[int] | Sequence[int]) -> None:
        """Refuse ids outside the vocabulary: they would stop the generation thread, and with it all requests."""
        for token in ids:
            if not 0 <= token < self.vocab_size:
                raise EngineError(f"token id {token} is not in 0..{self.vocab_size - 1}", hint="use this model's tokenizer")

    def _check_adapter(self, name: str) -> None:
        if name and name not in self._adapters.names:
            raise EngineError(f"adapter {name!r} is not loaded", hint="load it first")

    def _submit(self, pending: _Pending, streaming: bool) -> str:
        drawing = pending.drawing
        name = request_name(next(self._numbers), drawing.adapter)
        with self._lock:
            self._raise_if_failed()
            self._check_adapter(drawing.adapter)  # again: it may have been unloaded since
            self._pending[name] = pending
            self._num_tokens += pending.num_tokens
        accepted = self._batching.add_request(
            list(drawing.request.prompt_ids),
            request_id=name,
            max_new_tokens=drawing.request.max_new_tokens,
            streaming=streaming,
            eos_token_id=list(drawing.request.stop_token_ids),
            drawing=drawing,
        )
        if accepted is None:
            self._forget([name])
            raise EngineError("the engine takes no more requests", hint="it is stopping: send the request again")
        return name

    def _take(self, name: str) -> _Pending | None:
        """Out of the books; the lock is held."""
        pending = self._pending.pop(name, None)
        self._num_tokens -= pending.num_tokens if pending else 0
        return pending

    def _forget(self, names: list[str]) -> None:
        """Stop waiting for these requests and take them out of the batch."""
        with self._lock:
            abandoned = [name for name in names if self._take(name)]
        for name in abandoned:
            self._batching.cancel_request(name)

    def _raise_if_failed(self) -> None:
        if self._failure:
            raise EngineError(self._failure, hint="the replica must be restarted; its log has the cause")

    def _load(self) -> tuple[int, int]:
        processor = self._batching.batch_processor
        queued = self._batching.input_queue.qsize()
        if processor is None:
            return 0, queued
        scheduler = processor.scheduler
        return len(scheduler.active_requests), len(scheduler.waiting_requests) + queued

    @contextlib.contextmanager
    def _model_alone(self, adapter: str) -> Iterator[None]:
        """The model for this thread alone, the adapter in every row; requests wait for it and go on afterwards."""
        self._raise_if_failed()
        with self._alone:
            try:
                with self._batching.pause():
                    self._check_adapter(adapter)
                    try:
                        self._adapters.use([adapter])
                        yield
                    finally:
                        self._adapters.use([])
            except RuntimeError as error:
                if isinstance(error, EngineError):
                    raise
                raise EngineError(
                    f"the model failed: {error}", hint="look for the cause in the log of this process"
                ) from error

    def _deliver(self, outputs: Sequence[GenerationOutput]) -> None:
        """In the generation thread: the results of one step to those that wait, with one wake-up per event loop."""
        by_loop: dict[asyncio.AbstractEventLoop, list[tuple[Any, GenerationOutput | EngineError]]] = defaultdict(list)
        for output in outputs:
            name, item = output.request_id, output
            with self._lock:
                pending = self._pending.get(name)
                failed = pending is not None and bool(pending.drawing.error)
                if failed or output.is_finished():
                    self._take(name)
            if pending is None:  # cancelled while this result was under way
                continue
            result: GenerationOutput | EngineError = item
            if failed:
                kind = RequestError if pending.drawing.is_request_error else EngineError
                result = kind(pending.drawing.error, hint="send the request again, or another one")
                self._batching.cancel_request(name)
            if pending.loop is None:
                pending.queue.put(result)
            else:
                by_loop[pending.loop].append((pending.queue, result))
        for loop, items in by_loop.items():
            with contextlib.suppress(RuntimeError):  # the loop closed: nobody waits any more
                loop.call_soon_threadsafe(_put_all, items)

    def _watch(self) -> None:
        """The watching thread: when generation ends, an error to those that still wait."""
        while True:
            time.sleep(POLL_S)
            steps = getattr(self._batching, "current_batch", 0)
            if steps != self._progress[0] or not any(self._load()):
                self._progress = (steps, time.monotonic())
            cause = self._batching.background_thread_status.fatal_error
            if not self._batching.is_running() or cause is not None:
                self._fail(f"the generation thread died: {cause}" if cause else "the engine was closed")
                return
            # The generation thread is not a daemon: without this, a program that forgot close() would never exit
            if not threading.main_thread().is_alive() and not self._closing:
                self._batching.stop(block=False, hard_stop=True)
                self._closing = True

    def _fail(self, reason: str) -> None:
        with self._lock:
            self._failure = self._failure or reason
            pending = list(self._pending.values())
            self._pending.clear()
            self._num_tokens = 0
        for one in pending:
            error = EngineError(reason, hint="send the request again; if it fails again, look at the engine's log")
            if one.loop is None:
                one.queue.put(error)
            else:
                with contextlib.suppress(RuntimeError):
                    one.loop.call_soon_threadsafe(one.queue.put_nowait, error)


def _put_all(items: list[tuple[Any, GenerationOutput | EngineError]]) -> None:
    for waiting, item in items:
        waiting.put_nowait(item)


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
