"""What rows, names and reasons hold cannot rewrite the screen of who reads them."""

from __future__ import annotations

import ast
import json
from pathlib import Path

import pytest

from forge_ray.cli.ends import show_exception
from forge_ray.cli.show import print_table
from forge_ray.cli.terminal import echo, one_line, secho
from forge_ray.progress import stage, visible

pytestmark = pytest.mark.unit

CLI = Path(__file__).parents[2] / "forge_ray" / "cli"
HOSTILE = "\x1b[2J\x1b]0;title\x07ok\r\x9b31m\x7f\u202egnp\u2066 Ünïcode 東京 🙂\tand\n"


def is_harmless(text: str) -> bool:
    return all(letter.isprintable() or letter in "\n\t" for letter in text)


def test_control_characters_are_written_out(capsys: pytest.CaptureFixture[str]) -> None:
    echo(HOSTILE)
    secho(HOSTILE, err=True)
    print_table("t\x1b[31m", ("a",), [(HOSTILE,), ("[bold]not markup[/bold]",), ("two\nlines",)])
    with stage("s\x1b") as it:
        it.done(HOSTILE)
    printed = capsys.readouterr()
    assert is_harmless(printed.out.replace("\r", "x"))
    assert is_harmless(printed.err.replace("s\x1b", "s"))
    assert "Ünïcode 東京 🙂" in printed.out
    assert "[bold]not markup[/bold]" in printed.out
    assert r"two\u000alines" in printed.out
    assert one_line("a\nb") == r"a\u000ab"


def test_json_stays_the_same_json(capsys: pytest.CaptureFixture[str]) -> None:
    echo(json.dumps({"why": HOSTILE, "half": "\ud83d"}, ensure_ascii=False))
    line = capsys.readouterr().out
    assert is_harmless(line)
    assert json.loads(line) == {"why": HOSTILE, "half": "\ud83d"}


def test_a_traceback_repeats_no_control_characters(capsys: pytest.CaptureFixture[str]) -> None:
    error = ValueError(HOSTILE)
    show_exception(ValueError, error, None)
    assert is_harmless(capsys.readouterr().err)


def test_ordinary_text_is_printed_as_it_is() -> None:
    text = "Größe\tcafé\n東京 🙂 👩‍👩‍👧 עברית"
    assert visible(text) == text


def test_commands_print_in_one_place_alone() -> None:
    """`click.echo`, `print` and `sys.stdout` would pass by it."""
    others = []
    for path in sorted(CLI.glob("*.py")):
        if path.name == "terminal.py":
            continue
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call):
                called = ast.unparse(node.func)
                if called in ("print", "click.echo", "click.secho", "sys.stdout.write", "sys.stderr.write"):
                    others.append(f"{path.name}:{node.lineno} {called}")
    assert others == []
