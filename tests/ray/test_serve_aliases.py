"""Models that change while traffic flows: aliases, canaries, rules, archives, and the end of an endpoint."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections import Counter
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from serving import MESSAGES, WAIT_S, Endpoint, config, free_port, make_adapter, register

from forge_ray.config.base import parse
from forge_ray.config.release import AliasRoute, Guard
from forge_ray.errors import ConfigError, NotFound, PolicyError
from forge_ray.records import ModelVersion
from forge_ray.release import promotion, traffic
from forge_ray.store import lease, paths
from forge_ray.store.catalog import Catalog
from forge_ray.store.endpoint_state import state_of
from forge_ray.store.files import Store

pytestmark = pytest.mark.ray


@pytest.fixture(scope="module")
def catalog(store: Store) -> Any:
    with Catalog.open(store) as catalog:
        yield catalog


@pytest.fixture(scope="module")
def adapters(catalog: Catalog, endpoint: Endpoint, tiny_model_dir: Path, tmp_path_factory: Any) -> list[ModelVersion]:
    """Four adapters: one more than the engine holds at once."""
    folder = tmp_path_factory.mktemp("adapters")
    return [
        register(
            catalog, make_adapter(tiny_model_dir, folder / str(seed), seed, r=4 + 4 * (seed % 2)), endpoint.version, "a"
        )
        for seed in range(4)
    ]


@pytest.fixture(scope="module")
def expected(tiny_model_dir: Path, store: Store, adapters: list[ModelVersion]) -> dict[str, str]:
    """version → its greedy answer by plain transformers and PEFT."""
    import torch
    from peft import PeftModel
    from transformers import AutoTokenizer, LlamaForCausalLM

    tokenizer = AutoTokenizer.from_pretrained(tiny_model_dir)
    prompt = tokenizer.apply_chat_template(MESSAGES, add_generation_prompt=True, return_tensors="pt", return_dict=True)

    def answer(model: Any) -> str:
        ids = model.generate(**prompt, do_sample=False, max_new_tokens=16)[0, prompt["input_ids"].shape[1] :]
        return str(tokenizer.decode(ids, skip_special_tokens=True))

    def base() -> Any:
        return LlamaForCausalLM.from_pretrained(tiny_model_dir, dtype=torch.float32).eval()

    answers = {
        version.id: answer(PeftModel.from_pretrained(base(), store.fetch_dir(f"models/{version.id}")))
        for version in adapters
    }
    return answers | {"base": answer(base())}


def wait_for(url: str, name: str, version: str) -> None:
    """Until both replicas answer `name` by `version`."""
    deadline = time.monotonic() + WAIT_S
    while time.monotonic() < deadline:
        versions = {httpx.get(f"{url}/v1/models/{name}", timeout=WAIT_S).json().get("model_version") for _ in range(6)}
        if versions == {version}:
            return
        time.sleep(0.1)
    raise AssertionError(f"{name} is {versions}, not {version}")


def test_moved_alias_answers_with_the_new_adapter(
    endpoint: Endpoint, catalog: Catalog, adapters: list[ModelVersion], expected: dict[str, str], greedy: Any
) -> None:
    """Names with `:` and `/`; after each move the new adapter's exact answer at once, though the prompt was cached."""
    name = "ft:tiny:org/support@prod"
    assert len(set(expected.values())) == 5
    for version in [*adapters, adapters[0]]:
        promotion.set_route(catalog, name, AliasRoute(versions={version.id: 1}))
        wait_for(endpoint.url, name, version.id)
        assert greedy(name) == (expected[version.id], version.id, "stable")
        assert greedy(version.id)[:2] == (expected[version.id], version.id)
        assert greedy("tiny")[0] == expected["base"]
    card = httpx.get(f"{endpoint.url}/v1/models/{name}", timeout=WAIT_S).json()
    assert (card["base_model"], card["model_digest"]) == (endpoint.version.id, adapters[0].files_digest)


