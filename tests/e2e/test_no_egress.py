"""Nothing leaves: a machine whose only cable ends in a packet counter, which stays at 0. tests/e2e/test_wheel.py runs the
whole quick start on one."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import pytest
from netns import NOT_PERMITTED, counting, permitted

pytestmark = [pytest.mark.e2e, pytest.mark.skipif(not permitted(), reason=NOT_PERMITTED)]

ROOT = Path(__file__).parents[2]
START_HEAD = ROOT / "cluster/bare/start_head.sh"
LOOK = """
import urllib.request
try:
    urllib.request.urlopen("http://example.org/", timeout=2)
except OSError:
    pass
"""


def environment() -> dict[str, str]:
    """Without the switches of the tests' own process: what the product sets is what counts."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("RAY_", "HF_", "DO_NOT_TRACK"))}
    return kept | {"PYTHONPATH": str(ROOT), "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}


def counted(tmp_path: Path, *command: str, **variables: str) -> tuple[dict[str, Any], str]:
    """What the counter saw of a command, and what the command said."""
    report = tmp_path / "report.json"
    done = subprocess.run(
        [*counting(report), *command],
        cwd=ROOT,
        env=environment() | variables,
        capture_output=True,
        text=True,
        timeout=500,
        check=False,
    )
    assert report.is_file(), done.stderr[-4000:]
    return json.loads(report.read_text()), done.stderr


def test_packet_counter_sees_connections_and_lookups_only(tmp_path: Path) -> None:
    seen, printed = counted(tmp_path, sys.executable, "-c", LOOK)
    assert {" ".join(what.split()[:2]) for what in seen["control"]} >= {
        "203.0.113.9 tcp",
        "2001:db8::9 tcp",
        "198.51.100.1 udp",
    }
    assert any("udp 53 .example.org." in what for what in seen["seen"]), printed
    quiet, _ = counted(tmp_path, sys.executable, "-c", "import socket; socket.create_server(('', 0))")
    assert (quiet["exit"], quiet["seen"]) == (0, {})


def test_head_node_sends_no_packet(tmp_path: Path) -> None:
    """`start_head.sh` as it stands, dashboard and usage module included; Ray's report and its question come at its start."""
    with tempfile.TemporaryDirectory(
        dir="/tmp"
    ) as folder:  # short: Ray's sockets lie in it, and their names may not be long
        script = f"{START_HEAD} --ip 198.51.100.2 --temp-dir {folder} -- --num-cpus=1 && sleep 8"
        seen, printed = counted(tmp_path, "bash", "-c", script, HOME=str(tmp_path))
    assert seen["exit"] == 0, printed[-4000:]
    assert seen["seen"] == {}
