"""The store, the catalogue and a dataset in an S3 bucket: a real server in a process of its own, a real client."""

from __future__ import annotations

import contextlib
import hashlib
import json
import pickle
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
import uuid
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from forge_ray.config.data import DataConfig
from forge_ray.data.build.build import build, index_sources
from forge_ray.data.dataset import version as dataset
from forge_ray.data.dataset.order import order_of
from forge_ray.data.dataset.stream import Feed, Rows, local_batches, ray_batches
from forge_ray.data.read.ingest import expand, index_file
from forge_ray.data.read.readers import read_raw
from forge_ray.errors import ConfigError, DataError, NotFound, StoreError
from forge_ray.models.import_model import import_model
from forge_ray.records import ModelVersion, canonical_json
from forge_ray.release import promotion
from forge_ray.store import audit_log, conditional, log_check
from forge_ray.store.catalog import Catalog
from forge_ray.store.files import MANIFEST, Store
from forge_ray.store.log_reader import HEAD, LogReader, object_name

pytest.importorskip("moto")
pytestmark = pytest.mark.e2e


# One request at a time: it looks whether an object exists before it reads the body, so that of two both might succeed
SERVER = """
import moto.server as server
from werkzeug.serving import run_simple
server.run_simple = lambda *args, **settings: run_simple(*args, **settings | {"threaded": False})
server.main()
"""


@pytest.fixture(scope="module")
def endpoint(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    log = (tmp_path_factory.mktemp("s3") / "server.log").open("wb")
    command = [sys.executable, "-c", SERVER, "-H", "127.0.0.1", "-p", str(port)]
    server = subprocess.Popen(command, stdout=log, stderr=log)
    try:
        deadline = time.monotonic() + 120
        while True:
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}/moto-api/", timeout=5).close()
                break
            except OSError:
                assert server.poll() is None, Path(log.name).read_text()
                assert time.monotonic() < deadline, "the S3 server did not start"
                time.sleep(0.2)
        yield f"127.0.0.1:{port}"
    finally:
        server.terminate()
        server.wait(30)
        log.close()


@pytest.fixture
def bucket(endpoint: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Store]:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    name = f"bucket-{uuid.uuid4().hex[:12]}"
    options = f"endpoint_override={endpoint}&scheme=http&region=us-east-1&allow_bucket_creation=true"
    uri = f"s3://user:secret@{name}/team/forge?{options}"
    Store(uri).filesystem.create_dir(name)
    yield Store(uri)
    # Ray workers were started with the user's own cache folder
    for folder in {path.rsplit("/", 1)[0] for path in Store(uri).list("models", recursive=True)}:
        key = hashlib.sha256(f"{uri}/{folder}".encode()).hexdigest()[:16]
        shutil.rmtree(Path("~/.cache/forge_ray").expanduser() / key, ignore_errors=True)


def test_objects(bucket: Store) -> None:
    assert not bucket.is_local
    assert bucket.list("records", recursive=True) == []
    assert not bucket.exists("records/a.json")
    bucket.write("records/b/2.json", b"{}")
    bucket.write_once("records/a.json", b'{"a":1}')
    bucket.write_once("records/a.json", b'{"a":1}')
    with pytest.raises(StoreError, match="immutable"):
        bucket.write_once("records/a.json", b"{}")
    assert bucket.read_json("records/a.json") == {"a": 1}
    assert bucket.list("records") == ["records/a.json"]
    assert bucket.list("records", recursive=True) == ["records/a.json", "records/b/2.json"]
    with pytest.raises(NotFound, match=r"'records/none\.json' is not in the store s3://bucket-") as error:
        bucket.read("records/none.json")
    assert "secret" not in str(error.value)
    with pytest.raises(StoreError, match="is not a path inside the store"):
        bucket.read("../other/a.json")
    assert pickle.loads(pickle.dumps(bucket)).read("records/a.json") == b'{"a":1}'
    bucket.delete_dir("records")
    bucket.delete_dir("records")
    assert not bucket.exists("records/a.json")


