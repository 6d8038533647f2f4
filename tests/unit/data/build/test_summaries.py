"""The JSON of stage summaries: finished pieces in a work area stay readable."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from forge_ray.data.build import work
from forge_ray.data.build.plan import PlannedPart, ReducePlan, SourceChunk, UnusedRows
from forge_ray.data.build.summaries import (
    MapSummary,
    PartFile,
    Partition,
    PartitionSummary,
    RuleCounts,
    SourceCounts,
    SplitCounts,
    Tally,
    TrainTokens,
    WorkFile,
    source_counts,
)
from forge_ray.machine.cluster import open_store
from forge_ray.records import canonical_json

pytestmark = pytest.mark.unit

MAPPED = MapSummary(
    key="ab12",
    parts=(PartFile("ab12-0.arrow", 2, ((0, 5, 9), (1, 3, 3))), PartFile("ab12-1.arrow", 1)),
    unused="ab12-unused.arrow",
    steps={10: RuleCounts(4, 1, Counter(email=2), Counter({"too short": 1})), 2: RuleCounts()},
    erased=((0, 7),),
    tally=Tally(
        accepted=Counter({0: 2, 10: 1}),
        rejected=Counter({2: 1}),
        dropped=Counter({10: 1}),
        reasons=Counter({"not JSON": 1}),
        kinds=Counter(chat=3),
        lengths=Counter({8: 2, 16: 1}),
        licences=Counter({(0, ""): 2, (1, "a:b"): 1}),
        by_source={0: TrainTokens(20, 9)},
        by_split={0: SplitCounts(2, 20, 9, 100), 1: SplitCounts(1, 8, 4, 30)},
        truncated=1,
    ),
)
MAPPED_JSON: dict[str, Any] = {
    "key": "ab12",
    "parts": [
        {"path": "ab12-0.arrow", "num_rows": 2, "batches": [[0, 5, 9], [1, 3, 3]]},
        {"path": "ab12-1.arrow", "num_rows": 1},
    ],
    "unused": "ab12-unused.arrow",
    "steps": {
        "10": {"before": 4, "changed": 1, "found": {"email": 2}, "reasons": {"too short": 1}},
        "2": {"before": 0, "changed": 0, "found": {}, "reasons": {}},
    },
    "erased": [[0, 7]],
    "accepted": {"0": 2, "10": 1},
    "rejected": {"2": 1},
    "dropped": {"10": 1},
    "reasons": {"not JSON": 1},
    "kinds": {"chat": 3},
    "lengths": {"8": 2, "16": 1},
    "licences": {"0:": 2, "1:a:b": 1},
    "by_source": {"0": {"tokens": 20, "trained": 9}},
    "by_split": {
        "0": {"records": 2, "tokens": 20, "trained": 9, "bytes": 100},
        "1": {"records": 1, "tokens": 8, "trained": 4, "bytes": 30},
    },
    "truncated": 1,
}
PACKED = PartitionSummary(
    num_records=3,
    num_rows=4,
    tail_rows=1,
    num_tokens=40,
    num_trained_tokens=20,
    packed=WorkFile("work/data/p-packed.parquet", 99, "0f"),
    digest="sha256:1",
    tail="work/data/p-tail.parquet",
    sources={1: SourceCounts(5, 40, 20)},
)
PACKED_JSON: dict[str, Any] = {
    "num_records": 3,
    "num_rows": 4,
    "tail_rows": 1,
    "num_tokens": 40,
    "num_trained_tokens": 20,
    "files": {"packed": {"work": "work/data/p-packed.parquet", "size": 99, "sha256": "0f"}},
    "digest": "sha256:1",
    "tail": "work/data/p-tail.parquet",
    "sources": {"1": {"num_documents": 5, "num_tokens": 40, "num_trained_tokens": 20}},
}
PLAN = ReducePlan(
    chunks=(SourceChunk("a.jsonl", 0),),
    parts=(PlannedPart(MAPPED.parts[0], (0,)),),
    unused=(UnusedRows("ab12-unused.arrow", (0,)),),
    epochs=(1.0, 0.5),
    settings="sha256:s/4",
)
PLAN_JSON: dict[str, Any] = {
    "chunks": [{"name": "a.jsonl", "source": 0}],
    "parts": [MAPPED_JSON["parts"][0] | {"chunks": [0]}],
    "unused": [{"path": "ab12-unused.arrow", "chunks": [0]}],
    "epochs": [1.0, 0.5],
    "settings": "sha256:s/4",
}


@pytest.mark.parametrize(("value", "expected"), [(MAPPED, MAPPED_JSON), (PACKED, PACKED_JSON), (PLAN, PLAN_JSON)])
def test_json_is_pinned(value: MapSummary | PartitionSummary | ReducePlan, expected: dict[str, Any]) -> None:
    assert canonical_json(value.to_json()) == canonical_json(expected)
    assert type(value).from_json(json.loads(json.dumps(expected))) == value


def test_pieces_from_before_erasures_are_readable() -> None:
    assert MapSummary.from_json({key: value for key, value in MAPPED_JSON.items() if key != "erased"}).erased == ()


def test_an_empty_partition_has_no_files() -> None:
    empty = PartitionSummary()
    assert empty.to_json()["files"] == {}
    assert PartitionSummary.from_json(empty.to_json()) == empty


def test_partitions_are_summed_by_source() -> None:
    partitions = [Partition(0, number, 1, PACKED) for number in range(2)]
    assert source_counts(partitions) == {1: SourceCounts(10, 80, 40)}


def test_a_finished_piece_is_not_done_again(tmp_path: Path) -> None:
    store = open_store(str(tmp_path))
    assert work.once(store, "p", PartitionSummary, lambda: PACKED) == PACKED
    assert work.once(store, "p", PartitionSummary, PartitionSummary) == PACKED
    assert work.finished(store, "q", PartitionSummary) is None


def test_a_dataset_is_noted_by_its_inputs(tmp_path: Path) -> None:
    store = open_store(str(tmp_path))
    inputs = "sha256:" + "0" * 64
    assert work.noted_dataset(store, inputs) is None
    work.note_dataset(store, inputs, "ds_1")
    assert work.noted_dataset(store, inputs) == "ds_1"
    assert json.loads(store.read(f"{work.WORK}/inputs-{'0' * 32}.json")) == {"dataset": "ds_1"}
