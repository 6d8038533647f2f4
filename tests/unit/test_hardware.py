"""Which precision a machine computes in."""

from __future__ import annotations

from pathlib import Path

import pytest

from forge_ray import hardware
from forge_ray.errors import ConfigError

pytestmark = pytest.mark.unit


@pytest.mark.parametrize(
    ("cpuinfo", "expected"),
    [
        ("processor : 0\nflags\t\t: fpu avx2 avx512_bf16\n", "bf16"),
        ("processor : 0\nflags\t\t: fpu amx_bf16\n", "bf16"),
        ("processor : 0\nFeatures\t: fp asimd bf16\n", "bf16"),
        ("processor : 0\nflags\t\t: fpu avx2 avx512f\n", "fp32"),
        ("", "fp32"),
    ],
)
def test_auto_follows_the_cpu(cpuinfo: str, expected: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "cpuinfo").write_text(cpuinfo)
    monkeypatch.setattr(hardware, "CPUINFO", tmp_path / "cpuinfo")
    assert hardware.resolve_precision("auto", use_gpu=False) == expected
    assert hardware.resolve_precision("auto", use_gpu=True) == "bf16"


def test_a_system_that_does_not_tell_computes_in_fp32(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hardware, "CPUINFO", tmp_path / "absent")
    assert hardware.resolve_precision("auto", use_gpu=False) == "fp32"


def test_a_named_precision_stays_and_an_unknown_one_is_refused() -> None:
    assert hardware.resolve_precision("fp32", use_gpu=True) == "fp32"
    assert hardware.resolve_precision("bf16", use_gpu=False) == "bf16"
    with pytest.raises(ConfigError, match="fp16"):
        hardware.resolve_precision("fp16", use_gpu=False)