def test_no_request_fails_or_mixes_versions_while_an_alias_moves(
    endpoint: Endpoint, catalog: Catalog, adapters: list[ModelVersion], expected: dict[str, str], greedy: Any
) -> None:
    name, one, two = "moving@prod", adapters[0], adapters[1]
    promotion.set_route(catalog, name, AliasRoute(versions={one.id: 1}))
    wait_for(endpoint.url, name, one.id)
    stop, seen, failures = threading.Event(), Counter(), []

    def ask() -> None:
        while not stop.is_set():
            try:
                text, version, _ = greedy(name)
                seen[version, text == expected[version]] += 1
            except Exception as error:
                failures.append(error)

    threads = [threading.Thread(target=ask) for _ in range(4)]
    for thread in threads:
        thread.start()
    for version in (two, one) * 3:
        promotion.set_route(catalog, name, AliasRoute(versions={version.id: 1}))
        wait_for(endpoint.url, name, version.id)
    stop.set()
    for thread in threads:
        thread.join()
    assert not failures
    assert set(seen) == {(one.id, True), (two.id, True)}


def test_weights_shadow_and_rules(
    endpoint: Endpoint, catalog: Catalog, adapters: list[ModelVersion], expected: dict[str, str], greedy: Any
) -> None:
    name = "split@prod"
    one, two, three = adapters[:3]
    rules = [
        {"to": three.id, "header": {"X-Domain": "cards"}},
        {"to": "base", "user": ["guest"]},
        {"to": "base", "prompt_tokens_from": 400},
    ]
    route = parse(AliasRoute, {"versions": {one.id: 50, two.id: 50}, "shadow": [three.id], "rules": rules})
    promotion.set_route(catalog, name, route)
    wait_for(endpoint.url, name, one.id)
    answers = Counter(greedy(name) for _ in range(30))
    assert set(answers) == {(expected[one.id], one.id, "stable"), (expected[two.id], two.id, "canary")}
    same = {greedy(name, user="alice")[1] for _ in range(6)}
    assert len(same) == 1  # a user stays with a version
    assert greedy(name, extra_headers={"X-Domain": "cards"}) == (expected[three.id], three.id, "rule 1")
    assert greedy(name, user="guest") == (expected["base"], endpoint.version.id, "rule 2")
    deadline = time.monotonic() + WAIT_S
    shadowed = f'model="{name}",model_version="{three.id}"'
    while not any(
        line.startswith("forge_shadow_answers_total") and shadowed in line
        for line in httpx.get(f"{endpoint.url}/metrics", timeout=WAIT_S).text.splitlines()
    ):
        assert time.monotonic() < deadline
        time.sleep(0.5)


def test_classifier_rule_routes_by_its_answer(
    endpoint: Endpoint, catalog: Catalog, adapters: list[ModelVersion], client: openai.OpenAI, greedy: Any
) -> None:
    one, two, judge = adapters[:3]
    verdict = client.chat.completions.create(model=judge.id, messages=MESSAGES, temperature=0, max_tokens=8)
    label = (verdict.choices[0].message.content or "").strip()
    for name, routed_label in (("domain@prod", label), ("other@prod", "something else")):
        rules = [{"to": two.id, "classifier": judge.id, "label": routed_label}]
        promotion.set_route(catalog, name, parse(AliasRoute, {"versions": {one.id: 1}, "rules": rules}))
        wait_for(endpoint.url, name, one.id)
    assert greedy("domain@prod")[1:] == (two.id, "rule 1")
    assert greedy("other@prod")[1:] == (one.id, "stable")


