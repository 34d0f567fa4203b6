"""Ranks: who this process is, and what it may say to the others."""

import os
import warnings
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from raecli.errors import UsageError


@dataclass(frozen=True)
class Ranks:
    """This process among all of a job. With a world of 1 there is no process group and every call is local."""

    rank: int
    world: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        """Rank 0 writes what exists once."""
        return self.rank == 0

    def barrier(self) -> None:
        """Wait for all ranks."""
        if self.world > 1:
            dist.barrier()

    def sum(self, values: Tensor) -> Tensor:
        """Sum over ranks; every rank gets the result. Any shape, dtype kept."""
        if self.world > 1:
            values = values.to(self.device)
            dist.all_reduce(values)
        return values

    def any(self, flag: bool) -> bool:
        """True on all ranks if true on one."""
        return bool(self.sum(torch.tensor(int(flag), device=self.device)).item()) if self.world > 1 else flag

    def gather(self, value: Any) -> list[Any]:
        """Small Python values of all ranks, in rank order, on every rank."""
        if self.world == 1:
            return [value]
        values: list[Any] = [None] * self.world
        dist.all_gather_object(values, value)
        return values


def join_ranks(timeout_seconds: float) -> Ranks:
    """Join the job that torchrun's environment tells of. gloo on a CPU, nccl on GPUs."""
    rank, world = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    device = torch.device("cpu")
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
        torch.cuda.set_device(device)
    if world > 1:
        backend = "nccl" if device.type == "cuda" else "gloo"
        dist.init_process_group(backend, rank=rank, world_size=world, timeout=timedelta(seconds=timeout_seconds))
    return Ranks(rank, world, device)


def data_parallel(model: nn.Module, ranks: Ranks) -> nn.Module:
    """The model under DDP where there are several ranks. Buffers are functions of the seed, the same on all ranks."""
    if ranks.world == 1:
        return model
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # torch 2.15 renames broadcast_buffers, older ones know no other
        return DistributedDataParallel(model, broadcast_buffers=False, gradient_as_bucket_view=True)


def leave_ranks() -> None:
    """Close the process group, where there is one."""
    if dist.is_initialized():
        dist.destroy_process_group()


def decode_threads() -> int:
    """Threads that a rank may use for decoding images: its share of this machine's cores."""
    local = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    return max(1, len(os.sched_getaffinity(0)) // local)


def check_batch(batch_size: int, world: int) -> None:
    """Refuse a global batch that the ranks cannot share evenly."""
    if batch_size % world:
        raise UsageError(f"batch_size {batch_size} cannot be shared by {world} ranks; take a multiple")
