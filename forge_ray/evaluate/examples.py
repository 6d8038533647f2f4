"""Held-out rows as examples: chats that end in an answer (a text or calls), and plain texts."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Any

from forge_ray.config.classify import normalise
from forge_ray.config.release import EvalConfig
from forge_ray.data.curate.canaries import is_canary
from forge_ray.data.dataset.version import read_records
from forge_ray.data.tokens.chat import encode_chat
from forge_ray.errors import DataError
from forge_ray.records import DatasetManifest
from forge_ray.store.files import Store


@dataclass(frozen=True)
class Example:
    """One held-out chat: everything before its last answer, and that answer: a text, calls, or both."""

    record: str
    messages: tuple[dict[str, Any], ...]
    tools: list[Any] | None
    answer: str
    source: str = ""
    calls: tuple[dict[str, Any], ...] = ()
    rejected: dict[str, Any] | None = None  # the turn that a pair's answer was preferred to

    @property
    def turn(self) -> dict[str, Any]:
        """The answer as the last turn of the conversation."""
        return {"role": "assistant", "content": self.answer} | ({"tool_calls": list(self.calls)} if self.calls else {})


@dataclass(frozen=True)
class TextExample:
    """One held-out text or document."""

    record: str
    text: str
    source: str = ""


@dataclass(frozen=True)
class HeldOutRows:
    """What is evaluated, by record id, and how many rows of the split are not, by the reason."""

    chats: tuple[Example, ...]
    texts: tuple[TextExample, ...]
    left_out: dict[str, int] = field(default_factory=dict)


GENERAL_SPLIT = "test"  # of a dataset version of general rows
NO_ANSWER = "a chat that does not end in an answer"
UNPOSED = "it cannot be put to this model: "
SEVERAL_TURNS = "a judged answer of several turns"
JUDGED_BAD = "an answer that was judged bad"


def held_out(store: Store, manifest: DatasetManifest, config: EvalConfig) -> HeldOutRows:
    """The examples of the split, the first `max_examples` of either kind, canaries left out; `DataError` without any."""
    chats: list[Example] = []
    texts: list[TextExample] = []
    left_out: Counter[str] = Counter()
    for row in read_records(store, manifest, config.split):
        content = row["content"]
        if is_canary(content):
            continue
        source = source_name(manifest, row)
        if "text" in content:
            texts.append(TextExample(row["record"], content["text"], source))
            continue
        judged = content.get("chosen") or content.get("answer") or []
        messages = [*content["messages"], *judged]
        if len(judged) > 1 or len(content.get("rejected", ())) > 1:
            left_out[SEVERAL_TURNS] += 1
        elif content.get("label") is False:
            left_out[JUDGED_BAD] += 1
        elif messages[-1]["role"] == "assistant" and (messages[-1].get("content") or _calls(messages[-1])):
            context = tuple({**message, "weight": 0} for message in messages[:-1])
            answer, rejected = messages[-1].get("content") or "", next(iter(content.get("rejected", ())), None)
            calls = _calls(messages[-1])
            chats.append(Example(row["record"], context, content.get("tools"), answer, source, calls, rejected))
        else:
            left_out[NO_ANSWER] += 1
    if not (chats or texts):
        raise DataError(
            f"{manifest.id} has no text and no chat that ends in an answer in its {config.split} split"
            + "".join(f"; {count} × {reason}" for reason, count in sorted(left_out.items())),
            hint=f"raise data.splits.{config.split}, add rows, or evaluate the other split with eval.split",
        )
    count = config.max_examples or None
    return HeldOutRows(tuple(chats[:count]), tuple(texts[:count]), dict(left_out))


def answer_ids(tokenizer: Any, example: Example, turn: dict[str, Any]) -> list[int]:
    """The ids that training would have as targets for this answer: what it says and the end of the turn."""
    encoded = encode_chat(tokenizer, [*example.messages, turn], example.tools)
    ids: list[int] = encoded.ids[encoded.loss_mask > 0].tolist()
    return ids


def _calls(turn: dict[str, Any]) -> tuple[dict[str, Any], ...]:
    return tuple(turn.get("tool_calls") or ())


def examples(store: Store, manifest: DatasetManifest, config: EvalConfig) -> tuple[Example, ...]:
    """The chats of the split that end in a text; raises `DataError` when there is none."""
    chats = tuple(example for example in held_out(store, manifest, config).chats if example.answer and not example.calls)
    if not chats:
        raise DataError(
            f"{manifest.id} has no chat that ends in a text in its {config.split} split",
            hint=f"raise data.splits.{config.split}, add rows, or evaluate the other split with eval.split",
        )
    return chats


def source_name(manifest: DatasetManifest, row: dict[str, Any]) -> str:
    """The mixture's name of the source that a record came from; its file, in versions that have no mixture."""
    number = row.get("source")
    return manifest.mixture[number].name if number is not None and number < len(manifest.mixture) else str(row["file"])


def label_set(store: Store, manifest: DatasetManifest, config: EvalConfig) -> tuple[str, ...]:
    """The labels of `label_forms`."""
    return tuple(label_forms(store, manifest, config))


def label_forms(store: Store, manifest: DatasetManifest, config: EvalConfig) -> dict[str, str]:
    """Label as it is compared (`normalise`) → as an answer writes it: as in the settings, or as most training rows do."""
    if config.labels != "from_data":
        return {normalise(label): label for label in config.labels or ()}
    train = EvalConfig(split="validation").model_copy(update={"split": "train"})
    counts = Counter(example.answer for example in examples(store, manifest, train))
    forms = {normalise(text): text for text, _ in sorted(counts.items(), key=lambda item: (item[1], item[0]))}
    return dict(sorted(forms.items()))
