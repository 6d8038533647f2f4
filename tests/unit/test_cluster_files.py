"""What cluster/ ships parses, names files that exist, agrees with pyproject.toml, and does not open what it must not."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

from forge_ray.cli.main import cli
from forge_ray.config.base import load, parse
from forge_ray.config.release import DeployConfig
from forge_ray.config.run import RunConfig
from forge_ray.machine.offline import SERVE

pytestmark = pytest.mark.unit

ROOT = Path(__file__).parents[2]
BARE = ROOT / "cluster" / "bare"
SCRIPTS = sorted(BARE.glob("*.sh"))
KUBERAY = ROOT / "cluster" / "kuberay"
TELEMETRY_OFF = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_USAGE_STATS_REPORT_URL": "http://127.0.0.1:9/",
    "RAY_DATA_USAGE_DISABLED": "1",
    "HF_HUB_OFFLINE": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "DO_NOT_TRACK": "1",
}


def documents(name: str) -> dict[str, Any]:
    return {document["kind"]: document for document in yaml.safe_load_all((KUBERAY / name).read_text())}


RAYJOB = documents("rayjob.yaml")["RayJob"]["spec"]
RAYSERVICE = documents("rayservice.yaml")["RayService"]["spec"]
CLUSTERS = {"rayjob": RAYJOB["rayClusterSpec"], "rayservice": RAYSERVICE["rayClusterConfig"]}


def pods(cluster: dict[str, Any]) -> list[dict[str, Any]]:
    return [group["template"] for group in (cluster["headGroupSpec"], *cluster["workerGroupSpecs"])]


# ---------------------------------------------------------------- run files


@pytest.mark.parametrize("path", sorted((ROOT / "jobs").glob("*.yaml")), ids=lambda path: path.name)
def test_run_files_parse(path: Path) -> None:
    values = yaml.safe_load(path.read_text())
    if "data" not in values:
        load(DeployConfig, path)
        return
    config = load(RunConfig, path)
    if path.name not in ("minimal.yaml", "dpo.yaml"):  # whose rows are the user's, or made by a script
        assert all((ROOT / source.path).is_file() for source in config.data.sources)
    if config.train.targets:  # a head over labels, which no endpoint serves
        return
    assert config.deploy is not None
    assert config.deploy.models == (config.release.alias,)


def test_template_lists_every_setting() -> None:
    """A new setting must appear in jobs/sft.yaml; one marked `# default` must be the default."""

    def keys(model: Any, values: dict[str, Any], where: str) -> None:
        for name in type(model).model_fields:
            assert name in values, f"jobs/sft.yaml lacks {where}{name}"
            child = getattr(model, name)
            if hasattr(type(child), "model_fields") and isinstance(values[name], dict):
                keys(child, values[name], f"{where}{name}.")

    text = (ROOT / "jobs" / "sft.yaml").read_text()
    values = yaml.safe_load(text)
    config = load(RunConfig, ROOT / "jobs" / "sft.yaml")
    keys(config.model_copy(update={"deploy": None}), values, "")
    for section in ("data", "train", "eval"):
        for name, field in type(getattr(config, section)).model_fields.items():
            line = re.search(rf"^  {name}: .*# default", text, re.MULTILINE)
            if line and not field.is_required():
                assert getattr(getattr(config, section), name) == field.default, name


@pytest.mark.parametrize("path", sorted((ROOT / "jobs").glob("*.py")), ids=lambda path: path.name)
def test_each_job_script_documents_its_command(path: Path) -> None:
    text = path.read_text()
    assert len(text.splitlines()) <= 15
    command = re.search(r"^ray job submit --working-dir \. -- (.*)$", text, re.MULTILINE)
    assert command
    _, script, _, config, *_ = shlex.split(command[1])
    assert ROOT / script == path
    assert (ROOT / config).is_file()


# ---------------------------------------------------------------- Kubernetes


def ray_range() -> tuple[tuple[int, ...], tuple[int, ...]]:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    (requirement,) = [item for item in project["dependencies"] if item.startswith("ray[")]
    low, high = re.findall(r"[\d.]+", requirement)
    return version(low), version(high)


def version(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in text.split("."))


def test_ray_versions_are_within_pyproject_range() -> None:
    low, high = ray_range()
    versions = re.findall(r"(?:/ray:|-ray)(\d+\.\d+\.\d+)", (KUBERAY / "Dockerfile").read_text())
    versions += re.findall(r"^ray==([\d.]+)\b", (ROOT / "requirements" / "run.txt").read_text(), re.MULTILINE)
    for cluster in CLUSTERS.values():
        versions.append(cluster["rayVersion"])
        versions += [re.sub(r".*-ray", "", pod["spec"]["containers"][0]["image"]) for pod in pods(cluster)]
    assert len(versions) == 9
    assert all(low <= version(item) < high for item in versions), versions


@pytest.mark.parametrize("cluster", CLUSTERS.values(), ids=CLUSTERS.keys())
def test_pods_are_hardened_and_share_the_store(cluster: dict[str, Any]) -> None:
    assert cluster["authOptions"] == {"mode": "token", "secretName": "forge-ray-token"}
    claim = documents("store.yaml")["PersistentVolumeClaim"]
    assert claim["spec"]["accessModes"] == ["ReadWriteMany"]
    policy = documents("store.yaml")["NetworkPolicy"]["spec"]
    for pod in pods(cluster):
        assert policy["podSelector"]["matchLabels"].items() <= pod["metadata"]["labels"].items()
        assert pod["spec"]["securityContext"]["runAsNonRoot"] is True
        assert pod["spec"]["automountServiceAccountToken"] is False
        volumes = {volume["name"]: volume for volume in pod["spec"]["volumes"]}
        assert volumes["store"]["persistentVolumeClaim"]["claimName"] == claim["metadata"]["name"]
        assert [container["name"] for container in pod["spec"]["containers"]] in (["ray"], ["ray", "gateway"])
        for container in pod["spec"]["containers"]:
            assert container["securityContext"] == {"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}}
            assert container["resources"]["requests"]["memory"] == container["resources"]["limits"]["memory"]
            assert {variable["name"]: variable["value"] for variable in container["env"]} == TELEMETRY_OFF
            assert {mount["name"] for mount in container.get("volumeMounts", ())} <= set(volumes)


def test_rayjob_runs_the_pipeline_on_a_shipped_run_file() -> None:
    python, script, *rest = shlex.split(RAYJOB["entrypoint"])
    assert python == "python"
    assert (ROOT / script).is_file()
    options = list(zip(rest[::2], rest[1::2], strict=True))
    values = dict(options)
    config = load(RunConfig, ROOT / values["--config"], tuple(value for name, value in options if name == "--set"))
    assert config.deploy is None
    assert config.train.scaling.num_workers == RAYJOB["rayClusterSpec"]["workerGroupSpecs"][0]["replicas"]
    assert values["--store"] in [mount["mountPath"] for mount in container_of(RAYJOB["rayClusterSpec"])["volumeMounts"]]


def container_of(cluster: dict[str, Any]) -> dict[str, Any]:
    return dict(pods(cluster)[0]["spec"]["containers"][0])


def test_rayservice_import_path_exists() -> None:
    serve = yaml.safe_load(RAYSERVICE["serveConfigV2"])
    (app,) = serve["applications"]
    module, function = app["import_path"].split(":")
    source = ROOT / f"{module.replace('.', '/')}.py"
    assert re.search(rf"^def {function}\(", source.read_text(), re.MULTILINE)
    assert app["runtime_env"]["env_vars"].items() <= SERVE.items()
    assert set(app["args"]) == {"store", "deploy"}
    deploy = parse(DeployConfig, app["args"]["deploy"])
    assert deploy.models == (load(RunConfig, ROOT / "jobs" / "sft.yaml").release.alias,)
    worker = RAYSERVICE["rayClusterConfig"]["workerGroupSpecs"][0]
    assert deploy.replicas.max <= worker["maxReplicas"]
    limits = worker["template"]["spec"]["containers"][0]["resources"]["limits"]
    assert deploy.cpus_per_replica <= float(limits["cpu"])


def test_gateway_is_in_front_of_the_rayservice() -> None:
    """Serve's own proxy listens on the pod's loopback alone; the service leads to the gateway beside it."""
    serve = yaml.safe_load(RAYSERVICE["serveConfigV2"])
    assert serve["http_options"]["host"] == "127.0.0.1"
    (worker,) = RAYSERVICE["rayClusterConfig"]["workerGroupSpecs"]
    _, gateway = worker["template"]["spec"]["containers"]
    program, *words = gateway["command"]
    assert program == "forge"
    parameters = cli.commands["gateway"].make_context("gateway", words[1:]).params  # click refuses what it does not take
    assert words[0] == "gateway"
    assert parameters["to"] == (f"http://127.0.0.1:{serve['http_options']['port']}",)
    (port,) = gateway["ports"]
    service = documents("rayservice.yaml")["Service"]["spec"]
    assert (parameters["port"], parameters["host"]) == (port["containerPort"], "0.0.0.0")
    assert service["ports"][0]["targetPort"] == port["name"] == gateway["readinessProbe"]["httpGet"]["port"]
    assert service["selector"].items() <= worker["template"]["metadata"]["labels"].items()
    ingress = documents("store.yaml")["NetworkPolicy"]["spec"]["ingress"]
    assert port["containerPort"] in [item["port"] for rule in ingress for item in rule.get("ports", ())]


# ---------------------------------------------------------------- ray up


def test_onprem_config_matches_ray_up_schema() -> None:
    config = yaml.safe_load((ROOT / "cluster" / "ray" / "onprem.yaml").read_text())
    spec = importlib.util.find_spec("ray")  # found, not imported
    assert spec
    assert spec.origin
    schema = json.loads((Path(spec.origin).parent / "autoscaler" / "ray-schema.json").read_text())
    jsonschema.validate(config, schema)
    assert config["provider"]["type"] == "local"
    # `ray up` fills these in for fixed hosts, and refuses or skips its defaults where they are given
    assert not {"available_node_types", "head_node_type", "worker_nodes", "head_node"} & set(config)
    commands = config["head_start_ray_commands"] + config["worker_start_ray_commands"]
    for command in commands:
        script = shlex.split(command)[0]
        assert (ROOT / Path(script).relative_to("/opt/forge")).is_file()
    assert f"--ip {config['provider']['head_ip']}" in config["head_start_ray_commands"][-1]


# ---------------------------------------------------------------- bare hosts


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.name)
def test_scripts_are_valid_bash(script: Path) -> None:
    subprocess.run(["bash", "-n", script], check=True)
    if script.name != "environment.sh":
        assert os.access(script, os.X_OK)
        assert "\nset -euo pipefail\n" in script.read_text()
    if shutil.which("shellcheck"):
        subprocess.run(["shellcheck", "-x", script.name], check=True, cwd=BARE)


class Host:
    """A home folder and a `ray` that writes down how it was called, instead of starting anything."""

    def __init__(self, folder: Path) -> None:
        self.home = folder / "home"
        self.token = self.home / ".ray" / "auth_token"
        self._log = folder / "called"
        stub = folder / "bin" / "ray"
        stub.parent.mkdir()
        self.home.mkdir()
        stub.write_text(f'#!/bin/sh\nprintf "%s\\n" "$@" > {self._log}\nenv > {self._log}.env\n')
        stub.chmod(0o755)
        self._path = f"{stub.parent}:{os.environ['PATH']}"

    def run(self, script: str, *arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
        self._log.unlink(missing_ok=True)
        environment = {"HOME": str(self.home), "PATH": self._path, **variables}
        command = [str(BARE / script), *arguments]
        return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=30, check=False)

    @property
    def called(self) -> list[str]:
        return self._log.read_text().splitlines() if self._log.exists() else []

    @property
    def environment(self) -> dict[str, str]:
        lines = self._log.with_suffix(".env").read_text().splitlines()
        return dict(line.split("=", 1) for line in lines if "=" in line)


@pytest.fixture
def host(tmp_path: Path) -> Host:
    return Host(tmp_path)


def test_head_creates_private_token_once(host: Host) -> None:
    assert host.run("start_head.sh", "--ip", "10.0.0.1").returncode == 0
    token = host.token.read_text()
    assert re.fullmatch(r"[0-9a-f]{64}", token)
    assert host.token.stat().st_mode & 0o777 == 0o600
    assert host.run("start_head.sh", "--ip", "10.0.0.1").returncode == 0
    assert host.token.read_text() == token


def test_head_binds_only_configured_addresses(host: Host) -> None:
    result = host.run("start_head.sh", "--ip", "10.0.0.1", "--temp-dir", "/scratch/a b", "--", "--labels=pool=train")
    assert result.returncode == 0, result.stderr
    assert host.called[:2] == ["start", "--head"]
    assert "--node-ip-address=10.0.0.1" in host.called
    assert "--dashboard-host=127.0.0.1" in host.called
    assert "--disable-usage-stats" in host.called
    assert "--temp-dir=/scratch/a b" in host.called
    assert host.called[-1] == "--labels=pool=train"
    assert not any("0.0.0.0" in argument for argument in host.called)


def test_head_disables_telemetry_and_requires_token(host: Host) -> None:
    host.run("start_head.sh", "--ip", "10.0.0.1", RAY_AUTH_MODE="disabled", RAY_AUTH_TOKEN="from-the-environment")
    assert TELEMETRY_OFF.items() <= host.environment.items()
    assert host.environment["RAY_AUTH_MODE"] == "token"
    assert host.environment["RAY_AUTH_TOKEN_PATH"] == str(host.token)
    assert "RAY_AUTH_TOKEN" not in host.environment
    assert yaml.safe_load((host.home / "ray_bootstrap_config.yaml").read_text()) == {}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "--ip is missing"),
        (("--ip", "0.0.0.0"), "not an address that others can reach"),
        (("--ip", "10.0.0.1", "--dashboard-host", "0.0.0.0"), "shows the Jobs API"),
        (("--ip", "10.0.0.1", "--dashbord-host", "10.0.0.1"), "unknown option --dashbord-host"),
    ],
)
def test_head_refuses_unsafe_or_unknown_options(host: Host, arguments: tuple[str, ...], message: str) -> None:
    result = host.run("start_head.sh", *arguments)
    assert result.returncode == 2
    assert message in result.stderr
    assert "hint: " in result.stderr
    assert not host.called


def test_open_dashboard_requires_insecure_flag(host: Host) -> None:
    assert host.run("start_head.sh", "--ip", "10.0.0.1", "--dashboard-host", "0.0.0.0", "--insecure").returncode == 0
    assert "--dashboard-host=0.0.0.0" in host.called


def test_rays_folders_lie_where_no_other_user_can_enter(host: Host, tmp_path: Path) -> None:
    folder = tmp_path / f"forge-{os.getuid()}"
    for script, arguments in (
        ("start_head.sh", ("--ip", "10.0.0.1")),
        ("start_worker.sh", ("--head", "10.0.0.1", "--ip", "10.0.0.2")),
    ):
        assert host.run(script, *arguments, TMPDIR=str(tmp_path)).returncode == 0
        assert f"--temp-dir={folder}/ray" in host.called
        assert host.environment["RAY_TMPDIR"] == str(folder)
        assert folder.stat().st_mode & 0o777 == 0o700
        folder.chmod(0o755)
    assert host.run("start_head.sh", "--ip", "10.0.0.1", RAY_TMPDIR=str(folder)).returncode == 0
    assert host.environment["RAY_TMPDIR"] == str(folder)
    folder.rename(tmp_path / "moved")
    folder.symlink_to(tmp_path / "moved")  # as another user of /tmp could leave it
    refused = host.run("start_head.sh", "--ip", "10.0.0.1", TMPDIR=str(tmp_path))
    assert refused.returncode == 2
    assert "is not a folder of this user" in refused.stderr
    assert not host.called


WAYS = [
    ("start_head.sh", ("--ip", "10.0.0.1"), "10.0.0.1"),
    ("start_worker.sh", ("--head", "10.0.0.1", "--ip", "10.0.0.2"), "10.0.0.1,10.0.0.2"),
]


@pytest.mark.parametrize(("script", "arguments", "hosts"), WAYS, ids=["head", "worker"])
def test_rays_processes_ask_the_cluster_without_a_proxy(
    script: str, arguments: tuple[str, ...], hosts: str, host: Host
) -> None:
    assert host.run("start_head.sh", "--ip", "10.0.0.1").returncode == 0  # makes the token
    assert host.run(script, *arguments, https_proxy="http://proxy:3128", NO_PROXY=".corp").returncode == 0
    assert host.environment["no_proxy"] == host.environment["NO_PROXY"] == f".corp,127.0.0.1,localhost,::1,{hosts}"


@pytest.mark.parametrize("home", ["", "/dev/null/nowhere"])
def test_a_user_without_a_home_gets_one_next_to_rays_folder(home: str, host: Host, tmp_path: Path) -> None:
    own = tmp_path / f"forge-{os.getuid()}/home"
    assert host.run("start_head.sh", "--ip", "10.0.0.1", HOME=home, TMPDIR=str(tmp_path)).returncode == 0
    assert host.environment["HOME"] == str(own)
    assert host.environment["FORGE_HOME_REPLACED"] == home
    assert host.environment["RAY_AUTH_TOKEN_PATH"] == str(own / ".ray/auth_token")
    assert host.environment["USER"]
    assert own.stat().st_mode & 0o777 == 0o700
    assert not host.home.joinpath(".ray").exists()


def test_ray_is_started_with_the_cpus_of_this_process(host: Host, tmp_path: Path) -> None:
    """Where ray's Python has forge_ray; what comes after `--` is last, and Ray takes the last."""
    from forge_ray.machine.hardware import cpus

    assert host.run("start_head.sh", "--ip", "10.0.0.1").returncode == 0
    assert not any(argument.startswith("--num-cpus") for argument in host.called)
    (tmp_path / "bin/python").write_text(f'#!/bin/sh\nPYTHONPATH={ROOT} exec {sys.executable} "$@"\n')
    (tmp_path / "bin/python").chmod(0o755)
    assert host.run("start_head.sh", "--ip", "10.0.0.1", "--", "--num-cpus=3").returncode == 0
    assert [argument for argument in host.called if "cpus" in argument] == [f"--num-cpus={cpus()}", "--num-cpus=3"]


