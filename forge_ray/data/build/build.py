"""Build a dataset version on Ray Data: index → read, curate and tokenise → (duplicates) → pack → publish.

    files ─index→ chunks ─jobs→ parts ─[a rule over all records → jobs]…→ partitions → shards, records → DatasetManifest

Nothing that decides the result depends on how many tasks run. Every finished piece stays in the work area (`work.py`), so a
build that was killed goes on where it stopped, and one with more files does only what is new.
"""

from __future__ import annotations

import json
import time
import uuid
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

from forge_ray.config.data import DataConfig
from forge_ray.data.build import mixture
from forge_ray.data.build import tombstones as erased
from forge_ray.data.build.barrier import find_duplicates
from forge_ray.data.build.manifest import History, check_invalid, input_digest, kinds_of, manifest_of, segments, settings_of
from forge_ray.data.build.map import Job, Segment, job_key, run_job
from forge_ray.data.build.parts import INVALID
from forge_ray.data.build.reduce import run_partition, run_tail, run_unused
from forge_ray.data.build.work import Summary, read_batches, write_array, write_plan
from forge_ray.data.curate.decontaminate import build_index, evaluation_texts
from forge_ray.data.curate.rules import require_packages
from forge_ray.data.dataset.version import FORMAT, SPLITS, require_tokenizer, tokenizer_digest
from forge_ray.data.read.ingest import IndexedFile, expand, index_file
from forge_ray.data.read.readers import Chunk
from forge_ray.errors import DataError, NothingLeft
from forge_ray.records import DatasetManifest, FileEntry, ModelVersion, SplitStats, canonical_json, digest
from forge_ray.store import paths
from forge_ray.store.files import MANIFEST, Store

__all__ = ["build", "index_sources", "input_digest", "segments"]

JOB_BYTES = 4 << 20  # a few seconds of work, so that a small cluster is busy and a killed build loses little
PARTITION_RECORDS = 1 << 15  # records packed together; fixed, for it decides the rows
PARTITION_TOKENS = 4 << 20
PLACES_SHOWN = 3
UNUSED_JOBS = 64  # map jobs whose unused rows share one file
STALE_S = 24 * 3600

Progress = Callable[[float, float, str], None]


def _silent(done: float, total: float, text: str) -> None:
    """No one watches."""


def _row_settings(config: DataConfig, base: ModelVersion, tombstones: str) -> str:
    """What decides whether and how a row becomes tokens, but for its source's own settings (`_source_settings`)."""
    value = settings_of(config)
    for key in ("sources", "block_rows", "max_invalid_fraction"):
        value.pop(key)
    return digest([FORMAT, value, tokenizer_digest(base), *filter(None, [tombstones])])


def _source_settings(config: DataConfig, number: int) -> dict[str, Any]:
    """What a source adds; how often its records are used is decided after they were read."""
    value: dict[str, Any] = settings_of(config)["sources"][number]
    return {key: item for key, item in value.items() if key not in ("epochs", "weight")}


def index_sources(config: DataConfig, progress: Progress = _silent) -> list[IndexedFile]:
    """Digest and chunk every source file, one task a file; in the order of reading: by source, then by name."""
    require_packages(config.curate)
    import ray.data

    found = expand(config)
    files = [
        {"item": json.dumps([f.path, f.name, f.format, f.source, f.sha256]), "limit": config.max_line_bytes} for f in found
    ]
    blocks = min(len(files), 1024)
    indexed = []
    for row in ray.data.from_items(files, override_num_blocks=blocks).map(_index_row).iter_rows():
        item = json.loads(row["indexed"])
        indexed.append(IndexedFile(**{**item, "chunks": tuple(Chunk(**chunk) for chunk in item["chunks"])}))
        progress(len(indexed), len(files), "files read")
    return sorted(indexed, key=lambda item: (item.source, item.name))


