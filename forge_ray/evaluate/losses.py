"""General rows through an Engine: the loss of answers and texts alone; nothing is generated."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from forge_ray.config.release import EvalConfig
from forge_ray.data.record.schema import Reject
from forge_ray.data.tokens.template import ChatTokenizer
from forge_ray.evaluate.examples import GENERAL_SPLIT, UNPOSED, Example, HeldOutRows, answer_ids, held_out
from forge_ray.evaluate.measures import GENERAL_ANSWER, GENERAL_TEXT
from forge_ray.evaluate.texts import score_texts
from forge_ray.inference.engine import Engine, Question
from forge_ray.records import DatasetManifest
from forge_ray.store.files import Store

BATCH = 64  # chats that are scored together
OF_GENERAL = "general row, "  # begins the reasons why general rows were left out


def score_answers(engine: Engine, tokenizer: ChatTokenizer, chats: Sequence[Example]) -> Iterator[dict[str, Any]]:
    """One item per chat, in order, of the loss of its answer. One that the model's template has no place for is an item with
    `left_out`, the reason."""
    for start in range(0, len(chats), BATCH):
        items: list[dict[str, Any]] = []
        questions: list[Question] = []
        for example in chats[start : start + BATCH]:
            try:
                prompt = tokenizer.prompt_ids(list(example.messages), example.tools)
                questions.append((prompt, [answer_ids(tokenizer, example, example.turn)]))
            except Reject as reason:
                items.append({"record": example.record, "left_out": f"{UNPOSED}{reason}"})
            else:
                items.append({"record": example.record, "source": example.source})
        scores = iter(engine.score_all(questions))
        for item in items:
            if "left_out" not in item:
                (score,) = next(scores)
                item |= {"logprob": score.logprob, "num_tokens": score.num_tokens}
            yield item


def score_general(engine: Engine, tokenizer: ChatTokenizer, rows: HeldOutRows, window: int) -> Iterator[dict[str, Any]]:
    """One item per general row: the loss of a chat's answer, or of a text; `window` as for `score_texts`."""
    answers, texts = score_answers(engine, tokenizer, rows.chats), score_texts(engine, tokenizer, rows.texts, window)
    for kind, items in ((GENERAL_ANSWER, answers), (GENERAL_TEXT, texts)):
        for item in items:
            yield {**item, "left_out": OF_GENERAL + item["left_out"]} if "left_out" in item else {**item, "kind": kind}


def general_held_out(store: Store, general: DatasetManifest | None, config: EvalConfig) -> HeldOutRows:
    """The general rows; those that never became records, for this tokenizer, are counted too."""
    if general is None or config.general is None:
        return HeldOutRows((), ())
    settings = config.model_copy(update={"split": GENERAL_SPLIT, "max_examples": config.general.max_examples})
    rows = held_out(store, general, settings)
    left_out = rows.left_out | {f"quarantined: {reason}": count for reason, count in general.rejects.items()}
    return HeldOutRows(rows.chats, rows.texts, {OF_GENERAL + reason: count for reason, count in left_out.items()})
