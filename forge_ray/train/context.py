"""Who am I among the workers: rank, world size, device; under Ray Train, torchrun or alone."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from forge_ray.errors import ConfigError
from forge_ray.store.home import settle


@dataclass(frozen=True)
class Context:
    rank: int
    world_size: int
    local_rank: int
    device: torch.device
    under_ray: bool
    sp_size: int = 1  # neighbouring ranks that are given the same rows: sequence parallelism
    group: dist.ProcessGroup | None = None  # they, where there is more than one of them

    @property
    def is_first(self) -> bool:
        return self.rank == 0

    @property
    def data_rank(self) -> int:
        """Whose rows this rank is given, of `data_size`."""
        return self.rank // self.sp_size

    @property
    def data_size(self) -> int:
        return self.world_size // self.sp_size

    @property
    def sp_rank(self) -> int:
        """This rank's number among those with the same rows."""
        return self.rank % self.sp_size


def join(use_gpu: bool, num_threads: int, under_ray: bool, sp_size: int = 1) -> Context:
    """Join the process group: the one that Ray Train or torchrun prepared, else a group of one."""
    settle()
    rank, world_size, local_rank = 0, 1, 0
    if under_ray:
        import ray.train

        ray_context = ray.train.get_context()
        rank, world_size = ray_context.get_world_rank(), ray_context.get_world_size()
        local_rank = ray_context.get_local_rank()
    elif "RANK" in os.environ:
        rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
        local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    device = torch.device("cuda", local_rank % torch.cuda.device_count()) if use_gpu else torch.device("cpu")
    if use_gpu:
        torch.cuda.set_device(device)
    torch.set_num_threads(max(1, num_threads))  # fixed: the number of threads decides the order of sums
    if not dist.is_initialized():
        backend = "nccl" if use_gpu else "gloo"
        if "RANK" in os.environ:
            dist.init_process_group(backend)
        else:
            dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)  # type: ignore[attr-defined]
    return Context(rank, world_size, local_rank, device, under_ray, sp_size, _group(rank, world_size, sp_size))


def _group(rank: int, world_size: int, sp_size: int) -> dist.ProcessGroup | None:
    """This rank's group; every rank takes part in making each of them."""
    if world_size % sp_size:
        raise ConfigError(
            f"{world_size} workers do not make groups of train.sequence_parallel={sp_size}",
            hint=f"use a multiple of {sp_size} workers; an elastic run needs nodes that hold such a multiple each",
        )
    if sp_size == 1:
        return None
    groups = [dist.new_group(list(range(first, first + sp_size))) for first in range(0, world_size, sp_size)]
    group: dist.ProcessGroup = groups[rank // sp_size]
    return group


def sum_over_ranks(values: list[float], context: Context) -> list[float]:
    """Element-wise sum, the same on every rank."""
    tensor = torch.tensor(values, dtype=torch.float64, device=context.device)
    dist.all_reduce(tensor)
    return [float(value) for value in tensor]


def gather(value: Any, context: Context) -> list[Any]:
    """Every rank's value, by rank."""
    box: list[Any] = [None] * context.world_size
    dist.all_gather_object(box, value)
    return box


def agree(value: Any, context: Context) -> Any:
    """Rank 0's value, on every rank."""
    box = [value]
    dist.broadcast_object_list(box, src=0, device=context.device)
    return box[0]
