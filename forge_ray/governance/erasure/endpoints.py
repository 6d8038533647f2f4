"""Endpoints that may hold withdrawn weights in memory: each has let go, no longer runs, or is named as not confirmed.

A replica reports the versions in its memory to the coordinator of its deployment, which is asked on the Ray cluster that
this process belongs to or RAY_ADDRESS names. Without one, an endpoint counts as ended where nothing answers at its address
and it was started on this machine. A lease may show that it is running; an old one proves nothing, because weights can be
in memory behind a network that is cut: it only says when the endpoint was last seen.
"""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Collection
from typing import Any

from forge_ray.machine.cluster import connect
from forge_ray.records import Deployment, ModelVersion
from forge_ray.store import audit_log
from forge_ray.store.catalog import Catalog
from forge_ray.store.endpoint_state import CRASHED, RUNNING, SILENT, state_of, was_silent

POLL_S = 1.0
ANSWER_S = 5.0


def wait_until_released(
    catalog: Catalog, versions: Collection[str], deployments: Collection[str], wait_s: float, stopped: Collection[str]
) -> dict[str, str]:
    """Deployment → why it is not confirmed that it holds none of `versions`, after at most `wait_s` seconds. `deployments`
    are those that the plan names, `stopped` those that no longer run by the word of a person."""
    deadline = time.monotonic() + wait_s
    while True:
        catalog.sync()
        running = [one for one in _running(catalog, versions, deployments) if one.id not in stopped]
        reasons = {one.id: _trouble(catalog, one, versions) for one in running} if versions else {}
        open_reasons = {deployment: reason for deployment, reason in reasons.items() if reason}
        if not open_reasons or time.monotonic() > deadline:
            return open_reasons
        time.sleep(min(POLL_S, max(0.0, deadline - time.monotonic())))


def _running(catalog: Catalog, versions: Collection[str], deployments: Collection[str]) -> list[Deployment]:
    """Deployments that run, as the store has it, and may have loaded one of the versions: those of the plan, and those that
    follow all aliases of a base."""
    last = catalog.last("deployment")
    states = {one.id: state_of(catalog, one.id) for one in catalog.all(Deployment)}
    started = {
        one.id: max((e.at for e in catalog.events("deployment", one.id) if e.data["state"] == "running"), default="")
        for one in catalog.all(Deployment)
    }
    of_version = {version.id: version.base_model or version.id for version in catalog.all(ModelVersion)}
    bases = {of_version.get(version, version) for version in versions}
    newest: dict[str, Deployment] = {}
    for one in sorted(catalog.all(Deployment), key=lambda one: started[one.id]):
        newest[one.name] = one  # a later one of the same name took its place
    may_run = [one for one in newest.values() if states[one.id].state in (RUNNING, SILENT, CRASHED)]
    unseen = [one for one in states if one in last and was_silent(last[one])]  # nobody saw that it ended
    may_run += [one for one in catalog.all(Deployment) if one not in may_run and (one.id in unseen or states[one.id].lives)]
    return [
        one
        for one in may_run
        if one.id in deployments
        or (one.config.get("published", True) and of_version.get(one.model_version, one.model_version) in bases)
    ]


def _trouble(catalog: Catalog, deployment: Deployment, versions: Collection[str]) -> str:
    """Why it is not confirmed that the deployment holds none of the versions; "" where it is."""
    state = _state(deployment)
    if state is not None:
        if silent := state.get("silent"):
            return f"its coordinator does not answer ({silent})"
        replicas, running = state["replicas"].values(), state.get("running", 0)
        if held := sorted({version for replica in replicas for version in replica["held"]} & set(versions)):
            return f"its replicas hold {', '.join(held)}"
        return f"{len(replicas)} of its {running} replicas have reported lately" if len(replicas) < running else ""
    running = next((e for e in reversed(catalog.events("deployment", deployment.id)) if e.data.get("url")), None)
    url = running.data["url"] if running else ""
    if url and (answering := _answering(url)):
        return f"{url} answers ({answering}), and this process is not connected to its Ray cluster"
    now, last = state_of(catalog, deployment.id), catalog.last("deployment").get(deployment.id)
    if now.lives:
        return f"its coordinator is running ({now.seen}), and this process is not connected to its Ray cluster"
    if last and was_silent(last):
        return f"nobody saw it end: {last.data['reason']}"
    if now.state == CRASHED or _host(catalog, deployment.id) == socket.gethostname():
        return ""  # it was started here, and nothing answers
    reason = "it was started on another machine, and this process is not connected to its Ray cluster"
    return f"{reason}; it was {now.seen}" if now.seen else reason


def _state(deployment: Deployment) -> dict[str, Any] | None:
    """What the replicas reported to the coordinator, and how many there are (`running`); why it does not answer (`silent`);
    None where no cluster that is in reach has a coordinator."""
    import ray

    from forge_ray.serve.coordinator import find_coordinator

    if not ray.is_initialized():
        if not os.environ.get("RAY_ADDRESS"):
            return None
        connect(show_logs=False)
    coordinator = find_coordinator(deployment.id)
    if coordinator is None:
        return None
    try:
        return {**ray.get(coordinator.state.remote(), timeout=30), "running": _num_replicas(deployment.name)}
    except (ray.exceptions.RayError, TimeoutError) as error:
        return {"silent": type(error).__name__}


def _num_replicas(name: str) -> int:
    """Replicas of an application of Ray Serve that may have weights in memory, those that are stopping too."""
    from ray import serve

    application = serve.status().applications.get(name)
    states = [one.replica_states for one in application.deployments.values()] if application else []
    without = ("STARTING", "STOPPED")
    return sum(n for counts in states for state, n in counts.items() if getattr(state, "value", state) not in without)


def _answering(url: str) -> str:
    """Which deployment answers at the address; "" where nothing does."""
    import httpx2

    try:
        response = httpx2.get(f"{url}/health", timeout=ANSWER_S, trust_env=False)
    except httpx2.ConnectError:
        return ""
    except httpx2.HTTPError as error:
        return type(error).__name__
    return response.headers.get("x-forge-deployment", f"status {response.status_code}")


def _host(catalog: Catalog, deployment: str) -> str:
    """The machine on which it was started last, as the audit log has it."""
    started = (deployment, "deployment.running")
    lines = [line for line in audit_log.read(catalog.store) if (line["subject"], line["action"]) == started]
    return str(lines[-1]["who"]).rpartition("@")[2] if lines else ""
