"""Evaluation sets through an Engine → scores; `gate` judges them.

The same prompts, engine and scoring for every model. Three views of the same held-out rows, because a small chat model can
fail the first on format alone: the generated answer (exact match), the likeliest of a label set, and the loss.
"""

from __future__ import annotations

import hashlib
import json
import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from forge_ray.config.release import Contamination, EvalConfig
from forge_ray.data.curate.canaries import is_canary
from forge_ray.data.curate.contamination import contaminated, stream_records
from forge_ray.data.dataset.version import read_records
from forge_ray.data.tokens.chat import answer_of, chat_tokenizer, encode_chat, load_tokenizer_dir, prompt_ids
from forge_ray.data.tokens.template import ChatTokenizer
from forge_ray.data.tokens.text_tools import tools_of
from forge_ray.errors import DataError
from forge_ray.evaluate.safety import SafetyPrompt, answer_prompts
from forge_ray.inference.engine import Engine, GenerationRequest, Score
from forge_ray.records import DatasetManifest, EvalReport, FileEntry
from forge_ray.store import paths
from forge_ray.store.files import Store

OTHER = "(other)"
BATCH = 64
TIMED_PROMPTS = 5
TIMED_TOKENS = 16


@dataclass(frozen=True)
class Example:
    """One held-out chat: everything before its last answer, and that answer."""

    record: str
    messages: tuple[dict[str, Any], ...]
    tools: list[Any] | None
    answer: str
    source: str = ""


@dataclass(frozen=True)
class EvaluatedModel:
    """What is evaluated: `folder` (and `adapter` on top of it) are published directories of the store, which hold exactly
    the files that the records name."""

    id: str
    digest: str
    folder: str
    files: tuple[FileEntry, ...]
    adapter: str = ""
    adapter_files: tuple[FileEntry, ...] = ()

    def fetch(self, store: Store) -> tuple[Path, Path | None]:
        """Both folders on this machine, verified."""
        adapter = store.fetch_dir(self.adapter, files=self.adapter_files) if self.adapter else None
        return store.fetch_dir(self.folder, files=self.files), adapter


def examples(store: Store, manifest: DatasetManifest, config: EvalConfig) -> list[Example]:
    """The chat rows of the split by record id, canaries left out; raises `DataError` when there is none."""
    chats = []
    for row in read_records(store, manifest, config.split):
        if is_canary(row["content"]):
            continue
        messages = row["content"].get("messages", [])
        if messages and messages[-1]["role"] == "assistant" and messages[-1].get("content"):
            context = tuple({**message, "weight": 0} for message in messages[:-1])
            tools, answer = row["content"].get("tools"), messages[-1]["content"]
            chats.append(Example(row["record"], context, tools, answer, source_name(manifest, row)))
    if not chats:
        raise DataError(
            f"{manifest.id} has no chat row that ends in an answer in its {config.split} split",
            hint="raise data.splits, or evaluate the other split with eval.split",
        )
    return chats[: config.max_examples or None]


def source_name(manifest: DatasetManifest, row: dict[str, Any]) -> str:
    """The mixture's name of the source that a record came from; its file, in versions that have no mixture."""
    number = row.get("source")
    return manifest.mixture[number].name if number is not None and number < len(manifest.mixture) else str(row["file"])


def label_set(store: Store, manifest: DatasetManifest, config: EvalConfig) -> tuple[str, ...]:
    if config.labels != "from_data":
        return config.labels or ()
    train = EvalConfig(split="validation").model_copy(update={"split": "train"})
    return tuple(sorted({normalise(example.answer) for example in examples(store, manifest, train)}))


def normalise(text: str) -> str:
    """Case, surrounding white space and a final full stop do not decide whether an answer is right."""
    return " ".join(text.split()).removesuffix(".").casefold()


