"""Rows and images are regular files of their source's folder: links out of it, pipes and devices are refused by name."""

from __future__ import annotations

import os
import socket
from pathlib import Path

import pytest

from forge_ray.config.data import DataConfig
from forge_ray.data.read.ingest import index_file
from forge_ray.data.read.readers import image_reader, read_raw
from forge_ray.data.read.sources import ListedFile, expand
from forge_ray.data.read.strict_json import Reject
from forge_ray.errors import ConfigError, DataError

pytestmark = [pytest.mark.unit, pytest.mark.timeout(60)]

ROW = '{"text": "a row"}\n'


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    (tmp_path / "secret").write_text("PRIVATE KEY")
    (tmp_path / "rows/inner").mkdir(parents=True)
    (tmp_path / "rows/a.jsonl").write_text(ROW)
    return tmp_path / "rows"


def listed(path: Path | str, **source: str) -> list[ListedFile]:
    return expand(DataConfig.model_validate({"sources": [{"path": str(path), **source}]}))


def test_a_link_out_of_a_source_is_refused_by_name(rows: Path) -> None:
    (rows / "inner/readme.txt").symlink_to(rows.parent / "secret")
    for pattern in ("**/*", "*/readme.txt", "inner/readme.txt"):
        with pytest.raises(DataError, match=r"readme\.txt' is a link to .*secret"):
            listed(rows / pattern)


def test_a_folder_that_is_a_link_out_of_a_source_is_refused(rows: Path) -> None:
    (rows.parent / "elsewhere").mkdir()
    (rows.parent / "elsewhere/b.jsonl").write_text(ROW)
    (rows / "linked").symlink_to(rows.parent / "elsewhere")
    with pytest.raises(DataError, match="which is not in the folder of its source"):
        listed(rows / "**/*.jsonl")


def test_links_that_stay_in_the_source_are_followed(rows: Path) -> None:
    (rows / "inner/b.jsonl").symlink_to("../a.jsonl")
    assert len(listed(rows / "**/*.jsonl")) == 2
    (rows.parent / "current").symlink_to(rows)  # the folder itself is the user's own word
    assert len(listed(rows.parent / "current/*.jsonl")) == 1
    assert len(listed(rows.parent / "current/a.jsonl")) == 1


def test_pipes_sockets_devices_and_links_to_nothing_are_refused(rows: Path) -> None:
    os.mkfifo(rows / "pipe.jsonl")
    server = socket.socket(socket.AF_UNIX)
    server.bind(os.path.relpath(rows / "socket.jsonl"))
    (rows / "nothing.jsonl").symlink_to("missing.jsonl")
    for name, word in (("pipe", "pipe"), ("socket", "socket"), ("nothing", "link to nothing")):
        for path in (rows / f"{name}.jsonl", rows / f"{name}*"):
            if name == "nothing" and path.suffix == ".jsonl":
                continue  # named by itself there is no such file
            with pytest.raises(DataError, match=word):
                listed(path)
    with pytest.raises(DataError, match="device"):
        listed("/dev/zero", format="text")
    with pytest.raises(DataError, match="not a regular file"):
        index_file("/dev/zero", "zero", "text")
    server.close()


def test_a_checksums_file_that_is_a_link_out_is_not_shown(rows: Path) -> None:
    (rows / "SUMS").symlink_to(rows.parent / "secret")
    with pytest.raises(DataError, match="is a link to") as error:
        listed(rows / "a.jsonl", checksums=str(rows / "SUMS"))
    assert "PRIVATE KEY" not in str(error.value)


def test_images_are_regular_files_of_the_source(rows: Path) -> None:
    (rows / "inner/b.jsonl").write_text(ROW)
    (rows / "own.png").write_bytes(b"png")
    (rows / "inner/stays.png").symlink_to("../own.png")
    (rows / "inner/leaves.png").symlink_to(rows.parent / "secret")
    (rows / "inner/dir").symlink_to(rows.parent)
    os.mkfifo(rows / "inner/pipe.png")
    (rows / "inner/zero.png").symlink_to("/dev/zero")
    file = next(file for file in listed(rows / "**/*.jsonl") if file.name.endswith("b.jsonl"))
    (chunk,) = index_file(file.path, file.name, file.format, folder=file.folder).chunks
    read = image_reader(chunk)
    assert read("stays.png") == b"png"
    for name, reason in (
        ("leaves.png", "a link out of the folder"),
        ("dir/secret", "a link out of the folder"),
        ("zero.png", "a link out of the folder"),
        ("pipe.png", "not a regular file"),
    ):
        with pytest.raises(Reject, match=reason):
            read(name)
    assert [raw.reason for raw in read_raw(chunk, 1000)] == [""]


@pytest.mark.parametrize(
    "uri",
    [
        "fsspec+http://127.0.0.1/a.jsonl",
        "fsspec+https://127.0.0.1/a.jsonl",
        "filesystem+http://127.0.0.1/a.jsonl",
        "fsspec+filecache::http://127.0.0.1/a.jsonl",
        "fsspec+memory://x::http://127.0.0.1/a.jsonl",
        "fsspec+webhdfs://127.0.0.1/a.jsonl",
        "fsspec+file:///etc/a.jsonl",
        "hf://datasets/x/a.jsonl",
        "http://127.0.0.1/a.jsonl",
        "HTTP://127.0.0.1/a.jsonl",
        "File:///etc/a.jsonl",
    ],
)
def test_pages_of_the_web_are_no_source_in_any_disguise(uri: str) -> None:
    with pytest.raises(ConfigError, match="not on a file system or object store"):
        listed(uri)
