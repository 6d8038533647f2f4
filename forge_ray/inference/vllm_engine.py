"""The Engine over vLLM's `AsyncLLM`, on GPUs and, with the same code, on CPUs.

Two threads and a process: vLLM's *engine core* is a child process that holds the weights; `AsyncLLM` talks to it from an
event loop that runs in a thread of this engine, the *engine loop*; callers come from threads and event loops of their own
and hand their work over. A prefix that two requests share is computed once per adapter: vLLM salts its cache with the
adapter's name, and names are content digests.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import itertools
import tempfile
import threading
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from forge_ray.config.release import EngineConfig
from forge_ray.errors import EngineError, PolicyError
from forge_ray.inference.engine import EngineHealth, FinishReason, Generation, GenerationRequest, Question, Score, Token
from forge_ray.inference.vllm_adapters import ELSEWHERE, servable_adapter
from forge_ray.inference.vllm_settings import engine_arguments, linear_layers, prepare, refused, sampling_params
from forge_ray.store.owner import owner_mark

STALLED_AFTER_S = 300.0  # one forward pass of a full batch on a slow CPU takes well under a minute
CLOSE_AFTER_S = 60.0
FINISH: dict[str | None, FinishReason] = {"stop": "stop", "length": "length"}
DEAD = "the replica must be restarted; its log has the cause"
LACKS = {"embeddings": "transformers"}

Result = TypeVar("Result")


@dataclass
class _Pending:
    """A request that has not ended: the tokens that it may hold of the cache, and whether its first one came."""

    num_tokens: int
    adapter: str
    running: bool = False


def load_vllm_engine(
    model_dir: Path, adapter_dir: Path | None, config: EngineConfig, use_gpu: bool | None = None
) -> VllmEngine:
    """Load safetensors from local folders and start generating; `use_gpu` None: where the installed vLLM computes.

    With `adapter_dir` the weights that the engine is started with are the base with that adapter.
    """
    on_gpu = prepare(use_gpu)
    if not list(model_dir.glob("*.safetensors")):
        raise PolicyError(f"{model_dir} has no .safetensors weights", hint="convert the weights to safetensors first")
    num_adapters = config.max_adapters + (adapter_dir is not None)
    layers = linear_layers(model_dir) if num_adapters else {}
    arguments = engine_arguments(model_dir, config, on_gpu, num_adapters, layers)
    return VllmEngine(arguments, config, layers, adapter_dir)


class VllmEngine:
    """`Engine` over one loaded model; made by `load_vllm_engine`. `arguments` are vLLM's, `layers` those of
    `servable_adapter`."""

    def __init__(
        self,
        arguments: dict[str, Any],
        config: EngineConfig,
        layers: Mapping[str, tuple[int, int]],
        adapter_dir: Path | None,
    ) -> None:
        self.lacks = dict(LACKS)
        self._config = config
        self._numbers = itertools.count(1)
        self._layers = layers
        self._scratch = tempfile.TemporaryDirectory(prefix=f"forge-adapters-{owner_mark()}-")
        first = self._servable(adapter_dir) if adapter_dir is not None else None
        self._adapter_numbers = itertools.count(1)  # vLLM's ids of adapters; none is used twice
        self._adapters: dict[str, Any] = {}
        self._adapter_lock = threading.Lock()
        self._pending: dict[str, _Pending] = {}
        self._progress = time.monotonic()
        self._closed = False
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="engine-loop", daemon=True)
        self._thread.start()
        try:
            self._llm = self._call(_start(arguments))
        except Exception as error:
            self._stop_loop()
            raise EngineError(
                f"vLLM could not start with {arguments['model']}: {error}", hint="the cause stands above, in vLLM's log"
            ) from error
        self.max_request_tokens: int = self._llm.model_config.max_model_len
        self._eos = self._llm.tokenizer.eos_token_id if self._llm.tokenizer is not None else None
        if first is not None:
            try:
                self._add("", first)
            except EngineError:
                self.close()
                raise

    def generate(self, requests: Sequence[GenerationRequest]) -> list[Generation]:
        """Continue all `requests` as one continuous batch; results in the same order."""
        self._raise_if_failed()
        for request in requests:
            self._check(request)
        return self._call(_all([self._whole(request) for request in requests]))

    async def stream(self, request: GenerationRequest) -> AsyncIterator[Token]:
        """Tokens as they are made, the end last. Closing the iterator cancels the request."""
        self._check(request)
        loop = asyncio.get_running_loop()
        inbox: asyncio.Queue[list[Token] | EngineError] = asyncio.Queue()

        def put(item: list[Token] | EngineError) -> None:
            with contextlib.suppress(RuntimeError):  # the caller's loop closed: nobody waits any more
                loop.call_soon_threadsafe(inbox.put_nowait, item)

        delivery = asyncio.run_coroutine_threadsafe(self._deliver(request, put), self._loop)
        try:
            while True:
                item = await inbox.get()
                if isinstance(item, EngineError):
                    raise item
                for token in item:
                    yield token
                if item[-1].token_id is None:
                    return
        finally:
            delivery.cancel()

    def score(self, prompt_ids: Sequence[int], continuations: Sequence[Sequence[int]]) -> list[Score]:
        """Log-probability of each continuation after the same prompt, all in one batch.

        A continuation of one token shares the prompt's cache with the others; a longer one is a prefill of its own.
        """
        longest = len(prompt_ids) + max((len(ids) for ids in continuations), default=0)
        if not prompt_ids:
            raise EngineError("the prompt has 0 tokens; there is nothing to continue", hint="give at least one token")
        if longest > self.max_request_tokens:
            raise EngineError(
                f"prompt and longest continuation have {longest} tokens; the model has {self.max_request_tokens} positions"
                " or cache for them",
                hint="shorten the prompt, or raise engine.num_blocks",
            )
        self._raise_if_failed()
        return self._call(_all([self._score(list(prompt_ids), list(ids)) for ids in continuations]))

    def score_all(self, questions: Sequence[Question]) -> list[list[Score]]:
        """As `score`, one prompt after another: vLLM fills its batch with a prompt's continuations."""
        return [self.score(prompt_ids, continuations) for prompt_ids, continuations in questions]

    def embed(self, inputs: Sequence[Sequence[int]], adapter: str = "") -> list[list[float]]:
        """Always `EngineError`: vLLM gives a model that generates no access to its hidden states."""
        raise EngineError("vLLM has no embeddings of a generating model", hint="engine.kind: transformers has them")

    def load_adapter(self, name: str, folder: Path) -> None:
        """Make a PEFT LoRA folder available under `name`; it is in the engine's memory when this returns."""
        if not name:
            raise EngineError("an adapter needs a name; '' stands for the engine's own weights", hint="use its digest")
        self._raise_if_failed()
        with self._adapter_lock:
            if name in self._adapters:
                return
            most, num_loaded = self._config.max_adapters, len([other for other in self._adapters if other])
            if num_loaded >= most:
                raise EngineError(
                    f"adapter {name!r} does not fit: {num_loaded} are loaded, engine.max_adapters={most}",
                    hint="unload one, or raise engine.max_adapters",
                )
            self._add(name, self._servable(folder))

    def unload_adapter(self, name: str) -> None:
        """Forget an adapter that no pending request names."""
        self._raise_if_failed()
        with self._adapter_lock:
            self._adapter(name)
            users = sum(pending.adapter == name for pending in list(self._pending.values()))
            if not name or users:
                raise EngineError(
                    f"adapter {name!r} is in use by {users} requests" if name else "the engine's own weights stay",
                    hint="wait for them to end",
                )
            lora = self._adapters.pop(name)
            self._call(self._llm.remove_lora(lora.lora_int_id))

    def health(self) -> EngineHealth:
        """Whether vLLM's engine core lives and moves, and how many requests run and wait."""
        pending = list(self._pending.values())
        running = sum(request.running for request in pending)
        failure = self._failure()
        idle_s = time.monotonic() - self._progress
        if not failure and pending and idle_s > STALLED_AFTER_S:
            failure = f"{len(pending)} requests are pending and no token came for {idle_s:.0f} s"
        detail = failure or ("generating" if pending else "idle")
        num_tokens = sum(request.num_tokens for request in pending)
        return EngineHealth(not failure, detail, running, len(pending) - running, num_tokens)

    def close(self) -> None:
        """Stop generating and end the engine core; requests that are still pending fail with `EngineError`."""
        if self._closed:
            return
        self._closed = True
        with contextlib.suppress(Exception):
            asyncio.run_coroutine_threadsafe(self._shut_down(), self._loop).result(CLOSE_AFTER_S)
        self._stop_loop()
        self._scratch.cleanup()

    async def _shut_down(self) -> None:
        others = asyncio.all_tasks() - {asyncio.current_task()}
        self._llm.shutdown()
        for task in others:
            task.cancel()
        await asyncio.wait(others, timeout=CLOSE_AFTER_S) if others else None

    def _stop_loop(self) -> None:
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(timeout=CLOSE_AFTER_S)

    def _call(self, work: Coroutine[Any, Any, Result]) -> Result:
        """Run `work` in the engine loop and wait for it."""
        try:
            return asyncio.run_coroutine_threadsafe(work, self._loop).result()
        except concurrent.futures.CancelledError:
            raise EngineError(self._failure() or "the request was cancelled", hint=DEAD) from None

    def _failure(self) -> str:
        if self._closed:
            return "the engine was closed"
        return "vLLM's engine core died" if self._llm.errored else ""

    def _raise_if_failed(self) -> None:
        if failure := self._failure():
            raise EngineError(failure, hint=DEAD)

    def _adapter(self, name: str) -> Any:
        """vLLM's `LoRARequest`; None for the base's own weights."""
        lora = self._adapters.get(name)
        if lora is None and name:
            raise EngineError(f"adapter {name!r} is not loaded in this engine", hint="load_adapter makes it available")
        return lora

    def _servable(self, folder: Path) -> Path:
        scratch = Path(self._scratch.name) / str(next(self._numbers))
        return servable_adapter(folder, self._config.max_lora_rank, self._layers, scratch)

    def _add(self, name: str, folder: Path) -> None:
        from vllm.lora.request import LoRARequest

        lora = LoRARequest(name or "started-with", next(self._adapter_numbers), str(folder))
        try:
            self._call(self._llm.add_lora(lora))
        except Exception as error:
            self._raise_if_failed()
            raise EngineError(f"vLLM cannot serve the adapter in {folder}: {error}", hint=ELSEWHERE) from error
        self._adapters[name] = lora

    def _check(self, request: GenerationRequest) -> None:
        """Refuse what cannot be generated before anything of it is queued."""
        self._raise_if_failed()
        num_prompt, num_new = len(request.prompt_ids), request.max_new_tokens
        if num_prompt < 1 or num_new < 1:
            raise EngineError(
                f"prompt of {num_prompt} tokens, max_new_tokens={num_new}: both must be at least 1", hint="give a prompt"
            )
        if request.temperature < 0 or not 0 <= request.top_p <= 1:
            raise EngineError(
                f"temperature={request.temperature}, top_p={request.top_p}: want temperature >= 0 and top_p in 0..1",
                hint="temperature 0 is greedy, top_p 1 keeps every token",
            )
        if num_prompt + num_new > self.max_request_tokens:
            raise EngineError(
                f"prompt of {num_prompt} + max_new_tokens of {num_new} = {num_prompt + num_new} tokens exceed"
                f" {self.max_request_tokens} (what the model's positions and the cache hold)",
                hint="shorten the prompt, lower max_new_tokens, or raise engine.num_blocks (on a GPU engine.memory_share)",
            )
        if request.json_schema and not request.stop_token_ids:
            raise EngineError("json_schema without stop_token_ids could not end", hint="give the end-of-turn token")
        self._adapter(request.adapter)

    def _ends(self, request: GenerationRequest) -> tuple[int | None, ...]:
        """What ends an answer and is no part of it. A grammar ends with the tokenizer's own token."""
        return (*request.stop_token_ids, self._eos) if request.json_schema else request.stop_token_ids

    async def _deliver(self, request: GenerationRequest, put: Callable[[list[Token] | EngineError], None]) -> None:
        try:
            async for output in self._outputs(request, sampling_params(request)):
                put(_tokens(output.outputs[0], self._ends(request), request.num_logprobs))
        except EngineError as error:
            put(error)

    async def _whole(self, request: GenerationRequest) -> Generation:
        tokens: list[Token] = []
        async for output in self._outputs(request, sampling_params(request)):
            tokens += _tokens(output.outputs[0], self._ends(request), None)
        end = tokens[-1]
        assert end.finish_reason is not None
        return Generation(tuple(token.token_id for token in tokens if token.token_id is not None), end.finish_reason)

    async def _score(self, prompt_ids: list[int], continuation: list[int]) -> Score:
        """The last token as one that is generated, those before it as a part of the prompt."""
        if not continuation:
            return Score(0.0, 0)
        *before, last = continuation
        request = GenerationRequest((*prompt_ids, *before), max_new_tokens=1)
        params = sampling_params(request)
        params.logprob_token_ids = [last]
        if before:
            params.prompt_logprobs = 0
        async for output in self._outputs(request, params):
            total = output.outputs[0].logprobs[0][last].logprob
            if before:
                prompt_logprobs = output.prompt_logprobs[len(prompt_ids) :]
                total += sum(at[token].logprob for at, token in zip(prompt_logprobs, before, strict=True))
        return Score(total, len(continuation))

    async def _outputs(self, request: GenerationRequest, params: Any) -> AsyncIterator[Any]:
        """vLLM's outputs of one request, the last with a finish reason; `EngineError` where vLLM fails."""
        from vllm.exceptions import VLLMClientError, VLLMError
        from vllm.inputs.engine import tokens_input

        name = f"request-{next(self._numbers)}"
        pending = _Pending(len(request.prompt_ids) + request.max_new_tokens, request.adapter)
        if not self._pending:
            self._progress = time.monotonic()
        self._pending[name] = pending
        outputs = self._llm.generate(
            tokens_input(list(request.prompt_ids)), params, name, lora_request=self._adapter(request.adapter)
        )
        try:
            async with contextlib.aclosing(outputs):
                async for output in outputs:
                    pending.running = True
                    self._progress = time.monotonic()
                    yield output
        except asyncio.CancelledError:
            if self._closed:
                raise EngineError("the engine was closed", hint=DEAD) from None
            raise
        except VLLMClientError as error:
            raise refused(error) from error
        except VLLMError as error:
            self._raise_if_failed()
            cause = error.__cause__ or error
            raise EngineError(f"the request failed: {cause}", hint="the log of this process has the cause") from error
        finally:
            del self._pending[name]


