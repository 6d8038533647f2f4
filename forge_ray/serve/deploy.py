"""Deploy models to an endpoint, and undeploy it. Ray must be initialised by the caller.

The application belongs to Serve's detached controller: it keeps running when this process ends. It owns the route prefix
`/`, so that clients use the plain base URL `http://host:port/v1`; one cluster therefore serves one deployment at a time.
"""

from __future__ import annotations

import os
import sys
import time
from typing import Any

import httpx2
import ray
from ray import serve
from ray.exceptions import RayError
from ray.serve import RunTarget
from ray.serve.config import AutoscalingConfig, AutoscalingPolicy, BackpressureConfig
from ray.serve.schema import ApplicationStatus, LoggingConfig

from forge_ray.config.base import config_digest, parse, resolved
from forge_ray.config.release import DeployConfig
from forge_ray.errors import ConfigError, EngineError, NotFound, PolicyError, last_line
from forge_ray.machine.capacity import SAY_EVERY_S, Demand, is_short, missing, refuse_oversized
from forge_ray.machine.offline import SERVE
from forge_ray.machine.ray_internals import started_here
from forge_ray.models.class_head import refuse_reward_model
from forge_ray.records import Deployment
from forge_ray.release import promotion
from forge_ray.serve.coordinator import find_coordinator
from forge_ray.serve.endings import last_deployment, note, note_replaced, note_unsaid_ends, status_on_record
from forge_ray.serve.front import proxy_address
from forge_ray.serve.gateway_config import GatewayConfig
from forge_ray.serve.replica import Replica
from forge_ray.store.catalog import Catalog
from forge_ray.store.files import Store
from forge_ray.store.owner import owner_mark

POLL_S = 0.25
SLOWEST_TOKEN_S = 0.5  # on a loaded CPU; sets how long a stopping replica may take to finish its answers
KEEP_ALIVE_S = 90  # longer than clients keep idle connections, so that they close first and never send into a closed one
RETRY_AFTER_S = 2
LOOK_BACK_S = 5  # the load is averaged over this time


def drain_s(config: DeployConfig) -> float:
    """How long a stopping replica may take to finish its answers: longer than the longest answer takes."""
    return max(60.0, config.limits.max_new_tokens * SLOWEST_TOKEN_S)


def options(config: DeployConfig) -> dict[str, Any]:
    """Ray Serve's settings of the deployment.

    A replica admits what its engine runs and its own queue holds, and refuses the rest at once (429); Serve's queue in front
    of it is for the time without any replica. A rollout starts new replicas before old ones stop.
    """
    most = config.engine.max_running + config.limits.max_queued_requests
    target = config.replicas.target_tokens or config.engine.cache_tokens // 2
    return {
        "name": "replica",
        "ray_actor_options": {"num_cpus": config.cpus_per_replica, "num_gpus": config.gpus_per_replica},
        "autoscaling_config": AutoscalingConfig(
            min_replicas=config.replicas.min,
            max_replicas=config.replicas.max,
            upscale_delay_s=config.replicas.upscale_delay_s,
            downscale_delay_s=config.replicas.downscale_delay_s,
            metrics_interval_s=1,
            look_back_period_s=LOOK_BACK_S,
            policy=AutoscalingPolicy(
                policy_function="forge_ray.serve.scaling:TokensPolicy", policy_kwargs={"target_tokens": target}
            ),
        ),
        "max_ongoing_requests": 2 * most,
        "max_queued_requests": most * config.replicas.max,
        "backpressure_config": BackpressureConfig(status_code=429, retry_after_s=RETRY_AFTER_S),
        "max_surge_percent": 100 if config.replicas.surge else 0,
        "graceful_shutdown_timeout_s": drain_s(config),
        "health_check_period_s": 10,
        "health_check_timeout_s": 60,
        "logging_config": LoggingConfig(enable_access_log=False),  # `access_log` has a line already
    }


def build_app(deployment: Deployment, store_uri: str) -> serve.Application:
    """The Serve application of a sealed deployment record."""
    config = DeployConfig.model_validate(deployment.config)
    replica: Any = serve.deployment(Replica)
    app: serve.Application = replica.options(**options(config)).bind(deployment.model_dump(mode="json"), store_uri)
    return app


def app_from_args(args: dict[str, Any]) -> serve.Application:
    """For a Serve config file (KubeRay's RayService): `args` has `store`, a URI, and `deploy`, a `DeployConfig` mapping.

    Host and port are then Serve's own, from that file.
    """
    config = parse(DeployConfig, args["deploy"], where="deploy")
    with Catalog.open(Store(args["store"])) as catalog:
        return build_app(catalog.put(deployment_of(config, catalog)), args["store"])


