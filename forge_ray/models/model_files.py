"""Safety checks of a model's folder or GGUF file, by names and bytes before any library opens it; and whether its tokenizer
can be read on this machine.

Refused are code and references to code (`auto_map`, kernels from a hub), pickles under any name, links and names that lead
out of the folder, and headers and configurations that describe more than the files hold. Nothing is executed, and memory is
bounded.
"""

from __future__ import annotations

import importlib.util
import json
import math
import pickletools
import re
import struct
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from forge_ray.errors import ConfigError, PolicyError
from forge_ray.store.files import MANIFEST

CODE_ENDINGS = (".py", ".pyc", ".pyd", ".so", ".dll", ".dylib", ".sh", ".pth")
PICKLE_ENDINGS = (".bin", ".pt", ".pkl", ".pickle", ".ckpt", ".h5", ".msgpack", ".npy", ".npz", ".joblib")
PICKLE_STARTS = (b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05", b"PK\x03\x04")  # the last is the zip of torch.save
PICKLE_CALLS = {"GLOBAL", "STACK_GLOBAL", "INST", "OBJ", "REDUCE", "NEWOBJ", "NEWOBJ_EX", "BUILD"}
MAX_HEADER = 100 << 20  # bytes; no real model has a safetensors header this large
MAX_JSON = 256 << 20  # bytes; the largest tokenizers have 40 MB
MAX_FILES = 10_000
AGAIN = "download the file again"
# JSON keys that name code, at any depth; those of the second kind only if their value is a repository of a hub
NAMES_CODE = ("auto_map", "custom_pipelines")
IMPLEMENTATIONS = ("attn_implementation", "_attn_implementation", "experts_implementation", "_experts_implementation")
TABLES = ("tokenizer.json", "vocab.json")  # their keys are tokens, not settings
LEAST_LIMIT = 1 << 16  # sizes up to this are accepted whatever the weights hold
# Files at the top of a folder that libraries take for JSON objects without a look
OBJECTS = (
    *("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json"),
    *("special_tokens_map.json", "added_tokens.json", "processor_config.json", "preprocessor_config.json"),
)
SAME_MODEL = "take config.json and the weights from the same model"
BITS = {
    **dict.fromkeys(("F64", "I64", "U64", "C64"), 64),
    **dict.fromkeys(("F32", "I32", "U32"), 32),
    **dict.fromkeys(("F16", "BF16", "I16", "U16"), 16),
    **dict.fromkeys(("F8_E4M3", "F8_E5M2", "F8_E8M0", "F8_E4M3FNUZ", "F8_E5M2FNUZ", "I8", "U8", "BOOL"), 8),
    **dict.fromkeys(("F6_E2M3", "F6_E3M2"), 6),
    "F4": 4,
}
SIZES = ("vocab_size", "hidden_size", "intermediate_size", "moe_intermediate_size", "head_dim", "num_attention_heads")
LAYERS = ("num_hidden_layers", "num_layers", "n_layer", "num_local_experts", "num_experts", "n_routed_experts")
TEKKEN = "tekken.json"
SENTENCEPIECE = re.compile(r"tokenizer\.model\.v\d+(m\d+)?")
MISTRAL_FAMILIES = ("mistral", "mixtral", "ministral", "pixtral", "magistral", "devstral", "codestral", "voxtral")


@dataclass
class _Held:
    """Number of tensors and elements in the weights of a folder."""

    tensors: int = 0
    elements: int = 0


def refuse_unsafe(folder: Path) -> None:
    """Raise `PolicyError`, naming file and rule, if a folder is unsafe. Reads names, JSON and safetensors headers; executes
    nothing."""
    root, held = folder.resolve(), _Held()
    configs: dict[str, Any] = {}
    paths = sorted(folder.rglob("*"))
    if len(paths) > MAX_FILES:
        raise PolicyError(f"{folder.name} holds {len(paths)} files", hint="give a folder with nothing but the model")
    for path in paths:
        name = path.relative_to(folder).as_posix()
        if not name.isprintable():
            raise PolicyError(f"{name!r} has a name with control characters", hint="remove the file, or rename it")
        if not _resolves_inside(path, root):
            raise PolicyError(
                f"{name} is a link that leaves the model's folder",
                hint="copy the folder with its links resolved (`cp -rL FOLDER COPY`) and import the copy",
            )
        if path.is_dir():
            continue
        if not path.is_file():
            raise PolicyError(f"{name} is not a regular file", hint="remove it from the folder")
        ending = path.suffix.lower()
        if ending in CODE_ENDINGS:
            raise PolicyError(
                f"{name} is code, which a model folder must not contain", hint="remove it; no remote code is executed"
            )
        if ending in PICKLE_ENDINGS or _is_pickle(path, ending):
            raise PolicyError(f"{name} may hold pickled objects", hint="convert the weights to safetensors first")
        if ending == ".json" and path.name != MANIFEST:
            configs[name.lower()] = _json(path, name)
        if ending == ".safetensors":
            _check_safetensors(path, name, held)
    if "adapter_config.json" in configs:  # libraries would open the base model that it names instead
        raise PolicyError(
            f"{folder.name} has an adapter_config.json: it is an adapter, or would be opened as one",
            hint="import the base model; adapters come from training runs of this store (one that left it is found again if"
            " nothing was changed), or merged into their base",
        )
    own = [*folder.glob("tekken.json"), *folder.glob("tokenizer.model.v*")]  # Mistral models have no tokenizer.json
    for needed in ("config.json",) if own else ("config.json", "tokenizer.json"):
        if not (folder / needed).is_file():
            raise ConfigError(f"{folder.name} has no {needed}", hint="export the model with save_pretrained()")
    if not held.tensors and not list(folder.glob("*.safetensors")):
        raise ConfigError(f"{folder.name} has no .safetensors weights", hint="convert the weights to safetensors first")
    for name, value in configs.items():
        if name in OBJECTS and not isinstance(value, dict):
            raise PolicyError(f"{name} is not a JSON object", hint=AGAIN)
        if name == "config.json":
            _check_sizes(value, held)
        if name.endswith(".index.json"):
            _check_index(folder, name, value)


def _resolves_inside(path: Path, root: Path) -> bool:
    try:
        return path.resolve().is_relative_to(root)
    except (OSError, RuntimeError):  # links in a circle
        return False


def _is_pickle(path: Path, ending: str) -> bool:
    size = path.stat().st_size
    with path.open("rb") as stream:
        first = stream.read(8)
        # a safetensors header's length can read as a pickle's start (896 is 80 03); what follows it is checked below
        if ending == ".safetensors" and int.from_bytes(first, "little") <= size - 8:
            return False
        if first.startswith(PICKLE_STARTS):
            return True
        if ending in (".safetensors", ".json", ".gguf"):
            return False
        stream.seek(0)
        return _calls_something(stream)


def _calls_something(stream: BinaryIO) -> bool:
    """Whether the file, read as a pickle, calls anything. The oldest pickles have no marker at their start."""
    calls = False
    try:
        for opcode, _, _ in pickletools.genops(stream):
            calls = calls or opcode.name in PICKLE_CALLS
    except Exception:  # not a pickle: other kinds of files fail after a few bytes
        return False
    return calls


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) != len(pairs):
        raise KeyError("a key is written twice, and readers may disagree about its value")
    return value


