"""Evaluation sets through an Engine → scores; and the gate (level 3).

The same prompts, engine and scoring for every model. Three views of the same held-out rows, because a small chat model can
fail the first on format alone: the generated answer (exact match), the likeliest of a label set, and the loss.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from forge_ray.config.release import EvalConfig, Gate
from forge_ray.data.chat import chat_tokenizer, encode_chat, prompt_ids
from forge_ray.data.dataset import read_records
from forge_ray.errors import ConfigError, DataError
from forge_ray.inference.engine import Engine, GenerationRequest, Score
from forge_ray.records import DatasetManifest, EvalReport
from forge_ray.store import Store

OTHER = "(other)"
BATCH = 64


@dataclass(frozen=True)
class Example:
    """One held-out chat: everything before its last answer, and that answer."""

    record: str
    messages: tuple[dict[str, Any], ...]
    tools: list[Any] | None
    answer: str


@dataclass(frozen=True)
class Subject:
    """What is evaluated: `folder` (and `adapter` on top of it) are published directories of the store."""

    id: str
    digest: str
    folder: str
    adapter: str = ""


def examples(store: Store, manifest: DatasetManifest, config: EvalConfig) -> list[Example]:
    """The chat rows of the split by record id; raises `DataError` when there is none."""
    found = []
    for row in read_records(store, manifest, config.split):
        messages = row["content"].get("messages", [])
        if messages and messages[-1]["role"] == "assistant" and messages[-1].get("content"):
            context = tuple({**message, "weight": 0} for message in messages[:-1])
            found.append(Example(row["record"], context, row["content"].get("tools"), messages[-1]["content"]))
    if not found:
        raise DataError(
            f"{manifest.id} has no chat row that ends in an answer in its {config.split} split",
            hint="raise data.splits, or evaluate the other split with eval.split",
        )
    return found[: config.max_examples or None]


def label_set(store: Store, manifest: DatasetManifest, config: EvalConfig) -> tuple[str, ...]:
    if config.labels != "from_data":
        return config.labels or ()
    train = EvalConfig(split="validation").model_copy(update={"split": "train"})
    return tuple(sorted({normalise(example.answer) for example in examples(store, manifest, train)}))


def normalise(text: str) -> str:
    """Case, surrounding white space and a final full stop do not decide whether an answer is right."""
    return " ".join(text.split()).removesuffix(".").casefold()


def score_examples(
    engine: Engine, tokenizer: Any, found: Sequence[Example], labels: Sequence[str], config: EvalConfig
) -> Iterator[dict[str, Any]]:
    """One item per example, in order: reference, prediction, likeliest label, log-probability of the reference."""
    tokenizer = chat_tokenizer(tokenizer)
    stops = (tokenizer.end_of_turn_id,)
    label_ids = {label: answer_ids(tokenizer, found[0], label) for label in labels}
    for start in range(0, len(found), BATCH):
        batch = found[start : start + BATCH]
        prompts = [tuple(prompt_ids(tokenizer, list(example.messages), example.tools)) for example in batch]
        requests = [GenerationRequest(prompt, config.max_new_tokens, stop_token_ids=stops) for prompt in prompts]
        for example, prompt, generation in zip(batch, prompts, engine.generate(requests), strict=True):
            candidates = dict(label_ids)
            reference = normalise(example.answer) if labels else example.answer
            if reference not in candidates:
                candidates[reference] = answer_ids(tokenizer, example, example.answer)
            scores = dict(zip(candidates, engine.score(prompt, list(candidates.values())), strict=True))
            yield {
                "record": example.record,
                "reference": example.answer,
                "prediction": tokenizer.decode(generation.token_ids, skip_special_tokens=True),
                "finish_reason": generation.finish_reason,
                "likeliest": _likeliest(scores, labels),
                "logprob": scores[reference].logprob,
                "num_tokens": scores[reference].num_tokens,
            }


def answer_ids(tokenizer: Any, example: Example, answer: str) -> list[int]:
    """The ids that training would have as targets for this answer: its text and the end of the turn."""
    messages = [*example.messages, {"role": "assistant", "content": answer}]
    encoded = encode_chat(tokenizer, messages, example.tools)
    found: list[int] = encoded.ids[encoded.loss_mask > 0].tolist()
    return found


def _likeliest(scores: dict[str, Score], labels: Sequence[str]) -> str:
    return max(labels, key=lambda label: scores[label].logprob) if labels else ""


def summarise(
    items: Sequence[dict[str, Any]], labels: Sequence[str]
) -> tuple[dict[str, float], dict[str, dict[str, float]]]:
    """(metrics, per class). Loss is per trained token; F1 is of the generated answers."""
    right = [normalise(item["prediction"]) == normalise(item["reference"]) for item in items]
    tokens = sum(item["num_tokens"] for item in items)
    loss = -sum(item["logprob"] for item in items) / tokens
    metrics = {"exact_match": sum(right) / len(items), "loss": loss, "perplexity": math.exp(min(loss, 700.0))}
    if not labels:
        return metrics, {}
    likeliest = [item["likeliest"] == normalise(item["reference"]) for item in items]
    per_class = {label: _class_scores(items, label) for label in labels}
    present = [scores["f1"] for scores in per_class.values() if scores["support"]]
    metrics["label_likelihood"] = sum(likeliest) / len(items)
    metrics["macro_f1"] = sum(present) / max(1, len(present))
    return metrics, per_class


def _class_scores(items: Sequence[dict[str, Any]], label: str) -> dict[str, float]:
    predicted = [normalise(item["prediction"]) == label for item in items]
    actual = [normalise(item["reference"]) == label for item in items]
    both = sum(p and a for p, a in zip(predicted, actual, strict=True))
    precision = both / sum(predicted) if any(predicted) else 0.0
    recall = both / sum(actual) if any(actual) else 0.0
    f1 = 2 * precision * recall / (precision + recall) if both else 0.0
    return {"precision": precision, "recall": recall, "f1": f1, "support": float(sum(actual))}


def evaluate(store: Store, subject: Subject, manifest: DatasetManifest, config: EvalConfig) -> Iterator[dict[str, Any]]:
    """Score `subject`; yields `{"done", "total"}` on the way and the `EvalReport` as `{"report": …}` at the end."""
    import time

    import torch

    from forge_ray.data.chat import load_tokenizer_dir
    from forge_ray.inference.choose import open_engine

    started = time.monotonic()
    torch.set_num_threads(max(1, int(config.cpus)))
    folder = store.fetch_dir(subject.folder)
    adapter = store.fetch_dir(subject.adapter) if subject.adapter else None
    tokenizer = load_tokenizer_dir(folder)
    found, labels = examples(store, manifest, config), label_set(store, manifest, config)
    engine = open_engine(folder, adapter, config.engine, use_gpu=config.gpus > 0)
    items = []
    try:
        for item in score_examples(engine, tokenizer, found, labels, config):
            items.append(item)
            yield {"done": len(items), "total": len(found)}
    finally:
        engine.close()
    metrics, per_class = summarise(items, labels)
    lines = "".join(json.dumps(item, ensure_ascii=False, sort_keys=True) + "\n" for item in items).encode()
    report = EvalReport(
        subject=subject.id,
        subject_digest=subject.digest,
        dataset=manifest.id,
        split=config.split,
        config=config.model_dump(mode="json"),
        num_examples=len(items),
        metrics=metrics,
        per_class=per_class,
        items_sha256=hashlib.sha256(lines).hexdigest(),
        seconds=round(time.monotonic() - started, 3),
    ).sealed()
    with store.staged_dir(f"evals/{report.id}") as target:
        (target / "items.jsonl").write_bytes(lines)
        if labels:
            plot_confusion(items, labels, target / "confusion.png", f"{subject.id} · {config.split} of {manifest.id}")
    yield {"report": report.model_dump(mode="json")}


def plot_confusion(items: Sequence[dict[str, Any]], labels: Sequence[str], path: Path, title: str) -> None:
    """Reference by generated answer, as PNG; answers outside the label set are one column."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    columns = [*labels, OTHER]
    counts = [[0] * len(columns) for _ in labels]
    for item in items:
        reference, prediction = normalise(item["reference"]), normalise(item["prediction"])
        if reference in labels:
            column = columns.index(prediction) if prediction in labels else len(labels)
            counts[list(labels).index(reference)][column] += 1
    size = max(4.0, 0.45 * len(columns) + 2)
    figure = Figure(figsize=(size, size), dpi=110, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    axes.imshow(counts, cmap="Blues")
    high = max(map(max, counts), default=0)
    for row, values in enumerate(counts):
        for column, value in enumerate(values):
            if value:
                colour = "white" if value > high / 2 else "black"
                axes.text(column, row, str(value), ha="center", va="center", fontsize=8, color=colour)
    axes.set_xticks(range(len(columns)), columns, rotation=60, ha="right", fontsize=8)
    axes.set_yticks(range(len(labels)), labels, fontsize=8)
    axes.set(xlabel="generated answer", ylabel="reference")
    axes.set_title(title, fontsize=9)
    figure.savefig(path)


def judge(gate: Gate, report: EvalReport, incumbents: dict[str, EvalReport | None]) -> tuple[str, ...]:
    """Reasons why `report` does not pass; empty when it does. `incumbents` maps the names in the gate to their reports."""
    reasons = []
    for name, threshold in gate.thresholds.items():
        value = _metric(report, name)
        if threshold.min is not None and value < threshold.min:
            reasons.append(f"{name}={value:.4g} is below the minimum {threshold.min:g}")
        if threshold.max is not None and value > threshold.max:
            reasons.append(f"{name}={value:.4g} is above the maximum {threshold.max:g}")
    for rule in gate.better_than:
        other = incumbents[rule.incumbent]
        if other is None:  # an alias that points nowhere yet
            continue
        value, rival = _metric(report, rule.metric), _metric(other, rule.metric)
        gain = rival - value if rule.metric in ("loss", "perplexity") else value - rival
        if gain < rule.margin or gain <= 0:
            reasons.append(f"{rule.metric}={value:.4g} is not better than {rule.incumbent} ({rival:.4g}) by {rule.margin:g}")
    return tuple(reasons)


def _metric(report: EvalReport, name: str) -> float:
    if name not in report.metrics:
        raise ConfigError(
            f"release.gate names the metric {name!r}, which {report.id} does not have",
            hint=f"one of {', '.join(sorted(report.metrics))}",
        )
    return report.metrics[name]