async def _start(arguments: dict[str, Any]) -> Any:
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.v1.engine.async_llm import AsyncLLM

    return AsyncLLM.from_engine_args(AsyncEngineArgs(**arguments))


async def _all(work: Sequence[Coroutine[Any, Any, Result]]) -> list[Result]:
    """Results in order; the first failure cancels the others."""
    tasks = [asyncio.ensure_future(one) for one in work]
    try:
        return list(await asyncio.gather(*tasks))
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


def _tokens(output: Any, ends: Sequence[int | None], num_logprobs: int | None) -> list[Token]:
    """What a step of vLLM's adds to a stream; vLLM gives the token that ended it as well, and that one is left out."""
    token_ids = list(output.token_ids)
    if output.finish_reason is not None and output.finish_reason not in FINISH:
        raise EngineError(f"vLLM ended the request: {output.finish_reason}", hint="send the request again")
    if output.finish_reason == "stop" and token_ids and token_ids[-1] in ends:
        token_ids.pop()
    tokens = []
    for place, token_id in enumerate(token_ids):
        if num_logprobs is None:
            tokens.append(Token(token_id))
            continue
        logprobs = output.logprobs[place]
        best = sorted(((other, entry.logprob) for other, entry in logprobs.items()), key=lambda pair: -pair[1])
        tokens.append(Token(token_id, None, logprobs[token_id].logprob, tuple(best[:num_logprobs])))
    if output.finish_reason is not None:
        tokens.append(Token(None, FINISH[output.finish_reason]))
    return tokens
