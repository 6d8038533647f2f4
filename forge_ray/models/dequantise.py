"""Convert FP8 checkpoints to bf16 safetensors, a few rows of one weight at a time (torch on first use).

A weight of one byte is multiplied by its scale in fp32 and rounded once. Supported are the names `X.weight_scale_inv`,
`X.weight_scale` (for `X.weight`), `X_scale_inv` and `X_scale` (for experts' weights `X` of three dimensions), and scales per
tensor, per expert, per row or per block. Scales of activations are dropped: they belong to kernels that are not used here.
Weights of two or more bytes are copied unchanged.
"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from forge_ray.errors import ConfigError

CHUNK = 4 << 20  # elements at a time: 4 MiB read, 16 MiB in fp32
INDEX = "model.safetensors.index.json"
FLOAT8 = {"F8_E4M3": "float8_e4m3fn", "F8_E5M2": "float8_e5m2"}
SCALES = {"F32": "float32", "BF16": "bfloat16", "F16": "float16", "F8_E8M0": "float8_e8m0fnu"}
PLAIN = ("BF16", "F16", "F32", "F64", "I64", "I32", "BOOL")
OF_ACTIVATIONS = ("activation_scale", "input_scale", "output_scale", "k_scale", "v_scale")
OF_WEIGHTS = ("_scale_inv", "_scale")


@dataclass(frozen=True)
class Stored:
    """A tensor in a file, at bytes `first` to `last`."""

    path: Path
    dtype: str
    shape: tuple[int, ...]
    first: int
    last: int

    @property
    def size(self) -> int:
        return self.last - self.first

    def read(self, start: int = 0, stop: int | None = None) -> bytearray:
        """The bytes of rows `start` to `stop`, or of the whole tensor."""
        row = self.size // max(self.shape[0] if self.shape else 1, 1)
        begin, end = (self.first + start * row, self.first + stop * row) if stop is not None else (self.first, self.last)
        with self.path.open("rb") as stream:
            stream.seek(begin)
            return bytearray(stream.read(end - begin))


def is_float8(folder: Path) -> bool:
    """Whether the folder has FP8 weights. Raises `ConfigError` for a format that is neither FP8 nor unquantised."""
    return quantisation(folder) is not None or any(
        stored.dtype in FLOAT8 for path in _shards(folder) for stored in _header(path).values()
    )


def quantisation(folder: Path) -> dict[str, Any] | None:
    """The quantisation section of `config.json`, None if the weights are not quantised. Raises `ConfigError` for other
    formats than FP8."""
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    scheme = next(iter(_quantisations(config)), None)
    if scheme is None:
        return None
    method = scheme.get("quant_method")
    groups = (scheme.get("config_groups") or {}).values()
    weights = [group.get("weights") or {} for group in groups]
    is_known = method == "compressed-tensors" and weights and all(_has_8_bits(one) for one in weights)
    if not is_known and (method != "fp8" or scheme.get("expert_dtype", "fp8") != "fp8"):
        raise ConfigError(
            f"{folder.name} is quantised by {method!r}{_bits(weights)}, which cannot be converted to bf16",
            hint="import the model's bf16 or FP8 checkpoint",
        )
    return scheme


def _quantisations(config: Any) -> Iterator[dict[str, Any]]:
    if isinstance(config, dict):
        for key, value in config.items():
            if key in ("quantization_config", "compression_config") and isinstance(value, dict):
                yield value
            else:
                yield from _quantisations(value)


def _has_8_bits(weights: dict[str, Any]) -> bool:
    return weights.get("type") == "float" and weights.get("num_bits") == 8


def _bits(weights: list[dict[str, Any]]) -> str:
    return "".join(f" ({one.get('type')}, {one.get('num_bits')} bits)" for one in weights[:1])


def dequantise(source: Path, folder: Path) -> None:
    """Write the weights of `source`, their index and `config.json` to `folder` in bf16. Raises `ConfigError`."""
    scheme = quantisation(source) or {}
    block = scheme.get("weight_block_size")
    shards = _shards(source)
    everything = {name: stored for path in shards for name, stored in _header(path).items()}
    scales = _pair(everything)
    claimed = set(scales.values())
    weight_map: dict[str, str] = {}
    total = 0
    for path in shards:
        left_out = claimed | {name for name in everything if name.endswith(OF_ACTIVATIONS)}
        kept = {name: one for name, one in _header(path).items() if name not in left_out}
        if not kept:
            continue
        entries = {
            name: ("BF16", one.shape, 2 * math.prod(one.shape)) if name in scales else (one.dtype, one.shape, one.size)
            for name, one in kept.items()
        }
        total += sum(size for _, _, size in entries.values())
        weight_map |= dict.fromkeys(kept, path.name)
        with (folder / path.name).open("wb") as stream:
            stream.write(_head(entries))
            for name, one in kept.items():
                scale = everything[scales[name]] if name in scales else None
                for piece in _values(name, one, scale, block):
                    stream.write(piece)
    config = json.loads((source / "config.json").read_text(encoding="utf-8"))
    (folder / "config.json").write_text(json.dumps(_plain(config), indent=2) + "\n", encoding="utf-8")
    if (source / INDEX).is_file():
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
        (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def _shards(source: Path) -> list[Path]:
    """The files that the index names, or else all; further copies of the weights in the folder are not read."""
    if not (source / INDEX).is_file():
        return sorted(source.glob("*.safetensors"))
    weight_map = json.loads((source / INDEX).read_text(encoding="utf-8")).get("weight_map") or {}
    shards = [source / name for name in sorted(set(weight_map.values()))]
    for path in shards:
        if path.parent != source or not path.is_file():
            raise ConfigError(f"{INDEX} names {path.name}, which is missing", hint="download the folder again")
    return shards


def _header(path: Path) -> dict[str, Stored]:
    with path.open("rb") as stream:
        length = struct.unpack("<Q", stream.read(8))[0]
        header = json.loads(stream.read(length))
    start = 8 + length
    entries = sorted(((v["data_offsets"], k, v) for k, v in header.items() if k != "__metadata__"), key=lambda one: one[0])
    return {
        name: Stored(path, entry["dtype"], tuple(entry["shape"]), start + first, start + last)
        for (first, last), name, entry in entries
    }


def _pair(everything: dict[str, Stored]) -> dict[str, str]:
    """FP8 weight → its scale. Raises `ConfigError` for FP8 weights and scales without a counterpart."""
    scale_of: dict[str, str] = {}
    for name, stored in everything.items():
        if stored.dtype in FLOAT8:
            scale = next((name + ending for ending in OF_WEIGHTS if name + ending in everything), "")
            if not scale:
                raise ConfigError(f"{name} is FP8 and has no scale", hint="download all files of the checkpoint again")
            if everything[scale].dtype not in SCALES:
                raise ConfigError(
                    f"{scale} has the type {everything[scale].dtype}, not one of {', '.join(SCALES)}",
                    hint="import the model's bf16 checkpoint",
                )
            scale_of[name] = scale
    claimed = set(scale_of.values())
    for name, stored in everything.items():
        if name.endswith(OF_WEIGHTS) and not name.endswith(OF_ACTIVATIONS) and name not in claimed:
            raise ConfigError(f"{name} is a scale without an FP8 weight", hint="import the model's bf16 checkpoint")
        if name not in scale_of and name not in claimed and stored.dtype not in PLAIN and not name.endswith(OF_ACTIVATIONS):
            raise ConfigError(
                f"{name} has the type {stored.dtype}: the weights are packed in an unknown way",
                hint="import the model's bf16 or FP8 checkpoint",
            )
    return scale_of


def _head(entries: dict[str, tuple[str, tuple[int, ...], int]]) -> bytes:
    """The safetensors header for tensors in this order."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, (dtype, shape, size) in entries.items():
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [end, end + size]}
        end += size
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text


