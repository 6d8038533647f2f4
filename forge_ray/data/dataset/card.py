"""A dataset version on one page: counts, sources, licences, drops, lengths."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from forge_ray.records import DatasetManifest, SplitStats
from forge_ray.store import paths
from forge_ray.store.files import Store


def write_card(store: Store, manifest: DatasetManifest) -> str:
    """`cards/<id>/`: README.md and lengths.png; returns the folder's path in the store. Written anew at each call."""
    folder = paths.card(manifest.id)
    with store.staged_dir(folder) as target:
        (target / "README.md").write_text(markdown(manifest), encoding="utf-8")
        if manifest.lengths:
            plot_lengths(manifest, target / "lengths.png")
    return folder


def markdown(manifest: DatasetManifest) -> str:
    """The card as Markdown."""
    kinds = ", ".join(f"{count:,} {kind}" for kind, count in manifest.kinds.items())
    parts = [
        f"# {manifest.name} · {manifest.id}\n",
        f"Built {manifest.created_at[:19]} UTC with the tokenizer of {manifest.base_model};"
        f" rows of {manifest.sequence_length:,} tokens. Records: {kinds}.\n",
        "## Splits\n",
        _table(
            ("split", "records", "packed rows", "tokens", "trained tokens", "fill"),
            [_split(name, stats, manifest.sequence_length) for name, stats in manifest.splits.items()],
        ),
        "## Sources\n",
        _table(
            ("source", "records", "licences", "epochs", "training tokens", "share", "trained"),
            _sources(manifest),
        ),
        f"{len(manifest.sources):,} files:\n",
        _table(
            ("file", "records", "rejected", "dropped", "sha256"),
            [
                (
                    f"`{file.path}`",
                    f"{file.num_records:,}",
                    f"{file.num_rejected:,}",
                    f"{file.num_dropped:,}",
                    file.sha256[:16],
                )
                for file in manifest.sources[:200]
            ],
        ),
        "## What was left out\n",
        _table(("reason", "rows"), [(reason, f"{count:,}") for reason, count in manifest.rejects.items()]),
        f"{manifest.num_duplicates:,} records were exact duplicates of another; {manifest.num_truncated:,} were cut to"
        " the sequence length.\n",
    ]
    if manifest.curation:
        steps = [
            (
                step.rule,
                f"{step.before:,}",
                f"{step.after:,}",
                f"{step.changed:,}",
                _counts(step.found),
                _counts(step.reasons),
            )
            for step in manifest.curation
        ]
        parts += ["## Rules, in their order\n", _table(("rule", "before", "after", "masked", "found", "dropped for"), steps)]
    if manifest.lengths:
        lengths = [(f"≤ {int(limit):,}", f"{count:,}") for limit, count in manifest.lengths.items()]
        parts += ["## Lengths\n", "![documents by length](lengths.png)\n", _table(("tokens", "documents"), lengths)]
    return "\n".join(parts)


def _split(name: str, stats: SplitStats, sequence_length: int) -> tuple[str, ...]:
    capacity = max(1, stats.num_rows * sequence_length)
    counts = (stats.num_records, stats.num_rows, stats.num_tokens, stats.num_trained_tokens)
    return (name, *(f"{count:,}" for count in counts), f"{stats.num_tokens / capacity:.1%}")


def _sources(manifest: DatasetManifest) -> list[tuple[str, ...]]:
    total = max(1, sum(source.num_tokens for source in manifest.mixture))
    return [
        (
            f"`{source.name}`",
            f"{source.num_records:,}",
            _counts({licence or "none given": count for licence, count in source.licences.items()}),
            f"{source.epochs:g}",
            f"{source.num_tokens:,}",
            f"{source.num_tokens / total:.1%}",
            f"{source.num_trained_tokens / max(1, source.num_tokens):.1%}",
        )
        for source in manifest.mixture
    ]


def _counts(by_name: dict[str, int]) -> str:
    return ", ".join(f"{name} {count:,}" for name, count in by_name.items()) or "–"


def _table(header: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> str:
    if not rows:
        return "Nothing.\n"
    cells = [[cell.replace("|", "\\|").replace("\n", " ") for cell in row] for row in rows]
    lines = [" | ".join(header), " | ".join(["---"] * len(header)), *(" | ".join(row) for row in cells)]
    return "\n".join(f"| {line} |" for line in lines) + "\n"


def plot_lengths(manifest: DatasetManifest, path: Path) -> None:
    """Documents by length in tokens, in powers of two, with the sequence length marked."""
    from matplotlib.figure import Figure

    limits = [int(limit) for limit in manifest.lengths]
    figure = Figure(figsize=(7, 3.6), layout="constrained")
    axes = figure.add_subplot()
    axes.bar(range(len(limits)), list(manifest.lengths.values()), width=0.9, color="#4878a8")
    axes.set_xticks(range(len(limits)), [f"≤ {limit:,}" for limit in limits], rotation=30, ha="right")
    axes.set_ylabel("documents")
    axes.set_xlabel(f"tokens per document (packed into rows of {manifest.sequence_length:,})")
    axes.set_title(f"{manifest.name} · {manifest.id}", fontsize=10)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=120)
