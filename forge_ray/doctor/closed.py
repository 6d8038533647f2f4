"""Security checks: Ray's token and TLS, telemetry switches, listening sockets."""

from __future__ import annotations

import contextlib
import ipaddress
import os
import shlex
import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

from forge_ray.doctor.finding import Finding, Status, Surroundings, is_private, mode_of
from forge_ray.machine.offline import SWITCHES

TLS_FILES = ("RAY_TLS_SERVER_CERT", "RAY_TLS_SERVER_KEY", "RAY_TLS_CA_CERT")
EXPIRES_SOON = timedelta(days=30)
LISTEN = "0A"
MAKE_TOKEN = "cluster/bare/start_head.sh --ip ADDRESS"
LOOPBACK_DASHBOARD = "cluster/bare/stop.sh && cluster/bare/start_head.sh --ip ADDRESS --dashboard-host 127.0.0.1"
# The role of a process of Ray or forge_ray, by a part of its command line; the first match counts
ROLES = (
    ("ray/dashboard/dashboard.py", "dashboard"),
    ("ray.util.client.server", "client server"),
    ("ray::ProxyActor", "endpoint"),
    ("haproxy", "endpoint"),
    ("forge_ray.cli gateway", "gateway"),
    ("forge gateway", "gateway"),
    ("ray/autoscaler/_private/monitor.py", "metrics"),
    ("ray::DashboardAgent", "agent"),
    ("ray::RuntimeEnvAgent", "agent"),
    ("gcs_server", "GCS"),
    ("raylet", "raylet"),
    ("ray::", "worker"),
)


@dataclass(frozen=True)
class Listening:
    """A listening socket: the role of its process, its address and port, and whether the process requires a token."""

    role: str
    address: str
    port: int
    token: bool

    @property
    def is_open(self) -> bool:
        return not ipaddress.ip_address(self.address).is_loopback

    @property
    def is_everywhere(self) -> bool:
        return ipaddress.ip_address(self.address).is_unspecified

    def __str__(self) -> str:
        return f"{self.role} {f'[{self.address}]' if ':' in self.address else self.address}:{self.port}"


def token_path(around: Surroundings) -> Path:
    """The path of the file from which Ray reads the cluster's token."""
    return Path(around.environ.get("RAY_AUTH_TOKEN_PATH") or around.home / ".ray/auth_token")


def ray_token(around: Surroundings) -> Finding:
    rule = "Ray requires a token, in a file that only its owner can read"
    mode, path = around.environ.get("RAY_AUTH_MODE", ""), token_path(around)
    quoted = shlex.quote(str(path))
    if mode not in ("", "token", "k8s"):
        observed = f"RAY_AUTH_MODE={mode}: anyone who reaches a port of Ray can run code"
        return Finding("ray token", "fail", observed, rule, "export RAY_AUTH_MODE=token")
    if around.environ.get("RAY_AUTH_TOKEN"):
        observed = "the token is in RAY_AUTH_TOKEN, which `ps e` shows"
        fix = f'(umask 077; printf %s "$RAY_AUTH_TOKEN" >{quoted}); unset RAY_AUTH_TOKEN'
        return Finding("ray token", "warn", observed, rule, fix)
    if not path.is_file():
        observed = f"no token at {path}; a local Ray creates one, a cluster that is started by hand has none"
        return Finding("ray token", "warn", observed, rule, MAKE_TOKEN)
    if not path.stat().st_size:
        return Finding("ray token", "fail", f"{path} is empty", rule, f"rm {quoted} && {MAKE_TOKEN}")
    if not is_private(path):
        return Finding("ray token", "fail", f"{path} has mode {mode_of(path)}", rule, f"chmod 600 {quoted}")
    return Finding("ray token", "ok", f"{path}, mode {mode_of(path)}", rule)


