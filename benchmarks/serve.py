"""How fast serving is, as ratios on one machine: the endpoint and what stands beside it take turns.

    python benchmarks/serve.py                                  everything that this machine can, SmolLM2-135M, both engines
    python benchmarks/serve.py --rows endpoint,overhead --engines vllm --rounds 5
    python benchmarks/serve.py --device cuda --engines vllm --rows raw,endpoint --model FOLDER
    python benchmarks/serve.py --rows ray-llm                   needs the extra `bench`

| row | what | over |
| --- | --- | --- |
| endpoint | tokens/s of the deployed endpoint, behind HAProxy, streams | the same engine called in its own process |
| raw | tokens/s of our engine in its own process | vLLM's AsyncLLM alone (vllm) |
| ray-llm | tokens/s of the endpoint (vllm) | ray.serve.llm on the same vLLM |
| overhead | p50 and p99 of a request that costs no computing, behind HAProxy | bare Starlette on uvicorn (a difference) |
| batching | tokens/s of all requests at once, in process | transformers' `generate`, one after the other |
| adapters | tokens/s of requests on many adapters in one batch | an engine without adapters; one adapter after the other |
| overload | p99 of what is accepted at four times the load | the same with the batch just full; the refusals' p99 |
| prefix | time to the first token where a prefix of 2,000 tokens was read before | that of the first request with it |
| mixed | p99 between tokens of running answers while prompts of 4,000 tokens arrive | the same while none does |
| adapter | seconds from an alias's move to the first token of an adapter that the endpoint never saw | |
| abuse | p99 of others' requests while one client attacks (abuse.py) | the same before |

Each row also shows the processor seconds of its parts (processors.py), loading left out.
This process is the client: it sends over HTTP and computes nothing. All others are those of serve_processes.py.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import abuse
import aiohttp
import crowd
from processors import added_to, in_words

HERE = Path(__file__).parent
ADAPTER_S = 60.0
SHARED_TOKENS, SHARING = 2000, 4  # of a system prompt with tools; requests that follow the first one
LONG_PROMPT, RUNNING = 4000, 4  # tokens; answers under way meanwhile
BACK_S = 0.5  # after which a refused client returns: far sooner than Retry-After asks
MODEL = "measured"


@dataclass(frozen=True)
class Row:
    """One line of the table. `target` states what `value` should be, `met` whether it is."""

    row: str
    engine: str
    what: str
    value: float
    unit: str
    target: str
    met: bool | None = None


@dataclass(frozen=True)
class Answer:
    """One request as the client saw it; seconds since it was sent."""

    status: int
    first_s: float
    total_s: float
    tokens: int
    version: str
    arrivals: tuple[float, ...] = ()  # of its events


class Process:
    """A function of serve_processes.py in a process of its own."""

    def __init__(self, name: str, **arguments: Any) -> None:
        log = tempfile.NamedTemporaryFile("w+", prefix=f"bench-{name}-", suffix=".log", delete=False)  # noqa: SIM115
        self.log = log.name
        path = os.pathsep.join([str(HERE.parent), os.environ.get("PYTHONPATH", "")])
        command = [sys.executable, str(HERE / "serve_processes.py"), name, json.dumps(arguments)]
        self.child = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log,
            text=True,
            env={**os.environ, "PYTHONPATH": path},
        )
        self.ready = self._answer()

    def ask(self, do: str, **arguments: Any) -> dict[str, Any]:
        assert self.child.stdin is not None
        self.child.stdin.write(json.dumps({"do": do, **arguments}) + "\n")
        self.child.stdin.flush()
        return self._answer()

    def _answer(self) -> dict[str, Any]:
        assert self.child.stdout is not None
        if line := self.child.stdout.readline():
            return dict(json.loads(line))
        raise SystemExit(f"a process ended; its log: {self.log}\n{Path(self.log).read_text()[-2000:]}")

    def close(self) -> None:
        assert self.child.stdin is not None
        self.child.stdin.close()
        try:
            self.child.wait(60)
            Path(self.log).unlink()
        except subprocess.TimeoutExpired:
            self.child.kill()


@contextmanager
def process(name: str, **arguments: Any) -> Iterator[Process]:
    child = Process(name, **arguments)
    try:
        yield child
    finally:
        child.close()


async def ask(session: aiohttp.ClientSession, url: str, body: dict[str, Any]) -> Answer:
    """One streamed completion."""
    begun, tokens = time.perf_counter(), 0
    arrivals: list[float] = []
    payload = {"model": MODEL, "temperature": 0, "stream": True, "stream_options": {"include_usage": True}, **body}
    async with session.post(f"{url}/v1/completions", json=payload) as response:
        version = response.headers.get("x-forge-model-version", "")
        if response.status != 200:
            await response.read()
            return Answer(response.status, 0.0, time.perf_counter() - begun, 0, version)
        async for line in response.content:
            if line.startswith(b"data: {"):
                arrivals.append(time.perf_counter() - begun)
                if b'"usage":{' in line or b'"usage": {' in line:
                    tokens = json.loads(line[6:])["usage"]["completion_tokens"]
    return Answer(response.status, arrivals[0], time.perf_counter() - begun, tokens, version, tuple(arrivals))


def over_http(url: str, bodies: Sequence[dict[str, Any]]) -> dict[str, float]:
    """All of them at once."""

    async def everything() -> list[Answer]:
        timeout, connector = aiohttp.ClientTimeout(total=600), aiohttp.TCPConnector(limit=0)
        async with aiohttp.ClientSession(timeout=timeout, connector=connector) as session:
            return list(await asyncio.gather(*(ask(session, url, body) for body in bodies)))

    begun = time.perf_counter()
    answers = asyncio.run(everything())
    seconds = time.perf_counter() - begun
    if bad := [answer.status for answer in answers if answer.status != 200]:
        raise SystemExit(f"{len(bad)} of {len(bodies)} requests were answered {bad[0]}")
    return {"tokens": sum(answer.tokens for answer in answers), "seconds": seconds}


def rates(rounds: int, *ways: Callable[[], dict[str, float]]) -> list[float]:
    """Median tokens/s of each way; they take turns, the first turn warms up."""
    samples: list[list[float]] = [[] for _ in ways]
    for turn in range(rounds + 1):
        for way, rate in zip(ways, samples, strict=True):
            result = way()
            if turn:
                rate.append(result["tokens"] / result["seconds"])
    return [statistics.median(rate) for rate in samples]


def percentile(values: Sequence[float], share: float) -> float:
    return sorted(values)[min(int(len(values) * share), len(values) - 1)]


class Bench:
    """What the rows share."""

    def __init__(self, options: argparse.Namespace, prepared: dict[str, Any]) -> None:
        self.options = options
        self.model_dir: str = prepared["model_dir"]
        self.versions: list[str] = prepared["versions"]
        self.folders: list[str] = prepared["folders"]
        self.use_gpu = options.device == "cuda"
        self.length: int = options.prompt_tokens
        self.random = random.Random(0)
        self.ids = range(100, prepared["vocab"])  # the first ones are often special
        self.spent: Counter[str] = Counter()  # processor seconds of the row that is measured

    def prompts(self) -> list[list[int]]:
        """New ones each time: a prefix that is in the cache already would make later turns faster."""
        return [self.random.choices(self.ids, k=self.length) for _ in range(self.options.clients)]

    def settings(self, kind: str, **more: Any) -> dict[str, Any]:
        running = max(self.options.clients, 8)
        return {"kind": kind, "max_running": running, "max_adapters": 0, "memory_share": 0.4, **more}

    def engine(self, kind: str, adapters: int = 0) -> Any:
        names = {f"sha256:{k}": folder for k, folder in enumerate(self.folders[:adapters])}
        settings = self.settings(kind, max_adapters=adapters, max_lora_rank=self.options.rank)
        return process("engine", model_dir=self.model_dir, settings=settings, use_gpu=self.use_gpu, adapters=names)

    def endpoint(
        self, kind: str, engine: dict[str, Any] | None = None, keys: dict[str, Any] | None = None, **more: Any
    ) -> Any:
        """Behind HAProxy; with `keys` (name → limits) behind Serve's own proxy, which then asks for one of them."""
        deploy = {
            "models": [MODEL],
            "published": False,
            "gpus_per_replica": int(self.use_gpu),
            "cpus_per_replica": os.cpu_count(),
            "engine": self.settings(kind, **(engine or {})),
            **more,
        }
        return process("endpoint", store=self.options.store, deploy=deploy, keys=keys or {})

    def inside(self, engine: Process, do: str = "load", **more: Any) -> dict[str, float]:
        with added_to(self.spent):
            return engine.ask(do, prompts=self.prompts(), max_tokens=self.options.new_tokens, **more)

    def through(self, url: str, **more: Any) -> dict[str, float]:
        bodies = [{"prompt": prompt, "max_tokens": self.options.new_tokens, **more} for prompt in self.prompts()]
        with added_to(self.spent):
            return over_http(url, bodies)


