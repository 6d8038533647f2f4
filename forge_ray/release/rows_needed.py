"""What `forge plan` says of a gate: the held-out rows that rules with a confidence need, next to those that there are."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from forge_ray.config.classify import Target
from forge_ray.config.gate import BetterThan, Gate, NoWorseThan
from forge_ray.config.own_metric import RESERVED
from forge_ray.config.run import RunConfig
from forge_ray.data.dataset.labels import by_target
from forge_ray.data.record.schema import Reject
from forge_ray.evaluate import reports
from forge_ray.evaluate.examples import HeldOutRows, held_out, label_set
from forge_ray.evaluate.measures import CALL, CALL_RULES, TEXT
from forge_ray.evaluate.sample_size import POWER, Spread, num_rows, smallest_gain
from forge_ray.evaluate.summary import slice_of
from forge_ray.records import DatasetManifest
from forge_ray.store.catalog import Catalog
from forge_ray.store.files import Store

DISCORDANCE = 0.5  # of two models whose answers are independent, each right on half of the rows
GAIN = 0.05  # that is assumed of a share where the margin is 0: twice of it would be 0 too
EFFECT = 0.2  # the same for a mean, in standard deviations: a small effect (J. Cohen, 1988)
SHARES = frozenset(
    {
        "exact_match",
        "label_likelihood",
        "pair_accuracy",
        "json_valid",
        "json_match",
        "valid_schema",
        "needless_calls",
        *CALL_RULES,
    }
)
OF_PAIRS = ("pair_accuracy", "pair_margin", "reward_margin")
OF_TEXTS = ("text_loss", "text_perplexity", "bits_per_byte")
NO_ROWS = ("contamination", "size_bytes", "latency_ms_per_token")
OF_ANSWERS = ("exact_match", "label_likelihood", "macro_f1", "valid_schema", "json_", "field_")

Rule = BetterThan | NoWorseThan


@dataclass(frozen=True)
class RowsNeeded:
    """`rule` in words; `num_rows` that show the true gain `gain` with probability `power`, `num_rows_at_worst` whatever the
    discordance; `num_held_out` that there are (of the smallest slice, where slices are compared), enough for a true gain of
    `smallest_gain`. What is not known is None; `assumption` says what the numbers rest on, or why there are none."""

    rule: str
    power: float
    assumption: str
    gain: float | None = None
    num_rows: int | None = None
    num_rows_at_worst: int | None = None
    num_held_out: int | None = None
    smallest_gain: float | None = None


def rule_text(rule: Rule) -> str:
    """A rule in words, without its slices."""
    at = f" at {rule.confidence:.0%}" if rule.confidence else ""
    if isinstance(rule, BetterThan):
        return f"{rule.metric} better than {rule.incumbent} by {rule.margin:g}{at}"
    return f"{rule.metric} at most {rule.tolerance:g} worse than {rule.incumbent}{at}"


def rows_needed_of(config: RunConfig, store: Store, dataset: str) -> tuple[RowsNeeded, ...]:
    """What the gate's rules with a confidence ask of the held-out rows. `dataset`: its id, "" where there is none yet."""
    rules, split = config.release.gate, config.eval.split
    if not dataset or not any(rule.confidence for rule in rules.comparisons):
        return rows_needed(rules, None, (), {}, split, config.train.targets)
    with Catalog.read_only(store) as catalog:
        manifest = catalog.get_as(DatasetManifest, dataset)
        by_label = any(rule.slices == "label" for rule in rules.no_worse_than)
        labels = label_set(store, manifest, config.eval) if by_label else ()
        spreads = reports.measured_spreads(catalog, config.name)
        return rows_needed(rules, held_out(store, manifest, config.eval), labels, spreads, split, config.train.targets)


def rows_needed(
    gate: Gate,
    held: HeldOutRows | None,
    labels: Sequence[str],
    measured: Mapping[str, Spread],
    split: str,
    targets: tuple[Target, ...] = (),
) -> tuple[RowsNeeded, ...]:
    """Of each rule with a confidence, in the order of the run file. `held`: None where there is no dataset yet;
    `measured`: spreads by metric, as far as an earlier version has them; `targets`: of a classifier."""
    rules = [rule for rule in gate.comparisons if rule.confidence is not None]
    return tuple(_needed(rule, held, labels, measured.get(rule.metric), split, targets) for rule in rules)


