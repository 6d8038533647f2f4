"""Put a model version behind an endpoint, and take it away (level 4). Ray must be initialised by the caller.

The application belongs to Serve's detached controller: it goes on when this process ends. It owns the route prefix `/`, so
that clients use the plain base URL `http://host:port/v1`; one cluster therefore serves one deployment at a time.
"""

from __future__ import annotations

import time
from typing import Any

import httpx
from ray import serve
from ray.serve import RunTarget
from ray.serve.schema import ApplicationStatus

from forge_ray.catalog import Catalog
from forge_ray.config.base import config_digest, parse, resolved
from forge_ray.config.release import DeployConfig
from forge_ray.errors import ConfigError, EngineError, NotFound, PolicyError
from forge_ray.records import Deployment, Event
from forge_ray.serve.replica import Replica
from forge_ray.store import Store

POLL_S = 0.5
TOKENS_PER_REQUEST = 128  # what a request typically holds of the cache: sets how many are let in at once
SLOWEST_TOKEN_S = 0.5  # on a loaded CPU; sets how long a leaving replica may finish what it began
KEEP_ALIVE_S = 90  # longer than clients keep idle connections, so that they close first and never send into a closed one


def max_ongoing_requests(config: DeployConfig) -> int:
    """How many requests one replica takes at once: what the batch and the cache can move; the rest waits in Serve."""
    engine = config.engine
    fits = min(engine.max_batch_tokens, engine.cache_tokens // TOKENS_PER_REQUEST)
    return max(fits, int(config.replicas.target_ongoing_requests) + 1, 8)


def build_app(deployment: Deployment, store_uri: str) -> serve.Application:
    """The Serve application of a sealed deployment record."""
    config = DeployConfig.model_validate(deployment.config)
    replica: Any = serve.deployment(Replica)
    app: serve.Application = replica.options(
        name="replica",
        ray_actor_options={"num_cpus": config.cpus_per_replica, "num_gpus": config.gpus_per_replica},
        autoscaling_config={
            "min_replicas": config.replicas.min,
            "max_replicas": config.replicas.max,
            "target_ongoing_requests": config.replicas.target_ongoing_requests,
        },
        max_ongoing_requests=max_ongoing_requests(config),
        max_queued_requests=config.max_queued_requests,
        graceful_shutdown_timeout_s=max(60.0, config.max_new_tokens * SLOWEST_TOKEN_S),
        health_check_period_s=10,
        health_check_timeout_s=60,
    ).bind(deployment.model_dump(mode="json"), store_uri)
    return app


def app_from_args(args: dict[str, Any]) -> serve.Application:
    """For a Serve config file (KubeRay's RayService): `args` has `store`, a URI, and `deploy`, a `DeployConfig` mapping.

    Host and port are then Serve's own, from that file.
    """
    config = parse(DeployConfig, args["deploy"], where="deploy")
    with Catalog(Store(args["store"])) as catalog:
        return build_app(catalog.put(deployment_of(config, catalog)), args["store"])


def deployment_of(config: DeployConfig, catalog: Catalog) -> Deployment:
    """The sealed record of what would be served; a rejected version is refused."""
    version = catalog.model(config.model)
    if version.status == "rejected":
        raise PolicyError(
            f"{version.id} was rejected: {'; '.join(version.reasons)}", hint="deploy another version, or train a better one"
        )
    return Deployment(
        name=config.name,
        model=config.name,
        model_version=version.id,
        model_digest=version.files_digest,
        config=resolved(config),
        config_digest=config_digest(config),
    ).sealed()


def deploy(config: DeployConfig, catalog: Catalog, wait_s: float = 900) -> Deployment:
    """Serve what `config.model` names and wait until it answers; the record is written, its state is an event."""
    deployment = deployment_of(config, catalog)
    serve.start(http_options={"host": config.host, "port": config.port, "keep_alive_timeout_s": KEEP_ALIVE_S})
    running = set(serve.status().applications)
    if others := sorted(running - {config.name}):
        raise ConfigError(
            f"the cluster already serves {', '.join(others)} at /; {config.name!r} cannot have the same route",
            hint=f"`forge undeploy {others[0]}` first, or use another cluster",
        )
    deployment = catalog.put(deployment)
    target = RunTarget(target=build_app(deployment, catalog.store.uri), name=config.name, route_prefix="/")
    try:
        serve.run_many([target], wait_for_ingress_deployment_creation=False, wait_for_applications_running=False)
        wait_until_answering(config, deployment.id, time.monotonic() + wait_s)
    except EngineError as error:
        _note(catalog, deployment, "failed", reason=error.message)
        if config.name not in running:  # a first deployment that failed leaves nothing behind
            serve.delete(config.name)
        raise
    _note(catalog, deployment, "running", url=base_url(config))
    return deployment


def undeploy(name: str, catalog: Catalog | None = None) -> None:
    """Take the application away after it has finished what it began; with a catalogue, note that it stopped."""
    if name not in serve.status().applications:
        known = ", ".join(sorted(serve.status().applications)) or "nothing"
        raise NotFound(f"no deployment {name!r} is running on this cluster", hint=f"running: {known}")
    serve.delete(name)
    if catalog is not None:
        last = [record for record in catalog.all(Deployment) if record.name == name][-1:]
        for record in last:
            _note(catalog, record, "stopped")


def base_url(config: DeployConfig) -> str:
    """Where clients reach the endpoint; a server on all interfaces is reached here by loopback."""
    host = {"0.0.0.0": "127.0.0.1", "::": "[::1]"}.get(config.host, config.host)
    return f"http://{host}:{config.port}"


def wait_until_answering(config: DeployConfig, deployment_id: str, deadline: float) -> None:
    """Until /health is served by this very deployment; `EngineError` when Serve gives up or time runs out."""
    seen = "not started"
    with httpx.Client(base_url=base_url(config), timeout=10, trust_env=False) as client:
        while time.monotonic() < deadline:
            application = serve.status().applications.get(config.name)
            if application is not None:
                seen = f"{application.status.value.lower()} {application.message}".strip()
                if application.status == ApplicationStatus.DEPLOY_FAILED:
                    raise EngineError(f"{config.name!r} could not be deployed: {seen}", hint="see the replica's log")
                if application.status == ApplicationStatus.RUNNING:
                    answered = _health(client)
                    if answered == (200, deployment_id):
                        return
                    seen = (
                        f"running, and {base_url(config)}/health answers {answered[0]} for {answered[1] or 'another server'}"
                    )
            time.sleep(POLL_S)
    raise EngineError(
        f"{config.name!r} did not become healthy in time: {seen}",
        hint="check that the cluster has the CPUs or GPUs of a replica and that the port is Serve's",
    )


def _health(client: httpx.Client) -> tuple[int, str]:
    try:
        response = client.get("/health")
    except httpx.TransportError:
        return 0, ""
    return response.status_code, response.headers.get("x-forge-deployment", "")


def _note(catalog: Catalog, deployment: Deployment, state: str, **more: Any) -> None:
    data = {"state": state, "name": deployment.name, "model_version": deployment.model_version, **more}
    catalog.append(Event(kind="deployment", subject=deployment.id, data=data))