def ratio(row: str, kind: str, what: str, over: float, under: float, least: float) -> list[Row]:
    share = over / under
    return [
        Row(row, kind, what, round(share, 3), "×", f"≥ {least}", share >= least),
        Row(row, kind, "  from, to", round(under, 1), f"→ {over:.1f} tokens/s", ""),
    ]


def endpoint_row(bench: Bench, kind: str) -> list[Row]:
    with bench.engine(kind) as engine, bench.endpoint(kind) as endpoint:
        url = endpoint.ready["url"]
        through, inside = rates(bench.options.rounds, lambda: bench.through(url), lambda: bench.inside(engine))
    return ratio("endpoint", kind, "endpoint over the engine in process", through, inside, 0.9)


def raw_row(bench: Bench, kind: str) -> list[Row]:
    if kind != "vllm":
        return []
    with bench.engine(kind) as engine:
        ours, raw = rates(bench.options.rounds, lambda: bench.inside(engine), lambda: bench.inside(engine, "raw"))
    return ratio("raw", kind, "our engine over vLLM's AsyncLLM", ours, raw, 0.95)


def ray_llm_row(bench: Bench, kind: str) -> list[Row]:
    if kind != "vllm":
        return []
    beside = {"use_gpu": bench.use_gpu, "max_running": max(bench.options.clients, 8)}
    with bench.endpoint(kind) as endpoint, process("ray_llm", model_dir=bench.model_dir, **beside) as other:
        ways = [lambda: bench.through(endpoint.ready["url"]), lambda: bench.through(other.ready["url"], ignore_eos=True)]
        ours, theirs = rates(bench.options.rounds, *ways)
    return ratio("ray-llm", kind, "endpoint over ray.serve.llm", ours, theirs, 1.0)


