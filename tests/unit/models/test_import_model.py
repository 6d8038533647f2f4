"""Importing a base model: an unsafe or torn directory is refused before any library opens it, and leaves nothing behind."""

from __future__ import annotations

import io
import json
import os
import pickle
import shutil
import struct
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from forge_ray.errors import ConfigError, ForgeError, NotFound, PolicyError
from forge_ray.models.import_model import import_model
from forge_ray.records import ModelVersion
from forge_ray.store.catalog import Catalog
from forge_ray.store.files import Store

pytestmark = pytest.mark.unit


def safetensors(tensors: dict[str, Any], data: bytes) -> bytes:
    header = json.dumps(tensors).encode()
    return struct.pack("<Q", len(header)) + header + data


def tensor(first: Any, last: Any) -> dict[str, Any]:
    return {"dtype": "F32", "shape": [4], "data_offsets": [first, last]}


GOOD = safetensors({"__metadata__": {"format": "pt"}, "b": tensor(16, 32), "a": tensor(0, 16)}, bytes(32))


@pytest.fixture
def good(tmp_path: Path) -> Path:
    folder = tmp_path / "outer" / "good"
    folder.mkdir(parents=True)
    (folder / "config.json").write_text('{"model_type": "llama"}')
    (folder / "tokenizer.json").write_text('{"version": "1.0"}')
    (folder / "tokenizer_config.json").write_text('{"eos_token": "</s>"}')
    (folder / "model.safetensors").write_bytes(GOOD)
    (tmp_path / "secret.json").write_text('{"password": "x"}')
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "rows.json").write_text("{}")
    return folder


