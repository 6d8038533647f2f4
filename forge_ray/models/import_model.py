"""Import a base model: a Hugging Face directory or a GGUF file becomes a model version.

Only safetensors are accepted; FP8 weights are converted to bf16 (`dequantise.py`). Names and bytes are checked before any
library opens a file (`model_files.py`); the tokenizer and chat template are then tried in a sandbox (`sandbox.py`).
"""

from __future__ import annotations

import shutil
from pathlib import Path

from forge_ray.errors import ConfigError, ForgeError, NotFound, PolicyError
from forge_ray.models.dequantise import INDEX, dequantise, is_float8
from forge_ray.models.model_files import mistral_file, refuse_unsafe, refuse_unsafe_gguf, require_mistral_common
from forge_ray.models.sandbox import refuse_bombs
from forge_ray.models.vocabulary import refuse_rowless_tokens
from forge_ray.records import ModelVersion, files_digest
from forge_ray.store import paths
from forge_ray.store.catalog import Catalog
from forge_ray.store.exact import path_inside
from forge_ray.store.files import hash_dir, sha256_file
from forge_ray.store.owner import owner_mark

__all__ = ["import_model", "refuse_unsafe"]


def import_model(catalog: Catalog, path: str | Path, name: str, licence: str = "") -> ModelVersion:
    """Import a directory (copied) or a GGUF file (converted) as a model version. Importing the same bytes again returns the
    existing version."""
    source = Path(path).expanduser()
    if not source.exists():
        raise NotFound(f"no model at {str(path)!r}", hint="give a Hugging Face directory or a .gguf file")
    origin = _origin(source)
    same = origin.rpartition(" ")[2]  # the digest; the name of the folder does not count
    version = next((imported for imported in catalog.all(ModelVersion) if imported.source.rpartition(" ")[2] == same), None)
    if version is None:
        catalog.check_may("imported models")
        version = _import(catalog, source, origin, name, licence)
    return version


def _origin(source: Path) -> str:
    if source.is_file():
        if source.suffix != ".gguf":
            raise ConfigError(f"{source.name} is neither a folder nor a .gguf file", hint="give the model's folder")
        refuse_unsafe_gguf(source)
        return f"{source.name} sha256:{sha256_file(source)}"
    refuse_unsafe(source)
    if (own := mistral_file(source)) is not None:  # before minutes are spent reading weights
        require_mistral_common(own.name, source.resolve().name)
    return f"{source.resolve().name} {files_digest(hash_dir(source))}"


def _import(catalog: Catalog, source: Path, origin: str, name: str, licence: str) -> ModelVersion:
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
            licence=licence or "unknown",
            source=origin,
        ).sealed()
        store.move_dir(staging, paths.model(version.id))
        return catalog.put(version)
    finally:
        store.delete_dir(staging)


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