def test_unknown_is_404_archived_is_410_unless_a_fallback_is_declared(
    endpoint: Endpoint, catalog: Catalog, adapters: list[ModelVersion], expected: dict[str, str], greedy: Any
) -> None:
    version = adapters[3]
    for name, fallback in (("old@prod", ""), ("kind@prod", "base")):
        promotion.set_route(catalog, name, parse(AliasRoute, {"versions": {version.id: 1}, "fallback": fallback}))
    wait_for(endpoint.url, "kind@prod", version.id)
    with pytest.raises(openai.NotFoundError, match="not served"):
        greedy("nobody@prod")
    promotion.archive(catalog, version.id)
    wait_for_status(endpoint.url, "old@prod", 410)
    assert greedy("kind@prod") == (expected["base"], endpoint.version.id, "fallback")
    with pytest.raises(openai.APIStatusError) as refusal:
        greedy("old@prod")
    assert (refusal.value.status_code, refusal.value.code) == (410, "model_archived")
    with pytest.raises(PolicyError, match="archived"):
        promotion.set_route(catalog, "new@prod", AliasRoute(versions={version.id: 1}))
    promotion.archive(catalog, version.id, restore=True)
    wait_for(endpoint.url, "old@prod", version.id)
    assert greedy("old@prod")[0] == expected[version.id]
    promotion.set_route(catalog, "old@prod", None)
    wait_for_status(endpoint.url, "old@prod", 410)


def wait_for_status(url: str, name: str, status: int) -> None:
    deadline = time.monotonic() + WAIT_S
    while {httpx.get(f"{url}/v1/models/{name}", timeout=WAIT_S).status_code for _ in range(6)} != {status}:
        assert time.monotonic() < deadline
        time.sleep(0.1)


def test_version_that_fails_to_load_never_replaces_the_served_one(
    endpoint: Endpoint, catalog: Catalog, adapters: list[ModelVersion], expected: dict[str, str], greedy: Any, tmp_path: Path
) -> None:
    folder = make_adapter(endpoint_model(catalog, endpoint), tmp_path / "bad", 9)
    bad = register(catalog, folder, endpoint.version, "bad")
    path = Path(catalog.store.root) / f"models/{bad.id}/adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:-4] + b"torn")
    promotion.set_route(catalog, "careful@prod", AliasRoute(versions={adapters[0].id: 1}))
    wait_for(endpoint.url, "careful@prod", adapters[0].id)
    promotion.set_route(catalog, "careful@prod", AliasRoute(versions={bad.id: 1}))
    deadline = time.monotonic() + WAIT_S
    while not (broken := coordinator_state(endpoint)["table"]["broken"]) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert "adapter_model.safetensors" in broken[bad.id]
    assert greedy("careful@prod")[:2] == (expected[adapters[0].id], adapters[0].id)
    traffic.rollback(catalog, "careful@prod")


def endpoint_model(catalog: Catalog, endpoint: Endpoint) -> Path:
    return catalog.store.fetch_dir(f"models/{endpoint.version.id}")


def coordinator_state(endpoint: Endpoint) -> dict[str, Any]:
    import ray

    from forge_ray.serve.coordinator import find_coordinator

    state: dict[str, Any] = ray.get(find_coordinator(endpoint.deployment.id).state.remote())
    return state


def test_failing_canary_is_rolled_back(endpoint: Endpoint, catalog: Catalog, adapters: list[ModelVersion]) -> None:
    import ray

    from forge_ray.serve.canary import AnswerOutcome
    from forge_ray.serve.coordinator import find_coordinator

    name, one, two = "canary@prod", adapters[0], adapters[1]
    promotion.set_route(catalog, name, AliasRoute(versions={one.id: 1}))
    traffic.canary(catalog, name, two.id, 30, Guard(max_error_rate=0.2, min_requests=10))
    wait_for(endpoint.url, name, one.id)
    deadline = time.monotonic() + WAIT_S
    while len(coordinator_state(endpoint)["table"]["routes"].get(name, {"versions": {}})["versions"]) < 2:
        assert time.monotonic() < deadline
        time.sleep(0.1)
    coordinator = find_coordinator(endpoint.deployment.id)
    failed = [AnswerOutcome(name, two.id, 503, 0.0)] * 5 + [AnswerOutcome(name, two.id, 200, 0.01)] * 10
    ray.get(coordinator.report.remote("nobody", {}, [], failed, ""))
    while True:
        with Catalog.open(catalog.store) as now:  # what the coordinator wrote is seen by a catalogue that is opened after it
            if now.routes()[name].versions == {one.id: 1.0}:
                break
        assert time.monotonic() < deadline
        time.sleep(0.2)
    with Catalog.open(catalog.store) as now:
        assert "33.3% of 15 answers failed" in traffic.history(now, name)[-1]["why"]