def overhead_row(bench: Bench, kind: str) -> list[Row]:
    """No engine: once for all of them."""
    body = {"prompt": [100] * bench.length, "max_tokens": 32}

    async def latencies(url: str, stream: bool) -> list[float]:
        milliseconds = []
        async with aiohttp.ClientSession() as session:
            for _ in range(bench.options.requests):
                begun = time.perf_counter()
                async with session.post(
                    f"{url}/v1/completions", json={"model": MODEL, "stream": stream, **body}
                ) as response:
                    await response.read()
                    assert response.status == 200, response.status
                milliseconds.append(1000 * (time.perf_counter() - begun))
        return milliseconds

    rows = []
    with ExitStack() as stack:
        at = {
            "bare": stack.enter_context(process("uvicorn", app="bare", model_dir=bench.model_dir)).ready["url"],
            "app": stack.enter_context(process("uvicorn", app="null", model_dir=bench.model_dir)).ready["url"],
            "haproxy": stack.enter_context(process("null_endpoint", model_dir=bench.model_dir)).ready["url"],
        }
        for stream in (False, True):
            samples: dict[str, list[float]] = {name: [] for name in at}
            for turn in range(bench.options.rounds + 1):
                for name, url in at.items():
                    with added_to(bench.spent):
                        measured = asyncio.run(latencies(url, stream))
                    samples[name] += measured if turn else []
            kind = "stream of 32" if stream else "whole"
            for share in (0.5, 0.99):
                bare, app, haproxy = (percentile(samples[name], share) for name in at)
                added, p50 = haproxy - bare, share == 0.5 and not stream
                target = "≤ 3" if p50 else ""
                met = added <= 3 if p50 else None
                rows.append(Row("overhead", "", f"p{share * 100:.0f} added, {kind}", round(added, 2), "ms", target, met))
                rows.append(
                    Row("overhead", "", "  bare", round(bare, 2), f"ms; on uvicorn {app:.2f}, HAProxy {haproxy:.2f}", "")
                )
    return rows


