"""Learning that a step was no number without waiting for the device. RELIABILITY 10."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from raecli.errors import NonFiniteError


@dataclass(frozen=True)
class Noted:
    """A step whose norm is on its way to the host."""

    norm: Tensor  # a scalar on the host
    arrived: torch.cuda.Event | None  # None: it is there
    error: Callable[[], NonFiniteError]


class Verdict:
    """Raises what a bad step did wrong: on a CPU at once, on a GPU one step late.

    The bad step itself has touched nothing: the optimiser and the average skip it on the device (take_step). `settle`
    is to be called before the state is saved, so that no checkpoint hides a bad step.
    """

    def __init__(self) -> None:
        self.noted: Noted | None = None

    def note(self, norm: Tensor, error: Callable[[], NonFiniteError]) -> None:
        """Take in a step's gradient norm, a scalar; raise for the step before."""
        self.settle()
        if norm.device.type != "cuda":
            self.noted = Noted(norm, None, error)
            self.settle()
            return
        host = torch.empty((), dtype=norm.dtype, pin_memory=True)
        host.copy_(norm.detach(), non_blocking=True)
        arrived = torch.cuda.Event()
        arrived.record()
        self.noted = Noted(host, arrived, error)

    def settle(self) -> None:
        """Raise NonFiniteError if the last noted step was no number."""
        noted, self.noted = self.noted, None
        if noted is None:
            return
        if noted.arrived is not None:
            noted.arrived.synchronize()
        if not noted.norm.isfinite():
            raise noted.error()
