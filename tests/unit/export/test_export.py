"""A version leaves the store as a folder: it computes the same elsewhere, it is on record, and who may not is refused."""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections import namedtuple
from pathlib import Path
from typing import Any

import fabricated
import pytest
import torch
from click.testing import CliRunner
from peft import PeftModel
from safetensors import SafetensorError
from serving import make_adapter, register
from signed_store import add_people, allow
from transformers import AutoModelForCausalLM, AutoTokenizer

from forge_ray.cli.main import cli
from forge_ray.errors import ConfigError, ForgeError, NotFound, PolicyError, StoreError
from forge_ray.export import leave
from forge_ray.export.leave import Left, export_version
from forge_ray.governance.signers import export_signed
from forge_ray.governance.verify import verify_path
from forge_ray.inference.load import load_model
from forge_ray.models.import_model import import_model
from forge_ray.papers import mlflow_export
from forge_ray.records import Event, ModelVersion
from forge_ray.store import exports, paths, signing
from forge_ray.store.catalog import Catalog
from forge_ray.store.files import MANIFEST, Store, hash_dir
from forge_ray.store.owner import is_alive, owner_mark

pytestmark = pytest.mark.unit
IDS = torch.tensor([[10, 11, 12, 13, 40, 42, 44]])
PROMPT = "How do I reset my password? 12,345"
Held = tuple[Catalog, ModelVersion, ModelVersion]


@pytest.fixture(scope="module")
def adapter_dir(tiny_model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = make_adapter(tiny_model_dir, tmp_path_factory.mktemp("adapter") / "adapter", seed=3)
    (folder / "README.md").unlink(missing_ok=True)
    return folder


@pytest.fixture
def held(catalog: Catalog, tiny_model_dir: Path, adapter_dir: Path, tmp_path: Path) -> Held:
    """A store with a base, whose folder does not say where a turn ends, and an adapter on it."""
    model = shutil.copytree(tiny_model_dir, tmp_path / "tiny", ignore=shutil.ignore_patterns("generation_config.json"))
    base = register(catalog, model, None, "tiny")
    return catalog, base, register(catalog, adapter_dir, base, "helpdesk")


def folder_of(catalog: Catalog, version: ModelVersion) -> Path:
    return catalog.store.local(paths.model(version.id))


def logits(model: Any) -> torch.Tensor:
    with torch.inference_mode():
        values: torch.Tensor = model.eval()(IDS).logits
    return values


def opened(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, local_files_only=True)


def in_store(catalog: Catalog, base: ModelVersion, adapter: ModelVersion) -> torch.Tensor:
    """What the store's own engine computes: the adapter next to its base, not merged."""
    folders = folder_of(catalog, base), folder_of(catalog, adapter)
    model = PeftModel.from_pretrained(load_model(folders[0], None, torch.float32, torch.device("cpu")), str(folders[1]))
    return logits(model)


def test_adapter_opens_in_peft_and_comes_back_as_the_same_version(held: Held, tmp_path: Path) -> None:
    catalog, base, adapter = held
    left = export_version(catalog, adapter.id, str(tmp_path / "out"), "adapter", None)
    folder = tmp_path / "out"
    assert torch.equal(logits(PeftModel.from_pretrained(opened(folder_of(catalog, base)), str(folder))), in_store(*held))
    assert json.loads((folder / "adapter_config.json").read_text()) == json.loads(
        (folder_of(catalog, adapter) / "adapter_config.json").read_text()
    )
    card = (folder / "README.md").read_text()
    assert base.id in card
    assert "library_name: peft" in card
    assert AutoTokenizer.from_pretrained(folder).chat_template == (folder / "chat_template.jinja").read_text()
    assert json.loads((folder / "generation_config.json").read_text())["eos_token_id"] == [2]
    (copy,) = exports.exported(catalog)
    assert (copy.version, copy.form, copy.to, copy.digest) == (adapter.id, "adapter", str(folder), left.digest)
    assert import_model(catalog, folder, "again") == adapter
    (folder / "adapter_config.json").write_text("{}")
    with pytest.raises(PolicyError, match=r"has an adapter_config.json"):
        import_model(catalog, folder, "changed")


def test_merged_computes_what_the_engine_does(held: Held, tmp_path: Path) -> None:
    """In fp32, up to the rounding of one sum: the engine adds B A x, the merged weights hold W + B A."""
    catalog, base, adapter = held
    export_version(catalog, adapter.id, str(tmp_path / "out"), "merged", "fp32")
    torch.testing.assert_close(logits(opened(tmp_path / "out")), in_store(*held), rtol=1e-5, atol=1e-4)
    assert float((in_store(*held) - logits(opened(folder_of(catalog, base)))).abs().max()) > 0.1
    own, other = (AutoTokenizer.from_pretrained(path) for path in (folder_of(catalog, base), tmp_path / "out"))
    assert own(PROMPT)["input_ids"] == other(PROMPT)["input_ids"]
    assert json.loads((tmp_path / "out" / "generation_config.json").read_text())["eos_token_id"] == [2]
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        *("README.md", "bom.cdx.json", "chat_template.jinja", "config.json", "generation_config.json"),
        *("model.safetensors", "tokenizer.json", "tokenizer_config.json"),
    ]
    bom = json.loads((tmp_path / "out" / "bom.cdx.json").read_text())
    assert "model.safetensors" in [file["name"] for file in bom["metadata"]["component"]["components"]]
    imported = import_model(catalog, tmp_path / "out", "merged")
    assert (imported.weights, imported.base_model) == ("full", adapter.id)
    assert import_model(catalog, tmp_path / "out", "twice") == imported
    assert torch.equal(logits(opened(folder_of(catalog, imported))), logits(opened(tmp_path / "out")))