def _needed(
    rule: Rule,
    held: HeldOutRows | None,
    labels: Sequence[str],
    measured: Spread | None,
    split: str,
    targets: tuple[Target, ...],
) -> RowsNeeded:
    assert rule.confidence is not None
    kind = rule.slices if isinstance(rule, NoWorseThan) else "none"
    text = rule_text(rule) + (f", in each {kind}" if kind != "none" else "")
    if rule.metric in NO_ROWS or rule.metric.startswith(RESERVED):
        return RowsNeeded(text, POWER, f"{rule.metric} is not scored on the rows of the {split} split")
    of_target = next((target for target in targets if len(targets) > 1 and rule.metric.startswith(f"{target.name}_")), None)
    available = _available(rule, held, labels, targets, of_target) if held else None
    is_share = rule.metric in SHARES or (of_target is not None and rule.metric == f"{of_target.name}_accuracy")
    spread = measured or (Spread(DISCORDANCE, True) if is_share else None)
    margin = rule.margin if isinstance(rule, BetterThan) else -rule.tolerance
    if spread is None:
        if margin:
            why = "how much it differs from row to row is not known before a version of this name was released"
            return RowsNeeded(text, POWER, why, num_held_out=available)
        spread = Spread(1.0, False)  # the unit of the gain
        rows = num_rows(spread, EFFECT, 0.0, rule.confidence)
        why = f"{EFFECT:g} standard deviations of the rows' differences"
        return RowsNeeded(text, POWER, why, num_rows=rows, num_held_out=available)
    gain = _assumed_gain(margin, spread)
    if gain <= margin:
        return RowsNeeded(text, POWER, f"a share gains less than {margin:g}", num_held_out=available)
    return RowsNeeded(
        text,
        POWER,
        _assumption(spread, measured is not None),
        gain=gain,
        num_rows=num_rows(spread, gain, margin, rule.confidence),
        num_rows_at_worst=num_rows(Spread(1.0, True), gain, margin, rule.confidence) if spread.is_share else None,
        num_held_out=available,
        smallest_gain=smallest_gain(spread, available, margin, rule.confidence) if available else None,
    )


def _assumption(spread: Spread, is_measured: bool) -> str:
    begin = "as with the newest version of this name," if is_measured else "assuming that"
    if spread.is_share:
        return f"{begin} one of the two models alone is right on {spread.value:.0%} of them"
    return f"{begin} the rows' differences have a standard deviation of {spread.value:.3g}"


def _assumed_gain(margin: float, spread: Spread) -> float:
    """Twice the margin; none, where a version may be worse by a tolerance; something small where the margin is 0."""
    if margin < 0:
        return 0.0
    if margin == 0:
        return GAIN if spread.is_share else EFFECT * spread.value
    return min(2 * margin, 1.0) if spread.is_share else 2 * margin


def _available(
    rule: Rule, held: HeldOutRows, labels: Sequence[str], targets: tuple[Target, ...], of_target: Target | None
) -> int:
    """Rows that a rule's metric is scored on; with slices, those of the smallest one that it compares."""
    chats = [chat for chat in held.chats if of_target is None or _has_label(targets, of_target, chat.answer)]
    chats = [chat for chat in chats if chat.rejected or rule.metric not in OF_PAIRS]
    rows = [_row(chat.source, chat.answer, bool(chat.calls), bool(chat.tools)) for chat in chats]
    rows += [{"source": text.source, "reference": "", "kind": TEXT} for text in held.texts]
    counted = [row for row in rows if _is_scored(rule.metric, row)]
    if not isinstance(rule, NoWorseThan) or rule.slices == "none":
        return len(counted)
    sizes: dict[str, int] = {}
    for row in counted:
        if (value := slice_of(row, rule.slices, labels)) is not None:
            sizes[value] = sizes.get(value, 0) + 1
    return min((size for size in sizes.values() if size >= rule.min_examples), default=0)


def _has_label(targets: tuple[Target, ...], target: Target, answer: str) -> bool:
    try:
        return target.name in by_target(targets, answer)
    except Reject:
        return False


def _row(source: str, answer: str, has_calls: bool, has_tools: bool) -> dict[str, Any]:
    row = {"source": source, "reference": answer, "tools": has_tools}
    return row | ({"kind": CALL} if has_calls else {})


def _is_scored(metric: str, row: dict[str, Any]) -> bool:
    kind = row.get("kind", "")
    if metric in OF_TEXTS:
        return bool(kind == TEXT)
    if metric in CALL_RULES:
        return bool(kind == CALL)
    if metric == "needless_calls":
        return not kind and row["tools"]
    if metric.startswith(OF_ANSWERS):
        return not kind
    return bool(kind != TEXT)  # the loss, and the user's own metrics


def line(one: RowsNeeded, split: str) -> str:
    """One rule as a line of `forge plan`."""
    there = "" if one.num_held_out is None else f"; the {split} split has {one.num_held_out:,}"
    if one.num_rows is None:
        return f"gate {one.rule}: the held-out rows that it needs are not known: {one.assumption}{there}"
    needs = f"gate {one.rule}: needs about {one.num_rows:,} held-out rows to show a true gain of"
    if one.gain is None:
        return f"{needs} {one.assumption} with {one.power:.0%} power{there}"
    worst = f"; {one.num_rows_at_worst:,} if on all of them" if one.num_rows_at_worst else ""
    if one.smallest_gain is not None:
        there += f", enough for a true gain of {one.smallest_gain:.3g}"
    elif one.num_held_out is not None:
        there += ", enough for none"
    return f"{needs} {one.gain:.3g} with {one.power:.0%} power ({one.assumption}{worst}){there}"