def session_folders(around: Surroundings) -> Finding:
    """The folders of Ray's sessions (sockets, logs, code of jobs): Ray lets everyone write to them, so a folder around them
    must keep others out."""
    rule = "other users cannot enter the folders of Ray's sessions, which Ray makes 0777 and where it follows links"
    own = f"forge-{os.getuid()}"
    bases = [around.tmp] if around.tmp.name == own else [around.tmp, around.tmp / own]
    folders = [path for base in bases for path in sorted((base / "ray").glob("session_*")) if not path.is_symlink()]
    sessions = [path for path in folders if path.is_dir() and path.lstat().st_uid == os.getuid()]
    for path in sessions:
        if path.stat().st_mode & 0o022 and all(folder.stat().st_mode & 0o011 for folder in path.parents):
            around_it = path.parent if path.parent.stat().st_uid == os.getuid() else path
            observed = f"{path} has mode {mode_of(path)}, and others can reach it"
            fix = (
                f"chmod 700 {shlex.quote(str(around_it))}   # and start Ray by forge or cluster/bare, which keep it private"
            )
            return Finding("ray sessions", "fail", observed, rule, fix)
    return Finding("ray sessions", "ok", f"{len(sessions)} of this user, closed to others", rule)


def ray_tls(around: Surroundings, address: str = "") -> Finding:
    """TLS of Ray's gRPC; without it the token crosses the network unencrypted."""
    rule = "Ray uses TLS between hosts, with certificates that are valid for at least 30 days"
    if around.environ.get("RAY_USE_TLS", "0").lower() not in ("1", "true"):
        several = address or around.environ.get("RAY_ADDRESS", "")
        if not several or several in ("local", "auto"):
            return Finding("ray TLS", "ok", "off; no cluster of several hosts is configured here", rule)
        fix = "export RAY_USE_TLS=1 RAY_TLS_SERVER_CERT=… RAY_TLS_SERVER_KEY=… RAY_TLS_CA_CERT=…"
        return Finding("ray TLS", "warn", f"off: token and rows cross the network to {several} unencrypted", rule, fix)
    for name in TLS_FILES:
        path = Path(around.environ.get(name, "") or "/nonexistent")
        if not path.is_file():
            observed = f"RAY_USE_TLS is set and {name}={around.environ.get(name, '')!r} is not a file"
            return Finding("ray TLS", "fail", observed, rule, f"export {name}=/path/to/{name[8:].lower()}.pem")
    key = Path(around.environ["RAY_TLS_SERVER_KEY"])
    if not is_private(key):
        return Finding("ray TLS", "fail", f"{key} has mode {mode_of(key)}", rule, f"chmod 600 {shlex.quote(str(key))}")
    return _certificates(around, rule)


def _certificates(around: Surroundings, rule: str) -> Finding:
    from cryptography import x509
    from cryptography.hazmat.primitives.serialization import load_pem_private_key

    server, authority = (Path(around.environ[name]) for name in (TLS_FILES[0], TLS_FILES[2]))
    renew = f"openssl x509 -enddate -noout -in {shlex.quote(str(server))}"
    try:
        certificates = {path: x509.load_pem_x509_certificate(path.read_bytes()) for path in (server, authority)}
        key = load_pem_private_key(Path(around.environ[TLS_FILES[1]]).read_bytes(), None)
    except (ValueError, TypeError) as error:
        return Finding("ray TLS", "fail", f"a TLS file of Ray cannot be read: {str(error)[:80]}", rule, renew)
    if key.public_key() != certificates[server].public_key():
        return Finding("ray TLS", "fail", f"RAY_TLS_SERVER_KEY is not the key of {server}", rule, renew)
    path, first = min(certificates.items(), key=lambda item: item[1].not_valid_after_utc)
    left = first.not_valid_after_utc - around.now
    until = f"{path} is valid until {first.not_valid_after_utc:%Y-%m-%d}"
    status: Status = "fail" if left <= timedelta(0) else "warn" if left < EXPIRES_SOON else "ok"
    fix = "" if status == "ok" else f"openssl x509 -enddate -noout -in {shlex.quote(str(path))}"
    return Finding("ray TLS", status, until, rule, fix)


def switches(around: Surroundings) -> Iterator[Finding]:
    """The value of each telemetry switch in processes of forge_ray. A value that the operator set is kept."""
    for name, expected in SWITCHES.items():
        value = around.environ.get(name, expected)
        rule = f"{name}={expected}"
        if value == expected:
            yield Finding("switch", "ok", rule, rule)
        else:
            yield Finding("switch", "fail", f"{name}={value} is set here", rule, f"export {name}={expected}")


