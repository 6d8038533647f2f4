"""Items of an evaluation → scores (pure); the rows say which.

- a chat that ends in a text: exact match and loss; with labels: likeliest label and macro F1; where every reference is a
  JSON object (extraction): the object, and precision and recall of its fields
- a chat that ends in calls: the calls as a whole, their names, their arguments; and calls where a text was expected
- a pair of a preferred and a rejected answer: also which of them is likelier, and by how many nats
- either, where `eval.kl` asks: the KL divergence to the model that the run started from, nats per token (`kl.py`)
- a pair that a reward model scores: whether the preferred answer has more, and how much (`rewarded.py`)
- a chat that a classifier answers: also its classes and its probabilities (`class_measures.py`)
- either, with functions of the user's own: the mean of each of their scores over the rows that have it
- a plain text: loss, perplexity, and bits per byte, which can be compared over tokenizers
- general rows: the loss of their answers or texts, under names that begin with `general_`
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from forge_ray.config.classify import normalise
from forge_ray.config.measurements import GENERAL
from forge_ray.evaluate.chance import Difference, Statistic, difference, interval, mapped, ratio, share
from forge_ray.evaluate.class_measures import class_statistics, macro_f1
from forge_ray.records import EvalReport

Items = Sequence[dict[str, Any]]
CALL, TEXT, REWARDED = "call", "text", "reward"
GENERAL_ANSWER, GENERAL_TEXT = "general_answer", "general_text"
NUMBERS = ("loss", "perplexity", "bits_per_byte", "margin", "temperature", "kl")  # what is no share: names end so


def is_share(report: EvalReport, metric: str) -> bool:
    """Whether it is shown in percent. The user's own scores are not: nothing says what they count."""
    return not metric.endswith(NUMBERS) and metric not in report.num_scored


def is_right(item: dict[str, Any]) -> bool:
    return normalise(item["prediction"]) == normalise(item["reference"])


def statistics(items: Items, labels: Sequence[str]) -> dict[str, Statistic]:
    """Metric → its statistic over the items that have it, in their order."""
    chats = [item for item in items if "kind" not in item]
    calls = [item for item in items if item.get("kind") == CALL]
    texts = [item for item in items if item.get("kind") == TEXT]
    by_metric: dict[str, Statistic] = {}
    if chats:
        by_metric["exact_match"] = share([is_right(item) for item in chats])
    if scored := [item for item in (*chats, *calls) if "logprob" in item]:  # an endpoint gives none
        by_metric |= _losses("", scored)
    if chats and labels:
        if all("likeliest" in item for item in chats):
            by_metric["label_likelihood"] = share([item["likeliest"] == normalise(item["reference"]) for item in chats])
        by_metric["macro_f1"] = _macro_f1(chats, labels)
    is_classified = bool(chats) and all("predicted" in item for item in chats)
    if is_classified:
        by_metric |= class_statistics(chats)
    if chats and not labels and not is_classified and (references := objects(chats)):
        by_metric |= _extraction(references, [_object(item["prediction"]) for item in chats])
    if calls:
        by_metric |= {name: share([rule(item) for item in calls]) for name, rule in CALL_RULES.items()}
    if judged := [item["valid_schema"] for item in chats if "valid_schema" in item]:
        by_metric["valid_schema"] = share(judged)
    by_metric |= _own([*chats, *calls])
    if offered := [item for item in chats if "called" in item]:
        by_metric["needless_calls"] = share([bool(item["called"]) for item in offered])
    if pairs := [item for item in items if "rejected_logprob" in item]:
        margins = [item["logprob"] - item["rejected_logprob"] for item in pairs]
        by_metric["pair_accuracy"] = share([margin > 0 for margin in margins])
        by_metric["pair_margin"] = ratio(margins, [1.0] * len(pairs))
    if moved := [item for item in items if "kl" in item]:
        by_metric["kl"] = ratio([item["kl"] for item in moved], [item["kl_tokens"] for item in moved])
    if rewarded := [item for item in items if item.get("kind") == REWARDED]:
        gaps = [item["chosen_reward"] - item["rejected_reward"] for item in rewarded]
        by_metric["pair_accuracy"] = share([gap > 0 for gap in gaps])
        by_metric["reward_margin"] = ratio(gaps, [1.0] * len(rewarded))
    if texts:
        by_metric |= _text_losses("", texts)
    if general_answers := [item for item in items if item.get("kind") == GENERAL_ANSWER]:
        by_metric |= _losses(GENERAL, general_answers)
    if general_texts := [item for item in items if item.get("kind") == GENERAL_TEXT]:
        by_metric |= _text_losses(GENERAL, general_texts)
    return by_metric


