"""From what the stages counted to the manifest of a dataset version; also what must be refused."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

from forge_ray.config.base import resolved
from forge_ray.config.data import DataConfig
from forge_ray.data.build.map import Job, Segment
from forge_ray.data.build.reduce import source_counts
from forge_ray.data.build.work import Summary
from forge_ray.data.dataset.version import FORMAT, SPLITS, tokenizer_digest
from forge_ray.data.read.ingest import IndexedFile
from forge_ray.errors import DataError, NothingLeft
from forge_ray.records import CurationStep, DatasetManifest, ModelVersion, SourceFile, SourceStats, SplitStats, digest

History = list[list[Summary]]  # of every segment, of every job


def input_digest(config: DataConfig, sources: list[IndexedFile], tokenizer: str, tombstones: str) -> str:
    """What decides a dataset, known before it is built. `tombstones` is their name, "" where there are none."""
    files = sorted((source.source, source.sha256) for source in sources)
    return digest([FORMAT, settings_of(config), files, tokenizer, *filter(None, [tombstones])])


def settings_of(config: DataConfig) -> dict[str, Any]:
    """The settings without places: where a source lies and what it is called change no record."""
    value = resolved(config)
    for source in value["sources"]:
        for key in ("path", "name", "checksums"):
            source.pop(key)
    return value


def segments(config: DataConfig) -> Iterator[Segment]:
    """The rules of the run file, cut behind each rule that looks at all records at once."""
    first = 0
    for number, rule in enumerate(config.curate):
        if rule.rule in ("exact_duplicates", "near_duplicates"):
            yield Segment(first, number, number)
            first = number + 1
    yield Segment(first, len(config.curate), None)


def total_of(history: History, name: str) -> Counter[str]:
    total: Counter[str] = Counter()
    for summaries in history:
        for summary in summaries:
            total.update(summary[name])
    return total


def check_invalid(config: DataConfig, history: History, places: Callable[[], str]) -> None:
    """Raise `DataError` when too many rows cannot be used; `places` names the first of them."""
    reasons = total_of(history, "reasons")
    dropped = sum(total_of(history, "dropped").values())
    kept = sum(part["num_rows"] for summary in history[-1] for part in summary["parts"])
    total = kept + reasons.total() + dropped
    if not kept and any(summary.get("erased") for summaries in history for summary in summaries):
        raise NothingLeft(
            "no row is left: the others are erased, dropped or invalid", hint="add rows, or remove what was made of them"
        )
    table = "; ".join(f"{count} × {reason}" for reason, count in reasons.most_common(8))
    if not kept and not dropped:
        raise DataError(
            f"none of {total} rows can be used: {table} ({places()})", hint="see docs/guides/data.md for the accepted shapes"
        )
    if reasons.total() > config.max_invalid_fraction * total:
        raise DataError(
            f"{reasons.total()} of {total} rows are invalid, more than"
            f" data.max_invalid_fraction={config.max_invalid_fraction}: {table} ({places()})",
            hint="repair the rows, or raise data.max_invalid_fraction if these may be left out",
        )
    if not kept:
        raise DataError(
            f"the rules of data.curate drop all of {dropped} records", hint="remove or loosen the rule that drops most"
        )


def kinds_of(history: History) -> dict[str, int]:
    kinds = dict(sorted(total_of(history[-1:], "kinds").items()))
    others = [kind for kind in kinds if kind not in ("chat", "text")]
    if others and len(kinds) > 1:
        listed = ", ".join(f"{count} {kind}" for kind, count in kinds.items())
        raise DataError(
            f"the sources hold rows of several kinds: {listed}",
            hint="only chat and text go into one dataset; prepare the others with a run file of their own",
        )
    return kinds


def manifest_of(
    name: str,
    config: DataConfig,
    base: ModelVersion,
    sources: list[IndexedFile],
    jobs: list[Job],
    history: History,
    summaries: list[Summary],
    stats: dict[str, SplitStats],
    epochs: list[float],
    kinds: dict[str, int],
    tombstones: str,
) -> DatasetManifest:
    per_file: dict[tuple[int, str], Counter[str]] = {}
    erased: dict[str, list[int]] = {}
    licences: dict[int, Counter[str]] = {}
    for summaries_of_segment in history:
        for job, summary in zip(jobs, summaries_of_segment, strict=True):
            for number, line in summary.get("erased", []):
                erased.setdefault(job.chunks[number].name, []).append(line)
            for what in ("accepted", "rejected", "dropped"):
                for number, count in summary[what].items():
                    chunk = job.chunks[int(number)]
                    per_file.setdefault((chunk.source, chunk.name), Counter())[what] += count
    for summary in history[-1]:
        for tag, count in summary["licences"].items():
            source, _, licence = tag.partition(":")
            licences.setdefault(int(source), Counter())[licence] += count
    packed = source_counts([summary for summary in summaries if summary["split"] == SPLITS.index("train")])
    return DatasetManifest(
        name=name,
        format=FORMAT,
        input_digest=input_digest(config, sources, tokenizer_digest(base), tombstones),
        config=resolved(config),
        tokenizer_digest=tokenizer_digest(base),
        base_model=base.id,
        sources=tuple(
            SourceFile(
                path=file.name,
                sha256=file.sha256,
                size=file.size,
                num_records=per_file.get((file.source, file.name), Counter())["accepted"],
                num_rejected=per_file.get((file.source, file.name), Counter())["rejected"],
                num_dropped=per_file.get((file.source, file.name), Counter())["dropped"],
            )
            for file in sources
        ),
        kinds=kinds,
        mixture=tuple(
            SourceStats(
                name=source.name or source.path,
                num_records=sum(licences.get(number, Counter()).values()),
                num_documents=packed.get(number, Counter())["num_documents"],
                num_tokens=packed.get(number, Counter())["num_tokens"],
                num_trained_tokens=packed.get(number, Counter())["num_trained_tokens"],
                epochs=epochs[number],
                licences=dict(sorted(licences.get(number, Counter()).items())),
            )
            for number, source in enumerate(config.sources)
        ),
        curation=_curation(config, history),
        lengths=dict(sorted(total_of(history[-1:], "lengths").items(), key=lambda item: int(item[0]))),
        num_truncated=sum(summary["truncated"] for summary in history[-1]),
        splits=stats,
        num_duplicates=sum(summary["num_duplicates"] for summary in summaries),
        rejects=dict(sorted(total_of(history, "reasons").items())),
        sequence_length=config.sequence_length,
        erased={name: tuple(sorted(lines)) for name, lines in sorted(erased.items())},
    ).sealed()


def _curation(config: DataConfig, history: History) -> tuple[CurationStep, ...]:
    barriers = {segment.barrier: number for number, segment in enumerate(segments(config)) if segment.barrier is not None}
    steps = []
    for number, rule in enumerate(config.curate):
        before = changed = 0
        if number in barriers:  # it saw all that the segment before it kept
            before = sum(part["num_rows"] for summary in history[barriers[number]] for part in summary["parts"])
        found: Counter[str] = Counter()
        reasons: Counter[str] = Counter()
        for summary in (summary for summaries in history for summary in summaries):
            if step := summary["steps"].get(str(number)):
                before += step["before"]
                changed += step["changed"]
                found.update(step["found"])
                reasons.update(step["reasons"])
        after = before - reasons.total()
        steps.append(
            CurationStep(
                rule=rule.rule,
                before=before,
                after=after,
                changed=changed,
                found=dict(sorted(found.items())),
                reasons=dict(sorted(reasons.items())),
            )
        )
    return tuple(steps)
