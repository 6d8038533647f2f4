"""Held-out pairs through a reward model: how often the preferred answer has the higher reward.

Each answer is scored in the conversation that it ends, by transformers' own class, as others who open the export would. An
item has `kind: reward`, `chosen_reward` and `rejected_reward`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Generator, Iterator, Sequence
from typing import Any

from forge_ray.config.release import EvalConfig
from forge_ray.data.record.schema import Reject
from forge_ray.data.tokens.chat import encode_chat
from forge_ray.errors import ConfigError
from forge_ray.evaluate.examples import UNPOSED, Example, HeldOutRows
from forge_ray.evaluate.measures import REWARDED
from forge_ray.evaluate.publish import ScoredRows
from forge_ray.evaluate.scoring_files import ScoringFiles
from forge_ray.inference.classifier import Classifier, logits_of

NO_PAIR = "a row without a rejected answer"
TOO_LONG = "a conversation that is longer than the model's context"


def reward_rows(
    held: HeldOutRows, model: Classifier, config: EvalConfig, files: ScoringFiles
) -> Generator[dict[str, Any], None, ScoredRows]:
    """Yields `{"done", "total"}` on the way; returns what was scored. Raises `ConfigError` for settings that ask for text or
    labels."""
    text: dict[str, Any] = {"safety": files.prompts, "metrics": files.functions, "json_schema": files.schema}
    text |= {"general": config.general, "kl": config.kl}
    labels = {"labels": config.labels, "thresholds": config.thresholds}
    if unread := [name for name, is_set in (text | labels).items() if is_set]:
        raise ConfigError(
            f"eval.{unread[0]} asks for text or labels, and a reward model gives numbers", hint=f"remove eval.{unread[0]}"
        )
    items: list[dict[str, Any]] = []
    left_out = Counter(held.left_out) + Counter({NO_PAIR: len(held.texts)})
    for item in score_rewarded(held.chats, model):
        if "left_out" in item:
            left_out[item["left_out"]] += 1
        else:
            items.append(item)
            yield {"done": len(items), "total": len(held.chats)}
    return ScoredRows(items, (), [], None, left_out)


def score_rewarded(chats: Sequence[Example], model: Classifier) -> Iterator[dict[str, Any]]:
    """One item per example; one that is no pair, or cannot be read, is an item with `left_out`."""
    posed: list[Example] = []
    documents = []
    for example in chats:
        if example.rejected is None:
            yield {"record": example.record, "left_out": NO_PAIR}
            continue
        try:
            turns = (example.turn, example.rejected)
            pair = [encode_chat(model.tokenizer, [*example.messages, turn], example.tools).ids for turn in turns]
        except Reject as reason:
            yield {"record": example.record, "left_out": f"{UNPOSED}{reason}"}
            continue
        if max(map(len, pair)) > model.max_text_tokens:
            yield {"record": example.record, "left_out": TOO_LONG}
            continue
        posed.append(example)
        documents += pair
    rewards = {number: float(logits[0]) for number, logits in logits_of(model, documents)}
    for number, example in enumerate(posed):
        yield {
            "record": example.record,
            "source": example.source,
            "kind": REWARDED,
            "chosen_reward": rewards[2 * number],
            "rejected_reward": rewards[2 * number + 1],
        }
