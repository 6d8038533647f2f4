"""`python -m forge_ray …` and the script `forge`: the command line, on a machine where it can run.

In the syntax of Python 3.8, as `supported` is: an older Python or system is told so, before an import fails on it.
"""

from __future__ import annotations

import sys

from forge_ray.errors import EXIT_USAGE
from forge_ray.machine.supported import this_machine, unsupported


def main() -> None:
    problem = unsupported(this_machine())
    if problem:
        print(f"error: {problem.message}\nhint: {problem.hint}", file=sys.stderr)
        sys.exit(EXIT_USAGE)
    from forge_ray.cli.main import main as forge

    forge()


if __name__ == "__main__":
    main()