def batching_row(bench: Bench, kind: str) -> list[Row]:
    arguments = {"model_dir": bench.model_dir, "use_gpu": bench.use_gpu}
    with bench.engine(kind) as engine, process("sequential", **arguments) as other:

        def few() -> dict[str, float]:
            with added_to(bench.spent):
                return other.ask("load", prompts=bench.prompts()[:2], max_tokens=bench.options.new_tokens)

        together, alone = rates(bench.options.rounds, lambda: bench.inside(engine), few)
    return ratio("batching", kind, f"{bench.options.clients} at once over `generate`", together, alone, 4.0)


def adapters_row(bench: Bench, kind: str) -> list[Row]:
    count = bench.options.adapters
    names = [f"sha256:{k % count}" for k in range(bench.options.clients)]

    with bench.engine(kind, count) as engine, bench.engine(kind) as merged:

        def swapped() -> dict[str, float]:
            prompts, total = bench.prompts(), {"tokens": 0.0, "seconds": 0.0}
            for k in range(count):
                batch = prompts[k::count]
                with added_to(bench.spent):
                    done = engine.ask(
                        "load", prompts=batch, max_tokens=bench.options.new_tokens, names=[f"sha256:{k}"] * len(batch)
                    )
                total = {key: total[key] + done[key] for key in total}
            return total

        ways = [lambda: bench.inside(engine, names=names), lambda: bench.inside(merged), swapped]
        mixed, whole, serial = rates(bench.options.rounds, *ways)
    return [
        *ratio("adapters", kind, f"{count} mixed over one merged model", mixed, whole, 0.4),
        *ratio("adapters", kind, f"{count} mixed over one after the other", mixed, serial, 2.0),
    ]


def overload_row(bench: Bench, kind: str) -> list[Row]:
    """Refusals are timed to their status line, by clients that cost so little that they hold up nothing."""
    most = 8

    def press(url: str, clients: int, seconds: float) -> list[crowd.Outcome]:
        def new_request() -> bytes:
            prompt = bench.random.choices(bench.ids, k=bench.length)
            fields = {"model": MODEL, "temperature": 0, "stream": True, "stream_options": {"include_usage": True}}
            body = {**fields, "prompt": prompt, "max_tokens": bench.options.new_tokens}
            return crowd.request_bytes(url, "/v1/completions", body)

        return asyncio.run(crowd.press(url, new_request, clients, seconds, back_s=BACK_S))

    with bench.endpoint(kind, {"max_running": most}, limits={"max_queued_requests": most}) as endpoint:
        url = endpoint.ready["url"]
        press(url, most, 5)
        calm = [answer.total_s for answer in press(url, most, bench.options.seconds)]
        with added_to(bench.spent):
            answers = press(url, 4 * 2 * most, bench.options.seconds)
    whole = [answer for answer in answers if answer.is_whole]
    accepted = [answer.total_s for answer in whole if answer.status == 200]
    refused = [1000 * answer.first_s for answer in whole if answer.status in (429, 503)]
    failed = len(answers) - len(accepted) - len(refused)
    times = percentile(accepted, 0.99) / percentile(calm, 0.99)
    half = percentile(accepted, 0.5) / percentile(calm, 0.5)
    late = percentile(refused, 0.99) if refused else float("inf")
    middle = percentile(refused, 0.5) if refused else float("inf")
    return [
        Row("overload", kind, "p99 of the accepted over unloaded", round(times, 2), "×", "≤ 2", times <= 2),
        Row("overload", kind, f"  median, of {len(accepted)} (unloaded {len(calm)})", round(half, 2), "×", ""),
        Row("overload", kind, f"p99 of {len(refused)} refusals", round(late, 1), "ms", "≤ 20", late <= 20),
        Row("overload", kind, "  median", round(middle, 1), "ms", ""),
        Row("overload", kind, f"failed of {len(answers)}", failed, "", "0", failed == 0),
    ]


