"""The per-record rules of `data.curate`: each becomes a function from a record to a verdict.

Rules over all records at once are in `data/build/barrier.py`. What the rule `language` needs is in `forge-ray[language]`.
"""

from __future__ import annotations

import importlib.util
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import partial
from itertools import pairwise
from typing import Any

import numpy as np
import numpy.typing as npt

from forge_ray.config.curate import (
    Consent,
    Decontaminate,
    HeldOut,
    Language,
    Length,
    Licence,
    PersonalDataRule,
    Repetition,
    Rule,
    Secrets,
)
from forge_ray.config.data import Splits
from forge_ray.data.curate.decontaminate import contaminated
from forge_ray.data.curate.heldout import held_out_reason
from forge_ray.data.curate.sensitive import masked, personal_data, secrets
from forge_ray.data.curate.words import words
from forge_ray.data.record.schema import DataRecord, texts, with_texts
from forge_ray.errors import ConfigError, DataError


@dataclass(frozen=True, slots=True)
class Verdict:
    """`record` is None when the rule drops it, for `reason`; `detections` counts what it saw; `flag` marks the record."""

    record: DataRecord | None
    reason: str = ""
    detections: Mapping[str, int] = field(default_factory=dict)
    flag: str = ""


Check = Callable[[DataRecord], Verdict]
SHORTEST_LINE = 2  # lines that repeat are sought among so many, at least


def compile_rule(rule: Rule, index: npt.NDArray[np.uint64] | None = None, splits: Splits | None = None) -> Check:
    """The rule as a function. `index` is what `decontaminate` and `held_out` look up, `splits` how records are divided."""
    if isinstance(rule, Length):
        return partial(_length, rule)
    if isinstance(rule, Repetition):
        return partial(_repetition, rule)
    if isinstance(rule, Language):
        return partial(_language, rule, _identifier(rule))
    if isinstance(rule, Secrets):
        return partial(_sensitive, secrets, rule)
    if isinstance(rule, PersonalDataRule):
        return partial(_sensitive, personal_data, rule)
    if isinstance(rule, Licence):
        return partial(_tag, "licence", frozenset(rule.allow))
    if isinstance(rule, Consent):
        return partial(_tag, rule.field, frozenset(value.lower() for value in rule.allow), lower=True)
    if isinstance(rule, Decontaminate):
        assert index is not None
        return partial(_decontaminate, rule, index)
    if isinstance(rule, HeldOut):
        assert index is not None
        assert splits is not None
        return partial(_held_out, rule, index, splits)
    raise AssertionError(f"{rule.rule} looks at all records at once")


def require_packages(rules: Iterable[Rule]) -> None:
    """`ConfigError` where a rule needs a package that is not installed; asked before the first row is read."""
    if any(isinstance(rule, Language) for rule in rules) and importlib.util.find_spec("py3langid") is None:
        raise ConfigError(
            "data.curate: rule language needs the package 'py3langid'",
            hint="pip install 'forge-ray[language]' on every node, or remove the rule",
        )


def meta_fields(rules: tuple[Rule, ...]) -> tuple[str, ...]:
    """Columns of a row that the rules read."""
    return tuple(rule.field for rule in rules if isinstance(rule, Consent))


def _length(rule: Length, record: DataRecord) -> Verdict:
    contents = texts(record)
    chars = sum(map(len, contents))
    if chars < rule.min_chars:
        return Verdict(None, "fewer than min_chars characters")
    if rule.max_chars and chars > rule.max_chars:
        return Verdict(None, "more than max_chars characters")
    if rule.min_words and sum(len(words(text)) for text in contents) < rule.min_words:
        return Verdict(None, "fewer than min_words words")
    return Verdict(record)


def _repetition(rule: Repetition, record: DataRecord) -> Verdict:
    for text in texts(record):
        text_words = words(text)
        if len(text_words) < rule.min_words:
            continue
        lines = [line.strip() for line in text.splitlines() if line.strip()]
        if len(lines) >= SHORTEST_LINE and 1 - len(set(lines)) / len(lines) > rule.max_duplicate_lines:
            return Verdict(None, "repeats its lines")
        chars = sum(map(len, text_words))
        pairs = Counter(pairwise(text_words))
        top = max(count * sum(map(len, pair)) for pair, count in pairs.items() if count > 1) if _repeated(pairs) else 0
        if top / chars > rule.max_top_ngram:
            return Verdict(None, "repeats one pair of words")
        if _repeated_chars(text_words, 5) / chars > rule.max_duplicate_ngrams:
            return Verdict(None, "repeats runs of five words")
    return Verdict(record)


def _repeated(counts: Counter[Any]) -> bool:
    return any(count > 1 for count in counts.values())


def _repeated_chars(text_words: list[str], length: int) -> int:
    """Characters of the words that lie in a run which stood before; each is counted once."""
    seen: set[tuple[str, ...]] = set()
    total = covered = 0
    for start in range(len(text_words) - length + 1):
        run = tuple(text_words[start : start + length])
        if run in seen:
            total += sum(len(word) for word in text_words[max(start, covered) : start + length])
            covered = start + length
        seen.add(run)
    return total


def _identifier(rule: Language) -> Any:
    require_packages([rule])
    from py3langid.langid import MODEL_FILE, LanguageIdentifier

    identifier = LanguageIdentifier.from_model_file(MODEL_FILE, norm_probs=True)
    if unknown := sorted(set(rule.keep) - set(identifier.labels)):
        raise DataError(
            f"data.curate: rule language does not know {', '.join(unknown)}",
            hint=f"choose from {' '.join(identifier.labels)}",
        )
    return identifier


def _language(rule: Language, identifier: Any, record: DataRecord) -> Verdict:
    text = "\n".join(texts(record))
    if len(text) < rule.min_chars:
        return Verdict(record, detections={"too short to judge": 1})
    ranked = identifier.rank(text)
    best = ranked[0][0]
    if sum(share for language, share in ranked if language in rule.keep) < rule.min_probability:
        return Verdict(None, f"language {best}", {best: 1})
    return Verdict(record, detections={best: 1})


def _sensitive(find: Any, rule: Secrets | PersonalDataRule, record: DataRecord) -> Verdict:
    kinds = frozenset(rule.kinds)
    counts: Counter[str] = Counter(span.kind for text in texts(record) for span in find(text, kinds))
    if not counts:
        return Verdict(record)
    names = ",".join(sorted(counts))
    if rule.action == "drop":
        return Verdict(None, names, counts)
    if rule.action == "flag":
        return Verdict(record, detections=counts, flag=f"{rule.rule}:{names}")
    return Verdict(with_texts(record, lambda text: masked(text, find(text, kinds))), detections=counts)


def _tag(column: str, allow: frozenset[str], record: DataRecord, lower: bool = False) -> Verdict:
    value = record.meta.get(column, "")
    if (value.lower() if lower else value) in allow:
        return Verdict(record)
    return Verdict(None, f"{column} is {value!r}" if value else f"no {column}")


def _decontaminate(rule: Decontaminate, index: npt.NDArray[np.uint64], record: DataRecord) -> Verdict:
    if any(contaminated(text, index, rule.ngram) for text in texts(record)):
        return Verdict(None, f"shares {rule.ngram} words with an evaluation set")
    return Verdict(record)


def _held_out(rule: HeldOut, index: npt.NDArray[np.uint64], splits: Splits, record: DataRecord) -> Verdict:
    reason = held_out_reason(record, rule, index, splits)
    return Verdict(None, reason) if reason else Verdict(record)
