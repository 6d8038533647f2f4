"""Ray Serve behind HAProxy: the switches, which must be set before Ray starts, on every node of a cluster.

HAProxy talks to the replicas without the Python proxy between: several milliseconds less a request. It sends a request
again, to another replica, when one died before it answered. Two warnings: Serve then listens on all interfaces, and so does
HAProxy's own statistics page; keep both behind a firewall.
"""

from __future__ import annotations

import os
import socket
import tempfile

SWITCHES = {
    "RAY_SERVE_ENABLE_HA_PROXY": "1",
    # Generating twice harms nobody, so a request whose replica died before its first byte may be sent again. Its body must
    # fit the buffer for that.
    "RAY_SERVE_HAPROXY_RETRY_ON": "conn-failure empty-response junk-response",
    "RAY_SERVE_HAPROXY_RETRIES": "5",
    "RAY_SERVE_HAPROXY_TUNE_BUFSIZE": str(256 << 10),
    "RAY_SERVE_HAPROXY_OBSERVE_ERROR_LIMIT": "1",
}


def set_haproxy() -> None:
    """For a Ray that this process is about to start; what the operator has set stays."""
    here = tempfile.mkdtemp(prefix="forge-haproxy-")
    own = {
        "RAY_SERVE_HAPROXY_CONFIG_FILE_LOC": f"{here}/haproxy.cfg",
        "RAY_SERVE_HAPROXY_SOCKET_PATH": f"{here}/admin.sock",
        "RAY_SERVE_HAPROXY_SERVER_STATE_BASE": here,
        "RAY_SERVE_HAPROXY_SERVER_STATE_FILE": f"{here}/server-state",
        "RAY_SERVE_HAPROXY_STATS_PORT": str(_free_port()),
        "RAY_SERVE_HAPROXY_METRICS_PORT": str(_free_port()),
    }
    for name, value in (SWITCHES | own).items():
        os.environ.setdefault(name, value)


def behind_haproxy() -> bool:
    """Whether this process's Ray was started so."""
    return os.environ.get("RAY_SERVE_ENABLE_HA_PROXY") == "1"


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
