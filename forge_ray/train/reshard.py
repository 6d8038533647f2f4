"""`python -m forge_ray.train.reshard --input_folder A --output_folder B`: DeepSpeed's converter to universal checkpoints,
which reads the files as data alone. `ZeroEngine.reshard` starts it."""

from __future__ import annotations

import torch

from forge_ray.errors import TrainingError
from forge_ray.train.zero import data_only, plain_classes

# at the top, for the converter's own processes: those that do not fork import this module again
torch.serialization.add_safe_globals(plain_classes())


def main() -> None:
    from deepspeed.checkpoint import ds_to_universal

    try:
        with data_only():
            ds_to_universal.main(ds_to_universal.parse_arguments())
    except TrainingError as error:
        raise SystemExit(error.message) from None  # the last line is what the worker reports


if __name__ == "__main__":
    main()
