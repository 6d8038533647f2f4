"""How the workers of a group find each other (imports ray.train).

Ray Train's own way, but for one worker alone: torch's TCP store (2.13) asks the name server who 127.0.0.1 is, by its address
inside IPv6, which no /etc/hosts lists. Where nobody is to be met, no port is opened and nobody is asked.
"""

from __future__ import annotations

from datetime import timedelta
from typing import Any

from ray.train.torch import TorchConfig

from forge_ray.machine.ray_internals import torch_backend

TorchBackend, set_ranks = torch_backend()


def _alone(backend: str, timeout_s: int) -> None:
    from torch import distributed

    alone = distributed.HashStore()  # type: ignore[attr-defined]
    distributed.init_process_group(backend, store=alone, rank=0, world_size=1, timeout=timedelta(seconds=timeout_s))


class Meeting(TorchBackend):  # type: ignore[misc, valid-type]
    """Ray Train's hooks around a group of workers."""

    def on_start(self, worker_group: Any, backend_config: Any) -> None:
        if len(worker_group) > 1:
            super().on_start(worker_group, backend_config)
            return
        worker_group.execute(set_ranks)
        worker_group.execute(_alone, backend_config.backend, backend_config.timeout_s)


class ProcessGroup(TorchConfig):
    @property
    def backend_cls(self) -> type[Meeting]:
        return Meeting
