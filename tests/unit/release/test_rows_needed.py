"""What `forge plan` says of a gate: rows by rule, what it assumes, and which rows count."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import pytest

from forge_ray.config.base import parse
from forge_ray.config.classify import Target
from forge_ray.config.gate import Gate
from forge_ray.evaluate.examples import Example, HeldOutRows, TextExample
from forge_ray.evaluate.measures import statistics
from forge_ray.evaluate.sample_size import Spread
from forge_ray.release.rows_needed import SHARES, RowsNeeded, line, rows_needed

pytestmark = pytest.mark.unit

CALL = {"id": "c1", "type": "function", "function": {"name": "order", "arguments": "{}"}}


def held(num_chats: int = 0, num_calls: int = 0, num_texts: int = 0, num_offered: int = 0) -> HeldOutRows:
    chats = [Example(f"a{n}", (), None, "yes" if n % 4 else "no", "ab"[n % 10 == 0]) for n in range(num_chats)]
    chats += [Example(f"b{n}", (), ["tool"], "", "a", (CALL,)) for n in range(num_calls)]
    chats += [Example(f"c{n}", (), ["tool"], "yes", "a") for n in range(num_offered)]
    return HeldOutRows(tuple(chats), tuple(TextExample(f"t{n}", "text", "t") for n in range(num_texts)))


def needed(
    rows: HeldOutRows | None, measured: dict[str, Spread] | None = None, better: bool = True, **rule: Any
) -> RowsNeeded:
    gate = parse(Gate, {"better_than" if better else "no_worse_than": [{"confidence": 0.95, **rule}]})
    (one,) = rows_needed(gate, rows, ("yes", "no"), measured or {}, "test")
    return one


def test_margin_of_a_share() -> None:
    one = needed(held(100), margin=0.02)
    assert (one.gain, one.num_rows, one.num_rows_at_worst, one.num_held_out) == (0.04, 7716, 15444, 100)
    assert one.smallest_gain == pytest.approx(0.19, abs=0.01)
    assert line(one, "test") == (
        "gate exact_match better than base by 0.02 at 95%: needs about 7,716 held-out rows to show a true gain of 0.04 with"
        " 80% power (assuming that one of the two models alone is right on 50% of them; 15,444 if on all of them); the test"
        " split has 100, enough for a true gain of 0.194"
    )


def test_an_earlier_version_says_how_much_rows_differ() -> None:
    assumed, measured = needed(held(100)), needed(held(100), {"exact_match": Spread(0.1, True)})
    assert (assumed.gain, assumed.num_rows, measured.gain, measured.num_rows) == (0.05, 1235, 0.05, 246)
    assert "as with the newest version of this name, one of the two models alone is right on 10% of them" in line(
        measured, "test"
    )
    loss = needed(held(100), {"loss": Spread(0.5, False)}, metric="loss", margin=0.05)
    assert (loss.gain, loss.num_rows, loss.num_rows_at_worst) == (0.1, 619, None)
    assert "the rows' differences have a standard deviation of 0.5); the test split has 100" in line(loss, "test")


def test_what_is_no_share_is_not_guessed() -> None:
    one = needed(held(100), metric="loss", margin=0.05)
    assert (one.num_rows, one.gain, one.num_held_out) == (None, None, 100)
    assert "not known: how much it differs from row to row" in line(one, "test")
    small = needed(held(100), metric="loss")
    assert small.num_rows == 155
    assert "a true gain of 0.2 standard deviations of the rows' differences with 80% power; the test" in line(small, "test")


def test_no_worse_needs_rows_for_its_tolerance() -> None:
    one = needed(held(100), better=False, tolerance=0.05)
    assert one.rule == "exact_match at most 0.05 worse than base at 95%"
    assert (one.gain, one.num_rows) == (0.0, 1233)
    assert one.smallest_gain is not None
    assert one.smallest_gain > 0  # 100 rows are too few for a version that is as good
    assert needed(held(100), better=False).gain == 0.05  # without a tolerance it has to be better


def test_slices_count_by_the_smallest_that_is_judged() -> None:
    rows = held(40)
    assert needed(rows, better=False, slices="source", tolerance=0.1).num_held_out == 4
    assert needed(rows, better=False, slices="source", tolerance=0.1, min_examples=5).num_held_out == 36
    one = needed(rows, better=False, slices="label", tolerance=0.1)
    assert (one.num_held_out, one.rule) == (10, "exact_match at most 0.1 worse than base at 95%, in each label")
    none = needed(rows, better=False, slices="source", tolerance=0.1, min_examples=99)
    assert (none.num_held_out, none.smallest_gain) == (0, None)
    assert line(none, "test").endswith("the test split has 0, enough for none")


@pytest.mark.parametrize(
    ("metric", "count"),
    [
        ("exact_match", 7),
        ("field_f1", 7),
        ("valid_schema", 7),
        ("loss", 12),
        ("tone", 12),
        ("calls_match", 5),
        ("call_names_match", 5),
        ("needless_calls", 4),
        ("bits_per_byte", 11),
        ("text_loss", 11),
    ],
)
def test_rows_are_those_that_the_metric_is_of(metric: str, count: int) -> None:
    assert needed(held(3, 5, 11, 4), metric=metric).num_held_out == count


def test_accuracy_of_a_target_and_of_pairs_are_shares_of_the_rows_that_have_them() -> None:
    targets = (Target(name="size", labels=("small", "large")), Target(name="has", labels=("ant",), loss="multi"))
    both = [Example(f"a{n}", (), None, '{"size": "small", "has": "none"}') for n in range(40)]
    one = [Example(f"b{n}", (), None, '{"size": "large"}') for n in range(60)]
    rows = HeldOutRows((*both, *one), ())
    gate = parse(Gate, {"better_than": [{"metric": f"{name}_accuracy", "confidence": 0.95} for name in ("size", "has")]})
    size, has = rows_needed(gate, rows, (), {}, "test", targets)
    assert (size.num_held_out, has.num_held_out) == (100, 40)
    assert size.num_rows == has.num_rows == needed(held(9)).num_rows  # as of any share
    pairs = [Example(f"c{n}", (), None, "good", rejected={"role": "assistant", "content": "bad"}) for n in range(7)]
    names = ("pair_accuracy", "reward_margin")
    gate = parse(Gate, {"better_than": [{"metric": name, "confidence": 0.95} for name in names]})
    of_pairs, margin = rows_needed(gate, HeldOutRows((*one, *pairs), ()), (), {}, "test")
    assert (of_pairs.num_rows, of_pairs.num_held_out) == (size.num_rows, 7)
    assert margin.num_held_out == 7


def test_what_is_not_known_is_said() -> None:
    assert needed(None).num_held_out is None
    assert line(needed(None), "test").endswith("if on all of them)")
    assert "safety_pass_rate is not scored on the rows of the test split" in line(
        needed(held(9), metric="safety_pass_rate"), "test"
    )
    assert "a share gains less than 1" in line(needed(held(9), margin=1.0), "test")
    assert rows_needed(parse(Gate, {"better_than": [{"margin": 0.1}]}), held(9), (), {}, "test") == ()
    assert asdict(needed(held(9)))["power"] == 0.8


def test_shares_are_those_that_newcombe_s_interval_is_used_for() -> None:
    text = {"record": "rec_1", "source": "s", "reference": "{}", "prediction": "{}", "likeliest": "", "logprob": -1.0}
    text |= {"num_tokens": 2, "called": [], "valid_schema": True}
    call = text | {"kind": "call", "calls": []}
    pair = text | {"rejected_logprob": -2.0}
    names = statistics([pair, call], ()) | statistics([text | {"reference": "a"}], ("a",))
    assert {name for name, statistic in names.items() if statistic.right is not None} == SHARES