def cloud_question(around: Surroundings) -> Finding:
    """Ray's request to cloud metadata addresses. A local Ray runs no process that sends it; `ray start` does, unless this
    file exists."""
    rule = "`ray start` sends no request to the cloud metadata address (169.254.169.254); no switch of Ray turns it off"
    path = around.home / "ray_bootstrap_config.yaml"
    if path.is_file():
        return Finding("cloud question", "ok", f"{path} exists", rule)
    observed = f"no {path}: a manual `ray start --head` would send the request"
    return Finding("cloud question", "warn", observed, rule, f"echo '{{}}' >{shlex.quote(str(path))}")


def listening(proc: Path, roles: tuple[tuple[str, str], ...] = ROLES) -> list[Listening]:
    """Listening TCP sockets of this user's Ray, Serve and gateway processes."""
    waiting: dict[str, tuple[str, int]] = {}
    for name in ("tcp", "tcp6"):
        try:
            lines = (proc / "net" / name).read_text().splitlines()[1:]
        except OSError:  # no IPv6
            continue
        for fields in map(str.split, lines):
            if fields[3] == LISTEN:
                address, _, port = fields[1].partition(":")
                waiting[f"socket:[{fields[9]}]"] = (_address(address), int(port, 16))
    sockets = set()
    for process in proc.iterdir():
        if not process.name.isdigit():
            continue
        try:
            words = (process / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace").strip()
            role = next((role for part, role in roles if part in words), "")
            if not role or process.stat().st_uid != os.getuid():
                continue
            links = set(_links(process / "fd"))
            token = b"RAY_AUTH_MODE=token" in (process / "environ").read_bytes().split(b"\0")
        except OSError:  # the process ended in the meantime
            continue
        sockets |= {Listening(role, *waiting[link], token) for link in links & waiting.keys()}
    return sorted(sockets, key=lambda item: (item.role, item.port, item.address))


def _links(folder: Path) -> Iterator[str]:
    for link in folder.iterdir():
        with contextlib.suppress(FileNotFoundError):  # closed in the meantime
            yield os.readlink(link)


def _address(text: str) -> str:
    """The address of a line of /proc/net, which has 32-bit words in this machine's byte order."""
    words = [int(text[at : at + 8], 16) for at in range(0, len(text), 8)]
    raw = b"".join(struct.pack("=I", word) for word in words)
    address = ipaddress.ip_address(raw)
    mapped = getattr(address, "ipv4_mapped", None)
    return str(mapped or address)


def bind_addresses(sockets: list[Listening], keyless: Mapping[int, str]) -> Iterator[Finding]:
    """Which roles listen beyond loopback. `keyless`: port → deployment, for endpoints that require no API key."""
    rule = "the dashboard (it runs code) and endpoints without keys listen on loopback only; Ray's own ports require a token"
    if not sockets:
        yield Finding("listening", "ok", "no Ray, endpoint or gateway of this user is running", rule)
        return
    outside = [item for item in sockets if item.is_open]
    if not outside:
        yield Finding("listening", "ok", f"{len(sockets)} sockets, all on loopback", rule)
        return
    tokenless: list[Listening] = []
    guarded: list[Listening] = []
    for item in outside:
        where = "every interface" if item.is_everywhere else "the network"
        if item.role == "dashboard":
            status: Status = "fail" if item.is_everywhere or not item.token else "warn"
            yield Finding("listening", status, f"{item} exposes the Jobs API to {where}", rule, LOOPBACK_DASHBOARD)
        elif item.role in ("endpoint", "gateway"):
            if name := keyless.get(item.port):
                fix = "forge deploy DEPLOY.yaml --set auth=keys"
                yield Finding("listening", "fail", f"{item}: {name} accepts requests from {where} without a key", rule, fix)
        elif item.role == "metrics":
            fix = f"nft add rule inet filter input iifname != lo tcp dport {item.port} drop"
            yield Finding("listening", "warn", f"{item} exposes metrics to {where}", rule, fix)
        else:
            (guarded if item.token else tokenless).append(item)
    if tokenless:
        observed = f"{', '.join(map(str, tokenless[:4]))}{' …' if len(tokenless) > 4 else ''}: no token is required"
        yield Finding("listening", "fail", observed, rule, "cluster/bare/stop.sh && export RAY_AUTH_MODE=token")
    if guarded:
        yield Finding("listening", "ok", f"{len(guarded)} ports of Ray on the network, all of which require the token", rule)
