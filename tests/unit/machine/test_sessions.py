"""Notes in Ray's session folders, and the folders of spilled objects."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from forge_ray.machine import sessions
from forge_ray.store.files import Store

pytestmark = pytest.mark.unit


def test_spilled_objects_are_of_the_store_that_left_a_note(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    session = tmp_path / "ray" / "session_2026"
    spill = session / "ray_spilled_objects_0"
    spill.mkdir(parents=True)
    monkeypatch.setattr(sessions, "session_folder", lambda: session)
    monkeypatch.setenv("RAY_TMPDIR", str(tmp_path / "other"))
    one, other = Store(str(tmp_path / "one")), Store(str(tmp_path / "other"))
    sessions.note(one)
    assert list(sessions.spilled(one)) == []  # nothing was spilled
    (spill / "object").write_bytes(b"tokens")
    (folder,) = sessions.spilled(one)
    assert (folder.folder, folder.is_running, folder.is_of_store) == (spill, False, True)
    (folder,) = sessions.spilled(other)
    assert not folder.is_of_store
    monkeypatch.setattr(sessions, "_commands", lambda: [f"raylet --session-name={session.name}"])
    assert next(iter(sessions.spilled(one))).is_running


def test_session_on_another_machine_gets_no_note(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sessions, "session_folder", lambda: tmp_path / "nowhere")
    sessions.note(Store(str(tmp_path / "store")))
    monkeypatch.setattr(sessions, "session_folder", lambda: None)
    sessions.note(Store(str(tmp_path / "store")))
    assert os.listdir(tmp_path) == []