def prefix_row(bench: Bench, kind: str) -> list[Row]:
    """One request after the other: the batch is empty, so that nothing but the prompt is waited for."""

    async def firsts(url: str) -> list[float]:
        seconds = []
        async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=600)) as session:
            for _ in range(bench.options.rounds):
                shared = bench.random.choices(bench.ids, k=SHARED_TOKENS)
                for _ in range(1 + SHARING):
                    own = bench.random.choices(bench.ids, k=bench.length)
                    answer = await ask(session, url, {"prompt": shared + own, "max_tokens": 2})
                    assert answer.status == 200, answer
                    seconds.append(answer.first_s)
        return seconds

    with bench.endpoint(kind) as endpoint, added_to(bench.spent):
        seconds = asyncio.run(firsts(endpoint.ready["url"]))
    alone, later = seconds[:: 1 + SHARING], [first for k, first in enumerate(seconds) if k % (1 + SHARING)]
    share = statistics.median(later) / statistics.median(alone)
    what = f"first token after a shared prefix of {SHARED_TOKENS}, over the first request's"
    span = f"→ {1000 * statistics.median(later):.0f} ms"
    return [
        Row("prefix", kind, what, round(share, 3), "×", ""),
        Row("prefix", kind, "  from, to", round(1000 * statistics.median(alone)), span, ""),
    ]


def mixed_row(bench: Bench, kind: str) -> list[Row]:
    """Four answers run; calm and with prompts that arrive one after the other, in turns."""

    async def gaps(url: str, with_prompts: bool) -> tuple[list[float], list[float]]:
        times: list[float] = []
        firsts: list[float] = []
        running = [{"prompt": prompt, "max_tokens": 4 * bench.options.new_tokens} for prompt in bench.prompts()[:RUNNING]]

        async def one(session: aiohttp.ClientSession, body: dict[str, Any]) -> None:
            arrivals = (await ask(session, url, body)).arrivals
            times.extend(after - before for before, after in pairwise(arrivals))

        async def prompts(session: aiohttp.ClientSession) -> None:
            while True:
                body = {"prompt": bench.random.choices(bench.ids, k=LONG_PROMPT), "max_tokens": 1}
                firsts.append((await ask(session, url, body)).total_s)

        async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=600)) as session:
            arriving = asyncio.create_task(prompts(session)) if with_prompts else None
            await asyncio.gather(*(one(session, body) for body in running))
            if arriving is not None:
                arriving.cancel()
                await asyncio.gather(arriving, return_exceptions=True)
        return times, firsts

    calm: list[float] = []
    mixed: list[float] = []
    prompts: list[float] = []
    # so long a wait that no prompt is refused
    with bench.endpoint(kind, limits={"max_wait_share": 1000}) as endpoint, added_to(bench.spent):
        for turn in range(bench.options.rounds + 1):
            alone, _ = asyncio.run(gaps(endpoint.ready["url"], with_prompts=False))
            among, firsts = asyncio.run(gaps(endpoint.ready["url"], with_prompts=True))
            if turn:
                calm, mixed, prompts = calm + alone, mixed + among, prompts + firsts
    times = percentile(mixed, 0.99) / percentile(calm, 0.99)
    span = f"→ {1000 * percentile(mixed, 0.99):.0f} ms; {len(prompts)} prompts"
    span += f", {statistics.median(prompts):.1f} s each" if prompts else " were read"
    what = f"p99 between tokens while prompts of {LONG_PROMPT} arrive, over none"
    return [
        Row("mixed", kind, what, round(times, 2), "×", "≤ 2", times <= 2),
        Row("mixed", kind, "  from, to", round(1000 * percentile(calm, 0.99)), span, ""),
    ]


def adapter_row(bench: Bench, kind: str) -> list[Row]:
    """The last adapter is one that no other row uses."""
    new, first = bench.versions[-1], bench.versions[0]
    body = {"model": "bench@prod", "prompt": [100] * bench.length, "max_tokens": 1}

    async def wait_for(url: str, version: str) -> None:
        async with aiohttp.ClientSession() as session:
            deadline = time.perf_counter() + ADAPTER_S
            while (answer := await ask(session, url, body)).version != version:
                if time.perf_counter() > deadline:
                    raise SystemExit(f"{version} did not answer within {ADAPTER_S:.0f} s; the last answer: {answer}")
                await asyncio.sleep(0.02)

    engine = {"max_adapters": 2, "max_lora_rank": bench.options.rank}
    route = {"bench@prod": {"versions": {first: 1}}}
    with bench.endpoint(kind, engine, published=True, aliases=route) as endpoint:
        url = endpoint.ready["url"]
        asyncio.run(wait_for(url, first))
        with added_to(bench.spent):
            begun = time.perf_counter()
            endpoint.ask("alias", name="bench@prod", version=new)
            asyncio.run(wait_for(url, new))
            seconds = time.perf_counter() - begun
    return [
        Row("adapter", kind, "from the alias's move to the new adapter's token", round(seconds, 2), "s", "< 5", seconds < 5)
    ]


