"""Ranks: who this process is, and what it may say to the others."""

import contextlib
import os
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from raecli.errors import ExitCode, RaeError, UsageError, WorkerError
from raecli.store.atomic import told_error
from raecli.store.lock import hold_folder


class ToldElsewhere(RaeError):
    """What rank 0 has said already: this rank ends with the same exit code, without a word."""

    def __init__(self, exit_code: int, message: str) -> None:
        super().__init__(message)
        self.exit_code = ExitCode(exit_code)


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
        """True on all ranks if true on one. Asked of the host: a GPU's queue is not waited for."""
        if self.world == 1:
            return flag
        told = torch.tensor(int(flag))
        dist.all_reduce(told)
        return bool(told.item())

    def main_first(self, work: Callable[[], Any]) -> Any:
        """Do something on rank 0 alone; its (small) result, or its RaeError, comes to all ranks.

        So that what a user got wrong ends all ranks together, and is told once.
        """
        result, failure = None, None
        if self.is_main:
            try:
                result = work()
            except OSError as error:
                failure = told_error(error)
            except RaeError as error:
                failure = error
        verdict = (result, None) if failure is None else (None, (int(failure.exit_code), str(failure)))
        result, told = self.gather(verdict)[0]
        if failure is not None:
            raise failure
        if told is not None:
            raise ToldElsewhere(*told)
        return result

    @contextlib.contextmanager
    def holding(self, folder: Path) -> Iterator[None]:
        """Hold a folder for this job: rank 0 has the lock, all ranks fail if it cannot be had."""
        with contextlib.ExitStack() as stack:
            self.main_first(lambda: stack.enter_context(hold_folder(folder)))
            yield

    def gather(self, value: Any) -> list[Any]:
        """Small Python values of all ranks, in rank order, on every rank."""
        if self.world == 1:
            return [value]
        values: list[Any] = [None] * self.world
        dist.all_gather_object(values, value)
        return values


def join_ranks(timeout_seconds: float) -> Ranks:
    """Join the job that torchrun's environment tells of. gloo for what is on the host, nccl for what is on GPUs."""
    rank, world = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    device = torch.device("cpu")
    torch.backends.cudnn.allow_tf32 = False  # on by default: --precision fp32 says fp32, and bf16 has autocast
    torch.set_float32_matmul_precision("highest")  # NVIDIA's containers set TORCH_ALLOW_TF32_CUBLAS_OVERRIDE=1
    if torch.cuda.is_available():
        if world > 1 and "LOCAL_RANK" not in os.environ:
            raise UsageError("WORLD_SIZE is above 1 and LOCAL_RANK is not set: which GPU is this rank's?")
        local, gpus = int(os.environ.get("LOCAL_RANK", "0")), torch.cuda.device_count()
        if local >= gpus:
            raise UsageError(f"LOCAL_RANK is {local}, this machine has {gpus} GPUs: start one rank a GPU")
        device = torch.device("cuda", local)
        torch.cuda.set_device(device)
    if world > 1:
        backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
        try:
            dist.init_process_group(backend, rank=rank, world_size=world, timeout=timedelta(seconds=timeout_seconds))
        except dist.DistError as error:
            raise WorkerError(could_not_meet(rank, world, error)) from None
    return Ranks(rank, world, device)


def could_not_meet(rank: int, world: int, error: Exception) -> str:
    """Why a rank does not know the others: a port that is taken, ranks that never came."""
    place = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
    reason = str(error).strip().partition("\n")[0]
    return (
        f"rank {rank} of {world} could not meet the others at MASTER_ADDR:MASTER_PORT {place}: {reason}; "
        "choose a free port, and start all ranks"
    )


def data_parallel(model: nn.Module, ranks: Ranks) -> nn.Module:
    """The model under DDP where there are several ranks. Buffers are functions of the seed, the same on all ranks."""
    if ranks.world == 1:
        return model
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # torch 2.15 renames broadcast_buffers, older ones know no other
        return DistributedDataParallel(model, broadcast_buffers=False, gradient_as_bucket_view=True)


def fully_sharded(model: nn.Module, blocks: list[nn.Module], ranks: Ranks, *, bf16: bool) -> nn.Module:
    """The model under FSDP2: weights, gradients and what is made of them later are split over the ranks.

    Each block is gathered for its own forward and backward, in bfloat16 where its products are; what is around the
    blocks (embeddings of time and labels, the output) stays in float32. Gradients are averaged in float32.
    """
    if ranks.world == 1:
        return model
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    warnings.filterwarnings("ignore", "FSDP2-wrapped module .* returned a view")  # nobody writes into the velocity
    mesh = init_device_mesh(ranks.device.type, (ranks.world,))
    dtype = torch.bfloat16 if bf16 else None
    policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32, cast_forward_inputs=False)
    for block in blocks:
        fully_shard(block, mesh=mesh, mp_policy=policy)
    return fully_shard(model, mesh=mesh)


@contextlib.contextmanager
def gradients_held(forward: nn.Module, *, hold: bool) -> Iterator[None]:
    """Gradients stay on their rank in all but a step's last micro-batch, under DDP and FSDP alike."""
    if isinstance(forward, DistributedDataParallel):
        with forward.no_sync() if hold else contextlib.nullcontext():
            yield
        return
    if hasattr(forward, "set_requires_gradient_sync"):
        forward.set_requires_gradient_sync(not hold)
    yield


def leave_ranks() -> None:
    """Close the process group, where there is one."""
    if dist.is_initialized():
        dist.destroy_process_group()


def decode_threads() -> int:
    """Threads that a rank may use for decoding images: its share of this machine's cores."""
    local = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    return max(1, len(os.sched_getaffinity(0)) // local)


def check_batch(batch_size: int, world: int) -> None:
    """Refuse a global batch that the ranks cannot share evenly: it is the recipe's truth on any number of devices."""
    if batch_size % world:
        below, divisors = batch_size - batch_size % world, [n for n in range(1, world) if batch_size % n == 0]
        near = f"{below} or {below + world}" if below else f"{world}"
        fewer = f"--devices {divisors[-1]}" if divisors[-1] > 1 else "one rank"
        raise UsageError(
            f"batch_size {batch_size} cannot be shared by {world} ranks; take {fewer} or batch_size={near}"
        )
