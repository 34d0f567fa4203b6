"""Checkpoints written while training goes on: the loop waits for one copy into host memory, a thread does the rest."""

from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import torch
from torch import Tensor

from raecli.store.atomic import told_error
from raecli.store.checkpoint import save_checkpoint
from raecli.store.memory import copy_tensors
from raecli.store.statistics import LatentStatistics
from raecli.store.tensors import is_sharded, whole


class CheckpointWriter:
    """Writes one checkpoint at a time in a thread. As a context it waits for the last one, however it is left.

    What goes wrong there (StorageError, NonFiniteError) is raised by the next `check`, `save` or `wait`. Killed at any
    time, the checkpoint before is whole: the new one gets its name last, and older ones go after it was read back.
    All ranks call `save`, one of them writes: sharded tensors are gathered, one at a time.
    """

    def __init__(self, *, writes: bool = True) -> None:
        self.writes = writes
        self.pool = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self.pending: Future[Path] | None = None
        self.host: dict[str, Tensor] = {}  # kept: a fresh page costs more than its copy

    def save(
        self,
        run: Path,
        step: int,
        *,
        model: dict[str, Tensor],
        ema: dict[str, Tensor],
        optimizer: dict[str, Tensor],
        statistics: LatentStatistics,
        state: dict[str, Any],
        config: dict[str, Any],
        keep: int,
    ) -> None:
        """What save_checkpoint does, of the state as it is now; waits for the checkpoint before."""
        self.wait()
        parts = [self.copied(name, part) for name, part in (("model", model), ("ema", ema), ("optimizer", optimizer))]
        if not self.writes:
            return
        if torch.cuda.is_available():
            torch.cuda.current_stream().synchronize()
        self.pending = self.pool.submit(
            save_checkpoint,
            run,
            step,
            model=parts[0],
            ema=parts[1],
            optimizer=parts[2],
            statistics=statistics,
            state=state,
            config=config,
            keep=keep,
        )

    @torch.no_grad()
    def copied(self, part: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """Tensors in host memory, pinned where they come from a GPU; the memory is used again by the next save."""
        copies: dict[str, Tensor] = {}
        pairs: list[tuple[Tensor, Tensor]] = []
        for name, tensor in tensors.items():
            gathered = whole(tensor)
            if self.writes:
                copies[name] = self.buffer(f"{part}/{name}", gathered)
                pairs.append((copies[name], gathered))
            if is_sharded(tensor):  # the memory it was gathered in goes before the next one's is asked for
                copy_tensors(pairs)
                pairs.clear()
        copy_tensors(pairs)
        return copies

    def buffer(self, name: str, tensor: Tensor) -> Tensor:
        """The host memory of a tensor of this name and shape."""
        found = self.host.get(name)
        if found is None or found.shape != tensor.shape or found.dtype != tensor.dtype:
            pinned = tensor.device.type == "cuda"
            self.host[name] = found = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=pinned)
        return found

    def check(self) -> None:
        """Raise what went wrong in the background, if it is known yet; never waits."""
        if self.pending is not None and self.pending.done():
            self.wait()

    def wait(self) -> None:
        """Wait for the checkpoint that is being written, and raise what went wrong with it."""
        pending, self.pending = self.pending, None
        if pending is None:
            return
        try:
            pending.result()
        except OSError as error:
            raise told_error(error) from error

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.pool.shutdown(wait=True)
        if kind is None:
            self.wait()
