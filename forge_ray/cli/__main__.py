"""`python -m forge_ray.cli …`: what `forge` is, where no script is on the path."""

from forge_ray.cli.main import main

if __name__ == "__main__":
    main()