def _constant(text: str) -> float:
    if text == "NaN":
        raise KeyError("NaN is not a valid value of a setting")
    return float(text)  # some models have an infinite bound


def _json(path: Path, name: str) -> Any:
    if path.stat().st_size > MAX_JSON:
        raise PolicyError(f"{name} has {path.stat().st_size} bytes of JSON", hint=AGAIN)
    is_table = path.name in TABLES
    try:
        text = path.read_text(encoding="utf-8")
        value = json.loads(text) if is_table else json.loads(text, object_pairs_hook=_object, parse_constant=_constant)
        named = next(_naming_code(value), "")
    except KeyError as error:
        raise PolicyError(f"{name}: {error.args[0]}", hint="correct the file by hand") from None
    except (ValueError, RecursionError):
        raise PolicyError(f"{name} is not valid JSON", hint=AGAIN) from None
    if named:
        raise PolicyError(
            f"{name} has `{named}`, which names code to run", hint="use a model of an architecture that is built in"
        )
    return value


def _naming_code(value: Any) -> Iterator[str]:
    if isinstance(value, dict):
        yield from (key for key in NAMES_CODE if key in value)
        yield from (key for key in IMPLEMENTATIONS if "/" in str(value.get(key, "")))
        for item in value.values():
            yield from _naming_code(item)
    elif isinstance(value, list):
        for item in value:
            yield from _naming_code(item)


