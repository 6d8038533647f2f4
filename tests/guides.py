"""The command blocks of the guides: what a reader pastes, whether a test runs it, and the `forge` commands in it.

A block of the guides runs as it is written, in the order of its page, unless its first line says otherwise:
`# not run: REASON`, or `# tested by: PATH` where a test of its own runs it. In a `console` block the lines after `$ ` are
commands and the others are what they print; in a `sh` block every line is a command.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]
FENCE = re.compile(r"^( *)```(\w*)\n(.*?)^\1```$", re.MULTILINE | re.DOTALL)
MARK = re.compile(r"# (not run|tested by): (\S.*)\n")
HERE = re.compile(r"^(.*)<<\s*'?(\w+)'?(.*)\n((?:.*\n)*?)\2$", re.MULTILINE)
SUBSTITUTION = re.compile(r"\$\(([^()]*)\)")
ASSIGNMENT = re.compile(r"[A-Za-z_]\w*=")
SEPARATORS = set(";&|()")
KEYWORDS = ("do", "then", "else", "if", "while", "!", "sudo", "time")
SHELL = ("sh", "console")
PAGES = [
    *(ROOT / name for name in ("README.md", "ARCHITECTURE.md", "cluster/README.md", "jobs/data/README.md")),
    *sorted((ROOT / "docs").rglob("*.md")),
]
RUN = ("bring-a-model", "fine-tune")  # guides whose blocks tests/e2e/test_guides.py runs
LARGE = (
    "classify",
    "tool-calls",
    "pretrain",
    "cycles",
    "preferences",
)  # the same in `make test-large`, for each trains a model


@dataclass(frozen=True)
class Block:
    """One fenced block of a page."""

    page: Path
    line: int
    language: str
    text: str

    @property
    def place(self) -> str:
        return f"{self.page.relative_to(ROOT)}:{self.line}"

    @property
    def mark(self) -> tuple[str, str]:
        """`("not run", reason)`, `("tested by", path)`, or two empty strings: it runs."""
        mark = MARK.match(self.text)
        return (mark[1], mark[2]) if mark else ("", "")

    @property
    def script(self) -> str:
        """The commands alone."""
        return self.text if self.language == "sh" else "".join(f"{command}\n" for command in _typed(self.text))


def blocks(page: Path) -> list[Block]:
    text = page.read_text(encoding="utf-8")
    return [
        Block(
            page, text.count("\n", 0, fence.start()) + 1, fence[2], re.sub(f"^{fence[1]}", "", fence[3], flags=re.MULTILINE)
        )
        for fence in FENCE.finditer(text)
    ]


def _typed(console: str) -> Iterator[str]:
    """What a reader typed: the lines after a prompt, with those that a backslash at the end continues."""
    lines = iter(console.splitlines())
    for line in lines:
        if line.startswith("$ "):
            command = line.removeprefix("$ ")
            while command.endswith("\\"):
                command += "\n" + next(lines)
            yield command


def forge_commands(script: str) -> list[list[str]]:
    """The words of every `forge …` of a shell script, those inside `$(…)` too."""
    script = HERE.sub(r"\1 \3", script.replace("\\\n", " "))
    inner = [command for part in SUBSTITUTION.findall(script) for command in forge_commands(part)]
    lexer = shlex.shlex(SUBSTITUTION.sub("VALUE", script).replace("\n", "\n;\n"), posix=True, punctuation_chars=True)
    lexer.whitespace_split = True
    commands: list[list[str]] = [[]]
    for token in lexer:
        if set(token) <= SEPARATORS:
            commands.append([])
        elif commands[-1] or not (token in KEYWORDS or ASSIGNMENT.match(token)):
            commands[-1].append(token)
    return [_without_redirections(words[1:]) for words in commands if words[:1] == ["forge"]] + inner


def here_documents(script: str) -> list[tuple[str, str]]:
    """What a script writes between `<<EOF` and `EOF`: the file that it becomes, or `python`, with the text."""
    documents = []
    for before, _, after, text in HERE.findall(script):
        words = shlex.split(before + after)
        target = [word for previous, word in zip(["", *words], words, strict=False) if previous == ">"]
        documents.append((target[0] if target else "python", text))
    return documents


def _without_redirections(words: list[str]) -> list[str]:
    cut = next((place for place, word in enumerate(words) if word[0] in "<>"), None)
    if cut is None:
        return words
    return words[: cut - (words[cut - 1].isdigit())]