def _index_row(row: dict[str, Any]) -> dict[str, Any]:
    path, name, format, source, expected = json.loads(row["item"])
    return {"indexed": json.dumps(asdict(index_file(path, name, format, source, expected, max_line_bytes=row["limit"])))}


def build(
    name: str,
    config: DataConfig,
    base: ModelVersion,
    store: Store,
    sources: list[IndexedFile],
    progress: Progress = _silent,
) -> DatasetManifest:
    """Encode, pack and write the dataset; needs an initialised Ray. Nothing is visible until it is complete."""
    require_tokenizer(store, base)
    started = time.monotonic()
    jobs = _jobs(config, sources)
    if not jobs:
        raise DataError(f"none of {len(sources)} files has a row", hint="check data.sources")
    tombstones = erased.tombstones(store)
    settings = _row_settings(config, base, tombstones)
    history = []
    for segment in segments(config):
        segment = replace(segment, indexes=_indexes(config, segment, store), tombstones=tombstones)
        jobs = [
            replace(job, key=job_key(segment, settings, [job.key, job.dropped, *segment.indexes.values()])) for job in jobs
        ]
        summaries = _map(jobs, segment, config, base.id, store, progress)
        history.append(summaries)
        check_invalid(config, history, partial(_first_invalid, store, jobs, summaries))
        if segment.barrier is not None:
            key = digest([settings, segment.barrier, [s["key"] for s in summaries]])[len("sha256:") :][:32]
            progress(0, 1, "looking for duplicates")
            dropped = find_duplicates(store, config.curate[segment.barrier], key, summaries)  # type: ignore[arg-type]
            jobs = [
                replace(job, parts=tuple(part["path"] for part in summary["parts"]), dropped=drop)
                for job, summary, drop in zip(jobs, summaries, dropped, strict=True)
            ]
    return _assemble(name, config, base, store, sources, jobs, history, settings, tombstones, started, progress)


def _jobs(config: DataConfig, sources: list[IndexedFile]) -> list[Job]:
    """Chunks in the order of reading, small ones together. Cuts follow the content, so that a new file moves few of them."""
    own = [_source_settings(config, number) for number in range(len(config.sources))]
    jobs: list[Job] = []
    waiting: list[Chunk] = []
    size = 0

    def close() -> None:
        nonlocal size
        if waiting:
            jobs.append(
                Job(digest([[c.key, c.source, own[c.source]] for c in waiting])[len("sha256:") :][:32], tuple(waiting))
            )
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


def _first_invalid(store: Store, jobs: list[Job], summaries: list[Summary]) -> str:
    """Where the first rows stand that never became records: a build that fails publishes no quarantine."""
    places: list[str] = []
    for job, summary in zip(jobs, summaries, strict=True):
        if not summary["reasons"]:
            continue
        for row in (row for batch in read_batches(store, summary["unused"]) for row in batch.to_pylist()):
            if row["rule"] == INVALID:
                places.append(f"{job.chunks[row['chunk']].name} line {row['line']}")
            if len(places) == PLACES_SHOWN:
                return "first: " + ", ".join(places)
    return "first: " + ", ".join(places)


def _indexes(config: DataConfig, segment: Segment, store: Store) -> dict[int, str]:
    """The n-gram index of each decontamination rule of the segment, built here: evaluation sets are small."""
    found = {}
    for number in range(segment.first, segment.last):
        rule = config.curate[number]
        if rule.rule == "decontaminate":
            index = build_index(evaluation_texts(rule.against, store), rule.ngram)
            name = f"index-{digest(index.tobytes().hex())[len('sha256:') :][:32]}.npy"
            write_array(store, name, index)
            found[number] = name
    return found


