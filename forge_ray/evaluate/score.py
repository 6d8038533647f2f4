"""Held-out rows through an Engine → scores; `gate` judges them.

The same prompts, engine and scoring for every model. Three views of the same held-out answers, because a small chat model
can fail the first on format alone: the generated answer (exact match), the likeliest of a label set, and the loss.
"""

from __future__ import annotations

import contextlib
import itertools
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from forge_ray.config.classify import REWARD, normalise
from forge_ray.config.release import EvalConfig
from forge_ray.data.record.schema import Reject
from forge_ray.data.tokens.chat import answer_of, chat_tokenizer, load_tokenizer_dir, prompt_ids
from forge_ray.data.tokens.template import ChatTokenizer
from forge_ray.data.tokens.text_tools import tools_of
from forge_ray.evaluate.answer_schema import refuse_unfit, with_validity
from forge_ray.evaluate.calls import call_fields, call_form, calls_in
from forge_ray.evaluate.classified import classify_rows
from forge_ray.evaluate.examples import UNPOSED, Example, HeldOutRows, answer_ids, held_out, label_forms
from forge_ray.evaluate.kl import score_kl
from forge_ray.evaluate.losses import general_held_out, score_general
from forge_ray.evaluate.measures import is_general
from forge_ray.evaluate.own import scored, try_functions
from forge_ray.evaluate.publish import Scored, ScoredRows, publish, shared_rows
from forge_ray.evaluate.rewarded import reward_rows
from forge_ray.evaluate.safety import answer_prompts
from forge_ray.evaluate.scoring_files import ScoringFiles
from forge_ray.evaluate.texts import score_texts
from forge_ray.inference.classifier import open_classifier
from forge_ray.inference.engine import Engine, GenerationRequest, Score
from forge_ray.models.class_head import targets_of
from forge_ray.records import DatasetManifest, FileEntry
from forge_ray.store.files import Store

BATCH = 64
TIMED_PROMPTS = 5
TIMED_TOKENS = 16


@dataclass(frozen=True)
class EvaluatedModel:
    """What is evaluated: `folder` (and `adapter` on top of it) are published directories of the store, which hold exactly
    the files that the records name. `step`: of the checkpoint, where it is one of the run `id`; else 0. `start`: what the
    run started from; None of a model that no run of this store made."""

    id: str
    digest: str
    folder: str
    files: tuple[FileEntry, ...]
    adapter: str = ""
    adapter_files: tuple[FileEntry, ...] = ()
    step: int = 0
    start: EvaluatedModel | None = None

    def fetch(self, store: Store) -> tuple[Path, Path | None]:
        """Both folders on this machine, verified."""
        adapter = store.fetch_dir(self.adapter, files=self.adapter_files) if self.adapter else None
        return store.fetch_dir(self.folder, files=self.files), adapter


def score_examples(
    engine: Engine, tokenizer: Any, chats: Sequence[Example], labels: Mapping[str, str], config: EvalConfig
) -> Iterator[dict[str, Any]]:
    """One item per example, in order: reference, prediction, likeliest label (of `label_forms`), log-probability of the
    reference; and calls, where tools are offered. An example that the model's template has no place for is an item with
    `left_out`, the reason."""
    tokenizer = chat_tokenizer(tokenizer)
    form = call_form(tokenizer) if any(example.tools for example in chats) else None
    label_ids: dict[str, list[int]] = {}
    for start in range(0, len(chats), BATCH):
        posed: list[tuple[Example, tuple[int, ...], list[list[int]]]] = []
        for example in chats[start : start + BATCH]:
            try:
                prompt = tuple(prompt_ids(tokenizer, list(example.messages), example.tools))
                turns = [example.turn, *([example.rejected] if example.rejected else [])]
                posed.append((example, prompt, [answer_ids(tokenizer, example, turn) for turn in turns]))
            except Reject as reason:
                yield {"record": example.record, "left_out": f"{UNPOSED}{reason}"}
        requests = [
            GenerationRequest(prompt, config.max_new_tokens, stop_token_ids=tokenizer.end_ids) for _, prompt, _ in posed
        ]
        candidates: list[dict[str, list[int]]] = []
        for example, _, (answer, *_) in posed:
            is_labelled = bool(labels) and not example.calls
            if is_labelled and not label_ids:
                label_ids = {
                    label: answer_ids(tokenizer, example, {"role": "assistant", "content": text})
                    for label, text in labels.items()
                }
            own = dict(label_ids) if is_labelled else {}
            own.setdefault(_reference(example, is_labelled), answer)
            candidates.append(own)
        generated = engine.generate(requests)
        scored = engine.score_all(
            [(prompt, [*own.values(), *answers[1:]]) for (_, prompt, answers), own in zip(posed, candidates, strict=True)]
        )
        for (example, _, answers), own, generation, of_own in zip(posed, candidates, generated, scored, strict=True):
            is_labelled, scores = bool(labels) and not example.calls, dict(zip(own, of_own, strict=False))
            reference, rejected = _reference(example, is_labelled), answers[1:]
            yield {
                "record": example.record,
                "source": example.source,
                "reference": example.answer,
                "prediction": answer_of(tokenizer, generation.token_ids),
                "finish_reason": generation.finish_reason,
                "likeliest": _likeliest(scores, tuple(labels)) if is_labelled else "",
                "logprob": scores[reference].logprob,
                "num_tokens": scores[reference].num_tokens,
                **({"rejected_logprob": of_own[-1].logprob} if rejected else {}),
                **call_fields(example, calls_in(tokenizer, form, generation.token_ids)),
            }


