"""Runs to be computed again, and the process that does it: `python reproducing.py STORE run_… run_…`."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

ENGINES = ({"engine": "torch", "zero_stage": 0}, {"engine": "deepspeed", "zero_stage": 2})


def trained(uri: str, dataset: dict[str, Any], listed: str) -> None:
    """Train one run of either engine; their ids go to the file `listed`."""
    from forge_ray.config.base import parse
    from forge_ray.config.run import RunConfig
    from forge_ray.pipeline import train_on
    from forge_ray.records import DatasetManifest
    from forge_ray.store.catalog import Catalog
    from forge_ray.store.files import Store

    run_ids = []
    for engine in ENGINES:
        train = engine | {
            "max_steps": 6,
            "epochs": 100,
            "global_batch": 4,
            "precision": "fp32",
            "adapter": {"r": 4, "dropout": 0.1},
            "scaling": {"num_workers": 0},
            "validation": {"max_rows": 0},
        }
        values = {
            "name": "again",
            "base_model": "tiny",
            "data": {"sources": [{"path": "gone.jsonl"}], "sequence_length": 48},
        }
        config = parse(RunConfig, values | {"train": train, "release": {"alias": "again"}})
        with Catalog.open(Store(uri)) as catalog:
            manifest = catalog.put(DatasetManifest.model_validate(dataset))
            run_ids.append(train_on(config, catalog, catalog.model("tiny"), manifest, "fp32").id)
    Path(listed).write_text(json.dumps(run_ids))


if __name__ == "__main__":
    from forge_ray.governance.reproduce import reproduce
    from forge_ray.store.files import Store

    print(json.dumps([reproduce(Store(sys.argv[1]), run) for run in sys.argv[2:]]))