@pytest.fixture
def no_library_opens_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every way in which transformers, torch, safetensors or pickle would read a model fails the test."""
    import safetensors
    import torch
    import transformers

    def opened(*_: object, **__: object) -> None:
        pytest.fail("a library opened a directory that must be refused")

    for auto in ("AutoConfig", "AutoTokenizer", "AutoModelForCausalLM"):
        monkeypatch.setattr(getattr(transformers, auto), "from_pretrained", opened)
    monkeypatch.setattr(transformers.PreTrainedModel, "from_pretrained", opened)
    monkeypatch.setattr(torch, "load", opened)
    monkeypatch.setattr(safetensors, "safe_open", opened)
    for name in ("load", "loads", "Unpickler"):
        monkeypatch.setattr(pickle, name, opened)


def put(name: str, data: bytes) -> Callable[[Path], None]:
    def make(folder: Path) -> None:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)

    return make


def put_json(name: str, value: Any) -> Callable[[Path], None]:
    return put(name, json.dumps(value).encode())


def link(name: str, target: str) -> Callable[[Path], None]:
    def make(folder: Path) -> None:
        (folder / name).unlink(missing_ok=True)
        (folder / name).symlink_to(target)

    return make


def remove(name: str) -> Callable[[Path], None]:
    return lambda folder: (folder / name).unlink()


def hub_cache(folder: Path) -> None:
    """A snapshot folder of the Hugging Face cache: links to blobs next to it."""
    blobs = folder.parent / "blobs"
    blobs.mkdir()
    for path in list(folder.iterdir()):
        shutil.move(path, blobs / path.name)
        path.symlink_to(f"../blobs/{path.name}")


def fifo_as_config(folder: Path) -> None:
    (folder / "config.json").unlink()
    os.mkfifo(folder / "config.json")


def header_only(length: int, rest: bytes = b"") -> Callable[[Path], None]:
    return put("model.safetensors", struct.pack("<Q", length) + rest)


def weights(tensors: dict[str, Any], data: bytes) -> Callable[[Path], None]:
    return put("model.safetensors", safetensors(tensors, data))


AUTO_MAP = {"AutoModelForCausalLM": "modeling_evil.EvilModel"}
TORCH_ZIP = io.BytesIO(b"PK\x03\x04" + bytes(60)).getvalue()
LEAVES = "is a link that leaves the model's folder"
TORN = "has a malformed safetensors header"

BAD: dict[str, tuple[Callable[[Path], None], type[ForgeError], str]] = {
    "auto_map": (put_json("config.json", {"auto_map": AUTO_MAP}), PolicyError, "config.json has `auto_map`"),
    "auto_map, nested": (
        put_json("config.json", {"text_config": [{"vision": {"auto_map": AUTO_MAP}}]}),
        PolicyError,
        "config.json has `auto_map`",
    ),
    "auto_map, tokenizer": (
        put_json("tokenizer_config.json", {"auto_map": AUTO_MAP}),
        PolicyError,
        "tokenizer_config.json has `auto_map`",
    ),
    "auto_map, subfolder": (put_json("vae/config.JSON", {"auto_map": {}}), PolicyError, "vae/config.JSON has `auto_map`"),
    "python": (put("modeling_evil.py", b"import os"), PolicyError, "modeling_evil.py is code"),
    "python, deep and loud": (put("a/b/EVIL.PY", b""), PolicyError, "a/b/EVIL.PY is code"),
    "hidden python": (put(".hidden/x.py", b""), PolicyError, ".hidden/x.py is code"),
    "shared object": (put("kernels.so", b"\x7fELF"), PolicyError, "kernels.so is code"),
    "pth": (put("hook.pth", b"import os"), PolicyError, "hook.pth is code"),
    "bin": (put("pytorch_model.bin", TORCH_ZIP), PolicyError, "pytorch_model.bin may hold pickled objects"),
    "bin beside safetensors": (put("training_args.bin", b""), PolicyError, "training_args.bin may hold pickled objects"),
    "pt": (put("optimizer.pt", b""), PolicyError, "optimizer.pt may hold pickled objects"),
    "pkl": (put("x.pkl", b""), PolicyError, "x.pkl may hold pickled objects"),
    "pickle under another name": (put("notes.txt", pickle.dumps({1: 2})), PolicyError, "notes.txt may hold pickled"),
    "torch file under another name": (put("model.safetensors", TORCH_ZIP), PolicyError, "may hold pickled objects"),
    "link to a file outside": (link("generation_config.json", "../../secret.json"), PolicyError, LEAVES),
    "absolute link": (link("passwd", "/etc/passwd"), PolicyError, LEAVES),
    "link to a folder outside": (link("more", "../../elsewhere"), PolicyError, LEAVES),
    "links in a circle": (link("loop", "loop"), PolicyError, "loop is"),
    "link to nothing": (link("gone", "nowhere"), PolicyError, "gone is not a regular file"),
    "cache of the hub": (hub_cache, PolicyError, LEAVES),
    "fifo": (lambda folder: os.mkfifo(folder / "pipe"), PolicyError, "pipe is not a regular file"),
    "fifo as config": (
        fifo_as_config,
        PolicyError,
        "config.json is not a regular file",
    ),
    "header larger than allowed": (header_only(101 << 20), PolicyError, "is not a safetensors file"),
    "header larger than the file": (header_only(1000, b"{}"), PolicyError, "is not a safetensors file"),
    "header of 2^63 bytes": (header_only(1 << 63, b"{}"), PolicyError, "is not a safetensors file"),
    "empty weights": (put("model.safetensors", b""), PolicyError, "is not a safetensors file"),
    "header that is not JSON": (header_only(4, b"abcd"), PolicyError, TORN),
    "header that is a list": (header_only(2, b"[]"), PolicyError, TORN),
    "header nested deeply": (header_only(100_000, b"[" * 50_000 + b"]" * 50_000), PolicyError, TORN),
    "truncated weights": (
        put("model.safetensors", GOOD[:-1]),
        PolicyError,
        "the header describes 32 bytes, the file has 31",
    ),
    "bytes behind the weights": (put("model.safetensors", GOOD + b"x"), PolicyError, "describes 32 bytes, the file has 33"),
    "offsets behind the file": (weights({"a": tensor(0, 1 << 40)}, bytes(16)), PolicyError, "the header describes"),
    "overlapping tensors": (weights({"a": tensor(0, 16), "b": tensor(8, 24)}, bytes(24)), PolicyError, TORN),
    "a gap between tensors": (weights({"a": tensor(0, 8), "b": tensor(12, 24)}, bytes(24)), PolicyError, TORN),
    "offsets backwards": (weights({"a": tensor(0, -16)}, b""), PolicyError, TORN),
    "offsets that are text": (weights({"a": tensor("0", "16")}, bytes(16)), PolicyError, TORN),
    "one offset": (weights({"a": {"data_offsets": [0]}}, b""), PolicyError, TORN),
    "no offsets": (weights({"a": {}}, b""), PolicyError, TORN),
    "config that is not JSON": (put("config.json", b"{"), PolicyError, "config.json is not valid JSON"),
    "config that is not UTF-8": (put("config.json", b'"\xff"'), PolicyError, "config.json is not valid JSON"),
    "config nested deeply": (put("config.json", b"[" * 900 + b"]" * 900), PolicyError, "config.json is not a JSON object"),
    "no config": (remove("config.json"), ConfigError, "has no config.json"),
    "no tokenizer": (remove("tokenizer.json"), ConfigError, "has no tokenizer.json"),
    "no weights": (remove("model.safetensors"), ConfigError, "has no .safetensors weights"),
}


def everything(store: Store) -> list[str]:
    return sorted(path.name for path in Path(store.root).rglob("*") if not path.name.startswith("catalog.sqlite"))


@pytest.mark.parametrize("name", BAD)
@pytest.mark.usefixtures("no_library_opens_it")
def test_a_bad_directory_is_refused_unopened_and_leaves_nothing(name: str, good: Path, catalog: Catalog) -> None:
    spoil, kind, message = BAD[name]
    spoil(good)
    with pytest.raises(kind) as error:
        import_model(catalog, good, "evil")
    assert message in error.value.message
    assert error.value.hint
    assert everything(catalog.store) == []
    assert catalog.all(ModelVersion) == []
    assert catalog.aliases() == {}


def test_a_snapshot_of_links_is_refused_with_the_remedy_and_the_remedy_works(good: Path, catalog: Catalog) -> None:
    hub_cache(good)
    with pytest.raises(PolicyError, match="cp -rL"):
        import_model(catalog, good, "hub")
    shutil.copytree(good, good.parent / "copy", symlinks=False)
    assert import_model(catalog, good.parent / "copy", "hub").status == "imported"


@pytest.mark.usefixtures("no_library_opens_it")
def test_header_length_that_looks_like_a_pickle_is_accepted(good: Path, catalog: Catalog) -> None:
    header = json.dumps({"a": tensor(0, 16)}).encode().ljust(0x380)
    (good / "model.safetensors").write_bytes(struct.pack("<Q", len(header)) + header + bytes(16))
    assert import_model(catalog, good, "good").status == "imported"


def test_the_same_directory_twice_is_one_version(good: Path, catalog: Catalog) -> None:
    first = import_model(catalog, good, "base", licence="apache-2.0")
    again = import_model(catalog, good, "base")
    moved = import_model(catalog, Path(shutil.copytree(good, good.parent / "another name")), "base")
    assert first == again == moved
    assert catalog.all(ModelVersion) == [first]
    assert (first.status, first.weights, first.licence) == ("imported", "full", "apache-2.0")
    assert sorted(entry.path for entry in first.files) == [
        "config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    ]
    assert (catalog.store.fetch_dir(f"models/{first.id}") / "model.safetensors").read_bytes() == GOOD
    assert os.listdir(catalog.store.local("models")) == [first.id]


def test_other_bytes_are_another_version(good: Path, catalog: Catalog) -> None:
    first = import_model(catalog, good, "base")
    (good / "tokenizer_config.json").write_text("{}")
    second = import_model(catalog, good, "base")
    assert first.id != second.id
    assert first.licence == "unknown"


def test_links_that_stay_inside_are_followed(good: Path, catalog: Catalog) -> None:
    (good / "model.safetensors").rename(good / "weights.dat")
    (good / "model.safetensors").symlink_to("weights.dat")
    version = import_model(catalog, good, "base")
    copied = catalog.store.fetch_dir(f"models/{version.id}") / "model.safetensors"
    assert not copied.is_symlink()
    assert copied.read_bytes() == GOOD


def test_a_source_that_changes_while_it_is_copied_is_refused(
    good: Path, catalog: Catalog, monkeypatch: pytest.MonkeyPatch
) -> None:
    copy = shutil.copyfile

    def exchanged(source: Any, target: Any) -> Any:
        copy(source, target)
        if Path(target).name == "config.json":
            Path(target).write_text(json.dumps({"auto_map": AUTO_MAP}))
        return target

    monkeypatch.setattr(shutil, "copyfile", exchanged)
    with pytest.raises(PolicyError, match="auto_map"):
        import_model(catalog, good, "base")
    assert everything(catalog.store) == ["models"]


@pytest.mark.parametrize(("name", "kind", "message"), [
    ("nowhere", NotFound, "no model at"),
    ("weights.onnx", ConfigError, "weights.onnx is neither a folder nor a .gguf file"),
])  # fmt: skip
def test_inputs_that_are_not_models(tmp_path: Path, catalog: Catalog, name: str, kind: Any, message: str) -> None:
    (tmp_path / "weights.onnx").write_bytes(b"")
    with pytest.raises(kind) as error:
        import_model(catalog, tmp_path / name, "base")
    assert message in error.value.message
    assert everything(catalog.store) == []


@pytest.mark.usefixtures("no_library_opens_it")
@pytest.mark.parametrize("name", ["tekken.json", "tokenizer.model.v3"])
def test_a_mistral_model_without_its_package_is_refused_with_the_extra(
    name: str, good: Path, catalog: Catalog, monkeypatch: pytest.MonkeyPatch
) -> None:
    (good / name).write_text("{}")
    (good / "config.json").write_text('{"model_type": "mistral"}')
    monkeypatch.setitem(sys.modules, "mistral_common", None)
    with monkeypatch.context() as patch:
        patch.setattr("forge_ray.models.import_model.hash_dir", lambda _: pytest.fail("the weights were read first"))
        with pytest.raises(ConfigError, match=f"good has Mistral's own tokenizer, {name}, which needs") as error:
            import_model(catalog, good, "mistral")
    assert error.value.hint == "pip install 'forge-ray[mistral]' on every node"
    assert everything(catalog.store) == []
    (good / name).unlink()
    assert import_model(catalog, good, "mistral").status == "imported"


def test_a_broken_gguf_file_leaves_nothing(tmp_path: Path, catalog: Catalog) -> None:
    (tmp_path / "model.gguf").write_bytes(b"GGUF" + bytes(100))
    with pytest.raises(PolicyError, match="is not a valid GGUF file"):
        import_model(catalog, tmp_path / "model.gguf", "base")
    assert everything(catalog.store) == []
    assert catalog.all(ModelVersion) == []


def test_a_real_model_imports_and_loads(store: Store) -> None:
    """The tiny model of the shared store, imported on the same path as the refused ones."""
    from transformers import AutoModelForCausalLM

    with Catalog.open(store) as catalog:
        version = catalog.model("tiny")
    model = AutoModelForCausalLM.from_pretrained(store.fetch_dir(f"models/{version.id}"), local_files_only=True)
    assert model.config.num_hidden_layers == 2