def _reference(example: Example, is_labelled: bool) -> str:
    return normalise(example.answer) if is_labelled else example.answer


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


def evaluate(
    store: Store,
    subject: EvaluatedModel,
    manifest: DatasetManifest,
    config: EvalConfig,
    files: ScoringFiles,
    settings: dict[str, Any],
    general: DatasetManifest | None = None,
) -> Iterator[dict[str, Any]]:
    """Score `subject`; yields `{"done", "total"}` on the way and the `EvalReport` as `{"report": …}` at the end. `files` are
    those that `config` names; `settings` is what the report says of it; `general` are the general rows."""
    import torch

    from forge_ray.inference.choose import open_engine

    started = time.monotonic()
    torch.set_num_threads(max(1, int(config.cpus)))
    folder, adapter = subject.fetch(store)
    tokenizer = tokenizer_for(manifest, folder, adapter)
    held, forms = held_out(store, manifest, config), label_forms(store, manifest, config)
    labels = tuple(forms)
    general_held = general_held_out(store, general, config)
    shared = shared_rows(store, config, manifest, held, general, general_held)
    if targets := targets_of(adapter) or targets_of(folder):
        classifier = open_classifier(folder, adapter, targets, tokenizer, config.engine, config.gpus > 0)
        if targets == (REWARD,):
            rows = yield from reward_rows(held, classifier, config, files)
        else:
            rows = yield from classify_rows(store, manifest, held, classifier, config, files)
        costs = {"size_bytes": float(size_bytes(store, subject))}
        of = Scored(subject.id, subject.digest, settings, costs, time.monotonic() - started, files, step=subject.step)
        report = publish(store, manifest, config, replace(rows, labels=rows.labels or labels, shared=shared), of)
        yield {"report": report.model_dump(mode="json")}
        return
    refuse_unfit(files.schema, held.chats)
    try_functions(files.functions, held.chats, config.slices, labels)
    engine = open_engine(folder, adapter, config.engine, use_gpu=config.gpus > 0)
    items, answers = [], []
    total = len(held.chats) + len(held.texts) + len(general_held.chats) + len(general_held.texts) + len(files.prompts)
    left_out = Counter(held.left_out) + Counter(general_held.left_out)
    try:
        for item in itertools.chain(
            scored(
                with_validity(score_examples(engine, tokenizer, held.chats, forms, config), files.schema),
                *(files.functions, held.chats, config.slices, labels),
            ),
            score_texts(engine, tokenizer, held.texts, manifest.sequence_length),
            score_general(engine, tokenizer, general_held, general.sequence_length if general else 0),
        ):
            if "left_out" in item:
                left_out[item["left_out"]] += 1
                continue
            items.append(item)
            yield {"done": len(items), "total": total}
        for answer in answer_prompts(engine, tokenizer, files.prompts, config.safety_max_new_tokens):
            answers.append(answer)
            yield {"done": len(items) + len(answers), "total": total}
        latency = latency_ms_per_token(engine, list(itertools.islice(timed_prompts(tokenizer, held), 4 * TIMED_PROMPTS)))
    finally:
        engine.close()
    if config.kl and subject.start:
        del engine  # its weights
        by_record = {}
        for score in score_kl((folder, adapter), subject.start.fetch(store), tokenizer, held.chats, config):
            by_record[score["record"]] = score
            yield {"done": len(items) + len(answers), "total": total}
        items = [item | by_record.get(item["record"], {}) if not is_general(item) else item for item in items]
    costs = {"size_bytes": float(size_bytes(store, subject))} | ({"latency_ms_per_token": latency} if latency else {})
    rows = ScoredRows(items, labels, answers, shared, left_out, general)
    seconds = time.monotonic() - started
    of = Scored(subject.id, subject.digest, settings, costs, seconds, files, step=subject.step)
    report = publish(store, manifest, config, rows, of)
    yield {"report": report.model_dump(mode="json")}
