"""The guides as a newcomer follows them: every command block of a page, one after the other, in a folder like a checkout
whose store holds a tiny model under the name of the quick start's base model.

Where the user may make network namespaces, the commands run without a route to anywhere. `ds_…`, `run_…` and `mv_…` in a
block stand for the id that an earlier command printed: the newest of its kind in the store.
A tiny model need not be better than its base, so a release may end with the exit code of a gate that was not passed.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from guides import LARGE, ROOT, RUN, SHELL, blocks
from netns import no_route

from forge_ray.errors import EXIT_POLICY

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(900)]
BASE_MODEL = "smollm2-135m-instruct"
FOLDERS = {"ds": "datasets", "run": "runs", "mv": "models"}


@pytest.fixture
def checkout(tmp_path: Path, tiny_model_dir: Path) -> Path:
    for name in ("jobs", "docs"):
        shutil.copytree(ROOT / name, tmp_path / name)
    model = tmp_path / "my-7b"
    shutil.copytree(tiny_model_dir, model)
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 2048}))
    done = run(f"forge models import my-7b --name {BASE_MODEL} --licence Apache-2.0 --alias {BASE_MODEL}", tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    return tmp_path


def run(script: str, folder: Path) -> subprocess.CompletedProcess[str]:
    """As a reader does in a shell, with this environment's `forge` and `python`."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("RAY_", "FORGE_"))}
    return subprocess.run(
        [*no_route(), "bash", "-eu", "-c", script],
        cwd=folder,
        env={**environment, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"},
        capture_output=True,
        text=True,
        timeout=600,
    )


@pytest.mark.parametrize("guide", [*RUN, *(pytest.param(name, marks=pytest.mark.large) for name in LARGE)])
def test_a_guide_works_as_it_is_written(guide: str, checkout: Path) -> None:
    for block in blocks(ROOT / f"docs/guides/{guide}.md"):
        if block.language not in SHELL or block.mark[0]:
            continue
        script = re.sub(r"\b(ds|run|mv)_…", lambda prefix: newest(prefix[1]), block.script)
        done = run(script, checkout)
        allowed = (0, EXIT_POLICY) if "forge release" in script else (0,)
        assert done.returncode in allowed, f"{block.place}\n{script}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"


def newest(prefix: str) -> str:
    """As a part of a command, so that it is looked up when the command runs."""
    return f"$(basename $(ls -dt .forge/{FOLDERS[prefix]}/{prefix}_* | head -n 1))"
