"""A tokenizer and chat template from outside are tried in a process of their own, with an end to time and memory.

Both are programs in all but name: a template loops, a tokenizer's patterns backtrack and its replacements multiply. What
does not come to an end here would not in the middle of a dataset or of a request either.
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

CPU_S, WALL_S = 5, 300  # a loaded machine may be slow; a bomb uses its seconds
MEMORY = 3 << 30
MESSAGES = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "How do I reset my password?"},
    {"role": "assistant", "content": "Open the settings."},
    {"role": "user", "content": "And then?"},
]
LONGEST_TEXT = 1 << 20  # of so short a conversation
LONGEST_RUN = 2000  # of one letter: what patterns with nested repetitions are slow at
TEMPLATES = ("tokenizer_config.json", "chat_template.json", "processor_config.json")


def refuse_bombs(folder: Path) -> None:
    """Raise `PolicyError` where the tokenizer or a chat template of the folder reaches for Python, or does not end."""
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
        reason = done.stdout.strip() if done.returncode == 0 else "does not come to an end within its time and memory"
    except subprocess.TimeoutExpired:
        reason = "does not come to an end within its time and memory"
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
    """Every chat template of a folder: of its own files, or inside JSON."""
    yield from (path.read_text(encoding="utf-8", errors="replace") for path in sorted(folder.rglob("*.jinja")))
    for name in TEMPLATES:
        if (folder / name).is_file():
            found = json.loads((folder / name).read_bytes())
            value = found.get("chat_template") if isinstance(found, dict) else None
            named = value if isinstance(value, list) else [value]
            yield from (item["template"] if isinstance(item, dict) else item for item in named if item)


def _try_template(template: str) -> str:
    from jinja2.exceptions import SecurityError
    from transformers.utils.chat_template_utils import _compile_jinja_template

    try:
        compiled = _compile_jinja_template(template)
    except Exception:  # told where the model is used, with the template's line
        return ""
    for tools in (None, [{"type": "function", "function": {"name": "f", "description": "", "parameters": {}}}]):
        length = 0
        try:
            values = {"messages": MESSAGES, "tools": tools, "add_generation_prompt": True, "bos_token": "", "eos_token": ""}
            for piece in compiled.generate(**values):
                length += len(piece)
                if length > LONGEST_TEXT:
                    return f"makes more than {LONGEST_TEXT} letters of {len(MESSAGES)} short messages"
        except SecurityError as error:
            return f"reaches for Python's insides: {str(error)[:100]}"
        except MemoryError:
            return "does not come to an end within its time and memory"
        except Exception:  # such as a template that refuses a role: its own rule
            continue
    return ""


def _try_tokenizer(path: Path) -> str:
    from tokenizers import Tokenizer

    try:
        tokenizer = Tokenizer.from_file(str(path))
    except Exception:  # told where the model is used
        return ""
    letters = [chr(code) for code in range(32, 127)] + ["\n", "é", "東"]
    for text in [letter * LONGEST_RUN + "\x01" for letter in letters]:
        if len(tokenizer.encode(text).ids) > 100 * LONGEST_RUN:
            return "makes hundreds of tokens of each letter"
    return ""


def main(folder: Path) -> None:
    import transformers.utils.chat_template_utils  # noqa: F401  (before the limits: loading is none of the bomb's)

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