def test_folders(bucket: Store) -> None:
    with bucket.staged_dir("models/.one") as folder:
        (folder / "deep").mkdir()
        (folder / "deep/weights").write_bytes(b"12345678")
        (folder / "config.json").write_bytes(b"{}")
        assert not bucket.exists("models")
    bucket.move_dir("models/.one", "models/mv_x")
    assert [entry.path for entry in bucket.files("models/mv_x")] == ["config.json", "deep/weights"]
    local = bucket.fetch_dir("models/mv_x")
    assert (local / "deep/weights").read_bytes() == b"12345678"
    with bucket.staged_dir("models/.two") as folder:
        (folder / "other").write_bytes(b"")
    bucket.move_dir("models/.two", "models/mv_x")  # what is published stays
    assert bucket.is_published("models/mv_x")
    assert [entry.path for entry in bucket.files("models/mv_x")] == ["config.json", "deep/weights"]

    bucket.write("models/mv_x/deep/weights", b"12345679")  # the same size, another byte
    shutil.rmtree(local)
    with pytest.raises(StoreError, match="sha256"):
        bucket.fetch_dir("models/mv_x")

    with contextlib.suppress(RuntimeError), bucket.staged_dir("models/mv_y") as folder:
        (folder / "a").write_bytes(b"1")
        raise RuntimeError
    assert not bucket.exists(f"models/mv_y/{MANIFEST}")
    assert bucket.list("models/mv_y", recursive=True) == []


def test_catalogue(bucket: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    values = {"status": "imported", "weights": "full", "files": (), "files_digest": "", "licence": "mit"}
    with Catalog.open(bucket) as catalog:
        first, second = (catalog.put(ModelVersion.model_validate(values | {"name": n}).sealed()) for n in "ab")
        promotion.promote(catalog, first.id, "live")
        promotion.promote(catalog, second.id, "live")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "another machine"))
    with Catalog.open(bucket) as catalog:
        assert catalog.model("live") == second
        assert catalog.all(ModelVersion) == [first, second]
        assert log_check.verify(bucket).problems == ()


