"""What Python runs at the start of every process: .pth files, sitecustomize, usercustomize. Compromised packages add one."""

from __future__ import annotations

import base64
import hashlib
import re
from collections.abc import Iterator
from pathlib import Path

from forge_ray.doctor.finding import Finding, Surroundings

# Known lines of .pth files that run code
KNOWN_PTH = {
    "distutils-precedence.pth": re.compile(
        r"import os; var = 'SETUPTOOLS_USE_DISTUTILS'; enabled = os\.environ\.get\(var, 'local'\) == 'local';"
        r" enabled and __import__\('_distutils_hack'\)(\.add_shim\(\))?;?"
    ),
    "_virtualenv.pth": re.compile(r"import _virtualenv"),
    "a1_coverage.pth": re.compile(r"import sys; exec\('try: import coverage; coverage\.process_startup\(\)[^']*'\)"),
}
# of an editable installation of forge_ray itself; what another one imports can be anything
EDITABLE = re.compile(r"import (__editable___forge_ray_\w+_finder); \1\.install\(\)")
CUSTOMIZE = re.compile(r"(sitecustomize|usercustomize)(\.py|\.pyc|\.so|\.pyd|\..*\.(so|pyd))?")


def startup_files(around: Surroundings) -> Finding:
    """Every file whose code Python runs at its start is known."""
    rule = "Python runs only known files at its start; compromised packages often add one"
    recognised: list[Path] = []
    strange: list[Path] = []
    for path in [path for folder in around.site for path in sorted(folder.glob("*.pth"))]:
        code = [line for line in _lines(path) if line.startswith(("import ", "import\t"))]
        if code:
            (recognised if all(_is_known(path, line) for line in code) else strange).append(path)
    strange += [path for folder in _importing(around) for path in _customising(folder)]
    if strange:
        observed = ", ".join(map(str, strange))
        return Finding(
            "start-up files", "fail", observed, rule, f"ls -ld {strange[0]}; pip show -f OWNER; rm -r {strange[0]}"
        )
    return Finding("start-up files", "ok", f"{', '.join(path.name for path in recognised) or 'none'}: known", rule)


def _lines(path: Path) -> list[str]:
    return [line.strip() for line in path.read_text(encoding="utf-8", errors="replace").splitlines()]


def _is_known(path: Path, line: str) -> bool:
    if match := EDITABLE.fullmatch(line):
        return _is_recorded(path.with_name(f"{match[1]}.py"))
    pattern = KNOWN_PTH.get(path.name)
    return pattern is not None and pattern.fullmatch(line) is not None


def _is_recorded(module: Path) -> bool:
    """Whether a module is there as the installation of forge_ray lists it, and is what the name would import."""
    if not module.is_file() or module.with_suffix("").is_dir() or list(module.parent.glob(f"{module.stem}.*.so")):
        return False
    digest = base64.urlsafe_b64encode(hashlib.sha256(module.read_bytes()).digest()).rstrip(b"=").decode()
    records = module.parent.glob("forge_ray-*.dist-info/RECORD")
    return any(f"{module.name},sha256={digest}," in record.read_text(encoding="utf-8") for record in records)


def _importing(around: Surroundings) -> Iterator[Path]:
    """Folders from which Python imports at its start: site-packages, those that .pth files name, and PYTHONPATH."""
    named = [entry for entry in around.environ.get("PYTHONPATH", "").split(":") if entry]
    for folder in around.site:
        yield folder
        for path in sorted(folder.glob("*.pth")):
            named += [str(folder / line) for line in _lines(path) if line and not line.startswith(("import", "#"))]
    yield from (Path(entry) for entry in dict.fromkeys(named))


def _customising(folder: Path) -> list[Path]:
    """What `import sitecustomize` or `import usercustomize` would take from a folder: source, bytecode, library, package."""
    try:
        return sorted(path for path in folder.iterdir() if CUSTOMIZE.fullmatch(path.name))
    except OSError:  # a .pth file may name a folder that is not there
        return []
