"""What weights give away of the rows that they were trained on.

Three views, each with a control. Membership: the loss of training records against held-out ones, and the same for the base
model, which saw neither (Yeom et al., arXiv:1709.01604). Extraction: answers said word for word, of training and of held-out
prompts. Exposure: how far up a canary's code is among others (Carlini et al., arXiv:1802.08232), against canaries that were
held out. No text of a record is written, only its id.
"""

from __future__ import annotations

import hashlib
import heapq
import math
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow.parquet as pq

from forge_ray.config.measurements import LeakConfig
from forge_ray.config.release import EvalConfig
from forge_ray.data.curate import canaries
from forge_ray.data.curate.canaries import Canary
from forge_ray.data.curate.contamination import stream_records
from forge_ray.data.dataset.order import Order
from forge_ray.data.dataset.stream import Rows
from forge_ray.data.dataset.version import find_record
from forge_ray.data.record.schema import Reject
from forge_ray.data.tokens.chat import chat_tokenizer, prompt_ids
from forge_ray.errors import DataError
from forge_ray.evaluate.examples import Example, answer_ids
from forge_ray.evaluate.publish import json_lines
from forge_ray.evaluate.score import EvaluatedModel, tokenizer_for
from forge_ray.inference.engine import Engine, GenerationRequest
from forge_ray.records import DatasetManifest, EvalReport
from forge_ray.store import paths
from forge_ray.store.files import Store

RESAMPLES = 1000
BATCH = 64


@dataclass(frozen=True)
class TrainedOrder:
    """What a run was given: the packed rows and the order in which it took `num_steps` batches of them."""

    rows: Rows
    order: Order
    num_steps: int


@dataclass(frozen=True)
class Sample:
    """One record that is compared: its answer after its prompt; the second half of a plain text after the first."""

    record: str
    prompt: tuple[int, ...]
    answer: tuple[int, ...]


@dataclass(frozen=True)
class Groups:
    """What the run was trained on, and what was held out."""

    train: list[dict[str, Any]]
    held_out: list[dict[str, Any]]
    canaries: list[Canary]
    canaries_held_out: list[Canary]


@dataclass(frozen=True)
class Findings:
    """Of one model, in the order of the samples: log-probability per token [n], and (tuned model only) whether the greedy
    answer was the record's own [n]; per canary its exposure in bits."""

    train: npt.NDArray[np.float64]
    held_out: npt.NDArray[np.float64]
    train_said: npt.NDArray[np.bool_]
    held_out_said: npt.NDArray[np.bool_]
    canaries: list[float]
    canaries_held_out: list[float]


# ---------------------------------------------------------------- which records


def groups_of(store: Store, manifest: DatasetManifest, training: TrainedOrder, config: LeakConfig) -> Groups:
    """Records drawn by a hash of their id; of the training rows only those that the run has really used. Memory holds the
    drawn records and the canaries' ids."""

    def first(records: Iterable[Any], count: int, key: Any = lambda record: record) -> list[Any]:
        return heapq.nsmallest(count, records, key=lambda record: _draw(key(record), config.seed))

    planted = {canary.record: canary for canary in canaries.find(store, manifest, "train")}
    met: set[str] = set()

    def ordinary() -> Iterator[str]:
        for record in used_records(training):
            if record in planted:
                met.add(record)
            else:
                yield record

    # several times as many, for some are no chat or text that ends in an answer; a record is met once per repeat
    names = dict.fromkeys(first(ordinary(), 64 * config.max_records))
    train: list[dict[str, Any]] = []
    for name in names:
        row = find_record(store, manifest, name)
        if _is_usable(row["content"]):
            train.append(row)
        if len(train) == config.max_records:
            break
    held_out: list[dict[str, Any]] = []
    hidden: list[Canary] = []
    for split in ("test", "validation"):
        hidden += list(canaries.find(store, manifest, split))
        usable = (row for row in stream_records(store, manifest, split) if _is_usable(row["content"]))
        held_out += first(usable, config.max_records - len(held_out), lambda row: row["record"])
    if min(len(train), len(held_out)) < 2:
        raise DataError(
            f"{manifest.id} has {len(train)} training and {len(held_out)} held-out records to compare; each needs 2",
            hint="raise data.splits: without held-out records there is no control",
        )
    return Groups(
        train,
        held_out,
        first([planted[name] for name in sorted(met)], config.max_canaries, lambda canary: canary.record),
        first(hidden, config.max_canaries, lambda canary: canary.record),
    )