def test_sources_in_a_bucket(bucket: Store, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Globs, names that a URI must escape, a saved dataset, checksums and the images of rows."""
    place, options = bucket.uri.split("?")
    place = place.replace("user:secret@", "")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "user")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
    texts = {"in/a 1.jsonl": b'{"text": "a"}\n{"text": "b"}', "in/deep/c+d.jsonl": b'{"text": "c"}', "in/deep/e.md": b"d"}
    for name, data in texts.items():
        bucket.write(name, data)
    sums = "".join(f"{hashlib.sha256(data).hexdigest()}  {name.removeprefix('in/')}\n" for name, data in texts.items())
    bucket.write("in/SHA256SUMS", sums.encode())
    with pa.OSFile(str(tmp_path / "data.arrow"), "wb") as out:
        table = pa.table({"text": ["saved"] * 3})
        with pa.ipc.new_stream(out, table.schema) as writer:
            writer.write_table(table, max_chunksize=1)
    bucket.write("saved/data-0.arrow", (tmp_path / "data.arrow").read_bytes())
    bucket.write("saved/state.json", b'{"_data_files": [{"filename": "data-0.arrow"}]}')

    def read(path: str, checksums: str = "") -> list[str]:
        source = {"path": f"{place}/{path}?{options}", "checksums": checksums and f"{place}/{checksums}?{options}"}
        files = expand(DataConfig.model_validate({"sources": [source]}))
        indexed = [index_file(f.path, f.name, f.format, f.source, f.sha256, chunk_bytes=1) for f in files]
        rows = [row for file in indexed for chunk in file.chunks for row in read_raw(chunk, 1 << 20)]
        assert not [row.reason for row in rows if row.reason]
        return [(json.loads(row.raw) if row.raw is not None else row.value)["text"] for row in rows]

    assert read("in/*.jsonl") == ["a", "b"]
    assert read("in/a%201.jsonl") == ["a", "b"]
    assert read("in/**/*.*", "in/SHA256SUMS") == ["a", "b", "c", "d"]
    assert read("in/deep/[c-d]*.jsonl") == ["c"]
    assert read("sav*/*.arrow") == read("saved") == ["saved"] * 3
    with pytest.raises(NotFound, match=r"no file matches 's3://bucket-.*none"):
        read("in/none*.jsonl")
    bucket.write("in/deep/e.md", b"changed")
    with pytest.raises(DataError, match=r"has sha256 .* but its checksums file says"):
        read("in/**/*.*", "in/SHA256SUMS")


@pytest.mark.usefixtures("ray_cluster")
def test_dataset_is_built_and_read_in_the_bucket(bucket: Store, store: Store, tiny_model_dir: Path, tmp_path: Path) -> None:
    """The same rows give the same id as on a disk, and the same batches; rows can be read from a bucket, too."""
    lines = [
        {"messages": [{"role": "user", "content": f"q {n}"}, {"role": "assistant", "content": f"a {n}"}]} for n in range(60)
    ]
    data = "\n".join(json.dumps(line) for line in lines).encode()
    (tmp_path / "rows.jsonl").write_bytes(data)
    bucket.write("input/rows.jsonl", data)
    with Catalog.open(bucket) as catalog:
        base = import_model(catalog, tiny_model_dir, "tiny-llama", licence="apache-2.0")
        promotion.promote(catalog, base.id, "tiny")
        assert import_model(catalog, tiny_model_dir, "tiny-llama") == base
    assert not [name for name in bucket.list("models", recursive=True) if not name.startswith(f"models/{base.id}/")]

    config = DataConfig.model_validate(
        {"sources": [{"path": str(tmp_path / "rows.jsonl")}], "sequence_length": 64, "block_rows": 2}
    )
    sources = index_sources(config)
    built = {place: build("rows", config, base, place, sources) for place in (bucket, store)}
    assert built[bucket].id == built[store].id
    manifest = built[bucket]
    assert "secret" not in manifest.model_dump_json()
    where, options = bucket.uri.split("?")
    far_away = index_file(f"{where}/input/rows.jsonl?{options}", "rows.jsonl", "jsonl", chunk_bytes=1000)
    assert (far_away.sha256, far_away.num_lines) == (sources[0].sha256, 60)
    assert [json.loads(row.raw or b"") for chunk in far_away.chunks for row in read_raw(chunk, 1 << 20)] == lines
    assert bucket.files(f"datasets/{manifest.id}") == manifest.files
    assert not [name for name in bucket.list("datasets", recursive=True) if not name.startswith(f"datasets/{manifest.id}/")]
    assert sum(len(dataset.read_records(bucket, manifest, split)) for split in dataset.SPLITS) == 60

    def feed(place: Store) -> Feed:
        rows = Rows.of(place, manifest, "train")
        order = order_of(manifest, "train", 0, global_batch=2)
        return Feed(rows, order, order.lanes(1, 2), 1, 5)

    for disk, near, far in zip(
        local_batches(feed(store)), local_batches(feed(bucket)), ray_batches(feed(bucket)), strict=True
    ):
        for name, values in disk.items():
            assert np.array_equal(near[name], values)
            assert np.array_equal(far[name], values)


WRITER = """
import sys
from forge_ray.records import canonical_json
from forge_ray.store import audit_log
from forge_ray.store.files import Store
store = Store(sys.argv[1])
for number in range(int(sys.argv[3])):
    name = f"{sys.argv[2]}-{number}"
    audit_log.publish(store, f"events/{name}.json", canonical_json({"name": name}), "test.put", name)
"""
HOSTS, EVENTS = 3, 6


def test_hosts_that_write_at_once_lose_no_line(bucket: Store) -> None:
    """As many processes as hosts, without a lock between them: every event has one line, and the chain holds."""
    writers = [subprocess.Popen([sys.executable, "-c", WRITER, bucket.uri, f"host{n}", str(EVENTS)]) for n in range(HOSTS)]
    assert [writer.wait(120) for writer in writers] == [0] * HOSTS
    report = log_check.verify(bucket)
    assert (report.num_lines, report.problems) == (HOSTS * EVENTS, ())
    assert sorted(line.subject for line in LogReader(bucket).all()) == sorted(
        f"host{host}-{number}" for host in range(HOSTS) for number in range(EVENTS)
    )


def test_of_two_that_create_one_succeeds(bucket: Store) -> None:
    assert bucket.create("runs/a.json", b"1")
    assert not bucket.create("runs/a.json", b"2")
    assert not conditional.create(bucket.uri, bucket.path("runs/a.json"), b"2")  # also behind the look whether it exists
    assert bucket.read("runs/a.json") == b"1"


@pytest.mark.parametrize("killed_before", ["head", "line of an earlier version"])
def test_a_writer_killed_between_line_and_head_costs_nothing(bucket: Store, killed_before: str) -> None:
    def publish(name: str) -> None:
        audit_log.publish(bucket, f"events/{name}.json", canonical_json({"name": name}), "test.put", name)

    for before in ((), ("a",), ("b", "c")):
        for name in before:
            publish(name)
        head = bucket.read(HEAD) if bucket.exists(HEAD) else None
        publish(f"killed-{len(before)}")
        if killed_before != "head":
            bucket.delete(object_name(json.loads(bucket.read(HEAD))["n"]))
        elif head:
            bucket.write(HEAD, head)
        else:
            bucket.delete(HEAD)
        bucket.delete(f"events/killed-{len(before)}.json")
        assert len(LogReader(bucket).all()) >= len(before)
        audit_log.redo(bucket)
        assert bucket.exists(f"events/killed-{len(before)}.json")
        publish(f"next-{len(before)}")
        assert log_check.verify(bucket).problems == ()
    assert log_check.verify(bucket).num_lines == 9


def test_lines_that_were_cut_or_changed_stop_writers(bucket: Store) -> None:
    for name in "abc":
        audit_log.publish(bucket, f"events/{name}.json", canonical_json({"name": name}), "test.put", name)
    second, third = (bucket.read(object_name(number)) for number in (2, 3))
    cut: dict[int, bytes | None] = {2: None, 3: None}  # the last line alone would be written again, from the head
    for changes in (cut, {3: third.replace(b'"c"', b'"d"')}, {4: b"no line"}, {4: second}):
        for number, content in changes.items():
            bucket.delete(object_name(number)) if content is None else bucket.write(object_name(number), content)
        with pytest.raises(StoreError, match="does not go on from its head"):
            audit_log.publish(bucket, "events/e.json", b"{}", "test.put", "e")
        assert log_check.verify(bucket).problems
        assert not bucket.exists("events/e.json")
        bucket.write(object_name(2), second)
        bucket.write(object_name(3), third)
    bucket.delete(object_name(4))
    bucket.delete(HEAD)
    with pytest.raises(StoreError, match=r"head\.json is missing"):
        audit_log.publish(bucket, "events/e.json", b"{}", "test.put", "e")


def test_a_server_that_overwrites_all_the_same_is_refused(bucket: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(conditional, "put", lambda store, key, data, mode: None)
    monkeypatch.setattr(conditional, "_require_honoured", conditional._require_honoured.__wrapped__)
    with pytest.raises(StoreError, match=r"overwrites an object though the request forbids it") as error:
        bucket.create("runs/b.json", b"1")
    assert "secret" not in str(error.value)
    monkeypatch.setenv("FORGE_SINGLE_WRITER", "1")
    assert bucket.create("runs/b.json", b"1")
    assert not bucket.create("runs/b.json", b"2")
    monkeypatch.setenv("FORGE_SINGLE_WRITER", "yes")
    with pytest.raises(ConfigError, match=r"FORGE_SINGLE_WRITER is 'yes'"):
        bucket.create("runs/c.json", b"1")


def test_credentials_of_the_environment_and_of_a_profile(
    bucket: Store, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    uri = bucket.uri.replace("user:secret@", "")
    name = bucket.root.partition("/")[0]
    for variable in (
        "AWS_ACCESS_KEY_ID",
        "AWS_SECRET_ACCESS_KEY",
        "AWS_SESSION_TOKEN",
        "AWS_PROFILE",
        *(conditional.WEB_IDENTITY, conditional.CONTAINER_PATH, conditional.CONTAINER_URI),
    ):
        monkeypatch.delenv(variable, raising=False)
    profiles = tmp_path / "credentials"
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(profiles))
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    with pytest.raises(ConfigError, match=r"no credentials for the object store: .* under \[default\] of .*credentials"):
        conditional.create(uri, f"{name}/one", b"1")
    profiles.write_text("[default]\naws_access_key_id = user\naws_secret_access_key = a%b\n")
    assert conditional.create(uri, f"{name}/one", b"1")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "user")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
    conditional._bucket.cache_clear()
    assert not conditional.create(uri, f"{name}/one", b"2")
    with pytest.raises(StoreError, match=r"the store gs://other/x is on gs://.*") as error:
        conditional.create("gs://other/x", "other/x/one", b"1")
    assert "FORGE_SINGLE_WRITER=1" in error.value.hint
