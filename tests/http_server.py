"""A replica's HTTP without Ray: the tiny model behind uvicorn in a thread, for tests of the API."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from forge_ray.config.base import parse
from forge_ray.config.release import DeployConfig
from forge_ray.data.tokens.chat import load_tokenizer_dir
from forge_ray.inference.load import load_engine
from forge_ray.serve.context import Caller, Chosen, Directory, ServingContext
from forge_ray.serve.http import build_http
from forge_ray.serve.loaded import Loaded
from forge_ray.serve.metrics import Metrics
from forge_ray.serve.openai import ApiError
from forge_ray.serve.routing import RoutingInputs

ENGINE = {"precision": "fp32", "page_size": 16, "num_blocks": 256, "max_batch_tokens": 128}


class Fixed:
    """Names that never change."""

    def __init__(self, **names: Loaded) -> None:
        self.names = names

    def stable(self, name: str, caller: Caller) -> Loaded:
        if name not in self.names:
            raise ApiError(404, f"model {name!r} is not served here", param="model", code="model_not_found")
        return self.names[name]

    async def choose(self, name: str, caller: Caller, inputs: RoutingInputs) -> Chosen:
        return Chosen(name, self.stable(name, caller))

    def cards(self, caller: Caller) -> list[dict[str, Any]]:
        return [
            {"id": name, "object": "model", "created": 1, "owned_by": "forge_ray", "model_version": loaded.version}
            for name, loaded in self.names.items()
        ]


def deployment(directory: Directory, **more: Any) -> ServingContext:
    """What `directory` names, without an engine of its own; `more` are settings of the deployment."""
    config = parse(DeployConfig, {"name": "bot", "models": ["tiny"], "engine": ENGINE, **more})
    return ServingContext(config, "dep_0", directory, Metrics("bot", "r0"))


def served(model_dir: Path, name: str = "tiny", **more: Any) -> ServingContext:
    """The model of `model_dir` as `name`; `more` are settings of the deployment. Close the engine when done."""
    config = parse(DeployConfig, {"name": "bot", "models": [name], "engine": ENGINE, **more})
    engine = load_engine(model_dir, None, config.engine, use_gpu=False)
    tokenizer = load_tokenizer_dir(model_dir)
    loaded = Loaded("mv_0", "sha256:" + "0" * 64, engine, "", tokenizer, (tokenizer.end_of_turn_id,))
    return ServingContext(
        config, "dep_0", Fixed(**{name: loaded}), Metrics("bot", "r0", lambda: [engine.health()], lambda: [loaded])
    )


@contextmanager
def running(app: Any) -> Iterator[str]:
    """`app` on a free port of the loopback; gives its URL."""
    import uvicorn

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = int(probe.getsockname()[1])
    server = uvicorn.Server(uvicorn.Config(app, port=port, log_level="error", timeout_keep_alive=60))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    deadline = time.monotonic() + 60
    while not server.started and time.monotonic() < deadline:
        time.sleep(0.01)
    yield f"http://127.0.0.1:{port}"
    server.should_exit = True
    thread.join(timeout=30)


@contextmanager
def endpoint(model_dir: Path, **more: Any) -> Iterator[str]:
    """URL of the tiny model's API."""
    ready = served(model_dir, **more)
    try:
        with running(build_http(ready)) as url:
            yield url
    finally:
        ready.directory.stable("tiny", Caller("test")).engine.close()
