"""Labels as texts and as numbers."""

from __future__ import annotations

import pytest

from forge_ray.config.classify import Target
from forge_ray.data.dataset.labels import by_target, values_of, written
from forge_ray.data.record.schema import Reject

pytestmark = pytest.mark.unit
URGENT = Target(name="urgent", labels=("yes", "no"))
TOPICS = Target(name="topics", labels=("card", "loan", "fraud"), loss="multi")


@pytest.mark.parametrize(
    ("targets", "text", "values"),
    [
        ((URGENT,), "no", [0, 1]),
        ((URGENT,), '{"urgent": "no"}', [0, 1]),
        ((URGENT,), '{"topics": "card"}', [-1, -1]),
        ((TOPICS,), "fraud, card", [1, 0, 1]),
        ((TOPICS,), "none", [0, 0, 0]),
        ((TOPICS, URGENT), '{"urgent": "yes", "topics": "loan"}', [0, 1, 0, 1, 0]),
        ((TOPICS, URGENT), '{"urgent": "yes", "seen": "no"}', [-1, -1, -1, 1, 0]),
        ((TOPICS, URGENT), "no", [-1, -1, -1, 0, 1]),
    ],
)
def test_texts_become_numbers_of_the_targets(targets: tuple[Target, ...], text: str, values: list[int]) -> None:
    assert values_of(targets, text).tolist() == values


@pytest.mark.parametrize(
    ("targets", "text", "reason"),
    [
        ((URGENT,), "maybe", "'maybe' is not a label of target urgent"),
        ((TOPICS,), "card, lone", "'lone' is not a label of target topics"),
        ((TOPICS, URGENT), "maybe", "'maybe' is a label of no target, and names none"),
        ((URGENT, Target(name="late", labels=("yes", "no"))), "yes", "'yes' is a label of urgent and late, and names none"),
        ((URGENT,), '{"urgent": 3}', "'3' is not a label of target urgent"),
    ],
)
def test_a_label_of_no_target_is_rejected(targets: tuple[Target, ...], text: str, reason: str) -> None:
    with pytest.raises(Reject, match=reason):
        values_of(targets, text)


@pytest.mark.parametrize("text", ["card, fraud", "none", "loan"])
def test_numbers_are_written_as_rows_have_them(text: str) -> None:
    assert written((TOPICS,), values_of((TOPICS,), text)) == text


def test_several_targets_are_written_in_their_order() -> None:
    text = '{"urgent": "no", "topics": "fraud, card"}'
    assert written((TOPICS, URGENT), values_of((TOPICS, URGENT), text)) == '{"topics": "card, fraud", "urgent": "no"}'
    assert by_target((TOPICS, URGENT), text)["urgent"] == "no"
