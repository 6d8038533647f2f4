"""Fill a folder with a version in one of the forms that other tools open, and with what is said about it."""

from __future__ import annotations

import itertools
import json
import re
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from forge_ray.inference.choose import write_merged
from forge_ray.models.class_head import is_classifier
from forge_ray.papers.bom import bom
from forge_ray.papers.facts import Facts
from forge_ray.papers.markdown import code, plain
from forge_ray.papers.model_card import model_card
from forge_ray.records import ModelVersion, files_digest
from forge_ray.store import signing
from forge_ray.store.exact import copy_file
from forge_ray.store.files import hash_dir
from forge_ray.store.scratch import scratch
from forge_ray.train.model import copy_tokenizer, name_ends

Form = Literal["adapter", "merged", "gguf"]
Precision = Literal["bf16", "fp16", "fp32"]
CARD, BOM = "README.md", "bom.cdx.json"
TYPES: dict[str, Precision] = {"BF16": "bf16", "F16": "fp16", "F32": "fp32"}
LICENCE_TEXT = re.compile(r"(licen[cs]e|notice|copying)\b.*", re.IGNORECASE)
OPENING = {
    "adapter": "Open the base model with transformers, then `PeftModel.from_pretrained(model, FOLDER)`. In vLLM:"
    " `vllm serve BASE --enable-lora --lora-modules NAME=FOLDER`.",
    "merged": "`AutoModelForCausalLM.from_pretrained(FOLDER)` and `AutoTokenizer.from_pretrained(FOLDER)` of transformers,"
    " or `vllm serve FOLDER`.",
    "classifier": "`AutoModelForSequenceClassification.from_pretrained(FOLDER)` and"
    " `AutoTokenizer.from_pretrained(FOLDER)` of transformers; `classes.json` says which logits belong to which target.",
    "gguf": "`llama-server -m FILE.gguf`, and every program that is built on llama.cpp.",
}


@dataclass(frozen=True)
class StoredWeights:
    """The folders of the store that an export reads, verified: of the full weights, and of the adapter on them."""

    version: ModelVersion
    base: ModelVersion
    base_folder: Path
    adapter_folder: Path | None


def stored_precision(folder: Path) -> Precision:
    """What most numbers of the weights are stored as; fp32 where it is none of the three."""
    from safetensors import safe_open

    numbers: Counter[str] = Counter()
    for path in folder.glob("*.safetensors"):
        with safe_open(path, "pt") as file:
            for name in file.keys():  # noqa: SIM118  (a handle of safetensors has no iterator)
                part = file.get_slice(name)
                size = 1
                for length in part.get_shape():
                    size *= length
                numbers[part.get_dtype()] += size
    return TYPES.get(numbers.most_common(1)[0][0], "fp32") if numbers else "fp32"


def write_adapter_folder(held: StoredWeights, target: Path) -> None:
    """The adapter's own files, byte for byte, with the tokenizer, chat template and licence texts of its base."""
    assert held.adapter_folder is not None
    copy_tokenizer(held.base_folder, target)
    for path in held.base_folder.iterdir():
        if path.is_file() and LICENCE_TEXT.fullmatch(path.name):
            copy_file(held.base_folder, path.name, target)
    for entry in held.version.files:
        copy_file(held.adapter_folder, entry.path, target)


def write_merged_folder(held: StoredWeights, precision: Precision, target: Path, done: Callable[[int, int], None]) -> None:
    """Full weights: the very files of a version that has them in this precision; else summed and rounded once. `done` is
    told the files that are copied, and of how many."""
    if held.adapter_folder is None and precision == stored_precision(held.base_folder):
        for number, entry in enumerate(held.version.files, 1):
            copy_file(held.base_folder, entry.path, target)
            done(number, len(held.version.files))
    else:
        write_merged(held.base_folder, held.adapter_folder, precision, target)
    name_ends(target)


def write_gguf_folder(
    held: StoredWeights, precision: Precision, target: Path, done: Callable[[int, int], None]
) -> tuple[str, ...]:
    """One GGUF file, read back and compared, with the licence texts; returns notes about it. An adapter is summed in fp32,
    for the file's writer alone refuses what its precision cannot hold. `done` is told the tensors that are written, and of
    how many."""
    from forge_ray.export.gguf_check import check_read_back
    from forge_ray.export.gguf_file import write_gguf

    name = re.sub(r"[^A-Za-z0-9._-]+", "-", held.version.name).strip(".-") or held.version.id
    path, title = target / f"{name}-{precision}.gguf", f"{held.version.name} {held.version.id}"
    with scratch("merged") as folder:
        source = held.base_folder
        if held.adapter_folder is not None:
            source = folder
            write_merged(held.base_folder, held.adapter_folder, "fp32", folder)
        write_gguf(source, path, title, held.version.licence, precision, done)
        notes = check_read_back(path, source, precision)
    for file in held.base_folder.iterdir():
        if file.is_file() and LICENCE_TEXT.fullmatch(file.name):
            copy_file(held.base_folder, file.name, target)
    return notes


def write_documents(facts: Facts, held: StoredWeights, form: Form, precision: str, folder: Path) -> None:
    """The model card and the bill of materials of what the folder holds. A card that the folder has from elsewhere stays,
    under a name that is free; a bill of materials and a signature are over other files, and are left out."""
    if (folder / CARD).is_file():
        (folder / CARD).rename(_upstream_card(folder))
    for name in (BOM, signing.BUNDLE_FILE):
        (folder / name).unlink(missing_ok=True)
    files = hash_dir(folder)
    weights = held.version.weights if form == "adapter" else "full"
    copied = held.version.model_copy(update={"files": files, "files_digest": files_digest(files), "weights": weights})
    facts = replace(facts, version=copied)
    (folder / BOM).write_bytes(bom(facts))
    card = model_card(facts, library="gguf" if form == "gguf" else "")
    (folder / CARD).write_bytes(card + f"\n{_this_copy(held, form, precision, folder)}".encode())


def _upstream_card(folder: Path) -> Path:
    """`README.upstream.md`, or with a number where an earlier copy has that one."""
    numbers = itertools.chain([""], (f"-{number}" for number in itertools.count(2)))
    return next(path for number in numbers if not (path := folder / f"README.upstream{number}.md").exists())


def _this_copy(held: StoredWeights, form: Form, precision: str, folder: Path) -> str:
    version, base = held.version, held.base
    texts = sorted(path.name for path in folder.iterdir() if LICENCE_TEXT.fullmatch(path.name))
    if form == "adapter":
        named = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8")).get("base_model_name_or_path", "")
        what = (
            f"The adapter {version.id} alone. It belongs on {plain(base.name)} ({base.id}), imported from"
            f" {code(base.source) if base.source else 'a run of the same store'}, and on no other weights."
            f" {code('base_model_name_or_path')} is {code(str(named))}, the base's id in the store that it comes from: no"
            " path, and no name of a hub."
        )
    elif version.weights == "adapter":
        what = f"The adapter {version.id}, summed into its base {plain(base.name)} ({base.id}) in fp32, and rounded once"
        what += f" to {precision}."
    else:
        what = f"The weights of {version.id} in {precision}."
    licence = f"Licence: {plain(version.licence)}; its text: {', '.join(texts) or 'not in the store it comes from'}."
    opening = OPENING["classifier" if form == "merged" and is_classifier(version) else form]
    return f"## This copy\n\n{what}\n\n{opening}\n\n{licence}\n"