def _values(name: str, weight: Stored, scale: Stored | None, block: list[int] | None) -> Iterator[bytes]:
    """The bytes of a weight in its new type, in pieces of about `CHUNK` elements."""
    import torch

    rows = weight.shape[0] if weight.shape else 1
    step = max(1, CHUNK * rows // max(math.prod(weight.shape), 1))
    factors = None
    if scale is not None:
        values = torch.frombuffer(scale.read(), dtype=getattr(torch, SCALES[scale.dtype])).float().reshape(scale.shape)
        factors = _aligned(name, values, weight.shape)
    for start in range(0, rows, step):
        stop = min(rows, start + step)
        data = weight.read(start, stop) if weight.shape else weight.read()
        if factors is None:
            yield bytes(data)
            continue
        shape = (stop - start, *weight.shape[1:])
        part = torch.frombuffer(data, dtype=getattr(torch, FLOAT8[weight.dtype])).float().reshape(shape)
        picked = factors
        for axis, (size, grid) in enumerate(zip(weight.shape, factors.shape, strict=True)):
            if grid == 1:
                continue
            block_size = block[axis - len(weight.shape)] if block and axis >= len(weight.shape) - 2 else 0
            of = torch.arange(start, stop) if axis == 0 else torch.arange(size)
            picked = picked.index_select(axis, of // _width(name, size, grid, block_size))
        yield part.mul_(picked).to(torch.bfloat16).reshape(-1).view(torch.uint8).numpy().tobytes()


def _aligned(name: str, scale: Any, shape: tuple[int, ...]) -> Any:
    """The scale, reshaped to the number of dimensions of its weight: one number, one per row or expert, or a grid of
    blocks."""
    if not bool(scale.isfinite().all()):
        raise ConfigError(f"the scale of {name} is not finite", hint="download the checkpoint again")
    if scale.numel() == 1:
        return scale.reshape([1] * len(shape))
    if scale.dim() < len(shape) and scale.shape[0] == shape[0] and scale.numel() == shape[0]:
        return scale.reshape([-1] + [1] * (len(shape) - 1))
    if scale.dim() == len(shape):
        return scale
    raise ConfigError(
        f"{name} {list(shape)} has a scale {list(scale.shape)}: neither one number, nor one per row, nor a grid",
        hint="import the model's bf16 checkpoint",
    )


def _width(name: str, size: int, grid: int, block_size: int) -> int:
    """Number of elements per scale along a dimension; the last block may be shorter if the configuration has the block
    size."""
    if block_size and -(-size // block_size) == grid:
        return block_size
    if size % grid == 0:
        return size // grid
    raise ConfigError(
        f"{name}: {size} rows or columns with {grid} scales, and config.json has no block size that fits",
        hint="import the model's bf16 checkpoint",
    )


def _plain(config: Any) -> Any:
    """The configuration without its quantisation sections."""
    if isinstance(config, dict):
        return {k: _plain(v) for k, v in config.items() if k not in ("quantization_config", "compression_config")}
    return config
