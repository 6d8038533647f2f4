"""The precision of a machine, its memory, and the memory of a worker."""

from __future__ import annotations

from pathlib import Path

import pytest

from forge_ray.errors import ConfigError
from forge_ray.machine import hardware

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


def test_unknown_cpu_flags_mean_fp32(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hardware, "CPUINFO", tmp_path / "absent")
    assert hardware.resolve_precision("auto", use_gpu=False) == "fp32"


def test_a_named_precision_stays_and_an_unknown_one_is_refused() -> None:
    assert hardware.resolve_precision("fp32", use_gpu=True) == "fp32"
    assert hardware.resolve_precision("bf16", use_gpu=False) == "bf16"
    with pytest.raises(ConfigError, match="fp16"):
        hardware.resolve_precision("fp16", use_gpu=False)


def test_gpus_are_matched_by_part_of_their_name() -> None:
    names = {
        "NVIDIA H100 80GB HBM3": "H100",
        "H200": "H200",
        "NVIDIA A100-SXM4-40GB": "A100",
        "NVIDIA L40S": "L40S",
        "L4": "L4",
    }
    assert {name: hardware.gpu_named(name) for name in names} == {name: hardware.GPUS[key] for name, key in names.items()}
    assert hardware.gpu_named("Quadro P400") is None


def test_memory_per_worker(monkeypatch: pytest.MonkeyPatch) -> None:
    """The best node of the cluster counts: its memory divided by the workers that fit on it, or the GPU of a known name."""
    import ray

    from forge_ray.config.scaling import Scaling
    from forge_ray.machine import cluster

    def node(address: str, **resources: float) -> dict[str, object]:
        return {"Alive": True, "NodeManagerAddress": address, "Resources": resources}

    nodes = [node("here", CPU=4, memory=1), node("there", CPU=2, memory=30e9, object_store_memory=10e9)]
    monkeypatch.setattr(ray, "nodes", lambda: nodes)
    monkeypatch.setattr(ray.util, "get_node_ip_address", lambda: "here")
    monkeypatch.setattr(cluster, "main_memory", lambda: 16 * 10**9)
    monkeypatch.setattr(cluster, "_own_gpu", lambda: None)
    assert cluster.memory_per_worker(Scaling(num_workers=0)) == 16e9
    assert cluster.memory_per_worker(Scaling(num_workers=4)) == 20e9
    assert cluster.memory_per_worker(Scaling(num_workers=4, cpus_per_worker=4)) == 16e9
    assert cluster.memory_per_worker(Scaling(gpus_per_worker=1)) is None
    nodes.append(node("gpus", CPU=8, GPU=8, **{"accelerator_type:H100": 1}))
    assert cluster.memory_per_worker(Scaling(gpus_per_worker=1)) == hardware.GPUS["H100"].memory
    assert cluster.memory_per_worker(Scaling(gpus_per_worker=0.5)) == hardware.GPUS["H100"].memory // 2
    nodes.insert(0, node("others", CPU=8, GPU=8))
    assert cluster.memory_per_worker(Scaling(gpus_per_worker=1)) is None
    monkeypatch.setattr(cluster, "_own_gpu", lambda: 7)
    assert cluster.memory_per_worker(Scaling(num_workers=0, gpus_per_worker=1)) == 7
