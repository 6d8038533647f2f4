"""The guides' command blocks: each runs in a test or says why not, and every `forge …`, file and setting in them exists."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import Any

import click
import pytest
import yaml
from guides import LARGE, PAGES, ROOT, RUN, SHELL, Block, blocks, forge_commands, here_documents

from forge_ray.cli.init import run_file_text
from forge_ray.cli.main import cli
from forge_ray.config.base import apply_overrides, parse
from forge_ray.config.release import AliasRoute, DeployConfig
from forge_ray.config.run import RunConfig

pytestmark = pytest.mark.unit

GUIDES = [ROOT / "README.md", *sorted((ROOT / "docs" / "guides").glob("*.md"))]
FILES = {"RUN.yaml": (RunConfig, "jobs/minimal.yaml"), "DEPLOY.yaml": (DeployConfig, "jobs/deploy.yaml")}


def shell_blocks(pages: list[Path]) -> list[Block]:
    return [block for page in pages for block in blocks(page) if block.language in SHELL]


def context_of(words: list[str]) -> click.Context:
    """The verb that these words name, with its options; click refuses what the verb does not take."""
    command: click.Command = cli
    path: list[str] = []
    while isinstance(command, click.Group):
        name, *words = words or [""]
        assert name in command.commands, f"forge {' '.join([*path, name])} does not exist"
        command = command.commands[name]
        path.append(name)
    return command.make_context(" ".join(path), list(words))


def example(name: str) -> dict[str, Any]:
    values: dict[str, Any] = yaml.safe_load((ROOT / name).read_text(encoding="utf-8"))
    return values


def check_yaml(values: dict[str, Any], place: str) -> None:
    """A file of ours, or a part of one, that its config accepts: of a run, of a deployment, or of an alias's route."""
    if values.keys() <= RunConfig.model_fields.keys():
        run = example("jobs/minimal.yaml")
        whole = values if "base_model" in values else run | values | {"data": run["data"] | values.get("data", {})}
        parse(RunConfig, whole, where=place)
    elif values.keys() <= DeployConfig.model_fields.keys():
        parse(DeployConfig, values if "models" in values else example("jobs/deploy.yaml") | values, where=place)
    elif values.keys() != {"scrape_configs"}:  # Prometheus's
        parse(AliasRoute, values, where=place)


def written_files(page: Path) -> dict[str, Any]:
    """Name → content of the YAML files that the page's commands write, or that a block shows below the file's name."""
    yaml_texts = [block.text for block in blocks(page) if block.language == "yaml" and block.text.startswith("# ")]
    files = {text.partition("\n")[0].removeprefix("# "): yaml.safe_load(text) for text in yaml_texts}
    for block in shell_blocks([page]):
        files |= {name: yaml.safe_load(text) for name, text in here_documents(block.script) if name.endswith(".yaml")}
        for words in forge_commands(block.script):
            if words[:1] == ["init"]:
                options = context_of(words).params
                text = run_file_text(options["task"], options["data"], options["base_model"], options["name"])
                files[str(options["file"])] = yaml.safe_load(text)
    return files


def check_files(words: list[str], written: dict[str, Any]) -> None:
    """The run file or deployment file that a command names exists and takes the settings of `--set`."""
    context = context_of(words)
    for argument in context.command.params:
        if argument.metavar not in FILES or not context.params[argument.name or ""]:
            continue
        model, placeholder = FILES[argument.metavar]
        name = str(context.params[argument.name or ""])
        if name in written:
            values = written[name]
        else:
            path = placeholder if name == argument.metavar else name
            assert (ROOT / path).is_file(), f"{name}: no block writes this file, and it is not in the repository"
            values = example(path)
        parse(model, apply_overrides(values, context.params.get("overrides", ())), where=name)


@pytest.mark.parametrize("block", shell_blocks(GUIDES), ids=lambda block: block.place)
def test_every_guide_block_is_run_or_marked(block: Block) -> None:
    kind, reason = block.mark
    if kind == "tested by":
        assert (ROOT / reason.partition(" ")[0]).is_file()
    elif not kind:
        assert block.page.stem in RUN + LARGE, "no test runs this page: mark the block `# not run: REASON`"


def test_pages_run_by_tests_have_blocks_to_run() -> None:
    for name in RUN + LARGE:
        assert [block for block in shell_blocks([ROOT / f"docs/guides/{name}.md"]) if not block.mark[0]], name


