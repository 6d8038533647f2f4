"""`python -m forge_ray …` and the script `forge`: the command line, on a machine where it can run.

Like `supported`, it keeps to the syntax of Python 3.8, so that an unsupported Python or system gets an error message
before an import fails.
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
    from forge_ray.machine.signals import raise_on_signals

    raise_on_signals(_stop_in_time)
    try:  # the verbs take a moment to import
        from forge_ray.cli.main import main as forge
    except KeyboardInterrupt as error:
        from forge_ray.cli.ends import report

        sys.exit(report(error))
    forge()


def _stop_in_time(signum: int) -> None:
    from forge_ray.cli.ends import stop_in_time

    stop_in_time(signum)


if __name__ == "__main__":
    main()
