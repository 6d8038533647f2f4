"""Two folders of safetensors, tensor by tensor."""

from __future__ import annotations

from pathlib import Path
from typing import Any

WEIGHTS = ".safetensors"
TENSORS_SHOWN = 20


def compare_tensors(old: Path, new: Path) -> dict[str, Any]:
    """Compare every tensor of two folders of safetensors: how many there are, how many differ, and for those with the
    largest differences the absolute difference and the share of elements."""
    import torch
    from safetensors import safe_open

    def tensors(folder: Path) -> dict[str, Path]:
        file_of: dict[str, Path] = {}
        for path in sorted(folder.glob(f"*{WEIGHTS}")):
            with safe_open(path, framework="pt") as file:
                file_of |= dict.fromkeys(file.keys(), path)
        return file_of

    def read(path: Path, name: str) -> torch.Tensor:
        with safe_open(path, framework="pt") as file:
            tensor: torch.Tensor = file.get_tensor(name)
            return tensor

    before, after = tensors(old), tensors(new)
    differ: list[dict[str, Any]] = []
    for name in sorted(before.keys() & after.keys()):
        one, two = read(before[name], name), read(after[name], name)
        change: dict[str, Any] = {}
        kinds = [f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}" for tensor in (one, two)]
        if kinds[0] != kinds[1]:
            change |= {"was": kinds[0], "is": kinds[1]}
        if one.shape == two.shape and not torch.equal(one.double(), two.double()):
            apart = (one.double() - two.double()).abs()
            change |= {"largest": float(apart.max()), "share": float((apart != 0).double().mean())}
        if change:
            differ.append({"name": name, **change})
    differ.sort(key=lambda item: -item.get("largest", float("inf")))
    return {
        "num_tensors": len(before),
        "num_differ": len(differ),
        "largest": max((item.get("largest", 0.0) for item in differ), default=0.0),
        "tensors": differ[:TENSORS_SHOWN],
        "only_before": sorted(before.keys() - after.keys()),
        "only_after": sorted(after.keys() - before.keys()),
    }