def test_card_bill_of_materials_and_signature_of_an_earlier_copy(
    held: Held, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Cards stay under other names; what is over other files stays behind, and nothing that is listed is changed later."""
    catalog, base, _ = held
    old = tmp_path / "old"
    shutil.copytree(folder_of(catalog, base), old, ignore=shutil.ignore_patterns(MANIFEST))
    earlier = {"README.md": "an old card", "README.upstream.md": "the first card", "bom.cdx.json": "{}", "model.sig": "{}"}
    for name, text in earlier.items():
        (old / name).write_text(text)
    version = import_model(catalog, old, "old", "apache-2.0")
    people = add_people(catalog, tmp_path / "keys")
    with signing.acting(people["olga"]):
        left = export_version(catalog, version.id, str(tmp_path / "out"), "merged", None)
        signed = export_signed(catalog, version.id, str(tmp_path / "signed"))
    for copy in exports.exported(catalog, {version.id}):
        assert dict(copy.files) == {entry.path: entry.sha256 for entry in hash_dir(Path(copy.to))}
    assert left.num_files == len(list((tmp_path / "out").iterdir()))
    assert (tmp_path / "out" / "README.upstream.md").read_text() == "the first card"
    assert (tmp_path / "out" / "README.upstream-2.md").read_text() == "an old card"
    bom = json.loads((tmp_path / "out" / "bom.cdx.json").read_text())
    listed = {file["name"]: file["hashes"][0]["content"] for file in bom["metadata"]["component"]["components"]}
    assert not listed.keys() & {"bom.cdx.json", "model.sig", "README.md"}
    digests = {entry.path: entry.sha256 for entry in hash_dir(tmp_path / "out")}
    assert {name: digests[name] for name in listed} == listed
    for folder in (tmp_path / "out", Path(signed)):
        assert verify_path(folder, [people["olga"].public_key()])["what"] == "model.sig"


def test_full_version_is_copied_and_found_again(held: Held, tmp_path: Path) -> None:
    catalog, base, _ = held
    first = export_version(catalog, base.id, str(tmp_path / "out"), "merged", None)
    assert (first.precision, first.is_new) == ("fp32", True)
    weights = "model.safetensors"
    assert (tmp_path / "out" / weights).read_bytes() == (folder_of(catalog, base) / weights).read_bytes()
    assert json.loads((tmp_path / "out" / "generation_config.json").read_text())["eos_token_id"] == [2]
    again = export_version(catalog, base.id, str(tmp_path / "out"), "merged", "fp32")
    assert (again.is_new, again.digest) == (False, first.digest)
    assert len(exports.exported(catalog)) == 1
    shutil.copytree(tmp_path / "out", tmp_path / "carried")
    assert import_model(catalog, tmp_path / "carried", "again") == base
    shutil.copytree(folder_of(catalog, base), tmp_path / "by hand")
    assert import_model(catalog, tmp_path / "by hand", "again") == base
    with pytest.raises(ConfigError, match="holds something else"):
        export_version(catalog, base.id, str(tmp_path / "out"), "merged", "bf16")
    half = export_version(catalog, base.id, str(tmp_path / "half"), "merged", "bf16")
    assert half.num_bytes < 0.6 * first.num_bytes


REFUSED: dict[str, tuple[str, str, str | None, type[ForgeError], str]] = {
    "adapter form of full weights": ("base", "adapter", None, ConfigError, "has full weights"),
    "precision of a copied adapter": ("adapter", "adapter", "bf16", ConfigError, "copies them as they are"),
    "fp16 for transformers": ("adapter", "merged", "fp16", ConfigError, "is for --form gguf"),
    "unknown": ("nobody", "merged", None, NotFound, "'nobody' is no id"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_written_is_refused(name: str, held: Held, tmp_path: Path) -> None:
    catalog, base, adapter = held
    reference, form, precision, error, message = REFUSED[name]
    reference = {"base": base.id, "adapter": adapter.id}.get(reference, reference)
    with pytest.raises(error, match=message) as raised:
        export_version(catalog, reference, str(tmp_path / "out"), form, precision)  # type: ignore[arg-type]
    assert raised.value.hint
    assert not (tmp_path / "out").exists()
    assert exports.exported(catalog) == ()


def test_place_that_is_taken_is_refused(held: Held, tmp_path: Path) -> None:
    catalog, base, _ = held
    (tmp_path / "file").write_text("x")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "letter.txt").write_text("x")
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    cases = {
        str(tmp_path / "file"): "is not a folder",
        str(tmp_path / "link"): "is not a folder",
        str(tmp_path / "full"): r"holds something else: letter\.txt",
        f"{catalog.store.root}/out": "is inside the store",
        str(tmp_path / "file" / "below"): "cannot be written",
    }
    for out, message in cases.items():
        with pytest.raises(ForgeError, match=message) as raised:
            export_version(catalog, base.id, out, "merged", None)
        assert raised.value.hint
    (tmp_path / "empty").mkdir()
    assert export_version(catalog, base.id, str(tmp_path / "empty"), "merged", None).is_new
    assert sorted(path.name for path in (tmp_path / "full").iterdir()) == ["letter.txt"]


def test_disk_without_room_is_named_before_and_during(held: Held, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    catalog, base, _ = held
    usage = namedtuple("usage", "total used free")
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda path: usage(1 << 40, 1 << 40, 1000))
        with pytest.raises(StoreError, match=r"the copy needs 0\.00 GB, and .* has 0\.00 GB left"):
            export_version(catalog, base.id, str(tmp_path / "out"), "merged", None)

    for error in (
        OSError(errno.ENOSPC, "No space left on device"),
        OSError("16384 requested and 0 written"),  # of numpy
        SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)"),
    ):

        def full(*arguments: Any, error: Exception = error) -> None:
            raise error

        monkeypatch.setattr(leave, "write_documents", full)
        with pytest.raises(StoreError, match="the disk is full") as raised:
            export_version(catalog, base.id, str(tmp_path / "out"), "merged", None)
        assert "nothing was left behind" in raised.value.hint
    assert list(tmp_path.glob(".exporting-*")) == list(tmp_path.glob("out")) == []


def test_killed_export_leaves_nothing_that_looks_whole(held: Held, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Killed where it leaves most: everything is written and on record, and the folder has no name yet."""
    catalog, base, _ = held
    child = os.fork()
    if not child:
        leave.os = type("Killed", (), {"chmod": os.chmod, "rename": lambda *_: os.kill(os.getpid(), 9)})  # type: ignore[assignment]
        try:
            export_version(catalog, base.id, str(tmp_path / "out"), "merged", None)
        finally:
            os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -9
    (unfinished,) = tmp_path.glob(".exporting-*")
    assert is_alive(unfinished.name) is False
    assert not (tmp_path / "out").exists()
    (tmp_path / f".exporting-{owner_mark()}-other").mkdir()  # of a process that is still writing
    catalog.sync()
    assert len(exports.exported(catalog)) == 1  # a copy too many on record, never one too few
    export_version(catalog, base.id, str(tmp_path / "out"), "merged", None)
    assert [path.name for path in tmp_path.glob(".exporting-*")] == [f".exporting-{owner_mark()}-other"]


def test_policy_keeps_weights_in_the_store(held: Held, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By every command that would take them out; an owner can allow it, and a releaser then does it."""
    catalog, base, adapter = held
    people = add_people(catalog, tmp_path / "keys")
    allow(catalog, people, no_export=True)
    ways = {
        "export": lambda: export_version(catalog, base.id, str(tmp_path / "out"), "merged", None),
        "sign": lambda: export_signed(catalog, base.id, str(tmp_path / "out")),
    }
    for name, way in ways.items():
        with signing.acting(people["rosa"]), pytest.raises(PolicyError, match=r"policy\.no_export") as raised:
            way()
        assert "forge policy set --allow-export" in raised.value.hint, name
    assert not (tmp_path / "out").exists()
    allow(catalog, people, no_export=False, roles=True)
    with signing.acting(people["tina"]), pytest.raises(PolicyError, match="export events are written by releaser"):
        ways["export"]()
    with signing.acting(people["rosa"]):
        left = export_version(catalog, adapter.id, str(tmp_path / "out"), "adapter", None)
    assert left.signed_by == signing.key_id(people["rosa"].public_key())
    assert verify_path(tmp_path / "out", [people["rosa"].public_key()])["what"] == "model.sig"
    (tmp_path / "out" / "README.md").write_text("changed")
    with pytest.raises(PolicyError, match=r"README.md is not what was signed"):
        verify_path(tmp_path / "out", [people["rosa"].public_key()])


def test_unsigned_copy_of_a_store_with_signers_says_so(held: Held, tmp_path: Path) -> None:
    catalog, base, _ = held
    add_people(catalog, tmp_path / "keys")
    left = export_version(catalog, base.id, str(tmp_path / "out"), "merged", None)
    assert left.notes == ("not signed: FORGE_SIGNER is not set",)


def test_weights_for_mlflow_are_on_record_and_refused_alike(
    held: Held, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    catalog, _, adapter = held
    trained = register(catalog, folder_of(catalog, adapter), catalog.model(adapter.base_model), "trained")
    monkeypatch.setattr(mlflow_export, "_found", lambda *_: (trained, None))
    people = add_people(catalog, tmp_path / "keys")
    allow(catalog, people, no_export=True)
    with pytest.raises(PolicyError, match=r"policy\.no_export"):
        mlflow_export.export(catalog, trained.id, "http://127.0.0.1:9", "x", with_weights=True)


def test_run_in_mlflow_names_what_it_was_trained_from(catalog: Catalog, monkeypatch: pytest.MonkeyPatch) -> None:
    class Started(Exception):
        pass

    def started(uri: str, run: str, experiment: str, config: Any, tags: dict[str, str]) -> None:
        raise Started(tags["forge.base_model"], tags.get("forge.initial_adapter"))

    monkeypatch.setattr(mlflow_export, "MlFlow", started)
    for name, initial in (("first", ""), ("second", "mv_first")):
        trained = fabricated.run(catalog, name, "ds_x", "mv_base", initial_adapter=initial)
        with pytest.raises(Started) as raised:
            mlflow_export._export(catalog, None, trained, "http://127.0.0.1:9", "x", with_weights=False)
        assert raised.value.args == ("mv_base", initial or None)


def test_withdrawn_weights_neither_leave_nor_come_back(held: Held, tmp_path: Path) -> None:
    catalog, _, adapter = held
    out = tmp_path / "out"
    for form in ("adapter", "merged"):
        export_version(catalog, adapter.id, str(out / form), form, None)  # type: ignore[arg-type]
    catalog.append(Event(kind="model", subject=adapter.id, data={"state": "withdrawn", "erasure": "er_1"}))
    with pytest.raises(PolicyError, match="learned from rows that er_1 erased"):
        export_version(catalog, adapter.id, str(out / "more"), "merged", None)
    for form in ("adapter", "merged"):
        (out / form / "README.md").write_text("another card")  # weights decide, not what lies around them
        with pytest.raises(
            PolicyError, match=f"holds the weights of {adapter.id}, which learned from rows that er_1 erased"
        ):
            import_model(catalog, out / form, "back")


@pytest.fixture
def forge(held: Held) -> Any:
    def run(*arguments: str, code: int = 0) -> Any:
        result = CliRunner().invoke(cli, [*arguments, "--store", held[0].store.uri, "--json"])
        assert result.exit_code == code, result.output
        return json.loads(result.stdout.strip().splitlines()[-1])

    return run


def test_command_prints_one_object_and_ends_as_others_do(held: Held, forge: Any, tmp_path: Path) -> None:
    _, base, adapter = held
    export = ("models", "export", adapter.id, "--out", str(tmp_path / "out"))
    left = Left(**forge(*export, "--form", "adapter"))
    assert (left.model_version, left.form, left.is_new) == (adapter.id, "adapter", True)
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        *("README.md", "adapter_config.json", "adapter_model.safetensors", "bom.cdx.json", "chat_template.jinja"),
        *("generation_config.json", "tokenizer.json", "tokenizer_config.json"),
    ]
    assert forge(*export, "--form", "merged", code=2)["error"]["code"] == "config"
    (line,) = forge("audit", "log", "--action", "export")["results"]
    assert (line["action"], line["subject"]) == ("export.written", adapter.id)
    forge("signers", "create", "olga", "--role", "owner", "--out", str(tmp_path / "keys"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(signing.SIGNER, str(tmp_path / "keys" / "olga.key"))
        assert forge("policy", "set", "--no-export")["no_export"] is True
    refused = forge("models", "export", base.id, "--out", str(tmp_path / "more"), "--form", "merged", code=3)
    assert "policy.no_export" in refused["error"]["message"]


def test_export_events_survive_a_store_that_is_read_again(held: Held, tmp_path: Path) -> None:
    catalog, base, _ = held
    export_version(catalog, base.id, str(tmp_path / "out"), "merged", None)
    catalog.append(Event(kind="export", subject=base.id, data={"form": 1}))  # of no valid content: it counts for nothing
    with Catalog.read_only(Store(catalog.store.uri)) as again:
        assert [copy.to for copy in exports.exported(again)] == [str(tmp_path / "out")]


@pytest.mark.large
def test_vllm_scores_the_merged_folder_as_the_store_does(
    catalog: Catalog, wide_tiny_model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("vllm")
    from forge_ray.config.base import parse
    from forge_ray.config.release import EngineConfig
    from forge_ray.inference.choose import open_engine

    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("TORCHDYNAMO_DISABLE", "1")  # a function of vLLM's would be compiled for 15 s at first
    base = register(catalog, wide_tiny_model_dir, None, "wide")
    adapter = register(catalog, make_adapter(wide_tiny_model_dir, tmp_path / "adapter", seed=5), base, "helpdesk")
    export_version(catalog, adapter.id, str(tmp_path / "out"), "merged", "fp32")
    settings = {"precision": "fp32", "page_size": 32, "num_blocks": 64, "max_batch_tokens": 128}
    prompt, continuations = [5, 17, 60, 10, 11], [(5,), (17, 60, 200), tuple(range(200, 240))]
    scores = {}
    for kind, folders in {
        "transformers": (folder_of(catalog, base), folder_of(catalog, adapter)),
        "vllm": (tmp_path / "out", None),
    }.items():
        engine = open_engine(*folders, parse(EngineConfig, settings | {"kind": kind}), use_gpu=False)
        scores[kind] = [score.logprob for score in engine.score(prompt, continuations)]
        engine.close()
    assert scores["vllm"] == pytest.approx(scores["transformers"], abs=1e-3)
