"""Ray Serve behind HAProxy: the environment variables, to be set before Ray starts, on every node of a cluster.

HAProxy talks to the replicas directly, without the Python proxy: several milliseconds less per request. It retries a request
on another replica if one died before it answered. Two warnings: Serve then listens on all interfaces, and so does HAProxy's
statistics page; keep both behind a firewall.
"""

from __future__ import annotations

import os
import socket
import tempfile

SWITCHES = {
    "RAY_SERVE_ENABLE_HA_PROXY": "1",
    # Requests are safe to retry: generating has no side effects. A request whose replica died before its first byte is sent
    # again, if its body fits the buffer.
    "RAY_SERVE_HAPROXY_RETRY_ON": "conn-failure empty-response junk-response",
    "RAY_SERVE_HAPROXY_RETRIES": "5",
    "RAY_SERVE_HAPROXY_TUNE_BUFSIZE": str(256 << 10),
    "RAY_SERVE_HAPROXY_OBSERVE_ERROR_LIMIT": "1",
    # a Python process would read HAProxy's line for each request, at twice the cost of HAProxy itself; the replicas count
    # the requests that reach them, and have metrics of their own
    "RAY_SERVE_HAPROXY_METRICS_ENABLED": "0",
}


def set_haproxy() -> None:
    """Set the variables for a Ray that this process is about to start; those that are set already stay as they are."""
    here = tempfile.mkdtemp(prefix="forge-haproxy-")
    own = {
        "RAY_SERVE_HAPROXY_CONFIG_FILE_LOC": f"{here}/haproxy.cfg",
        "RAY_SERVE_HAPROXY_SOCKET_PATH": f"{here}/admin.sock",
        "RAY_SERVE_HAPROXY_SERVER_STATE_BASE": here,
        "RAY_SERVE_HAPROXY_SERVER_STATE_FILE": f"{here}/server-state",
        "RAY_SERVE_HAPROXY_STATS_PORT": str(free_port()),
        "RAY_SERVE_HAPROXY_METRICS_PORT": str(free_port()),
    }
    for name, value in (SWITCHES | own).items():
        os.environ.setdefault(name, value)


def behind_haproxy() -> bool:
    """Whether Ray Serve of this process is behind HAProxy."""
    return os.environ.get("RAY_SERVE_ENABLE_HA_PROXY") == "1"


def free_port() -> int:
    """A TCP port of the loopback address that nothing listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