def serve_file(config: DeployConfig, store_uri: str) -> dict[str, Any]:
    """The same deployment as a file for `serve deploy` (or a RayService's `serveConfigV2`)."""
    host, port = proxy_address(config, None)
    return {
        "http_options": {"host": host, "port": port, "keep_alive_timeout_s": KEEP_ALIVE_S},
        "applications": [
            {
                "name": config.name,
                "route_prefix": "/",
                "import_path": "forge_ray.serve.deploy:app_from_args",
                "runtime_env": {"env_vars": SERVE},
                "args": {"store": store_uri, "deploy": config.model_dump(mode="json", exclude_defaults=True)},
            }
        ],
    }


def deployment_of(config: DeployConfig, catalog: Catalog) -> Deployment:
    """The sealed record of the deployment; a rejected or archived version is refused."""
    archived = catalog.archived()
    models = {}
    for name in config.models:
        version = catalog.model(name)
        if version.status == "rejected":
            raise PolicyError(
                f"{version.id} was rejected: {'; '.join(version.reasons)}",
                hint="deploy another version, or train a better one",
            )
        if version.id in archived:
            raise PolicyError(f"{version.id} is archived", hint=f"`forge models restore {version.id}` first")
        refuse_reward_model(catalog.store, version)
        promotion.require_signed(catalog, version)
        models[name] = version.id
    first = catalog.model(config.models[0])
    return Deployment(
        name=config.name,
        model=config.models[0],
        model_version=first.id,
        model_digest=first.files_digest,
        models=models,
        config=resolved(config),
        config_digest=config_digest(config),
        genesis=catalog.authority().genesis,
    ).sealed()


def _start_proxy(host: str, port: int) -> None:
    try:
        serve.start(http_options={"host": host, "port": port, "keep_alive_timeout_s": KEEP_ALIVE_S})
    except (RayError, TimeoutError) as error:
        raise EngineError(
            f"Ray Serve's HTTP proxy did not start on {host}:{port}: {last_line(error) or type(error).__name__}",
            hint=f"the machine is at load {os.getloadavg()[0]:.0f}; if that is why, try again when it is quieter; the cause"
            " is in Ray's logs, session_latest/logs/serve/proxy_*.log",
        ) from error


def deploy(config: DeployConfig, catalog: Catalog, wait_s: float = 900, gateway: GatewayConfig | None = None) -> Deployment:
    """Serve the models of `config` and wait until they answer; writes the record, and its state as an event. `gateway`: what
    the caller starts in front, on the deployment's own host and port; without it those must be on loopback."""
    host, port = proxy_address(config, gateway)
    refuse_oversized(replicas_demand(config))
    for alias, route in config.aliases.items():
        if catalog.routes().get(alias) != (resolved_route := promotion.resolved_route(catalog, alias, route)):
            promotion.set_route(catalog, alias, resolved_route, why=f"deployment file of {config.name}")
    deployment = deployment_of(config, catalog)
    _start_proxy(host, port)
    running = set(serve.status().applications)
    if others := sorted(running - {config.name}):
        raise ConfigError(
            f"the cluster already serves {', '.join(others)} at /; {config.name!r} cannot have the same route",
            hint=f"`forge undeploy {others[0]}` first, or use another cluster",
        )
    deployment = catalog.put(deployment)
    before = last_deployment(catalog, config.name) if config.name in running else None
    note_unsaid_ends(catalog, config.name, served=before.id if before else "")
    target = RunTarget(target=build_app(deployment, catalog.store.uri), name=config.name, route_prefix="/")
    try:
        serve.run_many([target], wait_for_ingress_deployment_creation=False, wait_for_applications_running=False)
        wait_until_answering(config, deployment.id, time.monotonic() + wait_s, _url(host, port))
    except EngineError as error:
        note(catalog, deployment, "failed", reason=error.message)
        if config.name not in running:  # a first deployment that failed is removed again
            serve.delete(config.name)
        raise
    if before is not None and before.id != deployment.id:
        note_replaced(catalog, before, deployment)
    process = {"process": owner_mark()} if started_here() else {}  # with which it ends
    note(catalog, deployment, "running", url=base_url(config), **process)
    return deployment


def note_end(deployment: Deployment, store: Store) -> None:
    """Record that an endpoint ends in order with this process. One on a cluster keeps running, and nothing is recorded."""
    if started_here():
        with Catalog.open(store) as catalog:
            note(catalog, deployment, "stopped")


