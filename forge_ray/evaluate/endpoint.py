"""A model of another system on the same held-out rows: asked over its API, scored by the same rules, on record as a report.

Rows leave the premises by it. The store's signed policy must name the host; who sent how many rows of which dataset version
to which host and model is an event of the audit log, written before the first row is sent. The answers of an endpoint can
change from day to day, so it is asked anew each time unless a caller wants the last report.
"""

from __future__ import annotations

import asyncio
import sys
import time
from collections import Counter
from collections.abc import AsyncIterator, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field, replace
from typing import Any

from forge_ray.config.release import EvalConfig
from forge_ray.errors import ConfigError, DataError, EngineError
from forge_ray.evaluate.answer_schema import refuse_unfit, with_validity
from forge_ray.evaluate.calls import call_fields
from forge_ray.evaluate.chat_api import Connection, Endpoint, answers, connected
from forge_ray.evaluate.chat_format import ChatAnswer, Unanswered, request_of
from forge_ray.evaluate.examples import Example, HeldOutRows, held_out, label_set
from forge_ray.evaluate.general import general_rows
from forge_ray.evaluate.losses import OF_GENERAL, general_held_out
from forge_ray.evaluate.own import scored, try_functions
from forge_ray.evaluate.publish import Scored, ScoredRows, publish, shared_rows
from forge_ray.evaluate.reports import reports_of
from forge_ray.evaluate.safety import SafetyPrompt
from forge_ray.evaluate.scoring_files import ScoringFiles, files_of
from forge_ray.progress import Stage, stage, visible
from forge_ray.records import DatasetManifest, EvalReport
from forge_ray.store import disclosures, paths
from forge_ray.store.catalog import Catalog
from forge_ray.store.erased import refuse_erased
from forge_ray.store.removed import require
from forge_ray.store.uses import using

BATCH = 64  # requests between two looks at the store's erasures
MOST_FAILURES = 10  # requests without an answer: in succession and each tried again, or the first of all
TEXT = "a text: an endpoint gives no loss of it"
NO_LOSS = "an endpoint gives no loss of it"
IMAGE = "an image, which is not sent to an endpoint"
MACHINE = ("engine", "cpus", "gpus")  # settings of an evaluation here, which decide nothing there


@dataclass
class _Asked:
    """What has come of the requests so far."""

    items: list[dict[str, Any]] = field(default_factory=list)
    safety: list[dict[str, Any]] = field(default_factory=list)
    left_out: Counter[str] = field(default_factory=Counter)
    num_sent: int = 0
    num_answered: int = 0
    num_tokens: Counter[str] = field(default_factory=Counter)


def refuse_endpoint(catalog: Catalog, endpoint: Endpoint) -> None:
    """Raise `PolicyError` where the policy does not name the host, or this process may not send rows or write reports."""
    disclosures.refuse_host(catalog, endpoint.origin)
    catalog.check_may("evals")