def _map(
    jobs: list[Job], segment: Segment, config: DataConfig, base: str, store: Store, progress: Progress
) -> list[Summary]:
    import ray.data

    rows = [{"job": json.dumps(asdict(job))} for job in jobs]
    # tasks are cheap, objects in Ray's store are not: a row is a job, and what it makes goes to the work area
    work = ray.data.from_items(rows, override_num_blocks=len(rows)).map(
        partial(run_job, segment=segment, config=config, base=base, store=store)
    )
    found: dict[str, Summary] = {}
    for row in work.iter_rows():
        summary = json.loads(row["summary"])
        found[summary["key"]] = summary
        progress(len(found), len(jobs), "pieces read" if segment.barrier is not None else "pieces tokenised")
    return [found[job.key] for job in jobs]


def _assemble(
    name: str,
    config: DataConfig,
    base: ModelVersion,
    store: Store,
    sources: list[IndexedFile],
    jobs: list[Job],
    history: History,
    settings: str,
    tombstones: str,
    started: float,
    progress: Progress,
) -> DatasetManifest:
    kinds = kinds_of(history)
    train_tokens: Counter[int] = Counter()
    for summary in history[-1]:
        for source, counts in summary["by_source"].items():
            train_tokens[int(source)] += counts["tokens"]
    epochs = mixture.epochs_of(config, [train_tokens[n] for n in range(len(config.sources))])
    if set(kinds) - {"chat", "text"}:
        epochs = [1.0 for _ in epochs]  # nothing is packed, so nothing is repeated

    chunks: list[dict[str, Any]] = []
    parts, unused = [], []
    for number, job in enumerate(jobs):
        ranks = list(range(len(chunks), len(chunks) + len(job.chunks)))
        chunks += [{"name": chunk.name, "source": chunk.source} for chunk in job.chunks]
        parts += [{**part, "chunks": ranks} for part in history[-1][number]["parts"]]
        unused += [{"path": s[number]["unused"], "chunks": ranks} for s in history if s[number]["unused"]]
    shared = {
        "chunks": chunks,
        "parts": parts,
        "unused": unused,
        "epochs": epochs,
        "settings": f"{settings}/{config.block_rows}",
    }
    plan = digest(shared)[len("sha256:") :][:32]
    write_plan(store, plan, shared)

    staging = paths.dataset(f".building-{plan[:12]}-{uuid.uuid4().hex[:8]}")
    try:
        summaries = _reduce(config, base, store, plan, history, progress)
        stats, files = _collect(config, store, staging, summaries)
        files += _write_unused(store, staging, plan, len(unused))
        manifest = manifest_of(name, config, base, sources, jobs, history, summaries, stats, epochs, kinds, tombstones)
        seconds = round(time.monotonic() - started, 3)
        ordered = tuple(sorted(files, key=lambda entry: entry.path))
        manifest = manifest.model_copy(update={"files": ordered, "seconds": seconds})
        store.write(f"{staging}/{MANIFEST}", canonical_json({"files": [entry.model_dump() for entry in ordered]}))
        store.move_dir(staging, paths.dataset(manifest.id))
        return manifest
    finally:
        store.delete_dir(staging)
        remove_stale(store)


def _reduce(
    config: DataConfig, base: ModelVersion, store: Store, plan: str, history: History, progress: Progress
) -> list[Summary]:
    import ray.data

    totals: dict[int, Counter[str]] = {}
    for summary in history[-1]:
        for split, counts in summary["by_split"].items():
            totals.setdefault(int(split), Counter()).update(counts)
    tasks = []
    for split, counts in sorted(totals.items()):
        wanted = max(counts["records"] / PARTITION_RECORDS, (counts["tokens"] + counts["bytes"] / 4) / PARTITION_TOKENS)
        num_partitions = 1 << max(0, int(wanted).bit_length())  # doubles, so that growth seldom moves a record
        if wanted <= 1:
            num_partitions = 1
        tasks += [
            {"plan": plan, "split": split, "partition": number, "num_partitions": num_partitions}
            for number in range(num_partitions)
        ]
    if not any(task["split"] == SPLITS.index("train") for task in tasks):
        used = sum(counts["records"] for counts in totals.values())
        kind = NothingLeft if any(summary.get("erased") for summary in history[0]) else DataError
        raise kind(f"no row of {used} falls into the train split", hint="add rows, or lower data.splits")
    work = ray.data.from_items(tasks, override_num_blocks=len(tasks)).map(
        partial(run_partition, config=config, base=base.id, store=store)
    )
    found = []
    for row in work.iter_rows():
        found.append(json.loads(row["summary"]))
        progress(len(found), len(tasks), "partitions packed")
    return sorted(found, key=lambda summary: (summary["split"], summary["partition"]))