def _draw(record: str, seed: int) -> bytes:
    return hashlib.sha256(f"leak/{seed}/{record}".encode()).digest()


def _is_usable(content: dict[str, Any]) -> bool:
    if canaries.is_canary(content):
        return False
    if "text" in content:
        return len(content["text"].split()) >= 4
    messages = _conversation(content)
    return bool(messages) and messages[-1]["role"] == "assistant" and bool(messages[-1].get("content"))


def _conversation(content: dict[str, Any]) -> list[dict[str, Any]]:
    """The turns of a chat; of a judged row its prompt with the preferred answer, or the one that was judged."""
    return [*content.get("messages", ()), *(content.get("chosen") or content.get("answer") or ())]


def used_records(training: TrainedOrder) -> Iterator[str]:
    """The record ids in the packed rows that the run has taken, repeats included."""
    used = used_rows(training)
    rows, number = training.rows, 0
    for shard in range(len(rows.shard_rows)):
        path = rows.store.path(paths.shard(rows.dataset, rows.split, shard))
        with rows.store.filesystem.open_input_file(path) as stream:
            for batch in pq.ParquetFile(stream).iter_batches(1024, columns=["records"]):
                for records in batch.column("records").to_pylist():
                    if used[number]:
                        yield from records
                    number += 1


def used_rows(training: TrainedOrder) -> npt.NDArray[np.bool_]:
    """bool [num_rows]: what the run has taken at least once."""
    order, num_steps = training.order, training.num_steps
    if num_steps * order.global_batch >= order.num_rows:  # an epoch has every row
        return np.ones(order.num_rows, np.bool_)
    used = np.zeros(order.num_rows, np.bool_)
    for step in range(num_steps):
        used[order.rows_of(step, range(order.global_batch))] = True
    return used


