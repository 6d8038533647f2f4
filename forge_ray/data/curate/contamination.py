"""How much of an evaluation set occurs in the training rows, word for word.

The other side of `decontaminate`, after training: the index is of the evaluated rows, so memory grows with these alone, and
the training rows stream by.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow.parquet as pq

from forge_ray.config.measurements import Contamination
from forge_ray.data.curate.decontaminate import marks
from forge_ray.data.dataset.version import listed
from forge_ray.data.record.schema import DataRecord, texts
from forge_ray.records import DatasetManifest
from forge_ray.store.files import Store

BATCH_ROWS = 512
MIN_TEMPLATE_ROWS = 3  # what fewer rows share is never taken for the wording of the task


def stream_records(store: Store, manifest: DatasetManifest, split: str) -> Iterator[dict[str, Any]]:
    """`record`, `kind`, `source`, `content` (decoded) of every record of a split; memory holds a batch of them."""
    for path in listed(store, manifest, f"records/{split}"):
        with store.filesystem.open_input_file(store.path(path)) as stream:
            columns = ["record", "kind", "source", "content"]
            for batch in pq.ParquetFile(stream).iter_batches(BATCH_ROWS, columns=columns):
                for row in batch.to_pylist():
                    yield {**row, "content": json.loads(row["content"])}


def contaminated(
    evaluated: Iterable[dict[str, Any]], training: Iterable[dict[str, Any]], config: Contamination
) -> list[dict[str, Any]]:
    """Of the evaluated rows those that share `ngram` words in a row with a training row: `record`, `train_record` (the first
    that was met), `shared` of `runs`. System prompts are left out, and what is the wording of the task."""
    records, marks_of_rows = [], []
    for row in evaluated:
        records.append(row["record"])
        marks_of_rows.append(_marks_of(row, config.ngram))
    if not records:
        return []
    counts = Counter(mark for own in marks_of_rows for mark in own.tolist())
    most = max(MIN_TEMPLATE_ROWS - 1, int(config.template_share * len(records)))
    index = np.array(sorted(mark for mark, count in counts.items() if count <= most), np.uint64)
    met: dict[int, str] = {}  # mark → the first training record that has it
    for row in training if len(index) else ():
        own = _marks_of(row, config.ngram)
        if len(own):
            places = np.minimum(np.searchsorted(index, own), len(index) - 1)
            for mark in own[index[places] == own].tolist():
                met.setdefault(mark, row["record"])
    items = []
    for record, own in zip(records, marks_of_rows, strict=True):
        shared = [mark for mark in own.tolist() if mark in met]
        if shared:
            items.append({"record": record, "train_record": met[shared[0]], "shared": len(shared), "runs": len(own)})
    return items


def _marks_of(row: dict[str, Any], ngram: int) -> npt.NDArray[np.uint64]:
    content = dict(row["content"])
    if "messages" in content:
        content["messages"] = [message for message in content["messages"] if message["role"] != "system"]
    own = [marks(text, ngram) for text in texts(DataRecord(content, row["kind"]))]
    return np.unique(np.concatenate(own)) if own else np.zeros(0, np.uint64)