def _check_safetensors(path: Path, name: str, held: _Held) -> None:
    """Check that the tensors fill the file exactly and each has the size of its shape, before the file is mapped."""
    size = path.stat().st_size
    with path.open("rb") as stream:
        head = stream.read(8)
        length = struct.unpack("<Q", head)[0] if len(head) == 8 else -1
        if not 0 < length <= min(MAX_HEADER, size - 8):
            raise PolicyError(f"{name} is not a safetensors file (header of {length} bytes)", hint=AGAIN)
        try:
            header = json.loads(stream.read(length), object_pairs_hook=_object)
            entries = [entry for key, entry in header.items() if key != "__metadata__"]
            end = 0
            for first, last in sorted(entry["data_offsets"] for entry in entries):
                if first != end or last < first:
                    raise ValueError("a gap or an overlap")
                end = last
        except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
            raise PolicyError(f"{name} has a malformed safetensors header", hint=AGAIN) from None
    if end != size - 8 - length:
        raise PolicyError(f"{name}: the header describes {end} bytes, the file has {size - 8 - length}", hint=AGAIN)
    try:
        for entry in entries:
            _check_tensor(entry, held)
    except (ValueError, LookupError, TypeError):
        raise PolicyError(f"{name}: the size of a tensor does not match its shape and type", hint=AGAIN) from None


def _check_tensor(entry: dict[str, Any], held: _Held) -> None:
    shape, (first, last) = entry["shape"], entry["data_offsets"]
    if not all(type(length) is int and length >= 0 for length in shape):
        raise ValueError("a shape is not a list of lengths")
    count = math.prod(shape)
    if count * BITS[entry["dtype"]] != (last - first) * 8:
        raise ValueError("the size of a tensor does not match its shape")
    held.tensors += 1
    held.elements += count


def _check_sizes(config: Any, held: _Held) -> None:
    """Check that a configuration describes no tensor larger than all weights together: opening it allocates every tensor."""
    most = max(held.elements, LEAST_LIMIT)
    parts = (config, *(value for key, value in config.items() if key.endswith("_config") and isinstance(value, dict)))
    for part in parts:
        sizes = {key: part[key] for key in (*SIZES, *LAYERS) if key in part and part[key] is not None}
        for key, value in sizes.items():
            limit = most if key in SIZES else max(held.tensors, LEAST_LIMIT)
            if isinstance(value, list):  # one value per layer
                continue
            if type(value) is not int or not 0 <= value <= limit:
                raise PolicyError(
                    f"config.json has {key}={value}; the weights hold {held.elements:,} numbers in {held.tensors} tensors",
                    hint=SAME_MODEL,
                )
        vocab, hidden = sizes.get("vocab_size", 0), sizes.get("hidden_size", 0)
        if part is config and type(vocab) is int and type(hidden) is int and vocab * hidden > most:
            raise PolicyError(
                f"config.json describes an embedding of {vocab} × {hidden}; the weights hold {held.elements:,} numbers",
                hint=SAME_MODEL,
            )


def _check_index(folder: Path, name: str, index: Any) -> None:
    """Check that the files that an index names are in its folder: libraries open them by these names."""
    named = index.get("weight_map", {}) if isinstance(index, dict) else None
    if not isinstance(named, dict):
        raise PolicyError(f"{name} has no weight_map", hint=AGAIN)
    here = (folder / name).parent
    for file in sorted({str(value) for value in named.values()}):
        if "/" in file or "\\" in file or not (here / file).is_file():
            raise PolicyError(f"{name} names {file!r}, which is not in its folder", hint="download the whole model again")


def mistral_tokenizer(names: Collection[str], read_config: Callable[[], str | bytes]) -> str:
    """The name of Mistral's own tokenizer file among a model's files; "" if the model has none, or is not identified as a
    Mistral model. `read_config` reads its config.json."""
    if TEKKEN in names:
        return TEKKEN
    versions = sorted(name for name in names if SENTENCEPIECE.fullmatch(name))
    return versions[-1] if versions and _is_mistral(names, read_config) else ""