def _collect(
    config: DataConfig, store: Store, staging: str, summaries: list[Summary]
) -> tuple[dict[str, SplitStats], list[FileEntry]]:
    """Give the pieces their names in the dataset; returns the stats per split and the files."""
    import ray.data

    files: list[FileEntry] = []
    stats: dict[str, SplitStats] = {}
    tails, shards = [], {}
    for number, split in enumerate(SPLITS):
        mine = [summary for summary in summaries if summary["split"] == number]
        for summary in mine:
            if "records" in summary["files"]:
                files.append(_link(store, staging, summary["files"]["records"], _records_name(split, summary["partition"])))
        whole = [summary for summary in mine if summary["num_rows"]]
        for shard, summary in enumerate(whole):
            files.append(_link(store, staging, summary["files"]["packed"], _shard_name(split, shard)))
        shards[split] = [(summary["num_rows"], summary["digest"]) for summary in whole]
        if left := [summary["tail"] for summary in mine if summary["tail"]]:
            name = _shard_name(split, len(whole))
            tails.append({"split": split, "tails": json.dumps(left), "to": staging, "name": name})
    if tails:
        written = ray.data.from_items(tails, override_num_blocks=len(tails)).map(
            partial(run_tail, config=config, store=store)
        )
        for row in written.take_all():
            shards[row["split"]].append((row["rows"], row["digest"]))
            files.append(FileEntry.model_validate_json(row["entry"]))
    for number, split in enumerate(SPLITS):
        mine = [summary for summary in summaries if summary["split"] == number]
        stats[split] = SplitStats(
            num_records=sum(s["num_records"] for s in mine),
            num_rows=sum(rows for rows, _ in shards[split]),
            num_tokens=sum(s["num_tokens"] for s in mine),
            num_trained_tokens=sum(s["num_trained_tokens"] for s in mine),
            rows_digest=digest([each for _, each in shards[split]]),
            block_rows=config.block_rows,
            shard_rows=tuple(rows for rows, _ in shards[split]),
        )
    return stats, files


def _records_name(split: str, partition: int) -> str:
    return f"records/{split}/part-{partition:05d}.parquet"


def _shard_name(split: str, shard: int) -> str:
    return f"packed/{split}/shard-{shard:05d}.parquet"


def _link(store: Store, staging: str, file: dict[str, Any], name: str) -> FileEntry:
    store.link(file["work"], f"{staging}/{name}")
    return FileEntry(path=name, size=file["size"], sha256=file["sha256"])


def _write_unused(store: Store, staging: str, plan: str, count: int) -> list[FileEntry]:
    import ray.data

    if not count:
        return []
    tasks = [
        {"plan": plan, "jobs": json.dumps(list(range(low, min(low + UNUSED_JOBS, count)))), "part": part, "to": staging}
        for part, low in enumerate(range(0, count, UNUSED_JOBS))
    ]
    written = ray.data.from_items(tasks, override_num_blocks=len(tasks)).map(partial(run_unused, store=store))
    return [FileEntry.model_validate(entry) for row in written.take_all() for entry in json.loads(row["entries"])]


def remove_stale(store: Store) -> None:
    """Staging folders that a killed build left behind a day ago; a younger one may belong to a build that runs now."""
    if not store.is_local:
        return
    for folder in Path(store.path(paths.dataset())).glob(".building-*"):
        if time.time() - folder.stat().st_mtime > STALE_S:
            store.delete_dir(paths.dataset(folder.name))
