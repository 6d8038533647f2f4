"""Which training records share a run of words with an evaluation set.

After Brown et al. (arXiv:2005.14165, appendix C): a run of 13 words in common is contamination. The index holds hashes of 64
bits for each run of the evaluation sets; a chance hit among 10^9 runs looked up in 10^7 has a probability of 0.0005.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
import numpy.typing as npt

from forge_ray.config.data import DataConfig
from forge_ray.config.measurements import is_dataset_id
from forge_ray.data.curate.words import hashes, mixed, runs, words
from forge_ray.data.dataset.version import SPLITS, records
from forge_ray.data.read.ingest import expand, index_listed
from forge_ray.data.read.readers import read_raw
from forge_ray.data.record.schema import DataRecord, Reject, parse_line, parse_record, texts
from forge_ray.errors import DataError
from forge_ray.records import DatasetManifest
from forge_ray.store import paths
from forge_ray.store.files import Store

MIN_WORDS = 5  # an evaluation text with fewer is too common to be evidence: `yes`, `positive`
_WHOLE = np.uint64(0x5DEECE66D)


def build_index(texts: Iterable[str], ngram: int) -> npt.NDArray[np.uint64]:
    """Sorted hashes of every run of `ngram` words; of a text with fewer, of the text as a whole."""
    hashes_of_texts = [marks(text, ngram) for text in texts]
    return np.unique(np.concatenate(hashes_of_texts)) if hashes_of_texts else np.zeros(0, np.uint64)


def contaminated(text: str, index: npt.NDArray[np.uint64], ngram: int) -> bool:
    own = marks(text, ngram)
    if not len(own) or not len(index):
        return False
    places = np.minimum(np.searchsorted(index, own), len(index) - 1)
    return bool((index[places] == own).any())


def marks(text: str, ngram: int) -> npt.NDArray[np.uint64]:
    """Hashes of every run of `ngram` words of a text; of a shorter one, of the text as a whole; none below `MIN_WORDS`."""
    hashed = hashes(words(text))
    if len(hashed) >= ngram:
        return runs(hashed, ngram)
    if len(hashed) < MIN_WORDS:
        return np.zeros(0, np.uint64)
    return mixed(runs(hashed, len(hashed)) ^ _WHOLE)


def evaluation_texts(against: tuple[str, ...], store: Store) -> Iterator[str]:
    """Every text of the files or dataset versions that a decontamination rule names."""
    for place in against:
        if is_dataset_id(place):
            manifest = DatasetManifest.model_validate(store.read_json(paths.record("datasets", place)))
            for split in SPLITS:
                for table in records(store, manifest, split, ["content", "kind"]):
                    for row in table.to_pylist():
                        yield from texts(DataRecord(json.loads(row["content"]), row["kind"]))
            continue
        config = DataConfig.model_validate({"sources": [{"path": place}]})
        for file in expand(config, any_split=True):
            for chunk in index_listed(file).chunks:
                if chunk.reason:  # nothing of it would be looked for
                    raise DataError(
                        f"data.curate: {file.name!r} of decontaminate cannot be read: {chunk.reason}",
                        hint="convert it to JSONL in UTF-8, and name that",
                    )
                for raw in read_raw(chunk, config.max_line_bytes):
                    try:
                        yield from texts(parse_line(raw.raw) if raw.raw is not None else parse_record(raw.value))
                    except Reject:  # a set of bare questions has no shape of ours: take its strings
                        yield from _strings(raw.raw, raw.value)


def _strings(raw: bytes | None, value: Any) -> Iterator[str]:
    if raw is not None:
        try:
            value = json.loads(raw)
        except ValueError:
            value = raw.decode(errors="replace")
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict | list):
        for item in value.values() if isinstance(value, dict) else value:
            yield from _strings(None, item)
