"""Build a dataset version in tasks of Ray: index → read, curate and tokenise → (duplicates) → pack → publish.

    files ─index→ chunks ─jobs→ parts ─[a rule over all records → jobs]…→ partitions → shards, records → DatasetManifest

Nothing that decides the result depends on how many tasks run. Every finished piece stays in the work area (`work.py`), so a
build that was killed goes on where it stopped, and one with more files does only what is new.
"""

from __future__ import annotations

import sys
import time
import uuid
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path

from forge_ray.config.data import DataConfig, Splits
from forge_ray.data.build import mixture
from forge_ray.data.build.barrier import find_duplicates
from forge_ray.data.build.encoded import proof_for
from forge_ray.data.build.manifest import check_invalid, kinds_of, manifest_of, no_rows
from forge_ray.data.build.map import Job, job_key, run_job
from forge_ray.data.build.parts import INVALID
from forge_ray.data.build.plan import PartitionTask, PlannedPart, ReducePlan, SourceChunk, TailTask, UnusedRows, UnusedTask
from forge_ray.data.build.reduce import Shard, run_partition, run_tail, run_unused
from forge_ray.data.build.settings import BuildSpec, Progress, Segment, segments, silent, source_settings
from forge_ray.data.build.summaries import History, MapSummary, Partition, SplitCounts, WorkFile
from forge_ray.data.build.tombstones import tombstones
from forge_ray.data.build.work import read_batches, require, write_array, write_plan
from forge_ray.data.curate.decontaminate import build_index, evaluation_texts
from forge_ray.data.curate.heldout import index_of
from forge_ray.data.curate.rules import require_packages
from forge_ray.data.dataset.encoders import keep_proof, key_of
from forge_ray.data.dataset.version import SPLITS, require_tokenizer
from forge_ray.data.read.ingest import IndexedFile, index_listed
from forge_ray.data.read.readers import Chunk
from forge_ray.data.read.sources import ListedFile, expand
from forge_ray.data.tokens.equality import Proof
from forge_ray.data.tokens.fast import REFERENCE
from forge_ray.errors import DataError, EncodersDiffer, NothingLeft
from forge_ray.machine.tasks import in_tasks
from forge_ray.progress import visible
from forge_ray.records import DatasetManifest, FileEntry, ModelVersion, SplitStats, canonical_json, digest, hex_of
from forge_ray.store import paths
from forge_ray.store.files import MANIFEST, Store
from forge_ray.store.owner import is_alive, owner_mark

JOB_BYTES = 4 << 20  # a few seconds of work, so that a small cluster is busy and a killed build loses little
PARTITION_RECORDS = 1 << 15  # records packed together; fixed, for it decides the rows
PARTITION_TOKENS = 4 << 20
PLACES_SHOWN = 3
UNUSED_JOBS = 64  # map jobs whose unused rows share one file
INDEX_TASKS = 1024  # at most, so that a hundred thousand small files are not as many tasks
STALE_S = 24 * 3600