def score_examples(
    engine: Engine, tokenizer: Any, chats: Sequence[Example], labels: Sequence[str], config: EvalConfig
) -> Iterator[dict[str, Any]]:
    """One item per example, in order: reference, prediction, likeliest label, log-probability of the reference."""
    tokenizer = chat_tokenizer(tokenizer)
    stops = tokenizer.end_ids
    label_ids = {label: answer_ids(tokenizer, chats[0], label) for label in labels}
    for start in range(0, len(chats), BATCH):
        batch = chats[start : start + BATCH]
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
                "source": example.source,
                "reference": example.answer,
                "prediction": answer_of(tokenizer, generation.token_ids),
                "finish_reason": generation.finish_reason,
                "likeliest": _likeliest(scores, labels),
                "logprob": scores[reference].logprob,
                "num_tokens": scores[reference].num_tokens,
            }


def answer_ids(tokenizer: Any, example: Example, answer: str) -> list[int]:
    """The ids that training would have as targets for this answer: its text and the end of the turn."""
    messages = [*example.messages, {"role": "assistant", "content": answer}]
    encoded = encode_chat(tokenizer, messages, example.tools)
    ids: list[int] = encoded.ids[encoded.loss_mask > 0].tolist()
    return ids


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


def slice_scores(
    items: Sequence[dict[str, Any]], labels: Sequence[str], slices: Sequence[str]
) -> dict[str, dict[str, dict[str, float]]]:
    """kind of slice → its value → scores of the items there and their `count`. A reference outside the label set is in the
    slice `(other)`."""

    def value(item: dict[str, Any], kind: str) -> str:
        if kind == "source":
            return str(item["source"])
        reference = normalise(item["reference"])
        return reference if reference in labels else OTHER

    per_slice: dict[str, dict[str, dict[str, float]]] = {}
    for kind in slices:
        groups: dict[str, list[dict[str, Any]]] = {}
        for item in items:
            groups.setdefault(value(item, kind), []).append(item)
        per_slice[kind] = {}
        for of, group in sorted(groups.items()):
            scores = {name: score for name, score in summarise(group, labels)[0].items() if name != "macro_f1"}
            per_slice[kind][of] = scores | {"count": float(len(group))}
    return per_slice


def only_finite(
    metrics: dict[str, float], per_slice: dict[str, dict[str, dict[str, float]]]
) -> tuple[dict[str, float], dict[str, dict[str, dict[str, float]]], tuple[str, ...]]:
    """(metrics, per slice, names of what was left out): NaN has no JSON, and a model that diverged has a report too."""
    undefined = [name for name, value in metrics.items() if not math.isfinite(value)]
    kept: dict[str, dict[str, dict[str, float]]] = {}
    for kind, values in per_slice.items():
        kept[kind] = {}
        for of, scores in values.items():
            undefined += [f"{kind}:{of}:{name}" for name, value in scores.items() if not math.isfinite(value)]
            kept[kind][of] = {name: value for name, value in scores.items() if math.isfinite(value)}
    return {name: value for name, value in metrics.items() if math.isfinite(value)}, kept, tuple(undefined)


