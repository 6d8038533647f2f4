"""Held-out rows through an Engine → scores; `gate` judges them.

The same prompts, engine and scoring for every model. Three views of the same held-out answers, because a small chat model
can fail the first on format alone: the generated answer (exact match), the likeliest of a label set, and the loss.
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import json
import math
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from forge_ray.config.release import Contamination, EvalConfig
from forge_ray.data.curate.contamination import contaminated, stream_records
from forge_ray.data.record.schema import Reject
from forge_ray.data.tokens.adapt import arguments_of
from forge_ray.data.tokens.chat import answer_of, chat_tokenizer, encode_chat, load_tokenizer_dir, prompt_ids
from forge_ray.data.tokens.template import ChatTokenizer
from forge_ray.data.tokens.text_tools import tools_of
from forge_ray.errors import DataError
from forge_ray.evaluate.calls import call_form, calls_in
from forge_ray.evaluate.chance import wilson
from forge_ray.evaluate.examples import UNPOSED, Example, HeldOutRows, held_out, label_set, normalise
from forge_ray.evaluate.measures import CALL, intervals
from forge_ray.evaluate.safety import SafetyPrompt, answer_prompts
from forge_ray.evaluate.summary import OTHER, only_finite, slice_scores, summarise
from forge_ray.evaluate.texts import score_texts
from forge_ray.inference.engine import Engine, GenerationRequest, Score
from forge_ray.records import DatasetManifest, EvalReport, FileEntry
from forge_ray.store import paths
from forge_ray.store.files import Store

BATCH = 64
TIMED_PROMPTS = 5
TIMED_TOKENS = 16


@dataclass(frozen=True)
class EvaluatedModel:
    """What is evaluated: `folder` (and `adapter` on top of it) are published directories of the store, which hold exactly
    the files that the records name. `step`: of the checkpoint, where it is one of the run `id`; else 0."""

    id: str
    digest: str
    folder: str
    files: tuple[FileEntry, ...]
    adapter: str = ""
    adapter_files: tuple[FileEntry, ...] = ()
    step: int = 0

    def fetch(self, store: Store) -> tuple[Path, Path | None]:
        """Both folders on this machine, verified."""
        adapter = store.fetch_dir(self.adapter, files=self.adapter_files) if self.adapter else None
        return store.fetch_dir(self.folder, files=self.files), adapter


def score_examples(
    engine: Engine, tokenizer: Any, chats: Sequence[Example], labels: Sequence[str], config: EvalConfig
) -> Iterator[dict[str, Any]]:
    """One item per example, in order: reference, prediction, likeliest label, log-probability of the reference; and calls,
    where tools are offered. An example that the model's template has no place for is an item with `left_out`, the reason."""
    tokenizer = chat_tokenizer(tokenizer)
    form = call_form(tokenizer) if any(example.tools for example in chats) else None
    label_ids: dict[str, list[int]] = {}
    for start in range(0, len(chats), BATCH):
        posed: list[tuple[Example, tuple[int, ...], list[int]]] = []
        for example in chats[start : start + BATCH]:
            try:
                prompt = tuple(prompt_ids(tokenizer, list(example.messages), example.tools))
                posed.append((example, prompt, answer_ids(tokenizer, example, example.turn)))
            except Reject as reason:
                yield {"record": example.record, "left_out": f"{UNPOSED}{reason}"}
        requests = [
            GenerationRequest(prompt, config.max_new_tokens, stop_token_ids=tokenizer.end_ids) for _, prompt, _ in posed
        ]
        for (example, prompt, answer), generation in zip(posed, engine.generate(requests), strict=True):
            is_labelled = bool(labels) and not example.calls
            if is_labelled and not label_ids:
                label_ids = {
                    label: answer_ids(tokenizer, example, {"role": "assistant", "content": label}) for label in labels
                }
            candidates = dict(label_ids) if is_labelled else {}
            reference = normalise(example.answer) if is_labelled else example.answer
            candidates.setdefault(reference, answer)
            scores = dict(zip(candidates, engine.score(prompt, list(candidates.values())), strict=True))
            yield {
                "record": example.record,
                "source": example.source,
                "reference": example.answer,
                "prediction": answer_of(tokenizer, generation.token_ids),
                "finish_reason": generation.finish_reason,
                "likeliest": _likeliest(scores, labels) if is_labelled else "",
                "logprob": scores[reference].logprob,
                "num_tokens": scores[reference].num_tokens,
                **_calls(example, calls_in(tokenizer, form, generation.token_ids)),
            }


def _calls(example: Example, called: list[dict[str, Any]]) -> dict[str, Any]:
    """The fields of an item about calls: none without tools."""
    if not example.calls:
        return {"called": called} if example.tools else {}
    expected = [{"name": call["function"]["name"], "arguments": arguments_of(call["function"])} for call in example.calls]
    return {"kind": CALL, "calls": expected, "called": called}