def is_general(item: dict[str, Any]) -> bool:
    return item.get("kind") in (GENERAL_ANSWER, GENERAL_TEXT)


def intervals(items: Items, labels: Sequence[str]) -> dict[str, tuple[float, float]]:
    """Metric → its interval, where there are rows enough."""
    by_metric = {name: interval(statistic) for name, statistic in statistics(items, labels).items()}
    return {name: bounds for name, bounds in by_metric.items() if bounds is not None}


def differences(ours: Items, theirs: Items, labels: Sequence[str], confidence: float) -> dict[str, Difference | None]:
    """Metric → ours minus theirs on the rows that both have, two-sided; None where there are too few rows to say."""
    return {name: difference(*both, confidence) for name, both in paired(ours, theirs, labels).items()}


def paired(ours: Items, theirs: Items, labels: Sequence[str]) -> dict[str, tuple[Statistic, Statistic]]:
    """Metric → the statistics of either on the rows that both have, in one order."""
    others = {_key(item): item for item in theirs}
    both = [_on_both_sides(item, others[_key(item)]) for item in ours if _key(item) in others]
    if not both:
        return {}
    one, two = (statistics([pair[side] for pair in both], labels) for side in (0, 1))
    shared = [name for name in one if name in two and one[name].num_rows == two[name].num_rows]
    return {name: (one[name], two[name]) for name in shared}


def _key(item: dict[str, Any]) -> tuple[bool, str]:
    """A row may be among the rows of the task and the general ones."""
    return is_general(item), item["record"]