def _is_mistral(names: Collection[str], read_config: Callable[[], str | bytes]) -> bool:
    if "params.json" in names:  # the name of the configuration in Mistral's own format
        return True
    model_type = json.loads(read_config()).get("model_type", "") if "config.json" in names else ""
    return str(model_type).startswith(MISTRAL_FAMILIES)


def mistral_file(folder: Path) -> Path | None:
    """Mistral's own tokenizer file in a model's folder, if the model is identified as a Mistral model."""
    names = {path.name for path in folder.glob("*") if path.is_file()}
    name = mistral_tokenizer(names, (folder / "config.json").read_bytes)
    return folder / name if name else None


def require_mistral_common(name: str, model: str) -> None:
    """Raise `ConfigError` if the packages that read Mistral's tokenizer file `name` are not installed."""
    needed = {"mistral_common": "mistral-common"}
    if not name.endswith(".json"):
        needed["sentencepiece"] = "sentencepiece"
    missing = [package for module, package in needed.items() if importlib.util.find_spec(module) is None]
    if missing:
        raise ConfigError(
            f"{model} has Mistral's own tokenizer, {name}, which needs the package {' and '.join(map(repr, missing))}",
            hint="pip install 'forge-ray[mistral]' on every node",
        )


GGUF_WIDTHS = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}
GGUF_STRING, GGUF_ARRAY = 8, 9
GGUF_MOST_DIMENSIONS = 4
GGUF_MOST_PER_BYTE = 8  # weights per byte in the smallest quantisation


def refuse_unsafe_gguf(path: Path) -> None:
    """Raise `PolicyError` if a length, count or offset in a GGUF file exceeds the file. Tensors are not read."""
    size = path.stat().st_size
    with path.open("rb") as stream:
        try:
            _walk_gguf(stream, size)
        except (ValueError, struct.error, OverflowError) as error:
            raise PolicyError(f"{path.name} is not a valid GGUF file: {error}", hint=AGAIN) from None


def _walk_gguf(stream: BinaryIO, size: int) -> None:
    def numbers(layout: str) -> tuple[Any, ...]:
        return struct.unpack("<" + layout, stream.read(struct.calcsize("<" + layout)))

    def skip(length: int, what: str) -> None:
        if length > size - stream.tell():
            raise ValueError(f"{what} of {length} bytes where {size - stream.tell()} are left")
        stream.seek(length, 1)

    def value(kind: int, depth: int = 0) -> None:
        if kind in GGUF_WIDTHS:
            skip(GGUF_WIDTHS[kind], "a value")
        elif kind == GGUF_STRING:
            skip(numbers("Q")[0], "a text")
        elif kind == GGUF_ARRAY and not depth:
            inner, count = numbers("IQ")
            if inner in GGUF_WIDTHS:
                skip(count * GGUF_WIDTHS[inner], "a list")
                return
            if count > size:
                raise ValueError(f"a list of {count} values in a file of {size} bytes")
            for _ in range(count):
                value(inner, depth + 1)
        else:
            raise ValueError(f"a value of kind {kind}")

    magic, version, tensors, settings = numbers("4sIQQ")
    if magic != b"GGUF" or version not in (2, 3):
        raise ValueError(f"it starts with {magic!r}, version {version}")
    if tensors > size // 24 or settings > size // 12:
        raise ValueError(f"{tensors} tensors and {settings} settings in {size} bytes")
    for _ in range(settings):
        skip(numbers("Q")[0], "a name")
        value(numbers("I")[0])
    for _ in range(tensors):
        skip(numbers("Q")[0], "a name")
        (dimensions,) = numbers("I")
        if dimensions > GGUF_MOST_DIMENSIONS:
            raise ValueError(f"a tensor of {dimensions} dimensions")
        count = math.prod(numbers(f"{dimensions}Q"))
        _, place = numbers("IQ")
        if place > size or count > size * GGUF_MOST_PER_BYTE:
            raise ValueError(f"a tensor of {count} weights at byte {place} in a file of {size}")
