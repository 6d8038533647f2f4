"""Help texts: verbs in sections, one whole line each, an example that parses, plain phrases."""

from __future__ import annotations

import re
import shlex
from collections import Counter

import click
import pytest
from click.testing import CliRunner

from forge_ray.cli.main import SECTIONS, cli
from tests.unit.cli.test_cli import SURFACE, commands

pytestmark = pytest.mark.unit

GROUPS = ["", *(name for name, command in cli.commands.items() if isinstance(command, click.Group))]
DIALECT = re.compile(
    r"^(of|for what|before it)\b|\b(told|room|mend|beside|goes on|go on|by itself|for ever|so many|is no(?! longer))\b", re.I
)


def help_of(*words: str) -> str:
    done = CliRunner(env={"COLUMNS": "80"}).invoke(cli, [*words, "--help"], prog_name="forge")
    assert done.exit_code == 0, done.output
    return done.output


def group_of(name: str) -> click.Group:
    group = cli.commands[name] if name else cli
    assert isinstance(group, click.Group)
    return group


def test_every_verb_is_in_exactly_one_section() -> None:
    listed = Counter(name for names in SECTIONS.values() for name in names)
    assert listed == Counter(cli.commands.keys())
    titles = [line[:-1] for line in help_of().splitlines() if line.endswith(":") and not line.startswith(" ")]
    assert titles == ["Options", *SECTIONS]


@pytest.mark.parametrize("name", GROUPS)
def test_every_verb_has_one_whole_line_at_80_columns(name: str) -> None:
    lines = help_of(*name.split()).splitlines()
    assert max(map(len, lines)) <= 80
    for verb in group_of(name).commands:
        (line,) = [line for line in lines if re.match(rf"  {verb}  +\S", line)]
        assert line.endswith(".")
        assert not line.endswith("..."), line


@pytest.mark.parametrize("name", SURFACE)
def test_every_verb_has_an_example_that_parses(name: str) -> None:
    text = help_of(*name.split())
    assert max(map(len, text.splitlines())) <= 80
    _, marker, example = text.partition("\n  Example:\n    ")
    assert marker
    (line,) = example.splitlines()
    program, *words = shlex.split(line)
    assert program == "forge"
    assert words[: len(name.split())] == name.split()
    commands(cli)[name].make_context(name, words[len(name.split()) :])  # click refuses what the verb does not take


@pytest.mark.parametrize("name", SURFACE)
def test_help_is_in_whole_plain_phrases(name: str) -> None:
    command = commands(cli)[name]
    helps = {option.opts[0]: option.help or "" for option in command.params if isinstance(option, click.Option)}
    assert not [flag for flag, text in helps.items() if not text.endswith(".")]
    assert not [text for text in [command.help or "", *helps.values()] if DIALECT.search(text)]
