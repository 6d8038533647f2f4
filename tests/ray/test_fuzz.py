"""Broken lines among good ones: every good row is kept, every broken one is quarantined in its place, in bounded memory."""

from __future__ import annotations

import hashlib
import json
import os
import random
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from forge_ray.config.data import DataConfig
from forge_ray.data.build.build import build, index_sources
from forge_ray.data.dataset import version as dataset
from forge_ray.data.record.schema import parse_record
from forge_ray.store.catalog import Catalog
from forge_ray.store.files import Store

pytestmark = [pytest.mark.ray]
BIG_LINE = 50 << 20


def good(number: int) -> dict[str, Any]:
    return {
        "messages": [
            {"role": "user", "content": f"ticket {number}: größe {number % 97}?"},
            {"role": "assistant", "content": f"answer {number % 1013}"},
        ]
    }


def broken(chosen: random.Random, number: int) -> bytes:
    """One mutation of a good row; none of them is a row."""
    line = json.dumps(good(number)).encode()
    kind = number % 12
    if kind == 0:
        return line[: chosen.randrange(1, len(line) - 1)]
    if kind == 1:
        place = chosen.randrange(40, len(line) - 4)
        return line[:place] + bytes([chosen.choice((0xFF, 0xFE, 0xC0, 0x80))]) + line[place:]
    if kind == 2:
        return line.replace(b"ticket", b"tic\\u0000ket")
    if kind == 3:
        return b'{"messages": ' + b"[" * 5000 + b"]" * 5000 + b"}"
    if kind == 4:
        return json.dumps({"messages": chosen.choice([7, "text", {}, [], [1], [None]])}).encode()
    if kind == 5:
        return b"   \t " + chosen.choice([b"{}", b"null", b"[]", b'""', b"0"])
    if kind == 6:
        return line[:-1] + b', "messages": []}'
    if kind == 7:
        return line.replace(b"ticket", b"\\ud83d")
    if kind == 8:
        return line.replace(b'"assistant"', b'"asistant"')
    if kind == 9:
        return line + line
    if kind == 10:
        return line.replace(b'"content"', b'"contnt"')
    return bytes(chosen.randrange(1, 256) for _ in range(60)).replace(b"\n", b"?").replace(b"\r", b"?") + b"\x80"


def write_rows(folder: Path, num_good: int, num_bad: int, num_files: int) -> dict[tuple[str, int], tuple[int, str]]:
    """Seeded files; returns (file, line) → (offset, sha256) of each broken line. One line has 50 MB."""
    chosen = random.Random(0)
    where: dict[tuple[str, int], tuple[int, str]] = {}
    bad_left = num_bad
    for file in range(num_files):
        name, offset = f"{file:02d}.jsonl", 0
        with (folder / name).open("wb") as out:
            goods = range(file * num_good // num_files, (file + 1) * num_good // num_files)
            share = bad_left // (num_files - file)
            bad_left -= share
            marks = set(chosen.sample(range(len(goods) + share), share))
            numbers = iter(goods)
            for line in range(1, len(goods) + share + 1):
                if line - 1 in marks:
                    raw = broken(chosen, chosen.randrange(num_good))
                    if file == 0 and len(where) == 0:
                        raw = b'{"text": "' + b"x" * BIG_LINE + b'"}'
                    where[name, line] = (offset, hashlib.sha256(raw).hexdigest())
                else:
                    raw = json.dumps(good(next(numbers)), ensure_ascii=line % 2 == 0).encode()
                out.write(raw + b"\n")
                offset += len(raw) + 1
    return where


def quarantined(store: Store, dataset_id: str) -> Iterator[dict[str, Any]]:
    for path in store.list(f"datasets/{dataset_id}/quarantine"):
        yield from pq.read_table(store.path(path), filesystem=store.filesystem).to_pylist()


def check(store: Store, folder: Path, num_good: int, where: dict[tuple[str, int], tuple[int, str]]) -> None:
    with Catalog.open(store) as catalog:
        base = catalog.model("tiny")
    values = {"sources": [{"path": f"{folder}/*.jsonl"}], "sequence_length": 256, "max_invalid_fraction": 0.2}
    config = DataConfig.model_validate(values)
    manifest = build("fuzz", config, base, store, index_sources(config))
    assert sum(stats.num_records for stats in manifest.splits.values()) == num_good
    assert manifest.num_duplicates == 0
    quarantine = {
        (Path(row["file"]).name, row["line"]): (row["offset"], row["raw_sha256"]) for row in quarantined(store, manifest.id)
    }
    assert quarantine == where
    assert sum(manifest.rejects.values()) == len(where)
    for number in range(0, num_good, num_good // 50):
        assert dataset.find_record(store, manifest, parse_record(good(number)).id)["content"] == good(number)


def test_every_valid_row_is_kept_and_every_broken_line_is_quarantined(
    store: Store, tmp_path: Path, ray_cluster: None
) -> None:
    where = write_rows(tmp_path, 6000, 600, 3)
    check(store, tmp_path, 6000, where)


@pytest.mark.large
@pytest.mark.timeout(3600)
def test_a_million_rows_with_a_hundred_thousand_broken_lines(store: Store, tmp_path: Path) -> None:
    """In a process tree of its own, whose memory is watched."""
    import psutil

    rows = tmp_path / "rows"
    rows.mkdir()
    where = write_rows(rows, 1_000_000, 100_000, 8)
    (tmp_path / "where.json").write_text(json.dumps([[*key, *value] for key, value in where.items()]))
    code = (
        "import json,sys; from pathlib import Path; sys.path.insert(0, sys.argv[1]); import test_fuzz as t;"
        "from forge_ray.machine.cluster import connect; from forge_ray.store.files import Store; connect();"
        "where={(a,b):(c,d) for a,b,c,d in json.loads(Path(sys.argv[3],'where.json').read_text())};"
        "t.check(Store(sys.argv[2]), Path(sys.argv[3])/'rows', 1_000_000, where)"
    )
    command = [sys.executable, "-c", code, str(Path(__file__).parent), store.root, str(tmp_path)]
    process = subprocess.Popen(command, env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])})
    peak = 0
    while True:
        try:
            process.wait(1)
            break
        except subprocess.TimeoutExpired:
            family = [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]
            total = 0
            for each in family:
                try:
                    total += each.memory_full_info().pss
                except psutil.Error:
                    continue
            peak = max(peak, total)
    print(f"peak memory of the process tree: {peak / 1e6:,.0f} MB")
    assert process.returncode == 0
    assert peak < 4e9
