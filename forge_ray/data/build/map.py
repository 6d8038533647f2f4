"""The map stage: chunks of source files → records, curated and tokenised.

A job takes some chunks, or the records that an earlier segment left, applies per-record rules from top to bottom, and writes
sorted parts: by split, then by the record's shuffle key, so that any later partition of the keys is a run of rows.
Rows that are not used are kept beside them, with the reason. A job's result depends on its input and settings alone.
"""

from __future__ import annotations

import gc
import hashlib
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from forge_ray.config.curate import NearDuplicates
from forge_ray.config.data import DataConfig
from forge_ray.data.build.encoded import JobEncoder, job_encoder
from forge_ray.data.build.parts import MappedRecord, Parts, is_multimodal
from forge_ray.data.build.settings import Segment
from forge_ray.data.build.summaries import MapSummary
from forge_ray.data.build.tombstones import read as read_tombstones
from forge_ray.data.build.work import once, read_array, read_batches
from forge_ray.data.curate.rules import compile_rule, meta_fields
from forge_ray.data.read.readers import Chunk, image_reader, read_raw
from forge_ray.data.record.schema import DataRecord, Reject, parse_line, parse_record
from forge_ray.data.record.subject import subject_of
from forge_ray.data.tokens.template import Encoded
from forge_ray.store.files import Store

BATCH = 512  # records that are tokenised in one call


@dataclass(frozen=True)
class Job:
    """Chunks to read, or (in a later segment) the parts that the same job left in the segment before, less `dropped`."""

    key: str
    chunks: tuple[Chunk, ...]
    parts: tuple[str, ...] = ()
    dropped: str = ""  # a work file of this job's dropped row numbers and reasons


def run_job(job: Job, segment: Segment, config: DataConfig, base: str, store: Store) -> MapSummary:
    """A task of the map stage. Raises `EncodersDiffer` where a fast encoder cannot be used."""
    return once(store, job.key, MapSummary, lambda: _process(job, segment, config, base, store), segment.mark)


def _process(job: Job, segment: Segment, config: DataConfig, base: str, store: Store) -> MapSummary:
    rules = range(max(0, segment.first - 1), segment.last)  # the barrier before is reported with this segment
    out = Parts(job.key, store, [chunk.source for chunk in job.chunks], rules)
    checks = []
    for number in range(segment.first, segment.last):
        index = read_array(store, segment.indexes[number]) if number in segment.indexes else None
        checks.append((number, compile_rule(config.curate[number], index, config.splits)))
    finish = _finish(out, segment, config, base, store)
    tombstones = read_tombstones(store, segment.tombstones)
    batch: list[MappedRecord] = []
    for item in _input(job, segment, config, store, out):
        read = item.record
        if all(out.judge(number, item, check(item.record)) for number, check in checks):
            if item.record is not read and tombstones.holds(item.record, None):
                out.erase(item.chunk, item.line)
                continue
            batch.append(item)
        if len(batch) == BATCH:
            finish(batch)
            batch = []
    finish(batch)
    return out.close()


def _finish(
    out: Parts, segment: Segment, config: DataConfig, base: str, store: Store
) -> Callable[[list[MappedRecord]], None]:
    """What is done with the records that all rules of the segment keep."""
    barrier = None if segment.barrier is None else config.curate[segment.barrier]
    encoder = job_encoder(store, base, config, segment.left) if barrier is None else None
    num_refused = encoder.fast.num_refused if encoder and encoder.fast else 0
    gc.freeze()  # what was imported lives as long as the process: no collection need walk it

    def finish(batch: list[MappedRecord]) -> None:
        out.keep_images(batch)
        documents: list[list[Encoded]] = []
        if encoder is not None:
            batch, documents = _encoded(batch, encoder, config, out)
            out.tally.compared = encoder.num_compared
            out.tally.refused = encoder.fast.num_refused - num_refused if encoder.fast else 0
        if not batch:
            return
        if barrier is None:
            out.add_encoded(batch, documents, config)
        else:
            out.add_curated(batch, barrier if isinstance(barrier, NearDuplicates) else None)

    return finish


def _encoded(
    batch: list[MappedRecord], encoder: JobEncoder, config: DataConfig, out: Parts
) -> tuple[list[MappedRecord], list[list[Encoded]]]:
    """The records that have a place in a dataset, with their documents; the others go to `out`."""
    packable = [item for item in batch if not is_multimodal(item.record)]
    results = encoder.documents(packable, config)
    by_item = {id(item): result for item, result in zip(packable, results, strict=True)}
    kept, documents = [], []
    for item in batch:
        result = by_item.get(id(item), [])
        if isinstance(result, Reject):
            out.reject(item.chunk, item.line, item.offset, item.raw_sha256, str(result))
        else:
            kept.append(item)
            documents.append(result)
    return kept, documents


def _input(job: Job, segment: Segment, config: DataConfig, store: Store, out: Parts) -> Iterator[MappedRecord]:
    return _read(job, segment, config, store, out) if segment.first == 0 else _resumed(job, segment, store, out)


def _read(job: Job, segment: Segment, config: DataConfig, store: Store, out: Parts) -> Iterator[MappedRecord]:
    keep, subject = kept_columns(config), subject_of(config, store)
    tombstones = read_tombstones(store, segment.tombstones)
    for number, chunk in enumerate(job.chunks):
        source = config.sources[chunk.source]
        images = image_reader(chunk)
        for raw in read_raw(chunk, config.max_line_bytes):
            try:
                if raw.reason:
                    raise Reject(raw.reason)
                if raw.raw is not None:
                    record = parse_line(raw.raw, source.shape, source.mapping, keep, images)
                else:
                    record = parse_record(raw.value, source.shape, source.mapping, keep, images)
            except Reject as reason:
                out.reject(number, raw.line, raw.offset, raw.sha256, str(reason))
                continue
            whose = subject(record)
            if tombstones.holds(record, whose):
                out.erase(number, raw.line)
                continue
            if source.licence and "licence" not in record.meta:
                record.meta["licence"] = source.licence
            yield MappedRecord(number, raw.line, raw.offset, raw.sha256, record, subject=whose.digest if whose else None)


def _resumed(job: Job, segment: Segment, store: Store, out: Parts) -> Iterator[MappedRecord]:
    reasons = {}
    if job.dropped:
        reasons = {row["row"]: row["reason"] for batch in read_batches(store, job.dropped) for row in batch.to_pylist()}
    row_number = 0
    for part in job.parts:
        for batch in read_batches(store, part):
            for row in batch.drop_columns(["signature"]).to_pylist():
                record = DataRecord(json.loads(row["content"]), row["kind"], json.loads(row["meta"]))
                item = MappedRecord(
                    row["chunk"], row["line"], row["offset"], row["raw_sha256"], record, row["flags"], row["subject"]
                )
                if row_number in reasons:
                    out.drop(segment.first - 1, item, reasons[row_number])
                else:
                    yield item
                row_number += 1


def kept_columns(config: DataConfig) -> tuple[str, ...]:
    """Columns of a row that are kept beside its record because a setting names them."""
    subject = (config.subject.field,) if config.subject else ()
    return tuple(dict.fromkeys((*meta_fields(config.curate), *subject, "licence")))


def job_key(segment: Segment, settings: str, parts: list[str]) -> str:
    return hashlib.sha256("/".join([settings, str(segment.first), *parts]).encode()).hexdigest()[:32]
