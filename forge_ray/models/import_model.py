"""Import a base model: a Hugging Face directory or a GGUF file becomes a model version.

Only safetensors are accepted; FP8 weights are converted to bf16 (`dequantise.py`). Names and bytes are checked before any
library opens a file (`model_files.py`); the tokenizer and chat template are then tried in a sandbox (`sandbox.py`).
"""

from __future__ import annotations

import json
import shutil
from itertools import islice
from pathlib import Path
from typing import Any

from forge_ray.errors import ConfigError, ForgeError, NotFound, PolicyError
from forge_ray.models.dequantise import INDEX, dequantise, is_float8
from forge_ray.models.model_files import MAX_FILES, mistral_file, refuse_unsafe, refuse_unsafe_gguf, require_mistral_common
from forge_ray.models.sandbox import refuse_bombs
from forge_ray.models.vocabulary import refuse_rowless_tokens
from forge_ray.records import FileEntry, ModelVersion, files_digest
from forge_ray.store import exports, paths
from forge_ray.store.catalog import Catalog
from forge_ray.store.exact import path_inside
from forge_ray.store.files import hash_dir, sha256_file
from forge_ray.store.home import expanded
from forge_ray.store.owner import owner_mark

__all__ = ["import_model", "refuse_unsafe"]

ADAPTER = "adapter_config.json"


def import_model(catalog: Catalog, path: str | Path, name: str, licence: str = "") -> ModelVersion:
    """Import a directory (copied) or a GGUF file (converted) as a model version. Importing the same bytes again returns the
    existing version. So does a copy that left this store (`store/exports.py`) with the version's own weights; one with other
    weights (merged, converted) is a version of its own, with the one that it came from as its base."""
    source = expanded(path)
    if not source.exists():
        raise NotFound(f"no model at {str(path)!r}", hint="give a Hugging Face directory or a .gguf file")
    copies = exports.exported(catalog)
    if copies and (source / ADAPTER).is_file() and (version := _version_of_adapter(catalog, source, copies)):
        return version
    origin, files = _origin(source)
    exports.refuse_withdrawn_weights(catalog, files, source)
    same = origin.rpartition(" ")[2]  # the digest; the name of the folder does not count
    version = next(
        (
            one
            for one in catalog.all(ModelVersion)
            if one.source.rpartition(" ")[2] == same or (one.weights == "full" and one.files_digest == same)
        ),
        None,
    )
    copy = exports.copy_with(copies, files)
    if version is None and copy and exports.is_unchanged(copy, files):
        exported = catalog.get_as(ModelVersion, copy.version)
        version = exported if exports.is_version_itself(copy, exported) else None
    if version is None:
        catalog.check_may("imported models")
        version = _import(catalog, source, origin, name, licence, copy.version if copy else "")
    return version


def _version_of_adapter(catalog: Catalog, source: Path, copies: tuple[exports.ExportedCopy, ...]) -> ModelVersion | None:
    """The version that an adapter's folder is an unchanged copy of."""
    if sum(1 for _ in islice(source.rglob("*"), MAX_FILES + 1)) > MAX_FILES:
        return None
    files = hash_dir(source)
    exports.refuse_withdrawn_weights(catalog, files, source)
    copy = exports.copy_with(copies, files)
    return catalog.get_as(ModelVersion, copy.version) if copy and exports.is_unchanged(copy, files) else None


def _origin(source: Path) -> tuple[str, tuple[FileEntry, ...]]:
    """What the record says of where the weights came from, and the files."""
    if source.is_file():
        if source.suffix != ".gguf":
            raise ConfigError(f"{source.name} is neither a folder nor a .gguf file", hint="give the model's folder")
        refuse_unsafe_gguf(source)
        entry = FileEntry(path=source.name, size=source.stat().st_size, sha256=sha256_file(source))
        return f"{source.name} sha256:{entry.sha256}", (entry,)
    refuse_unsafe(source)
    if (own := mistral_file(source)) is not None:  # before minutes are spent reading weights
        require_mistral_common(own.name, source.resolve().name)
    files = hash_dir(source)
    return f"{source.resolve().name} {files_digest(files)}", files


def _import(catalog: Catalog, source: Path, origin: str, name: str, licence: str, base: str) -> ModelVersion:
    """`base`: the version that this is a copy of, merged or converted; "" for a model from elsewhere."""
    store = catalog.store
    staging = paths.model(f".importing-{origin[-16:]}-{owner_mark()}")
    with store.staged_dir(staging) as folder:
        if source.is_dir():
            is_quantised = is_float8(source)
            for entry in hash_dir(source):
                if is_quantised and (entry.path.endswith(".safetensors") or entry.path in ("config.json", INDEX)):
                    continue
                copy = path_inside(folder, entry.path)
                copy.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(source / entry.path, copy)
            if is_quantised:
                dequantise(source, folder)
        else:
            try:
                convert_gguf(source, folder)
            except ForgeError:
                raise
            except Exception as error:  # the readers of GGUF raise many kinds of errors
                raise PolicyError(
                    f"{source.name} cannot be converted: {type(error).__name__}: {str(error)[:200]}",
                    hint="download the file again, or give the model's folder",
                ) from error
        refuse_unsafe(folder)  # the copy, in case the source changed in the meantime
        refuse_bombs(folder)
        refuse_rowless_tokens(folder)
    try:
        files = store.files(staging)
        version = ModelVersion(
            name=name,
            status="imported",
            weights="full",
            files=files,
            files_digest=files_digest(files),
            base_model=base,
            licence=licence or "unknown",
            source=origin,
        ).sealed()
        store.move_dir(staging, paths.model(version.id))
        return catalog.put(version)
    finally:
        store.delete_dir(staging)


def convert_gguf(source: Path, folder: Path, dtype: Any = None) -> None:
    """Dequantise a GGUF file to safetensors, with its tokenizer and chat template. `dtype`: of torch; None: fp32 where
    every tensor of the file has it, else bf16."""
    import torch
    from gguf import GGMLQuantizationType
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GgufConfig

    from forge_ray.models.gguf_once import read_once
    from forge_ray.models.gguf_settings import apply_settings

    where = {"gguf_file": source.name, "local_files_only": True, "trust_remote_code": False}
    with read_once(source) as file:
        if dtype is None:
            is_fp32 = all(tensor.tensor_type == GGMLQuantizationType.F32 for tensor in file.tensors)
            dtype = torch.float32 if is_fp32 else torch.bfloat16
        config = AutoConfig.from_pretrained(source.parent, **where)
        apply_settings(config, file)
        model = AutoModelForCausalLM.from_pretrained(
            source.parent, config=config, quantization_config=GgufConfig(dequantize=True), dtype=dtype, **where
        )
        setattr(model, "_weight_conversions", None)  # noqa: B010  (those of the file; the folder gets its publisher's names)
        model.save_pretrained(folder)
        AutoTokenizer.from_pretrained(source.parent, **where).save_pretrained(folder)
        tokens = file.fields.get("tokenizer.ggml.tokens")
        _drop_invented(folder / "tokenizer.json", len(tokens.data) if tokens else 0)


def _drop_invented(path: Path, num_tokens: int) -> None:
    """Remove the tokens that transformers' class adds behind those of the file: the embedding has no rows for them."""
    tokenizer = json.loads(path.read_text(encoding="utf-8"))
    added = [token for token in tokenizer["added_tokens"] if token["id"] < num_tokens]
    if len(added) < len(tokenizer["added_tokens"]):
        path.write_text(json.dumps(tokenizer | {"added_tokens": added}, ensure_ascii=False), encoding="utf-8")
