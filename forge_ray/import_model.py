"""Import a base model: a Hugging Face directory or a GGUF file becomes a model version (level 2).

FP8 weights become bf16 on the way (`dequantise.py`).

Safetensors only. A directory is judged by its bytes and names before any library opens it: `auto_map`, Python files,
pickled weights and links that lead out of it are refused.
"""

from __future__ import annotations

import json
import shutil
import struct
from pathlib import Path
from typing import Any

from forge_ray.catalog import Catalog
from forge_ray.dequantise import INDEX, dequantise, is_float8
from forge_ray.errors import ConfigError, NotFound, PolicyError
from forge_ray.records import ModelVersion, files_digest
from forge_ray.store import MANIFEST, hash_dir, sha256_file

CODE_ENDINGS = (".py", ".pyc", ".pyd", ".so", ".dll", ".dylib", ".sh", ".pth")
PICKLE_ENDINGS = (".bin", ".pt", ".pkl", ".pickle", ".ckpt", ".h5", ".msgpack", ".npy", ".npz", ".joblib")
PICKLE_STARTS = (b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05", b"PK\x03\x04")  # the last: torch.save's zip
MAX_HEADER = 100 << 20  # a safetensors header of more is an attack, not a model


def import_model(catalog: Catalog, path: str | Path, name: str, licence: str = "", alias: str = "") -> ModelVersion:
    """Copy (a directory) or convert (a GGUF file) into the store; the same bytes again give the version that is there."""
    source = Path(path).expanduser()
    if not source.exists():
        raise NotFound(f"no model at {str(path)!r}", hint="give a Hugging Face directory or a .gguf file")
    origin = _origin(source)
    same = origin.rpartition(" ")[2]  # the digest; the folder's name may be another
    version = next((known for known in catalog.all(ModelVersion) if known.source.rpartition(" ")[2] == same), None)
    if version is None:
        version = _import(catalog, source, origin, name, licence)
    if alias:
        catalog.promote(version.id, alias)
    return version


def _origin(source: Path) -> str:
    if source.is_file():
        if source.suffix != ".gguf":
            raise ConfigError(f"{source.name} is neither a folder nor a .gguf file", hint="give the model's folder")
        return f"{source.name} sha256:{sha256_file(source)}"
    refuse_unsafe(source)
    return f"{source.resolve().name} {files_digest(hash_dir(source))}"


def _import(catalog: Catalog, source: Path, origin: str, name: str, licence: str) -> ModelVersion:
    store = catalog.store
    staging = f"models/.importing-{origin[-16:]}"
    with store.staged_dir(staging) as folder:
        if source.is_dir():
            is_quantised = is_float8(source)
            for entry in hash_dir(source):
                if is_quantised and (entry.path.endswith(".safetensors") or entry.path in ("config.json", INDEX)):
                    continue
                target = folder / entry.path
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(source / entry.path, target)
            if is_quantised:
                dequantise(source, folder)
        else:
            convert_gguf(source, folder)
        refuse_unsafe(folder)  # what was copied, in case the source changed meanwhile
    try:
        files = store.files(staging)
        version = ModelVersion(
            name=name,
            status="imported",
            weights="full",
            files=files,
            files_digest=files_digest(files),
            licence=licence or "unknown",
            source=origin,
        ).sealed()
        store.move_dir(staging, f"models/{version.id}")
        return catalog.put(version)
    finally:
        store.delete_dir(staging)


def refuse_unsafe(folder: Path) -> None:
    """Raise `PolicyError` naming the file and the rule; reads names, JSON and safetensors headers, runs nothing."""
    root = folder.resolve()
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
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
            raise PolicyError(f"{name} is code; a model directory must hold none", hint="remove it; no remote code is run")
        if ending in PICKLE_ENDINGS or _starts_like_a_pickle(path):
            raise PolicyError(f"{name} may hold pickled objects", hint="convert the weights to safetensors first")
        if ending == ".json" and path.name != MANIFEST:
            _refuse_json(path, name)
        if ending == ".safetensors":
            _check_safetensors(path, name)
    own = [*folder.glob("tekken.json"), *folder.glob("tokenizer.model.v*")]  # Mistral's do without a tokenizer.json
    for needed in ("config.json",) if own else ("config.json", "tokenizer.json"):
        if not (folder / needed).is_file():
            raise ConfigError(f"{folder.name} has no {needed}", hint="export the model with save_pretrained()")
    if not list(folder.glob("*.safetensors")):
        raise ConfigError(f"{folder.name} has no .safetensors weights", hint="convert the weights to safetensors first")


def _resolves_inside(path: Path, root: Path) -> bool:
    try:
        return path.resolve().is_relative_to(root)
    except (OSError, RuntimeError):  # links in a circle
        return False


def _starts_like_a_pickle(path: Path) -> bool:
    with path.open("rb") as stream:
        first = stream.read(8)
    # the length of a safetensors header can read as a pickle's start (896 is 80 03); what follows it is checked below
    is_length = path.suffix.lower() == ".safetensors" and int.from_bytes(first, "little") <= path.stat().st_size - 8
    return first.startswith(PICKLE_STARTS) and not is_length


def _refuse_json(path: Path, name: str) -> None:
    try:
        names_code = _mentions(json.loads(path.read_text(encoding="utf-8")), "auto_map")
    except (ValueError, RecursionError):
        raise PolicyError(f"{name} is not valid JSON", hint="fetch the file again") from None
    if names_code:
        raise PolicyError(
            f"{name} has `auto_map`, which names code to run", hint="use a model of an architecture that is built in"
        )


def _mentions(value: Any, key: str) -> bool:
    if isinstance(value, dict):
        return key in value or any(_mentions(item, key) for item in value.values())
    return isinstance(value, list) and any(_mentions(item, key) for item in value)


def _check_safetensors(path: Path, name: str) -> None:
    """The tensors must tile the file: a torn or forged one is refused before it is mapped."""
    size = path.stat().st_size
    with path.open("rb") as stream:
        head = stream.read(8)
        length = struct.unpack("<Q", head)[0] if len(head) == 8 else -1
        if not 0 < length <= min(MAX_HEADER, size - 8):
            raise PolicyError(f"{name} is not a safetensors file (header of {length} bytes)", hint="fetch the file again")
        try:
            header = json.loads(stream.read(length))
            end = 0
            for first, last in sorted(entry["data_offsets"] for key, entry in header.items() if key != "__metadata__"):
                if first != end or last < first:
                    raise ValueError("a gap or an overlap")
                end = last
        except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
            raise PolicyError(f"{name} has a malformed safetensors header", hint="fetch the file again") from None
    if end != size - 8 - length:
        raise PolicyError(f"{name}: the header promises {end} bytes, {size - 8 - length} are there", hint="fetch it again")


def convert_gguf(source: Path, folder: Path) -> None:
    """Dequantise a GGUF file to bf16 safetensors, with its tokenizer and chat template."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    where = {"gguf_file": source.name, "local_files_only": True, "trust_remote_code": False}
    model = AutoModelForCausalLM.from_pretrained(
        source.parent, quantization_config=GgufConfig(dequantize=True), dtype=torch.bfloat16, **where
    )
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(source.parent, **where).save_pretrained(folder)
