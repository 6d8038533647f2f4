"""`python -m forge_ray.cli …`: what `forge` is, where no script is on the path."""

from forge_ray.cli.ends import stop_in_time
from forge_ray.cli.main import main
from forge_ray.machine.signals import raise_on_signals

if __name__ == "__main__":
    raise_on_signals(stop_in_time)
    main()