def evaluate_endpoint(
    catalog: Catalog, endpoint: Endpoint, manifest: DatasetManifest, config: EvalConfig, reuse: bool = False
) -> EvalReport:
    """The report of a model behind an API on the held-out rows of `manifest`. Raises `PolicyError` where rows may not be
    sent there, `DataError` where no row was answered, `ConfigError` where a function of `eval.metrics` fails (the answers
    are kept in a report without it), and what `chat_api.answers` raises. With `reuse` the last report of the same rows and
    settings is enough, where there is one, and nothing is sent."""
    started = time.monotonic()
    files, digests = files_of(config)
    general = general_rows(catalog, manifest, config)
    settings = _settings(endpoint, config, digests, general)
    with stage("evaluate") as it:
        existing = list(reports_of(catalog, (endpoint.name, manifest.id, settings))) if reuse else []
        if existing:
            it.done(f"{existing[-1].id}  {endpoint.name}: the report of {existing[-1].created_at[:19]}, nothing was sent")
            return existing[-1]
        refuse_endpoint(catalog, endpoint)
        what = f"the evaluation of {endpoint.name}"
        refuse_erased(catalog.store, what, manifest.id)
        require(catalog, paths.dataset(manifest.id))
        with using(catalog.store, what, paths.dataset(manifest.id)):
            held, labels = held_out(catalog.store, manifest, config), label_set(catalog.store, manifest, config)
            refuse_unfit(files.schema, held.chats)
            try_functions(files.functions, held.chats, config.slices, labels)
            shared = shared_rows(catalog.store, config, manifest, held)
            asked = _sent(catalog, endpoint, manifest, config, held, files.prompts, it)
            asked.left_out.update(_not_scored(general_held_out(catalog.store, general, config)))
        valid = list(with_validity(iter(asked.items), files.schema))
        costs = {name: float(count) for name, count in asked.num_tokens.items() if count}

        def published(config: EvalConfig, files: ScoringFiles, settings: dict[str, Any]) -> EvalReport:
            items = list(scored(iter(valid), files.functions, held.chats, config.slices, labels))
            rows = ScoredRows(items, labels, asked.safety, shared, asked.left_out)
            of = Scored(endpoint.name, "", settings, costs, time.monotonic() - started, files, endpoint.url)
            report = publish(catalog.store, manifest, config, rows, of)
            refuse_erased(catalog.store, report.id, manifest.id, folder=paths.report(report.id))
            return catalog.put(report)

        try:
            report = published(config, files, settings)
        except ConfigError as error:
            if not config.metrics:
                raise
            bare = config.model_copy(update={"metrics": ()})
            bare_digests = {name: value for name, value in digests.items() if name != "metrics"}
            bare_settings = _settings(endpoint, bare, bare_digests, general)
            report = published(bare, replace(files, functions=()), bare_settings)
            raise ConfigError(
                f"{error.message}; the answers of {endpoint.name} are kept as {report.id}, without scores of eval.metrics",
                hint=error.hint,
            ) from error
        scores = ", ".join(f"{name} {value:.3f}" for name, value in report.metrics.items())
        it.done(f"{report.id}  {endpoint.name}: {scores}")
        if config.kl:
            line = f"  kl is not measured of {visible(endpoint.name)}: an API has no weights to compare with those before"
            print(line, file=sys.stderr, flush=True)
        return report


def _settings(
    endpoint: Endpoint, config: EvalConfig, digests: dict[str, Any], general: DatasetManifest | None
) -> dict[str, Any]:
    """What the report is known by: what decides the scores, the bytes of files (`digests`) and the general rows included."""
    scoring = {name: value for name, value in config.scoring().items() if name not in MACHINE}
    asked_with = {"model": endpoint.model, "url": endpoint.url, "options": dict(endpoint.options)}
    settings = scoring | digests | {"endpoint": asked_with}
    if general and config.general:
        settings["general"] = {"dataset": general.id, "max_examples": config.general.max_examples}
    return settings


def _sent(
    catalog: Catalog,
    endpoint: Endpoint,
    manifest: DatasetManifest,
    config: EvalConfig,
    held: HeldOutRows,
    prompts: Sequence[SafetyPrompt],
    it: Stage,
) -> _Asked:
    """Send the rows that can be, between two events of the audit log."""
    asked = _Asked()
    asked.left_out.update(held.left_out)
    asked.left_out.update({TEXT: len(held.texts)} if held.texts else {})
    chats = [chat for chat in held.chats if not _has_image(chat)]
    asked.left_out.update({IMAGE: len(held.chats) - len(chats)} if len(held.chats) > len(chats) else {})
    if not chats:
        raise DataError(
            f"none of the {asked.left_out.total()} held-out rows can be put to {endpoint.name}:"
            f" {asked.left_out.most_common(1)[0][0]}",
            hint="an endpoint is compared on chats; nothing was sent",
        )
    began = disclosures.begin(catalog, manifest.id, config.split, len(chats), endpoint.origin, endpoint.url, endpoint.model)
    try:
        asyncio.run(_ask_all(catalog, endpoint, manifest.id, config, chats, prompts, asked, it))
    finally:
        disclosures.end(catalog, began, asked.num_sent, asked.num_answered)
    if not asked.items:
        raise DataError(
            f"{endpoint.name} answered none of the {len(chats)} rows: {asked.left_out.most_common(1)[0][0]}",
            hint="`forge audit log --action disclosure` says how many were sent",
        )
    return asked


