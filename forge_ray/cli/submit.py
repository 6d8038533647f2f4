"""Submit a run file to a Ray cluster as a job, follow its log, and report the result."""

from __future__ import annotations

import asyncio
import json
import logging
import shlex
import time
from pathlib import Path
from typing import Any

import httpx2

from forge_ray.cli.job_folder import require_complete
from forge_ray.cli.terminal import echo, without_colours
from forge_ray.client import foreign
from forge_ray.config.run import RunConfig
from forge_ray.errors import (
    EXIT_POLICY,
    EXIT_USAGE,
    ConfigError,
    ForgeError,
    NotFound,
    PolicyError,
    TrainingError,
    first_line,
)
from forge_ray.machine.offline import set_offline_switches
from forge_ray.machine.proxies import bypass
from forge_ray.store import pins

AGENT_WAIT_S = 90.0
ANSWER_S = 10.0
EXCLUDES = [".venv", ".git", ".forge", "**/__pycache__", "*.egg-info", ".mypy_cache", ".ruff_cache", ".hypothesis"]


def submit(
    file: str, config: RunConfig, address: str, store_uri: str, overrides: tuple[str, ...], wait: bool
) -> dict[str, Any]:
    """Run `forge run FILE`, whose settings are `config`, on the cluster, with the current folder as its working directory.
    The token is read as Ray does (RAY_AUTH_TOKEN, RAY_AUTH_TOKEN_PATH or ~/.ray/auth_token). With `wait`, logs go to stderr
    until the job ends. Nothing is sent where the folder lacks a file that the run file names."""
    set_offline_switches()
    path = Path(file)
    if not path.is_file() or not path.resolve().is_relative_to(Path.cwd()):
        raise NotFound(
            f"{file!r} is not a file below the current folder",
            hint="the current folder becomes the job's working directory: cd there",
        )
    if "://" not in store_uri and not Path(store_uri).is_absolute():
        raise ConfigError(f"store {store_uri!r} is relative", hint="use a path or URI that all nodes share")

    import requests
    from ray.exceptions import AuthenticationError
    from ray.job_submission import JobStatus, JobSubmissionClient

    logging.getLogger("ray").setLevel(logging.WARNING)  # no message for each file that is packed
    require_complete(config, EXCLUDES, Path.cwd())
    bypass(address)
    relative = path.resolve().relative_to(Path.cwd()).as_posix()
    words = ["python", "-m", "forge_ray.cli", "run", relative, "--store", store_uri, "--json"]
    for override in overrides:
        words += ["--set", override]
    environment: dict[str, Any] = {"working_dir": ".", "excludes": EXCLUDES}
    if not Path("forge_ray").is_dir():
        environment["py_modules"] = [str(Path(__file__).parents[1])]  # all of forge_ray
    if store_id := pins.id_of(store_uri):  # the cluster's nodes have not seen the store; the job is held to the same one
        environment["env_vars"] = {pins.STORE_ID: store_id}
    try:
        client = JobSubmissionClient(address)
        job = _accepted(client, shlex.join(words), environment)
    except (ConnectionError, RuntimeError, AuthenticationError, requests.RequestException, ValueError, KeyError) as error:
        raise _not_submitted(address, error) from error
    if not wait:
        return {"job": job, "status": "submitted", "address": address, "store": store_uri}
    logs = asyncio.run(_follow(client, job))
    info = client.get_job_info(job)
    result = _result(logs)
    if info.status != JobStatus.SUCCEEDED:
        raise _failure(job, address, info, result)
    return {"job": job, "status": "succeeded", "address": address, "store": store_uri, "result": result}


def _not_submitted(address: str, error: Exception) -> NotFound:
    """The error of a submission: what Ray says of it, and who answered if that was not Ray."""
    url = address if "://" in address else f"http://{address}"
    try:
        response = httpx2.get(f"{url.rstrip('/')}/api/version", timeout=ANSWER_S, trust_env=False)
        stranger = "" if "ray_version" in response.text else foreign(response)
    except httpx2.HTTPError:
        stranger = ""
    if stranger:
        return NotFound(
            f"the job could not be submitted: {address} was answered by {stranger}, not by the dashboard of a Ray cluster",
            hint="give the address of the head itself (http://HEAD:8265); from elsewhere forward it:"
            " ssh -L 8265:127.0.0.1:8265 HEAD. forge uses no proxy of the environment for it",
        )
    return NotFound(
        f"the job could not be submitted to {address}: {first_line(error)}",
        hint="check that the dashboard is reachable (http://HEAD:8265) and ~/.ray/auth_token has the cluster's token",
    )


def _accepted(client: Any, entrypoint: str, environment: dict[str, Any]) -> str:
    """Submit the job and return its id. A head node that has just started has no agent yet, so submission is retried."""
    deadline = time.monotonic() + AGENT_WAIT_S
    while True:
        try:
            return str(client.submit_job(entrypoint=entrypoint, runtime_env=environment))
        except RuntimeError as error:
            if "No available agent" not in str(error) or time.monotonic() > deadline:
                raise
        time.sleep(1)


def _failure(job: str, address: str, info: Any, result: Any) -> ForgeError:
    """The error of the job, with its exit code."""
    kind = {EXIT_USAGE: ConfigError, EXIT_POLICY: PolicyError}.get(info.driver_exit_code, TrainingError)
    job_error = result.get("error") if isinstance(result, dict) else None
    reason = job_error["message"] if job_error else str(info.message or "").partition("\n")[0]
    hint = f"its log: ray job logs {job} --address {address}"
    return kind(
        f"job {job} {info.status.value.lower()}: {reason}", hint=f"{job_error['hint']}; {hint}" if job_error else hint
    )


async def _follow(client: Any, job: str) -> str:
    seen = []
    async for text in client.tail_job_logs(job):
        seen.append(text)
        echo(without_colours(text), err=True, nl=False)
    return "".join(seen)


def _result(logs: str) -> Any:
    """The job's JSON output: the last line of its log that is an object."""
    for line in reversed(logs.split("\n")):  # splitlines() would end a line at U+2028 too
        if line.startswith("{"):
            try:
                return json.loads(line)
            except ValueError:
                continue
    return None
