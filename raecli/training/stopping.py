"""Asked to stop: TERM, INT, HUP and USR1 raise a flag; the loop saves at the end of a step, the same on all ranks."""

import os
import signal
import types

from raecli.errors import Interrupted, Preempted
from raecli.training.distributed import Ranks


class StopRequest:
    """Whether a signal asked this job to stop. Agreed between the ranks, so that they save at the same step."""

    def __init__(self, ranks: Ranks) -> None:
        self.ranks, self.signal = ranks, 0
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP):
            signal.signal(number, self.note)

    def note(self, number: int, frame: types.FrameType | None) -> None:
        """Remember the signal; a second INT ends the process at once, the last checkpoint is whole."""
        if self.signal == signal.SIGINT == number:
            os._exit(130)
        self.signal = self.signal or number

    def agreed(self) -> bool:
        """True on every rank if any was asked."""
        return self.ranks.any(bool(self.signal))

    def error(self) -> Preempted | Interrupted:
        """What to end with, once the state is saved."""
        if self.signal == signal.SIGINT:
            return Interrupted("interrupted, state saved; run the same command to resume")
        return Preempted("asked to stop, state saved; run the same command to resume")