def _not_scored(general: HeldOutRows) -> dict[str, int]:
    """How many general rows were not scored, by the reason: only a loss is measured of them."""
    num_rows = len(general.chats) + len(general.texts)
    return dict(general.left_out) | ({f"{OF_GENERAL}{NO_LOSS}": num_rows} if num_rows else {})


def _has_image(chat: Example) -> bool:
    contents = [message.get("content") for message in chat.messages]
    return any(part.get("type") != "text" for content in contents if isinstance(content, list) for part in content)


async def _ask_all(
    catalog: Catalog,
    endpoint: Endpoint,
    dataset: str,
    config: EvalConfig,
    chats: Sequence[Example],
    prompts: Sequence[SafetyPrompt],
    asked: _Asked,
    it: Stage,
) -> None:
    """Fill `asked`, in the order of `chats` and `prompts`."""
    model, options = endpoint.model, endpoint.options
    rows = [request_of(model, chat.messages, chat.tools, config.max_new_tokens, options) for chat in chats]
    more = [request_of(model, prompt.asked, None, config.safety_max_new_tokens, options) for prompt in prompts]
    replies: tuple[dict[int, ChatAnswer], dict[int, ChatAnswer]] = ({}, {})
    async with connected(endpoint) as connection:
        for bodies, own, what in ((rows, replies[0], ""), (more, replies[1], "a safety prompt: ")):
            try:
                async with aclosing(_arriving(catalog, dataset, connection, bodies)) as arriving:  # type: ignore[type-var]
                    async for number, answer in arriving:
                        if isinstance(answer, ChatAnswer):
                            own[number] = answer
                            counts = {"prompt_tokens": answer.prompt_tokens, "completion_tokens": answer.completion_tokens}
                            asked.num_tokens.update(counts)
                        else:
                            asked.left_out[f"{what}{answer.reason}"] += 1
                        done = len(replies[0]) + len(replies[1])
                        it.update(done, len(rows) + len(more), f"{endpoint.name}: {done}/{len(rows) + len(more)} answers")
            finally:
                if bodies is rows:
                    asked.num_sent, asked.num_answered = connection.num_sent, len(own)
    asked.items = [_item(chats[number], reply) for number, reply in sorted(replies[0].items())]
    asked.safety = [_judged(prompts[number], reply) for number, reply in sorted(replies[1].items())]


async def _arriving(
    catalog: Catalog, dataset: str, connection: Connection, bodies: Sequence[dict[str, Any]]
) -> AsyncIterator[tuple[int, ChatAnswer | Unanswered]]:
    """The answers as they come. `PolicyError` once an erasure withdraws the dataset, `EngineError` once it is clear that no
    more answers will come: nothing more is sent then."""
    endpoint, size = connection.endpoint, max(BATCH, connection.endpoint.concurrency)
    num_answered = num_outages = num_failed = 0
    for start in range(0, len(bodies), size):
        refuse_erased(catalog.store, f"the evaluation of {endpoint.name}", dataset)
        async with aclosing(answers(connection, bodies[start : start + size])) as arriving:  # type: ignore[type-var]
            async for number, answer in arriving:
                yield start + number, answer
                if isinstance(answer, ChatAnswer):
                    num_answered, num_outages = num_answered + 1, 0
                    continue
                num_failed, num_outages = num_failed + 1, num_outages + 1 if answer.is_outage else 0
                if num_outages >= MOST_FAILURES or (num_failed >= MOST_FAILURES and not num_answered):
                    raise EngineError(
                        f"{endpoint.name} left {num_failed} requests unanswered: {answer.reason}"
                        f"{f' ({answer.message})' if answer.message else ''}",
                        hint="no more rows were sent; --endpoint-option changes fields of the requests, --timeout and"
                        " --concurrency how they are sent",
                    )


def _item(chat: Example, reply: ChatAnswer) -> dict[str, Any]:
    return {
        "record": chat.record,
        "source": chat.source,
        "reference": chat.answer,
        "prediction": reply.text,
        "finish_reason": reply.finish_reason,
        "answered_by": reply.answered_by,
        **call_fields(chat, list(reply.calls)),
    }


def _judged(prompt: SafetyPrompt, reply: ChatAnswer) -> dict[str, Any]:
    return {"place": prompt.place, "asked": prompt.asked, "answer": reply.text, "failures": prompt.failures(reply.text)}