def abuse_row(bench: Bench, kind: str) -> list[Row]:
    rows = []
    keys = {"others": {}, "attacker": {"concurrency": 1}}
    with bench.endpoint(kind, keys=keys) as endpoint:
        url, texts, seconds = endpoint.ready["url"], endpoint.ready["keys"], bench.options.seconds
        with added_to(bench.spent):  # without the gateways, which end meanwhile and have a figure of their own
            attacks = list(abuse.measured(url, texts, seconds, bench.options.attacks.split(",")))
        for name, before, during in attacks:
            times = during.p99 / before.p99
            met = times <= 2 and not during.failed
            rows.append(Row("abuse", kind, f"others' p99, {abuse.ATTACKS[name][1]}", round(times, 2), "×", "≤ 2", met))
            span = f"→ {1000 * during.p99:.0f} ms; {len(during.seconds)} answered, {during.failed} not"
            span += f"; the gateway took {during.gateway:.2f} of a core, {before.gateway:.2f} before"
            rows.append(Row("abuse", kind, "  from, to", round(1000 * before.p99), span, ""))
    return rows


ROWS: dict[str, Callable[[Bench, str], list[Row]]] = {
    "endpoint": endpoint_row,
    "raw": raw_row,
    "overhead": overhead_row,
    "batching": batching_row,
    "adapters": adapters_row,
    "overload": overload_row,
    "adapter": adapter_row,
    "prefix": prefix_row,
    "mixed": mixed_row,
    "abuse": abuse_row,
    "ray-llm": ray_llm_row,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", default=",".join(ROWS))
    parser.add_argument("--engines", default="transformers,vllm")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--model", default="", help="a folder with safetensors and tokenizer, else SmolLM2-135M")
    parser.add_argument("--store", default="", help="where the model and its adapters are kept between calls")
    parser.add_argument("--clients", type=int, default=16)
    parser.add_argument("--prompt-tokens", type=int, default=32)
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--adapters", type=int, default=8)
    parser.add_argument("--rank", type=int, default=8, choices=(8, 16, 32, 64, 128, 256))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--requests", type=int, default=300, help="per turn of `overhead`")
    parser.add_argument("--seconds", type=float, default=20, help="of `overload`, and before and during each attack")
    parser.add_argument("--attacks", default=",".join(abuse.ATTACKS), help="of `abuse`")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    names = options.rows.split(",")
    if unknown := set(names) - set(ROWS):
        parser.error(f"--rows: {', '.join(sorted(unknown))} is not one of {', '.join(ROWS)}")
    with tempfile.TemporaryDirectory(prefix="bench-serve-") as scratch:
        options.store = options.store or scratch
        with process(
            "prepare", store=options.store, model=options.model, num_adapters=options.adapters, rank=options.rank
        ) as preparation:
            bench = Bench(options, preparation.ready)
        rows: list[Row] = []
        for name in names:
            for kind in options.engines.split(",")[: 1 if name == "overhead" else None]:
                print(f"{name} {kind}", file=sys.stderr)
                bench.spent.clear()
                if measured := ROWS[name](bench, kind):
                    seconds = round(sum(bench.spent.values()), 1)
                    rows += [*measured, Row(name, kind, "  processor seconds", seconds, f"s: {in_words(bench.spent)}", "")]
    report(options, rows)


def report(options: argparse.Namespace, rows: list[Row]) -> None:
    if options.json:
        print(json.dumps([asdict(row) for row in rows]))
        return
    load = os.getloadavg()[0]
    print(
        f"{options.clients} clients, {options.prompt_tokens} + {options.new_tokens} tokens, median of {options.rounds};",
        end=" ",
    )
    print(f"{os.cpu_count()} CPUs, load {load:.1f} at the end, {options.device}\n")
    print("| row | engine | what | value | target |  |\n| --- | --- | --- | ---: | --- | --- |")
    for row in rows:
        met = {True: "met", False: "missed", None: ""}[row.met]
        print(f"| {row.row} | {row.engine} | {row.what} | {row.value} {row.unit} | {row.target} | {met} |")


if __name__ == "__main__":
    main()