def test_killed_replica_restarts_with_every_published_adapter(
    endpoint: Endpoint, adapters: list[ModelVersion], expected: dict[str, str], greedy: Any
) -> None:
    before = coordinator_state(endpoint)["replicas"]
    pid = next(iter(before.values()))["pid"]
    os.kill(pid, signal.SIGKILL)
    deadline = time.monotonic() + WAIT_S
    while time.monotonic() < deadline:
        now = coordinator_state(endpoint)["replicas"]
        if (
            len(now) == 2
            and pid not in {seen.get("pid") for seen in now.values()}
            and all(seen["live"] for seen in now.values())
        ):
            break
        time.sleep(0.2)
    else:
        raise AssertionError(now)
    for version in adapters[:3]:
        answers = {greedy(version.id)[0] for _ in range(6)}
        assert answers == {expected[version.id]}


def test_unused_coordinator_ends_and_a_killed_one_restarts(endpoint: Endpoint, store: Store, catalog: Catalog) -> None:
    """With a minimum of 0 replicas an unused one gives up the lease; one that restarts takes it over."""
    import ray

    from forge_ray.serve.coordinator import coordinator_of, find_coordinator

    more = {"name": "nobody's", "config": endpoint.deployment.config | {"replicas": {"min": 0, "max": 1}}}
    other = endpoint.deployment.model_copy(update=more).sealed()
    ray.get(coordinator_of(other, store.uri, idle_s=6).start.remote())
    deadline, was_held = time.monotonic() + WAIT_S, False
    while find_coordinator(other.id) is not None:
        assert time.monotonic() < deadline
        was_held = was_held or lease.read(store, paths.endpoint(other.id)) is not None
        time.sleep(0.2)
    assert was_held
    assert not store.exists(paths.endpoint(other.id))

    path = paths.endpoint(endpoint.deployment.id)
    before = lease.read(store, path)
    assert before is not None
    assert state_of(catalog, endpoint.deployment.id).lives
    ray.kill(find_coordinator(endpoint.deployment.id))
    while (coordinator := find_coordinator(endpoint.deployment.id)) is None or len(
        ray.get(coordinator.state.remote())["replicas"]
    ) < 2:
        assert time.monotonic() < deadline
        time.sleep(0.2)
    while (holder := lease.read(store, path)) == before:
        assert time.monotonic() < deadline
        time.sleep(0.2)
    assert holder is not None
    assert holder.pid != before.pid
    assert lease.runs_here(before) is False
    assert (state_of(catalog, endpoint.deployment.id).state, coordinator_state(endpoint)["lease"]) == ("running", "held")


def test_second_application_and_rejected_version_are_refused(endpoint: Endpoint, catalog: Catalog) -> None:
    from forge_ray.serve.deploy import deploy, undeploy

    with pytest.raises(ConfigError, match="already serves bot"):
        deploy(config(free_port(), name="other"), catalog)
    other = {"source": "", "files_digest": "sha256:" + "0" * 64}  # no import of these files finds it later
    bad = endpoint.version.model_copy(update={"status": "rejected", "reasons": ("too weak",)} | other).sealed()
    catalog.put(bad)
    with pytest.raises(PolicyError, match="too weak"):
        deploy(config(free_port(), models=[bad.id]), catalog)
    with pytest.raises(NotFound, match="running: bot"):
        undeploy("nothing")


def test_undeploy_removes_the_application(endpoint: Endpoint, catalog: Catalog) -> None:
    """Last of this file: it ends the endpoint that the others share."""
    from ray import serve

    from forge_ray.serve.coordinator import find_coordinator
    from forge_ray.serve.deploy import undeploy

    undeploy("bot", catalog)
    states = [event.data["state"] for event in catalog.events("deployment", endpoint.deployment.id)]
    assert states == ["running", "stopped"]
    assert "bot" not in serve.status().applications
    assert find_coordinator(endpoint.deployment.id) is None
