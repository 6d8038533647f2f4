"""What the error about rows that cannot be used says to do."""

from __future__ import annotations

from collections import Counter
from types import SimpleNamespace

import pytest

from forge_ray.config.data import DataConfig
from forge_ray.data.build.manifest import check_invalid
from forge_ray.data.build.summaries import History
from forge_ray.data.tokens.units import TOO_LONG
from forge_ray.errors import DataError

pytestmark = pytest.mark.unit


@pytest.mark.parametrize(
    ("reason", "hint"),
    [(f"a pair, both answers together, is {TOO_LONG}", "data.overlong: truncate"), ("not JSON", "accepted shapes")],
)
def test_rows_that_are_too_long_need_a_longer_row_and_no_other_shape(reason: str, hint: str) -> None:
    tally = SimpleNamespace(dropped=Counter[str](), reasons=Counter({reason: 3}))
    history: History = [[SimpleNamespace(num_records=0, erased=0, tally=tally)]]  # type: ignore[list-item]
    config = DataConfig.model_validate({"sources": [{"path": "rows.jsonl"}]})
    with pytest.raises(DataError, match="none of 3 rows can be used") as caught:
        check_invalid(config, history, 1, lambda: "first: rows.jsonl line 1")
    assert hint in (caught.value.hint or "")
