"""Fixtures that several folders share: a tiny random model, a store that holds it, one local Ray cluster."""

from __future__ import annotations

import atexit
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
# what a machine holds of the stores that it has seen; those of tests are not seen again
os.environ["XDG_STATE_HOME"] = tempfile.mkdtemp(prefix="forge-state-")
# The matrices are small, and two processes of tests share the cores: threads would wait for each other longest.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# Ray Train looks at its workers every 2 s, and a worker waits for that look with each checkpoint: long where there are many.
os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.2")

import pytest

atexit.register(shutil.rmtree, os.environ["XDG_STATE_HOME"], ignore_errors=True)

# Files that take long start first, so that the processes of `make test` end at about the same time
LONG = (
    "test_sequence_parallel.py",
    "test_resume.py",
    "test_vllm_engine.py",
    "test_guards.py",
    "test_cluster_job.py",
    "test_serve.py",
    "test_serve_kept_answers.py",  # before the next one, which ends the endpoint that the three share
    "test_serve_aliases.py",
    "test_serve_keys.py",
    "test_serve_scale.py",
    "test_wheel.py",
    "test_train.py",
    "test_guides.py",
    "test_background_validation.py",
    "test_dataset_versions.py",
    "test_serving_chaos.py",
    "test_no_egress.py",
)
SENTENCES = [
    "The quick brown fox jumps over the lazy dog.",
    "How do I reset my password? Open the settings and choose reset.",
    "Paris is the capital of France; Berlin is the capital of Germany.",
    "Größe, café, naïve, 東京 and 🙂 are words with more than one byte per character.",
    "one two three four five six seven eight nine ten",
]
CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: LONG.index(item.path.name) if item.path.name in LONG else len(LONG))


@pytest.hookimpl(optionalhook=True)  # without xdist too: a machine with a GPU may lack it
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """For `--dist loadfile`: the files of the endpoints are as one, for they share a cluster and take it in turns."""
    if config.getoption("dist") != "loadfile":
        return None
    from xdist.scheduler import LoadFileScheduling

    class ByFile(LoadFileScheduling):
        def _split_scope(self, nodeid: str) -> str:
            file = str(super()._split_scope(nodeid))
            return "endpoints" if file.startswith("tests/ray/test_serve") else file

    return ByFile(config, log)


def tiny_tokenizer() -> Any:
    """A byte-level BPE tokenizer trained in a moment, with ChatML's special tokens."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<|pad|>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(SENTENCES, trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<|pad|>",
        eos_token="<|im_end|>",
        additional_special_tokens=["<|im_start|>"],
    )
    fast.chat_template = CHAT_TEMPLATE
    return fast


def make_tiny_model(folder: Path, num_heads: int = 4) -> Path:
    """A random two-layer Llama in fp32 and its tokenizer, as safetensors. Heads have 64 / `num_heads` dimensions."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    tokenizer = tiny_tokenizer()
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=num_heads,
        num_key_value_heads=num_heads // 2,
        max_position_embeddings=512,
        initializer_range=0.3,  # wide, so that the argmax is clear and greedy answers differ between prompts
        eos_token_id=tokenizer.eos_token_id,
        bos_token_id=None,
        pad_token_id=tokenizer.pad_token_id,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def catalog(tmp_path: Path) -> Iterator[Any]:
    """An empty catalogue of a store of its own."""
    from forge_ray.store.catalog import Catalog
    from forge_ray.store.files import Store

    with Catalog.open(Store(str(tmp_path / "store"))) as catalog:
        yield catalog


@pytest.fixture(scope="session")
def tiny_model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp("tiny") / "tiny-llama")


@pytest.fixture(scope="session")
def wide_tiny_model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same with heads of 32 dimensions: vLLM's CPU attention has none of 16."""
    return make_tiny_model(tmp_path_factory.mktemp("wide") / "tiny-llama", num_heads=2)


@pytest.fixture(scope="session")
def store(tmp_path_factory: pytest.TempPathFactory, tiny_model_dir: Path) -> Any:
    """A store that holds the tiny model as a version with the alias `tiny`."""
    from forge_ray.models.import_model import import_model
    from forge_ray.release import promotion
    from forge_ray.store.catalog import Catalog
    from forge_ray.store.files import Store

    store = Store(str(tmp_path_factory.mktemp("store")))
    with Catalog.open(store) as catalog:
        base = import_model(catalog, tiny_model_dir, "tiny-llama", licence="apache-2.0")
        promotion.promote(catalog, base.id, "tiny")
    return store


@pytest.fixture(scope="session")
def ray_cluster() -> Iterator[None]:
    """One local cluster for all tests of a process, started as every command starts its own: one that looks for a dashboard
    waits 12 s for it at the end of each training."""
    import ray

    from forge_ray.machine import cluster

    cluster.connect()
    yield
    ray.shutdown()


@pytest.fixture(scope="session")
def endpoint(ray_cluster: None, store: Any) -> Iterator[Any]:
    """One endpoint for all serving tests: its start takes twenty seconds. Two replicas of the tiny model."""
    from ray import serve
    from serving import WAIT_S, Endpoint, config, free_port

    from forge_ray.serve.deploy import base_url, deploy
    from forge_ray.store.catalog import Catalog

    deploy_config = config(free_port(), keep_answers={"days": 7})
    with Catalog.open(store) as catalog:
        deployment = deploy(deploy_config, catalog, wait_s=WAIT_S)
        yield Endpoint(base_url(deploy_config), deployment, catalog.model("tiny"))
    serve.shutdown()


@pytest.fixture(scope="session")
def client(endpoint: Any) -> Iterator[Any]:
    import openai
    from serving import WAIT_S

    with openai.OpenAI(base_url=f"{endpoint.url}/v1", api_key="none", max_retries=0, timeout=WAIT_S) as client:
        yield client


@pytest.fixture(scope="session")
def greedy(client: Any) -> Any:
    """name → its greedy answer to `MESSAGES`, and which version and route gave it."""

    from serving import MESSAGES

    def ask(name: str, **more: Any) -> tuple[str, str, str]:
        raw = client.chat.completions.with_raw_response.create(
            model=name, messages=MESSAGES, temperature=0, max_tokens=16, **more
        )
        text = raw.parse().choices[0].message.content or ""
        return text, raw.headers["x-forge-model-version"], raw.headers.get("x-forge-route", "")

    return ask