def _on_both_sides(ours: dict[str, Any], theirs: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Both items, with the user's own scores that both have: a difference is of the same rows."""
    if "scores" not in ours or "scores" not in theirs:
        return ours, theirs
    names = ours["scores"].keys() & theirs["scores"].keys()
    kept = ({name: item["scores"][name] for name in names} for item in (ours, theirs))
    return {**ours, "scores": next(kept)}, {**theirs, "scores": next(kept)}


def _own(items: Items) -> dict[str, Statistic]:
    """Means of the user's own scores; of one that is 0 or 1 on every row it is a share."""
    by_name: dict[str, list[float]] = {}
    for item in items:
        for name, value in item.get("scores", {}).items():
            by_name.setdefault(name, []).append(value)
    return {
        name: share([value == 1 for value in values]) if {*values} <= {0.0, 1.0} else ratio(values, [1.0] * len(values))
        for name, values in sorted(by_name.items())
    }


def _losses(prefix: str, items: Items) -> dict[str, Statistic]:
    """Per token, natural logarithm."""
    loss = ratio(_nats(items), [item["num_tokens"] for item in items])
    return {f"{prefix}loss": loss, f"{prefix}perplexity": mapped(loss, lambda nats: math.exp(min(nats, 700.0)))}


def _text_losses(prefix: str, texts: Items) -> dict[str, Statistic]:
    bits = ratio(_nats(texts), [item["num_bytes"] * math.log(2) for item in texts])
    return {**_losses(f"{prefix}text_", texts), f"{prefix}bits_per_byte": bits}


def _nats(items: Items) -> list[float]:
    return [-item["logprob"] for item in items]


def _macro_f1(chats: Items, labels: Sequence[str]) -> Statistic:
    """Of the classes that occur, of the generated answers."""
    actual = np.array([[normalise(item["reference"]) == label for label in labels] for item in chats], np.float64)
    predicted = np.array([[normalise(item["prediction"]) == label for label in labels] for item in chats], np.float64)
    return macro_f1(actual, predicted)


def class_scores(chats: Items, label: str) -> dict[str, float]:
    """Precision, recall, F1 and support of one class."""
    predicted = [normalise(item["prediction"]) == label for item in chats]
    actual = [normalise(item["reference"]) == label for item in chats]
    both = sum(p and a for p, a in zip(predicted, actual, strict=True))
    precision = both / sum(predicted) if any(predicted) else 0.0
    recall = both / sum(actual) if any(actual) else 0.0
    f1 = 2 * precision * recall / (precision + recall) if both else 0.0
    return {"precision": precision, "recall": recall, "f1": f1, "support": float(sum(actual))}


# ---------------------------------------------------------------- extraction


def objects(chats: Items) -> list[dict[str, Any]]:
    """The references, where every one is a JSON object; else none."""
    references = [_object(item["reference"]) for item in chats]
    return [reference for reference in references if reference is not None] if None not in references else []


def _object(text: str) -> dict[str, Any] | None:
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None


def leaves(value: Any, path: str = "") -> Iterator[tuple[str, str]]:
    """(path, JSON of the value) of every value that holds no other; elements of a list have the path of the list."""
    if isinstance(value, dict) and value:
        for key, item in value.items():
            yield from leaves(item, f"{path}.{key}" if path else key)
    elif isinstance(value, list) and value:
        for item in value:
            yield from leaves(item, f"{path}[]")
    else:
        yield path, json.dumps(value, sort_keys=True)


def _extraction(references: Sequence[dict[str, Any]], answers: Sequence[dict[str, Any] | None]) -> dict[str, Statistic]:
    expected = [Counter(leaves(reference)) for reference in references]
    answered = [Counter(leaves(answer)) if answer is not None else Counter() for answer in answers]
    right = [float((w & g).total()) for w, g in zip(expected, answered, strict=True)]
    num_expected, num_answered = ([float(each.total()) for each in side] for side in (expected, answered))
    return {
        "json_valid": share([answer is not None for answer in answers]),
        "json_match": share([answer == reference for answer, reference in zip(answers, references, strict=True)]),
        "field_precision": ratio(right, num_answered),
        "field_recall": ratio(right, num_expected),
        "field_f1": ratio([2 * count for count in right], [w + g for w, g in zip(num_expected, num_answered, strict=True)]),
    }


def field_scores(chats: Items) -> dict[str, dict[str, float]]:
    """Path of a field → precision, recall, F1 and support; {} where the rows are no extraction."""
    references = objects(chats)
    totals: dict[str, Counter[str]] = {}
    for reference, item in zip(references, chats if references else [], strict=True):
        expected, answered = Counter(leaves(reference)), Counter(leaves(_object(item["prediction"]) or {}))
        answered.pop(("", "{}"), None)  # no object at all: there is no field to count
        for name, side in (("expected", expected), ("answered", answered), ("right", expected & answered)):
            for (path, _), count in side.items():
                totals.setdefault(path, Counter())[name] += count
    scores = {}
    for path, counts in sorted(totals.items()):
        precision = counts["right"] / counts["answered"] if counts["answered"] else 0.0
        recall = counts["right"] / counts["expected"] if counts["expected"] else 0.0
        f1 = 2 * counts["right"] / (counts["expected"] + counts["answered"])
        scores[path] = {"precision": precision, "recall": recall, "f1": f1, "support": float(counts["expected"])}
    return scores


# ---------------------------------------------------------------- calls


def _calls(item: dict[str, Any], side: str) -> list[str]:
    """The calls of the reference (`calls`) or of the answer (`called`) as JSON, in order."""
    return [json.dumps(call, sort_keys=True) for call in item[side]]


def _names(item: dict[str, Any], side: str) -> list[str]:
    return [call["name"] for call in item[side]]


CALL_RULES: dict[str, Callable[[dict[str, Any]], bool]] = {
    "calls_match": lambda item: _calls(item, "calls") == _calls(item, "called"),
    "calls_match_any_order": lambda item: sorted(_calls(item, "calls")) == sorted(_calls(item, "called")),
    "call_names_match": lambda item: _names(item, "calls") == _names(item, "called"),
}