def sample_of(tokenizer: Any, row: dict[str, Any], most: int) -> Sample:
    """At most `most` tokens in all; what is longer loses its end."""
    content = row["content"]
    if "text" in content:
        (ids,) = tokenizer.text_ids([content["text"]])
        if isinstance(ids, Reject):
            raise ids
        ids = ids[:most]
        return Sample(row["record"], tuple(ids[: len(ids) // 2]), tuple(ids[len(ids) // 2 :]))
    messages = _conversation(content)
    context = tuple({**message, "weight": 0} for message in messages[:-1])
    example = Example(row["record"], context, content.get("tools"), messages[-1]["content"])
    prompt = prompt_ids(tokenizer, list(context), example.tools)[: most - 1]
    return Sample(row["record"], tuple(prompt), tuple(answer_ids(tokenizer, example, example.turn)[: most - len(prompt)]))


# ---------------------------------------------------------------- what a model says


def findings(engine: Engine, tokenizer: Any, groups: Groups, config: LeakConfig, extract: bool) -> Iterator[int | Findings]:
    """How many of the samples and canaries are done, and at the end what was found."""
    tokenizer = chat_tokenizer(tokenizer)
    done, logprobs, extracted = 0, {}, {}
    for name, rows in (("train", groups.train), ("held_out", groups.held_out)):
        samples = [sample_of(tokenizer, row, engine.max_request_tokens) for row in rows]
        scores = []
        for sample in samples:
            (score,) = engine.score(sample.prompt, [sample.answer])
            scores.append(score.logprob / score.num_tokens)
            done += 1
            yield done
        logprobs[name] = np.array(scores, np.float64)
        extracted[name] = np.array(_extracted(engine, tokenizer, samples) if extract else [], np.bool_)
    exposures: dict[str, list[float]] = {}
    for name, planted in (("train", groups.canaries), ("held_out", groups.canaries_held_out)):
        exposures[name] = []
        for canary in planted:
            exposures[name].append(exposure(engine, tokenizer, canary, config))
            done += 1
            yield done
    yield Findings(
        logprobs["train"],
        logprobs["held_out"],
        extracted["train"],
        extracted["held_out"],
        exposures["train"],
        exposures["held_out"],
    )


def _extracted(engine: Engine, tokenizer: Any, samples: Sequence[Sample]) -> list[bool]:
    """Whether the greedy continuation is the sample's own, token for token."""
    stops, extracted = tokenizer.end_ids, []
    for start in range(0, len(samples), BATCH):
        batch = samples[start : start + BATCH]
        requests = [GenerationRequest(s.prompt, len(s.answer), stop_token_ids=stops) for s in batch]
        for sample, generation in zip(batch, engine.generate(requests), strict=True):
            end = next((place for place, token in enumerate(sample.answer) if token in stops), len(sample.answer))
            extracted.append(tuple(generation.token_ids) == sample.answer[:end])
    return extracted


def exposure(engine: Engine, tokenizer: Any, canary: Canary, config: LeakConfig) -> float:
    """log2 |R| - log2 rank of the code among itself and the drawn candidates, by log-probability; ties count half. A model
    that does not know it has 1.44 bits on average."""
    codes = [canary.code, *canaries.candidates(canary, config.candidates, config.seed)]
    example = Example(canary.record, ({"role": "user", "content": canary.prompt, "weight": 0},), None, canary.code)
    answers = [answer_ids(tokenizer, example, {"role": "assistant", "content": code}) for code in codes]
    own, *others = [score.logprob for score in engine.score(prompt_ids(tokenizer, list(example.messages)), answers)]
    if not math.isfinite(own):
        return math.nan
    rank = 1 + sum(other > own for other in others) + sum(other == own for other in others) / 2
    return math.log2(len(codes)) - math.log2(rank)


# ---------------------------------------------------------------- what follows


def auc(train: npt.NDArray[np.float64], held_out: npt.NDArray[np.float64]) -> float:
    """The probability that a training record is likelier than a held-out one; 0.5: nothing to tell them apart."""
    return float(_wins(train, held_out).mean())


def _wins(train: npt.NDArray[np.float64], held_out: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    if not (np.isfinite(train).all() and np.isfinite(held_out).all()):
        return np.full((len(train), len(held_out)), np.nan)
    wins: npt.NDArray[np.float64] = (train[:, None] > held_out) + 0.5 * (train[:, None] == held_out)
    return wins


def auc_interval(train: npt.NDArray[np.float64], held_out: npt.NDArray[np.float64], seed: int) -> tuple[float, float]:
    """95 % of the AUCs of samples that are drawn again from these, with replacement."""
    wins, random = _wins(train, held_out), np.random.default_rng(seed)
    rows, columns = (
        random.multinomial(size, np.full(size, 1 / size), RESAMPLES) / size for size in (len(train), len(held_out))
    )
    low, high = np.quantile(((rows @ wins) * columns).sum(axis=1), [0.025, 0.975])
    return float(low), float(high)


def metrics_of(tuned: Findings, base: Findings, seed: int) -> dict[str, float]:
    """What the report says. Losses are in nats per token; exposure in bits."""
    low, high = auc_interval(tuned.train, tuned.held_out, seed)
    tuned_auc, base_auc = auc(tuned.train, tuned.held_out), auc(base.train, base.held_out)
    rates = float(tuned.train_said.mean()), float(tuned.held_out_said.mean())
    metrics = {
        "leak_auc": tuned_auc,
        "leak_auc_low": low,
        "leak_auc_high": high,
        "leak_auc_base": base_auc,
        "leak_auc_gain": tuned_auc - base_auc,
        "leak_gap": float(tuned.train.mean() - tuned.held_out.mean()),
        "leak_gap_base": float(base.train.mean() - base.held_out.mean()),
        "extraction_rate": rates[0],
        "extraction_rate_held_out": rates[1],
        "extraction_gain": rates[0] - rates[1],
    }
    if tuned.canaries:
        metrics |= {"exposure_mean": float(np.mean(tuned.canaries)), "exposure_max": float(np.max(tuned.canaries))}
        metrics["exposure_base_mean"] = float(np.mean(base.canaries))
    if tuned.canaries_held_out:
        metrics["exposure_held_out_mean"] = float(np.mean(tuned.canaries_held_out))
    return metrics


def audit(
    store: Store,
    subject: EvaluatedModel,
    base: EvaluatedModel,
    manifest: DatasetManifest,
    training: TrainedOrder,
    config: EvalConfig,
    settings: dict[str, Any],
) -> Iterator[dict[str, Any]]:
    """Audit `subject` against `base`; yields `{"done", "total"}` on the way and the `EvalReport` as `{"report": …}` at the
    end. `settings` is what the report says of its config, of which `config.leak` is a part."""
    import torch

    from forge_ray.inference.choose import open_engine

    assert config.leak is not None
    started = time.monotonic()
    torch.set_num_threads(max(1, int(config.cpus)))
    groups = groups_of(store, manifest, training, config.leak)
    each = len(groups.train) + len(groups.held_out) + len(groups.canaries) + len(groups.canaries_held_out)
    measured: list[Findings] = []
    for number, which in enumerate((subject, base)):
        folder, adapter = which.fetch(store)
        engine = open_engine(folder, adapter, config.engine, use_gpu=config.gpus > 0)
        try:
            for step in findings(
                engine, tokenizer_for(store, manifest, folder, adapter), groups, config.leak, extract=which is subject
            ):
                if isinstance(step, Findings):
                    measured.append(step)
                else:
                    yield {"done": number * each + step, "total": 2 * each}
        finally:
            engine.close()
    report, lines = report_of(subject, manifest, groups, (measured[0], measured[1]), config.leak, settings)
    report = report.model_copy(update={"seconds": round(time.monotonic() - started, 3)})
    with store.staged_dir(paths.report(report.id)) as target:
        (target / "items.jsonl").write_bytes(lines)
    yield {"report": report.model_dump(mode="json")}


def report_of(
    subject: EvaluatedModel,
    manifest: DatasetManifest,
    groups: Groups,
    measured: tuple[Findings, Findings],
    config: LeakConfig,
    settings: dict[str, Any],
) -> tuple[EvalReport, bytes]:
    """(report, its items): of the tuned and the base model."""
    tuned, base = measured
    metrics = metrics_of(tuned, base, config.seed)
    items: list[dict[str, Any]] = []
    for name, rows, scores, control, extracted in (
        ("train", groups.train, tuned.train, base.train, tuned.train_said),
        ("held_out", groups.held_out, tuned.held_out, base.held_out, tuned.held_out_said),
    ):
        for row, score, before, again in zip(rows, scores, control, extracted, strict=True):
            losses = {"loss": -float(score), "loss_base": -float(before), "said": bool(again)}
            items.append({"record": row["record"], "group": name} | losses)
    for name, planted, bits, control_bits in (
        ("train", groups.canaries, tuned.canaries, base.canaries),
        ("held_out", groups.canaries_held_out, tuned.canaries_held_out, base.canaries_held_out),
    ):
        for canary, value, before_bits in zip(planted, bits, control_bits, strict=True):
            items.append({"canary": canary.record, "group": name, "exposure": value, "exposure_base": before_bits})
    lines = json_lines(items)
    counts = {
        "records": {"train": len(groups.train), "held_out": len(groups.held_out)},
        "canaries": {"train": len(groups.canaries), "held_out": len(groups.canaries_held_out)},
    }
    report = EvalReport(
        subject=subject.id,
        subject_digest=subject.digest,
        dataset=manifest.id,
        split="train",
        config=settings,
        num_examples=len(groups.train),
        metrics={name: value for name, value in metrics.items() if math.isfinite(value)},
        per_class={},
        per_slice={kind: {of: {"count": float(n)} for of, n in groups_.items()} for kind, groups_ in counts.items()},
        undefined=tuple(name for name, value in metrics.items() if not math.isfinite(value)),
        items_sha256=hashlib.sha256(lines).hexdigest(),
    ).sealed()
    return report, lines