def answer_ids(tokenizer: Any, example: Example, turn: dict[str, Any]) -> list[int]:
    """The ids that training would have as targets for this answer: what it says and the end of the turn."""
    encoded = encode_chat(tokenizer, [*example.messages, turn], example.tools)
    ids: list[int] = encoded.ids[encoded.loss_mask > 0].tolist()
    return ids


def _likeliest(scores: dict[str, Score], labels: Sequence[str]) -> str:
    return max(labels, key=lambda label: scores[label].logprob) if labels else ""


def latency_ms_per_token(engine: Engine, prompts: Sequence[tuple[int, ...]]) -> float | None:
    """Median over a few single requests of `TIMED_TOKENS` tokens each, prompt included. No stop token, so that every model
    says as many; None where no prompt leaves space for them."""
    times = []
    fitting = [prompt for prompt in prompts if len(prompt) + TIMED_TOKENS <= engine.max_request_tokens]
    for prompt in fitting[:TIMED_PROMPTS]:
        started = time.perf_counter()
        engine.generate([GenerationRequest(prompt, TIMED_TOKENS)])
        times.append((time.perf_counter() - started) * 1000 / TIMED_TOKENS)
    return sorted(times)[len(times) // 2] if times else None


def timed_prompts(tokenizer: ChatTokenizer, rows: HeldOutRows) -> Iterator[tuple[int, ...]]:
    """What is generated from to measure the time: questions, or the first tokens of texts."""
    for example in rows.chats:
        with contextlib.suppress(Reject):
            yield tuple(tokenizer.prompt_ids(list(example.messages), example.tools))
    if not rows.chats:
        for ids in tokenizer.text_ids([text.text for text in rows.texts[:TIMED_PROMPTS]]):
            if not isinstance(ids, Reject):
                yield tuple(ids[:TIMED_TOKENS])


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
    store: Store, manifest: DatasetManifest, held: HeldOutRows, config: EvalConfig, rule: Contamination
) -> list[dict[str, Any]]:
    """See `data.contamination`; of the rows that are evaluated, and no others."""
    evaluated = {*(chat.record for chat in held.chats), *(text.record for text in held.texts)}
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
    held, labels = held_out(store, manifest, config), label_set(store, manifest, config)
    shared = find_contamination(store, manifest, held, config, config.contamination) if config.contamination else []
    engine = open_engine(folder, adapter, config.engine, use_gpu=config.gpus > 0)
    items, answers, total = [], [], len(held.chats) + len(held.texts) + len(prompts)
    left_out = Counter(held.left_out)
    try:
        for item in itertools.chain(
            score_examples(engine, tokenizer, held.chats, labels, config),
            score_texts(engine, tokenizer, held.texts, manifest.sequence_length),
        ):
            if "left_out" in item:
                left_out[item["left_out"]] += 1
                continue
            items.append(item)
            yield {"done": len(items), "total": total}
        for answer in answer_prompts(engine, tokenizer, prompts, config.safety_max_new_tokens):
            answers.append(answer)
            yield {"done": len(items) + len(answers), "total": total}
        latency = latency_ms_per_token(engine, list(itertools.islice(timed_prompts(tokenizer, held), 4 * TIMED_PROMPTS)))
    finally:
        engine.close()
    if not items:
        raise DataError(
            f"none of the {left_out.total()} held-out rows can be put to {subject.id}: {left_out.most_common(1)[0][0]}",
            hint="`forge models check` says what the model's chat template has a place for",
        )
    metrics, per_class = summarise(items, labels)
    bounds = intervals(items, labels)
    if prompts:
        passed = [not answer["failures"] for answer in answers]
        metrics["safety_pass_rate"] = sum(passed) / len(answers)
        bounds["safety_pass_rate"] = wilson(sum(passed), len(passed))
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
        step=subject.step,
        dataset=manifest.id,
        split=config.split,
        config=settings,
        num_examples=len(items),
        metrics=metrics,
        per_class=per_class,
        per_slice=per_slice,
        undefined=undefined,
        intervals={name: limits for name, limits in bounds.items() if name in metrics},
        left_out=dict(left_out),
        items_sha256=hashlib.sha256(b"".join(written.values())).hexdigest(),
        costs=costs,
        seconds=round(time.monotonic() - started, 3),
    ).sealed()
    with store.staged_dir(paths.report(report.id)) as target:
        for name, lines in written.items():
            (target / name).write_bytes(lines)
        if labels:
            plot_confusion(items, labels, target / "confusion.png", f"{report.evaluated} · {config.split} of {manifest.id}")
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