def latency_ms_per_token(engine: Engine, tokenizer: Any, chats: Sequence[Example]) -> float | None:
    """Median over a few single requests of `TIMED_TOKENS` tokens each, prompt included. No stop token, so that every model
    says as many; None where no prompt leaves space for them."""
    times = []
    for example in chats:
        prompt = tuple(prompt_ids(tokenizer, list(example.messages), example.tools))
        if len(prompt) + TIMED_TOKENS > engine.max_request_tokens:
            continue
        started = time.perf_counter()
        engine.generate([GenerationRequest(prompt, TIMED_TOKENS)])
        times.append((time.perf_counter() - started) * 1000 / TIMED_TOKENS)
        if len(times) == TIMED_PROMPTS:
            break
    return sorted(times)[len(times) // 2] if times else None


def size_bytes(store: Store, subject: EvaluatedModel) -> int:
    """Of the safetensors that an engine loads to answer as `subject`."""
    folders = [folder for folder in (subject.folder, subject.adapter) if folder]
    return sum(e.size for folder in folders for e in store.files(folder) if e.path.endswith(".safetensors"))


def tokenizer_for(manifest: DatasetManifest, folder: Path, adapter: Path | None) -> ChatTokenizer:
    """The tokenizer of an evaluated model. It is given tools as the dataset's rows are, the base model too, or as the
    adapter was trained to be given them."""
    tools = manifest.config.get("tools") or (tools_of(adapter) if adapter else "template")
    return load_tokenizer_dir(folder, tools=tools)


def find_contamination(
    store: Store, manifest: DatasetManifest, chats: Sequence[Example], config: EvalConfig, rule: Contamination
) -> list[dict[str, Any]]:
    """See `data.contamination`; of the rows that are evaluated, and no others."""
    evaluated = {example.record for example in chats}
    rows = (row for row in stream_records(store, manifest, config.split) if row["record"] in evaluated)
    return contaminated(rows, stream_records(store, manifest, "train"), rule)


def evaluate(
    store: Store,
    subject: EvaluatedModel,
    manifest: DatasetManifest,
    config: EvalConfig,
    prompts: tuple[SafetyPrompt, ...],
    settings: dict[str, Any],
) -> Iterator[dict[str, Any]]:
    """Score `subject`; yields `{"done", "total"}` on the way and the `EvalReport` as `{"report": …}` at the end.
    `prompts` are those of the files that `config.safety` names; `settings` is what the report says of its config."""
    import torch

    from forge_ray.inference.choose import open_engine

    started = time.monotonic()
    torch.set_num_threads(max(1, int(config.cpus)))
    folder, adapter = subject.fetch(store)
    tokenizer = tokenizer_for(manifest, folder, adapter)
    chats, labels = examples(store, manifest, config), label_set(store, manifest, config)
    shared = find_contamination(store, manifest, chats, config, config.contamination) if config.contamination else []
    engine = open_engine(folder, adapter, config.engine, use_gpu=config.gpus > 0)
    items, answers, total = [], [], len(chats) + len(prompts)
    try:
        for item in score_examples(engine, tokenizer, chats, labels, config):
            items.append(item)
            yield {"done": len(items), "total": total}
        for answer in answer_prompts(engine, tokenizer, prompts, config.safety_max_new_tokens):
            answers.append(answer)
            yield {"done": len(items) + len(answers), "total": total}
        latency = latency_ms_per_token(engine, tokenizer, chats)
    finally:
        engine.close()
    metrics, per_class = summarise(items, labels)
    if prompts:
        metrics["safety_pass_rate"] = sum(not answer["failures"] for answer in answers) / len(answers)
    if config.contamination:
        metrics["contamination"] = len(shared) / len(items)
    metrics, per_slice, undefined = only_finite(metrics, slice_scores(items, labels, config.slices))
    costs = {"size_bytes": float(size_bytes(store, subject))} | ({"latency_ms_per_token": latency} if latency else {})
    kept = {"items.jsonl": items}
    kept |= {"safety.jsonl": answers} if prompts else {}
    kept |= {"contaminated.jsonl": shared} if config.contamination else {}
    written = {name: json_lines(rows) for name, rows in kept.items()}
    report = EvalReport(
        subject=subject.id,
        subject_digest=subject.digest,
        dataset=manifest.id,
        split=config.split,
        config=settings,
        num_examples=len(items),
        metrics=metrics,
        per_class=per_class,
        per_slice=per_slice,
        undefined=undefined,
        items_sha256=hashlib.sha256(b"".join(written.values())).hexdigest(),
        costs=costs,
        seconds=round(time.monotonic() - started, 3),
    ).sealed()
    with store.staged_dir(paths.report(report.id)) as target:
        for name, lines in written.items():
            (target / name).write_bytes(lines)
        if labels:
            plot_confusion(items, labels, target / "confusion.png", f"{subject.id} · {config.split} of {manifest.id}")
    yield {"report": report.model_dump(mode="json")}


def json_lines(rows: Sequence[dict[str, Any]]) -> bytes:
    """One object a line; what is not a finite number is null, for JSON has no word for it."""
    plain = [{k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in row.items()} for row in rows]
    return "".join(json.dumps(row, ensure_ascii=False, sort_keys=True) + "\n" for row in plain).encode()


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