def test_worker_requires_private_token(host: Host) -> None:
    arguments = ("start_worker.sh", "--head", "10.0.0.1", "--ip", "10.0.0.2")
    missing = host.run(*arguments)
    assert missing.returncode == 2
    assert "no token at" in missing.stderr
    host.token.parent.mkdir()
    host.token.write_text("secret")
    host.token.chmod(0o644)
    loose = host.run(*arguments)
    assert loose.returncode == 2
    assert "has mode 644" in loose.stderr
    assert not host.called
    host.token.chmod(0o600)
    assert host.run(*arguments).returncode == 0
    assert {"--address=10.0.0.1:6379", "--node-ip-address=10.0.0.2"} <= set(host.called)
    assert "--head" not in host.called


def test_ports_are_fixed_and_documented(host: Host) -> None:
    host.run("start_head.sh", "--ip", "10.0.0.1")
    ports = {int(match[1]) for argument in host.called if (match := re.search(r"port=(\d+)$", argument))}
    ports |= {int(host.environment[name]) for name in ("AUTOSCALER_METRIC_PORT", "DASHBOARD_METRIC_PORT")}
    readme = (ROOT / "cluster" / "README.md").read_text()
    documented: set[int] = set()
    for cell in re.findall(r"^\| ([\d–, ]+) \|", readme, re.MULTILINE):
        for part in cell.split(","):
            first, _, last = part.strip().partition("–")
            documented |= set(range(int(first), int(last or first) + 1))
    assert len(ports) == 13
    assert ports <= documented


def test_stop_forwards_its_options(host: Host) -> None:
    assert host.run("stop.sh", "--force").returncode == 0
    assert host.called == ["stop", "--grace-period", "30", "--force"]
