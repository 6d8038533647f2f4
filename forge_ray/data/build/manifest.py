"""From what the stages counted to the manifest of a dataset version; also what must be refused."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

from forge_ray.config.base import resolved
from forge_ray.config.data import DataConfig
from forge_ray.data.build.map import Job
from forge_ray.data.build.settings import BuildSpec, segments
from forge_ray.data.build.summaries import History, Partition, SourceCounts, source_counts, total
from forge_ray.data.dataset.version import FORMAT, SPLITS, tokenizer_digest
from forge_ray.data.tokens.equality import Proof
from forge_ray.data.tokens.fast import versions
from forge_ray.data.tokens.lost import remedy
from forge_ray.errors import DataError, NothingLeft
from forge_ray.records import CurationStep, DatasetManifest, SourceFile, SourceStats, SplitStats

REPAIR = "repair the rows, or raise data.max_invalid_fraction if these may be left out"


def no_rows(num_files: int) -> DataError:
    return DataError(
        f"data.sources: none of {num_files} files has a row", hint="name files that hold rows, or write these again"
    )


def check_invalid(config: DataConfig, history: History, num_files: int, places: Callable[[], str]) -> None:
    """Raise `DataError` when too many rows cannot be used; `places` names the first of them."""
    reasons = reject_reasons(history)
    dropped = sum(summary.tally.dropped.total() for summaries in history for summary in summaries)
    kept = sum(summary.num_records for summary in history[-1])
    num_rows = kept + reasons.total() + dropped
    if not kept and any(summary.erased for summaries in history for summary in summaries):
        raise NothingLeft(
            "no row is left: the others are erased, dropped or invalid", hint="add rows, or remove what was made of them"
        )
    if not num_rows:
        raise no_rows(num_files)
    table = "; ".join(f"{count} × {reason}" for reason, count in reasons.most_common(8))
    if not kept and not dropped:
        raise DataError(
            f"none of {num_rows} rows can be used: {table} ({places()})",
            hint=_remedy(config, reasons) or "see docs/guides/data.md for the accepted shapes",
        )
    if reasons.total() > config.max_invalid_fraction * num_rows:
        raise DataError(
            f"{reasons.total()} of {num_rows} rows are invalid, more than"
            f" data.max_invalid_fraction={config.max_invalid_fraction}: {table} ({places()})",
            hint="; ".join(filter(None, [_remedy(config, reasons), REPAIR])),
        )
    if not kept:
        raise DataError(
            f"the rules of data.curate drop all of {dropped} records", hint="remove or loosen the rule that drops most"
        )


def _remedy(config: DataConfig, reasons: Counter[str]) -> str:
    longer = "set a larger data.sequence_length" if any("sequence_length" in reason for reason in reasons) else ""
    if longer and config.overlong == "reject":
        longer += ", or data.overlong: truncate"
    return "; ".join(filter(None, [remedy(reasons), longer]))


def reject_reasons(history: History) -> Counter[str]:
    """How many rows never became records, by reason."""
    return total(summary.tally.reasons for summaries in history for summary in summaries)


def kinds_of(history: History) -> dict[str, int]:
    kinds = dict(sorted(total(summary.tally.kinds for summary in history[-1]).items()))
    others = [kind for kind in kinds if kind not in ("chat", "text")]
    if others and len(kinds) > 1:
        listed = ", ".join(f"{count} {kind}" for kind, count in kinds.items())
        raise DataError(
            f"the sources hold rows of several kinds: {listed}",
            hint="only chat and text go into one dataset; prepare the others with a run file of their own",
        )
    return kinds


def manifest_of(
    spec: BuildSpec,
    jobs: Sequence[Job],
    history: History,
    partitions: Sequence[Partition],
    stats: dict[str, SplitStats],
    epochs: Sequence[float],
) -> DatasetManifest:
    """The manifest without its files; `stats` are by name of the split, `epochs` by number of the source."""
    files = _file_counts(jobs, history)
    licences: dict[int, Counter[str]] = {}
    for (source, licence), count in total(summary.tally.licences for summary in history[-1]).items():
        licences.setdefault(source, Counter())[licence] += count
    packed = source_counts(partition for partition in partitions if partition.split == SPLITS.index("train"))
    return DatasetManifest(
        name=spec.name,
        format=FORMAT,
        input_digest=spec.input_digest,
        config=resolved(spec.config),
        tokenizer_digest=tokenizer_digest(spec.base),
        base_model=spec.base.id,
        sources=tuple(
            SourceFile(
                path=file.name,
                sha256=file.sha256,
                size=file.size,
                num_records=files.get((file.source, file.name), Counter())["accepted"],
                num_rejected=files.get((file.source, file.name), Counter())["rejected"],
                num_dropped=files.get((file.source, file.name), Counter())["dropped"],
                version=file.version,
            )
            for file in spec.sources
        ),
        kinds=kinds_of(history),
        mixture=tuple(
            SourceStats(
                name=source.name or source.path,
                num_records=licences.get(number, Counter()).total(),
                num_documents=packed.get(number, SourceCounts()).num_documents,
                num_tokens=packed.get(number, SourceCounts()).num_tokens,
                num_trained_tokens=packed.get(number, SourceCounts()).num_trained_tokens,
                epochs=epochs[number],
                licences=dict(sorted(licences.get(number, Counter()).items())),
            )
            for number, source in enumerate(spec.config.sources)
        ),
        curation=_curation(spec.config, history),
        lengths={str(bound): n for bound, n in sorted(total(summary.tally.lengths for summary in history[-1]).items())},
        num_truncated=sum(summary.tally.truncated for summary in history[-1]),
        splits=stats,
        num_duplicates=sum(partition.num_duplicates for partition in partitions),
        rejects=dict(sorted(reject_reasons(history).items())),
        sequence_length=spec.config.sequence_length,
        encoder=encoder_of(spec.proof, history),
        erased=_erased_lines(jobs, history),
    ).sealed()


def encoder_of(proof: Proof | None, history: History) -> dict[str, Any]:
    """The fast encoder that made the ids and on what it was proven, or why none did; {} for builds too small for one."""
    if proof is None or proof.difference:
        return {} if proof is None else {"unused": proof.difference, "num_proven": proof.num_texts}
    return {
        **versions(),
        "num_proven": proof.num_texts,
        "left": proof.left,
        "num_compared": sum(summary.tally.compared for summary in history[-1]),
        "num_refused": sum(summary.tally.refused for summary in history[-1]),
    }


def _file_counts(jobs: Sequence[Job], history: History) -> dict[tuple[int, str], Counter[str]]:
    """Accepted, rejected and dropped rows of each file, by number of its source and name."""
    files: dict[tuple[int, str], Counter[str]] = {}
    for summaries in history:
        for job, summary in zip(jobs, summaries, strict=True):
            tally = summary.tally
            outcomes = {"accepted": tally.accepted, "rejected": tally.rejected, "dropped": tally.dropped}
            for outcome, by_chunk in outcomes.items():
                for number, count in by_chunk.items():
                    chunk = job.chunks[number]
                    files.setdefault((chunk.source, chunk.name), Counter())[outcome] += count
    return files


def _erased_lines(jobs: Sequence[Job], history: History) -> dict[str, tuple[int, ...]]:
    lines: dict[str, list[int]] = {}
    for summaries in history:
        for job, summary in zip(jobs, summaries, strict=True):
            for number, line in summary.erased:
                lines.setdefault(job.chunks[number].name, []).append(line)
    return {name: tuple(sorted(numbers)) for name, numbers in sorted(lines.items())}


def _curation(config: DataConfig, history: History) -> tuple[CurationStep, ...]:
    barriers = {segment.barrier: number for number, segment in enumerate(segments(config)) if segment.barrier is not None}
    steps = []
    for number, rule in enumerate(config.curate):
        before = changed = 0
        if number in barriers:  # it saw all that the segment before it kept
            before = sum(summary.num_records for summary in history[barriers[number]])
        detections: Counter[str] = Counter()
        reasons: Counter[str] = Counter()
        for summary in (summary for summaries in history for summary in summaries):
            if step := summary.steps.get(number):
                before += step.before
                changed += step.changed
                detections.update(step.detections)
                reasons.update(step.reasons)
        after = before - reasons.total()
        steps.append(
            CurationStep(
                rule=rule.rule,
                before=before,
                after=after,
                changed=changed,
                found=dict(sorted(detections.items())),
                reasons=dict(sorted(reasons.items())),
            )
        )
    return tuple(steps)
