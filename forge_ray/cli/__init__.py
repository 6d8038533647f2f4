"""`forge …`: a module per topic. `main` has every verb; `python -m forge_ray.cli` is the same program."""
