"""Try an imported tokenizer and chat template in a process of their own, with limits on time and memory.

Both can consume unbounded resources: a template can loop, a tokenizer's patterns can backtrack and its replacements can
multiply. One that does not finish here would not finish in a dataset build or a request either.
"""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
from pathlib import Path
from typing import Any

from forge_ray.errors import PolicyError

CPU_S, WALL_S = 5, 300  # wall time allows for a busy machine; a bomb uses up its CPU time
MEMORY = 3 << 30
MESSAGES = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "How do I reset my password?"},
    {"role": "assistant", "content": "Open the settings."},
    {"role": "user", "content": "And then?"},
]
LONGEST_TEXT = 1 << 20  # characters that a template may make of so short a conversation
LONGEST_RUN = 2000  # repetitions of one letter, on which patterns with nested repetitions are slow
TEMPLATES = ("tokenizer_config.json", "chat_template.json", "processor_config.json")


def refuse_bombs(folder: Path) -> None:
    """Raise `PolicyError` if the tokenizer or a chat template of the folder accesses Python internals or does not finish."""
    if not _is_tokenizer(folder / "tokenizer.json") and not any(True for _ in templates(folder)):
        return
    here = str(Path(__file__).parents[2])
    path = os.pathsep.join(filter(None, (here, os.environ.get("PYTHONPATH", ""))))
    try:
        done = subprocess.run(
            [sys.executable, "-m", "forge_ray.models.sandbox", str(folder)],
            env=os.environ | {"PYTHONPATH": path, "TOKENIZERS_PARALLELISM": "false"},
            capture_output=True,
            text=True,
            timeout=WALL_S,
            check=False,
        )
        reason = done.stdout.strip() if done.returncode == 0 else "does not finish within the limits of time and memory"
    except subprocess.TimeoutExpired:
        reason = "does not finish within the limits of time and memory"
    if reason:
        raise PolicyError(
            f"{folder.name}: the tokenizer or chat template {reason}", hint="take both from the model's own publisher"
        )


def _is_tokenizer(path: Path) -> bool:
    try:
        return "model" in json.loads(path.read_bytes())
    except (OSError, ValueError, TypeError):
        return False


def templates(folder: Path) -> Any:
    """Every chat template of a folder: from .jinja files and from JSON."""
    yield from (path.read_text(encoding="utf-8", errors="replace") for path in sorted(folder.rglob("*.jinja")))
    for name in TEMPLATES:
        if (folder / name).is_file():
            config = json.loads((folder / name).read_bytes())
            value = config.get("chat_template") if isinstance(config, dict) else None
            named = value if isinstance(value, list) else [value]
            yield from (item["template"] if isinstance(item, dict) else item for item in named if item)


def _try_template(template: str) -> str:
    from jinja2.exceptions import SecurityError
    from transformers.utils.chat_template_utils import _compile_jinja_template

    try:
        compiled = _compile_jinja_template(template)
    except Exception:  # reported when the model is used, with the line of the template
        return ""
    for tools in (None, [{"type": "function", "function": {"name": "f", "description": "", "parameters": {}}}]):
        length = 0
        try:
            values = {"messages": MESSAGES, "tools": tools, "add_generation_prompt": True, "bos_token": "", "eos_token": ""}
            for piece in compiled.generate(**values):
                length += len(piece)
                if length > LONGEST_TEXT:
                    return f"renders {len(MESSAGES)} short messages as more than {LONGEST_TEXT} characters"
        except SecurityError as error:
            return f"accesses Python internals: {str(error)[:100]}"
        except MemoryError:
            return "does not finish within the limits of time and memory"
        except Exception:  # such as a template that refuses a role, which is allowed
            continue
    return ""


def _try_tokenizer(path: Path) -> str:
    from tokenizers import Tokenizer

    try:
        tokenizer = Tokenizer.from_file(str(path))
    except Exception:  # reported when the model is used
        return ""
    letters = [chr(code) for code in range(32, 127)] + ["\n", "é", "東"]
    for text in [letter * LONGEST_RUN + "\x01" for letter in letters]:
        if len(tokenizer.encode(text).ids) > 100 * LONGEST_RUN:
            return "makes hundreds of tokens from each letter"
    return ""


def main(folder: Path) -> None:
    import transformers.utils.chat_template_utils  # noqa: F401  (before the limits, which apply to the template and the tokenizer only)

    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY, used + MEMORY))
    spent = int(sum(resource.getrusage(resource.RUSAGE_SELF)[:2]))
    resource.setrlimit(resource.RLIMIT_CPU, (spent + CPU_S, spent + CPU_S))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    reasons = [_try_template(template) for template in templates(folder)]
    if (folder / "tokenizer.json").is_file():
        reasons.append(_try_tokenizer(folder / "tokenizer.json"))
    print(next(filter(None, reasons), ""))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
