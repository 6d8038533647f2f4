"""The short form of `serving_chaos.py`: replicas are killed and an alias moves under load, and no client notices.
Where the user may make network namespaces, without a route to anywhere."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from netns import no_route

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(300)]


@pytest.mark.parametrize(
    "front",
    [pytest.param((), id="haproxy"), pytest.param(("--plain",), id="serves-proxy", marks=pytest.mark.large)],
)
def test_no_request_is_lost_while_replicas_die_and_an_alias_moves(tmp_path: Path, front: tuple[str, ...]) -> None:
    script = Path(__file__).with_name("serving_chaos.py")
    options = ["--kills", "1", "--swaps", "4", "--clients", "4", "--pause", "0.1", *front]
    words = [*no_route(), sys.executable, str(script), str(tmp_path / "store"), *options]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    report = json.loads(done.stdout.splitlines()[-1])
    assert report["failed"] == 0, report
    assert (report["kills"], report["swaps"]) == (1, 4)
    assert report["requests"] > 20
    assert set(report["answers_per_version"].values()) == {1}  # greedy: each version's own text, whoever sent it
    assert len(report["answers_per_version"]) == 2
    if front:  # Serve's proxy answers 500 for what a dead replica had; HAProxy leaves few to the gateway, or none
        assert report["sent_again"].get("status_500", 0) > 0