@pytest.mark.parametrize("block", shell_blocks(PAGES), ids=lambda block: block.place)
def test_every_forge_command_exists_with_its_options_and_files(block: Block) -> None:
    written = written_files(block.page)
    for words in forge_commands(block.script):
        check_files(words, written)
    for path in re.findall(r"(?<![\w/.])jobs/[\w./-]+\w", block.script):
        assert (ROOT / path).exists(), path


@pytest.mark.parametrize("block", shell_blocks(PAGES), ids=lambda block: block.place)
def test_every_here_document_is_valid(block: Block) -> None:
    for name, text in here_documents(block.script):
        if name == "python" or name.endswith(".py"):
            compile(text, block.place, "exec")
        elif name.endswith(".yaml"):
            check_yaml(yaml.safe_load(text), block.place)


@pytest.mark.parametrize(
    "block", [block for page in PAGES for block in blocks(page) if block.language == "yaml"], ids=lambda block: block.place
)
def test_every_yaml_block_is_a_valid_file(block: Block) -> None:
    check_yaml(yaml.safe_load(block.text), block.place)


def test_mistakes_in_a_block_are_detected() -> None:
    for line in ("forge data prapare run.yaml", "forge plan RUN.yaml --steps 3", "forge train RUN.yaml --set train.lr=1"):
        (words,) = forge_commands(line)
        with pytest.raises(Exception, match=r"prapare|--steps|lr"):
            check_files(words, {})
    with pytest.raises(AssertionError, match="no block writes this file"):
        check_files(shlex.split("train absent.yaml"), {})


def test_commands_are_parsed_like_a_shell() -> None:
    script = 'A=1 forge data show "ds_…" --rows 2  # why\nfor i in 1; do forge runs list; done && forge doctor > out.txt\n'
    script += "cat > run.yaml <<'EOF'\nforge nothing\nEOF\necho $(forge usage --json)\n"
    assert forge_commands(script) == [
        ["data", "show", "ds_…", "--rows", "2"],
        ["runs", "list"],
        ["doctor"],
        ["usage", "--json"],
    ]
    assert here_documents(script) == [("run.yaml", "forge nothing\n")]
    block = Block(ROOT / "README.md", 1, "console", "# not run: no GPU\n$ echo a \\\n    b\na b\n$ echo c\n")
    assert block.script == "echo a \\\n    b\necho c\n"
    assert block.mark == ("not run", "no GPU")


def test_modules_named_in_architecture_exist() -> None:
    text = (ROOT / "ARCHITECTURE.md").read_text(encoding="utf-8")
    paths = set(re.findall(r"`([\w/]+\.py)`", text))
    assert len(paths) > 60
    assert [path for path in sorted(paths) if not ((ROOT / path).is_file() or (ROOT / "forge_ray" / path).is_file())] == []


def test_architecture_tables_list_every_module() -> None:
    text = (ROOT / "ARCHITECTURE.md").read_text(encoding="utf-8")
    cells = [line.split("|")[1] for line in text.splitlines() if line.startswith("| `")]
    names = {package: re.findall(r"`(\w+)`", cell) for cell in cells for package in re.findall(r"`(\w+)/`:", cell)}
    for package, listed in names.items():
        assert sorted(listed) == modules_in(ROOT / "forge_ray" / "data" / package), package
    heading = text.index("| modules of `serve/`")
    table = [line.split("|")[1] for line in text[heading:].partition("\n\n")[0].splitlines()[2:]]
    assert sorted(re.findall(r"`(\w+)`", "".join(table))) == modules_in(ROOT / "forge_ray" / "serve")
    assert names.keys() == {"read", "record", "tokens", "dataset", "curate", "build"}


def modules_in(folder: Path) -> list[str]:
    return sorted(path.stem for path in folder.glob("*.py") if path.stem != "__init__")


def test_pages_use_standard_terms() -> None:
    dialect = re.compile(
        r"\b(told|mend|beside|rooms?|goes on|go on|by itself|for ever|so many|is none|nobody|somebody)\b", re.I
    )
    generated = ROOT / "docs/reference/settings.md"  # the settings' own descriptions have a test of their own
    lines = [(page, line) for page in PAGES if page != generated for line in page.read_text(encoding="utf-8").splitlines()]
    assert [(str(page.relative_to(ROOT)), line) for page, line in lines if dialect.search(line)] == []