def index_sources(config: DataConfig, progress: Progress = silent) -> list[IndexedFile]:
    """Digest and chunk every source file, in tasks; in the order of reading: by source, then by name."""
    require_packages(config.curate)
    files = expand(config)
    indexed: list[IndexedFile] = []

    def keep(some: list[IndexedFile]) -> None:
        indexed.extend(some)
        progress(len(indexed), len(files), "files read")

    if len(files) == 1 and "://" not in files[0].path:  # another process would take two seconds to begin
        keep(_indexed(files, config.max_line_bytes))
    else:
        size = -(-len(files) // INDEX_TASKS) or 1
        groups = [files[low : low + size] for low in range(0, len(files), size)]
        in_tasks(partial(_indexed, max_line_bytes=config.max_line_bytes), groups, keep)
    indexed.sort(key=lambda file: (file.source, file.name))
    for line in noted(indexed):
        print(f"  {line}", file=sys.stderr)
    return indexed


def _indexed(files: list[ListedFile], max_line_bytes: int) -> list[IndexedFile]:
    return [index_listed(file, max_line_bytes) for file in files]


def noted(files: Iterable[IndexedFile]) -> Iterator[str]:
    """What is to be said about source files, a line each: those without rows, and columns that lose nulls."""
    return (f"{visible(file.name)}: {visible(note)}" for file in files for note in file.notes)


def build(
    name: str,
    config: DataConfig,
    base: ModelVersion,
    store: Store,
    sources: list[IndexedFile],
    progress: Progress = silent,
    mark: str = "",
) -> DatasetManifest:
    """Encode, pack and write the dataset; needs an initialised Ray. Nothing is visible until it is complete. Where the
    work area's `mark` is gone, it ends with a `StoreError`."""
    require_tokenizer(store, base)
    started = time.monotonic()
    jobs = _jobs(config, sources)
    if not jobs:
        raise no_rows(len(sources))
    spec = BuildSpec(name, config, base, store, sources, tombstones(store), progress, mark)
    spec = replace(spec, proof=proof_for(spec))
    try:
        return _build(spec, jobs, started)
    except EncodersDiffer as error:
        print(f"error: {error.message}; the whole build is encoded again, by {REFERENCE} alone", file=sys.stderr)
        refused = keep_proof(store, key_of(base), replace(spec.proof or Proof(0), difference=error.message))
    return _build(replace(spec, proof=refused), jobs, started)


def _build(spec: BuildSpec, jobs: list[Job], started: float) -> DatasetManifest:
    config, store, sources = spec.config, spec.store, spec.sources
    history: History = []
    for segment in segments(config):
        is_last = segment.barrier is None
        indexes, left = _indexes(config, segment, store), spec.left if is_last else None
        segment = replace(segment, indexes=indexes, tombstones=spec.tombstones, mark=spec.mark, left=left)
        settings, inputs = spec.token_settings if is_last else spec.row_settings, indexes.values()
        jobs = [replace(job, key=job_key(segment, settings, [job.key, job.dropped, *inputs])) for job in jobs]
        summaries = _map(spec, jobs, segment)
        history.append(summaries)
        check_invalid(config, history, len(sources), partial(_first_invalid, store, jobs, summaries))
        if segment.barrier is not None:
            jobs = _without_duplicates(spec, jobs, segment.barrier, summaries)
    return _assemble(spec, jobs, history, started)


def _jobs(config: DataConfig, sources: list[IndexedFile]) -> list[Job]:
    """Chunks in the order of reading, small ones together. Cuts follow the content, so that a new file moves few of them."""
    own = [source_settings(config, number) for number in range(len(config.sources))]
    jobs: list[Job] = []
    waiting: list[Chunk] = []
    size = 0

    def close() -> None:
        nonlocal size
        if waiting:
            jobs.append(Job(hex_of(digest([[c.key, c.source, own[c.source]] for c in waiting]))[:32], tuple(waiting)))
        waiting.clear()
        size = 0

    for file in sources:
        share = file.text_bytes // max(1, len(file.chunks))
        for chunk in file.chunks:
            if waiting and size + share > JOB_BYTES:
                close()
            waiting.append(chunk)
            size += share
            if share > JOB_BYTES // 8 or int(chunk.key[:8], 16) % 64 == 0:
                close()
    close()
    return jobs


def _without_duplicates(spec: BuildSpec, jobs: list[Job], barrier: int, summaries: list[MapSummary]) -> list[Job]:
    """The jobs of the next segment: over the parts that these left, less what the rule `barrier` drops."""
    key = hex_of(digest([spec.row_settings, barrier, [summary.key for summary in summaries]]))[:32]
    spec.progress(0, 1, "looking for duplicates")
    dropped = find_duplicates(spec.store, spec.config.curate[barrier], key, summaries)  # type: ignore[arg-type]
    return [
        replace(job, parts=tuple(part.path for part in summary.parts), dropped=drop)
        for job, summary, drop in zip(jobs, summaries, dropped, strict=True)
    ]


def _first_invalid(store: Store, jobs: list[Job], summaries: list[MapSummary]) -> str:
    """Where the first rows stand that never became records: a build that fails publishes no quarantine."""
    places: list[str] = []
    for job, summary in zip(jobs, summaries, strict=True):
        if not summary.tally.reasons:
            continue
        for row in (row for batch in read_batches(store, summary.unused) for row in batch.to_pylist()):
            if row["rule"] == INVALID:
                places.append(f"{job.chunks[row['chunk']].name} line {row['line']}")
            if len(places) == PLACES_SHOWN:
                return "first: " + ", ".join(places)
    return "first: " + ", ".join(places)


def _indexes(config: DataConfig, segment: Segment, store: Store) -> dict[int, str]:
    """What each decontamination rule of the segment looks up, built here: evaluation sets are small."""
    names = {}
    for number in range(segment.first, segment.last):
        rule = config.curate[number]
        if rule.rule in ("decontaminate", "held_out"):
            if rule.rule == "decontaminate":
                index = build_index(evaluation_texts(rule.against, store), rule.ngram)
            else:
                index = index_of(rule, store)
            name = f"index-{hex_of(digest(index.tobytes().hex()))[:32]}.npy"
            write_array(store, name, index)
            names[number] = name
    return names


def _map(spec: BuildSpec, jobs: list[Job], segment: Segment) -> list[MapSummary]:
    summaries: dict[str, MapSummary] = {}

    def keep(summary: MapSummary) -> None:
        summaries[summary.key] = summary
        require(spec.store, spec.mark)
        spec.progress(len(summaries), len(jobs), "pieces read" if segment.barrier is not None else "pieces tokenised")

    work = partial(run_job, segment=segment, config=spec.config, base=spec.base.id, store=spec.store)
    in_tasks(work, jobs, keep)
    return [summaries[job.key] for job in jobs]


def _assemble(spec: BuildSpec, jobs: list[Job], history: History, started: float) -> DatasetManifest:
    store, plan = spec.store, _plan(spec, jobs, history)
    value = plan.to_json()
    name = hex_of(digest(value))[:32]
    write_plan(store, name, value)

    staging = paths.dataset(f".building-{name[:12]}-{owner_mark()}-{uuid.uuid4().hex[:8]}")
    try:
        partitions = _reduce(spec, name, history)
        stats, files = _collect(spec, staging, partitions)
        files += _write_unused(store, staging, name, len(plan.unused))
        require(store, spec.mark)
        manifest = manifest_of(spec, jobs, history, partitions, stats, plan.epochs)
        seconds = round(time.monotonic() - started, 3)
        ordered = tuple(sorted(files, key=lambda entry: entry.path))
        manifest = manifest.model_copy(update={"files": ordered, "seconds": seconds})
        store.write(f"{staging}/{MANIFEST}", canonical_json({"files": [entry.model_dump() for entry in ordered]}))
        store.move_dir(staging, paths.dataset(manifest.id))
        return manifest
    finally:
        store.delete_dir(staging)
        remove_stale(store)


def _plan(spec: BuildSpec, jobs: list[Job], history: History) -> ReducePlan:
    epochs = _epochs(spec.config, history)
    chunks: list[SourceChunk] = []
    parts, unused = [], []
    for number, job in enumerate(jobs):
        ranks = tuple(range(len(chunks), len(chunks) + len(job.chunks)))
        chunks += [SourceChunk(chunk.name, chunk.source) for chunk in job.chunks]
        parts += [PlannedPart(part, ranks) for part in history[-1][number].parts]
        unused += [UnusedRows(summaries[number].unused, ranks) for summaries in history if summaries[number].unused]
    settings = f"{spec.token_settings}/{spec.config.block_rows}"
    return ReducePlan(tuple(chunks), tuple(parts), tuple(unused), epochs, settings)


def _epochs(config: DataConfig, history: History) -> tuple[float, ...]:
    """Times that each source's training records are used."""
    if set(kinds_of(history)) - {"chat", "text"}:
        return tuple(1.0 for _ in config.sources)  # nothing is packed, so nothing is repeated
    tokens: Counter[int] = Counter()
    for summary in history[-1]:
        for source, counts in summary.tally.by_source.items():
            tokens[source] += counts.tokens
    return tuple(mixture.epochs_of(config, [tokens[source] for source in range(len(config.sources))]))


def _reduce(spec: BuildSpec, plan: str, history: History) -> list[Partition]:
    tasks = _partition_tasks(plan, history, is_only_evaluated(spec.config.splits))
    partitions: list[Partition] = []

    def keep(partition: Partition) -> None:
        partitions.append(partition)
        spec.progress(len(partitions), len(tasks), "partitions packed")

    in_tasks(partial(run_partition, config=spec.config, base=spec.base.id, store=spec.store, mark=spec.mark), tasks, keep)
    return sorted(partitions, key=lambda partition: (partition.split, partition.number))


def is_only_evaluated(splits: Splits) -> bool:
    """Whether the splits leave nothing to train on, as whoever set them wants it."""
    return splits.validation + splits.test == 1


def _partition_tasks(plan: str, history: History, may_lack_train: bool) -> list[PartitionTask]:
    """The partitions of every split that has records; `DataError` where none falls into the train split, unless it may."""
    totals: dict[int, SplitCounts] = {}
    for summary in history[-1]:
        for split, counts in summary.tally.by_split.items():
            totals.setdefault(split, SplitCounts()).add(counts)
    if not totals or (SPLITS.index("train") not in totals and not may_lack_train):
        used = sum(counts.records for counts in totals.values())
        kind = NothingLeft if any(summary.erased for summary in history[0]) else DataError
        raise kind(f"no row of {used} falls into the train split", hint="add rows, or lower data.splits")
    tasks = []
    for split, counts in sorted(totals.items()):
        fill = max(counts.records / PARTITION_RECORDS, (counts.tokens + counts.bytes / 4) / PARTITION_TOKENS)
        num_partitions = 1 << max(0, int(fill).bit_length())  # doubles, so that growth seldom moves a record
        if fill <= 1:
            num_partitions = 1
        tasks += [PartitionTask(plan, split, number, num_partitions) for number in range(num_partitions)]
    return tasks


def _collect(spec: BuildSpec, staging: str, partitions: list[Partition]) -> tuple[dict[str, SplitStats], list[FileEntry]]:
    """Give the pieces their names in the dataset; returns the stats per split and the files."""
    store, config = spec.store, spec.config
    by_split = {
        split: [partition for partition in partitions if partition.split == number] for number, split in enumerate(SPLITS)
    }
    files: list[FileEntry] = []
    tails: list[TailTask] = []
    shards: dict[str, list[tuple[int, str]]] = {}
    for split, in_split in by_split.items():
        for partition in in_split:
            if partition.summary.records:
                files.append(_link(store, staging, partition.summary.records, _records_name(split, partition.number)))
        shards[split] = []
        for partition in in_split:
            if partition.summary.packed:
                files.append(_link(store, staging, partition.summary.packed, _shard_name(split, len(shards[split]))))
                shards[split].append((partition.summary.num_rows, partition.summary.digest))
        if left := tuple(partition.summary.tail for partition in in_split if partition.summary.tail):
            tails.append(TailTask(split, left, staging, _shard_name(split, len(shards[split]))))

    def keep(shard: Shard) -> None:
        shards[shard.split].append((shard.num_rows, shard.digest))
        files.append(shard.file)

    in_tasks(partial(run_tail, config=config, store=store), tails, keep)
    stats = {split: _split_stats(in_split, shards[split], config.block_rows) for split, in_split in by_split.items()}
    return stats, files


def _split_stats(partitions: list[Partition], shards: list[tuple[int, str]], block_rows: int) -> SplitStats:
    """`shards` are (rows, digest of the rows), in their order."""
    return SplitStats(
        num_records=sum(partition.summary.num_records for partition in partitions),
        num_rows=sum(num_rows for num_rows, _ in shards),
        num_tokens=sum(partition.summary.num_tokens for partition in partitions),
        num_trained_tokens=sum(partition.summary.num_trained_tokens for partition in partitions),
        rows_digest=digest([rows_digest for _, rows_digest in shards]),
        block_rows=block_rows,
        shard_rows=tuple(num_rows for num_rows, _ in shards),
    )


def _records_name(split: str, partition: int) -> str:
    return f"records/{split}/part-{partition:05d}.parquet"


def _shard_name(split: str, shard: int) -> str:
    return f"packed/{split}/shard-{shard:05d}.parquet"


def _link(store: Store, staging: str, file: WorkFile, name: str) -> FileEntry:
    store.link(file.path, f"{staging}/{name}")
    return FileEntry(path=name, size=file.size, sha256=file.sha256)


def _write_unused(store: Store, staging: str, plan: str, count: int) -> list[FileEntry]:
    starts = range(0, count, UNUSED_JOBS)
    tasks = [UnusedTask(plan, range(low, min(low + UNUSED_JOBS, count)), part, staging) for part, low in enumerate(starts)]
    files: list[FileEntry] = []
    in_tasks(partial(run_unused, store=store), tasks, files.extend)
    return files


def remove_stale(store: Store) -> None:
    """Staging folders that killed builds left behind; one of another machine may be in use until it is a day old."""
    if not store.is_local:
        return
    for folder in Path(store.path(paths.dataset())).glob(".building-*"):
        alive = is_alive(folder.name)
        if alive is False or (alive is None and time.time() - folder.stat().st_mtime > STALE_S):
            store.delete_dir(paths.dataset(folder.name))
