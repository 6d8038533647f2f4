"""Files that come with forge_ray: run files, the quick start's rows, dashboards, start scripts, documentation.

They are named as in a checkout, such as `jobs/deploy.yaml`. A checkout has them next to the package; in a wheel setup.py
puts them inside it.
"""

from __future__ import annotations

from pathlib import Path

PACKAGE = Path(__file__).parents[1]  # all of forge_ray


def folder(package: Path = PACKAGE) -> Path:
    """The folder that holds `jobs`, `cluster` and `docs` of this installation."""
    carried = package / "files"
    return carried if carried.is_dir() else package.parent


def here_or_shipped(name: str, package: Path = PACKAGE) -> str:
    """`name` if it is a file, relative to the current folder; else the full path of the shipped file of that name. `name`
    again if there is neither."""
    shipped = folder(package) / name
    return str(shipped) if shipped.is_file() and not Path(name).is_file() else name