def replicas_demand(config: DeployConfig) -> Demand:
    """What the fewest replicas that can answer ask of Ray."""
    count = max(config.replicas.min, 1)
    settings = "cpus_per_replica, gpus_per_replica and replicas.min of the deployment"
    return Demand(f"endpoint {config.name!r}", count, config.cpus_per_replica, config.gpus_per_replica, settings)


def undeploy(name: str, catalog: Catalog | None = None) -> list[str]:
    """Remove the application after its running requests finish; with a catalogue, record that it stopped. The end of one
    that is not on this cluster is recorded where the store shows that it crashed or is silent; the ids of these."""
    if name not in serve.status().applications:
        if catalog is not None and (ended := note_unsaid_ends(catalog, name)):
            return ended
        running = ", ".join(sorted(serve.status().applications)) or "nothing"
        raise NotFound(f"no deployment {name!r} is running on this cluster", hint=f"running: {running}")
    serve.delete(name)
    if catalog is not None and (record := last_deployment(catalog, name)):
        if coordinator := find_coordinator(record.id):
            ray.kill(coordinator)
        note(catalog, record, "stopped")
    return []


def status(catalog: Catalog) -> list[dict[str, Any]]:
    """What runs on this cluster: Serve's own state, and what the replicas reported to their coordinator; with what the store
    knows of endpoints elsewhere."""
    endpoints = []
    for name, application in sorted(serve.status().applications.items()):
        record = last_deployment(catalog, name)
        coordinator = find_coordinator(record.id) if record else None
        state = ray.get(coordinator.state.remote(), timeout=30) if coordinator else {}
        url = base_url(parse(DeployConfig, record.config)) if record else ""
        replicas = {deployment.status.value: deployment.replica_states for deployment in application.deployments.values()}
        endpoints.append(
            {
                "name": name,
                "status": application.status.value,
                "message": application.message,
                "url": url,
                "replica_states": next(iter(replicas.values()), {}),
                **state,
            }
        )
    return [*endpoints, *status_on_record(catalog, {endpoint["name"] for endpoint in endpoints})]


def base_url(config: DeployConfig) -> str:
    """The URL by which clients on this machine reach the endpoint: loopback for a server on all interfaces."""
    return _url(config.host, config.port)


def _url(host: str, port: int) -> str:
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)
    return f"http://{f'[{host}]' if ':' in host else host}:{port}"


def wait_until_answering(config: DeployConfig, deployment_id: str, deadline: float, url: str) -> None:
    """Wait until exactly this deployment answers at `url`; `EngineError` when Serve gives up or time runs out.

    With a minimum of 0 replicas, the endpoint is ready when Serve is: the first request starts one.
    """
    seen, began = "not started", time.monotonic()
    say_at = began + SAY_EVERY_S
    with httpx2.Client(base_url=url, timeout=10, trust_env=False) as client:
        while time.monotonic() < deadline:
            application = serve.status().applications.get(config.name)
            if application is not None:
                seen = f"{application.status.value.lower()} {application.message}".strip()
                if application.status == ApplicationStatus.DEPLOY_FAILED:
                    raise EngineError(f"{config.name!r} could not be deployed: {seen}", hint="see the replica's log")
                if application.status == ApplicationStatus.RUNNING:
                    if not config.replicas.min:
                        return
                    answered = _answers(client)
                    if answered == deployment_id:
                        return
                    seen = f"running, and {url} is answered by {answered or 'another server'}"
            if (now := time.monotonic()) >= say_at:
                say_at = now + SAY_EVERY_S
                waits = f"{now - began:.0f} of at most {deadline - began:.0f} s"
                demand = replicas_demand(config)
                why = (
                    f"{missing(demand)}, and a replica that loads holds its own"
                    if is_short(demand)
                    else "it loads its models"
                )
                print(f"  waiting   {seen}; {why}; {waits}", file=sys.stderr, flush=True)
            time.sleep(POLL_S)
    raise EngineError(
        f"{config.name!r} did not become healthy in {deadline - began:.0f} s: {seen}; {missing(replicas_demand(config))}",
        hint="check that the cluster has the CPUs or GPUs of a replica and that the port is Serve's",
    )


def _answers(client: httpx2.Client) -> str:
    """The id of the deployment that answers; a 401 carries it too."""
    try:
        return client.get("/health").headers.get("x-forge-deployment", "")
    except httpx2.TransportError:
        return ""
