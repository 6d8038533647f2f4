"""A path that matches no file: the same name in another Unicode form, or what nearly matches."""

from __future__ import annotations

import difflib
import glob
import os
import unicodedata
from pathlib import Path

from forge_ray.data.read.places import display_name
from forge_ray.store.home import expanded


def in_other_form(path: Path) -> str:
    """The path, or glob, in the Unicode form in which files match it (macOS writes `ü` as two letters); "" where none do."""
    for form in ("NFC", "NFD"):
        other = unicodedata.normalize(form, str(path))
        if other != str(path) and (os.path.exists(other) or glob.glob(other, recursive=True)):
            return other
    return ""


def hint_for(path: str) -> str:
    """What to do about a local path that matches nothing."""
    whole = expanded(path)
    escaped = str(whole).replace("[", "[[]")
    if escaped != str(whole) and glob.glob(escaped, recursive=True):
        return f"[…] stands for one of the letters in it; write [[] for a bracket: {display_name(escaped)!r}"
    names = os.listdir(whole.parent) if whole.parent.is_dir() else []
    near = difflib.get_close_matches(whole.name, names, 3)
    if near:
        return f"did you mean {' or '.join(repr(display_name(str(whole.parent / name))) for name in near)}?"
    return "globs are relative to the current folder"
