"""What a job counts of the rows that it cannot use."""

from __future__ import annotations

from pathlib import Path

import pytest

from forge_ray.data.build.build import noted
from forge_ray.data.build.parts import MAX_REASONS, Parts
from forge_ray.data.read.ingest import EMPTY, index_file
from forge_ray.store.files import Store

pytestmark = pytest.mark.unit


def test_reasons_that_quote_values_do_not_grow_with_the_rows(tmp_path: Path) -> None:
    """They become part of the manifest; the quarantine keeps each as it is."""
    parts = Parts("job", Store(str(tmp_path)), [0], [])
    for number in range(3 * MAX_REASONS):
        parts.reject(0, number + 1, 0, "", f"a message has no known role: 'role {number}'")
    parts.reject(0, 1, 0, "", "not JSON")
    reasons = parts.tally.reasons
    assert len(reasons) == MAX_REASONS + 2
    assert reasons["a message has no known role: 'role 7'"] == reasons["not JSON"] == 1
    assert reasons["a message has no known role: '…'"] == 2 * MAX_REASONS
    assert parts.unused[-2]["reason"] == f"a message has no known role: 'role {3 * MAX_REASONS - 1}'"


def test_files_to_be_named_are_named_once_each(tmp_path: Path) -> None:
    for name, data in (("a.jsonl", b""), ("b\x1b.jsonl", b""), ("c.jsonl", b'{"text": "x"}\n')):
        (tmp_path / name).write_bytes(data)
    files = [index_file(str(path), path.name, "jsonl") for path in sorted(tmp_path.iterdir())]
    assert list(noted(files)) == [f"a.jsonl: {EMPTY}", f"b\\u001b.jsonl: {EMPTY}"]
