"""Standard streams that may go away, and signals that come before there is anything to save. For door and workers."""

import os
import signal
import sys
import types
from typing import TextIO

from raecli.errors import ExitCode


def guard_streams() -> None:
    """From now on a reader that leaves (`| head -1`, a closed terminal) or a closed stdout ends no work."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:  # started with >&-
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))  # noqa: PTH123, SIM115
        elif not isinstance(stream, Guarded):
            setattr(sys, name, Guarded(stream))


class Guarded:
    """A text stream whose writes go nowhere once its reader is gone. What it cannot encode is written escaped."""

    def __init__(self, stream: TextIO) -> None:
        self.stream = stream
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")

    def write(self, text: str) -> int:
        """Write, unless nobody reads."""
        try:
            return self.stream.write(text)
        except BrokenPipeError:
            return self.leave(len(text))

    def flush(self) -> None:
        """Flush, unless nobody reads."""
        try:
            self.stream.flush()
        except BrokenPipeError:
            self.leave(0)

    def leave(self, count: int) -> int:
        """Send what is buffered, and all that follows, to nowhere: Python flushes once more as it ends."""
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, self.stream.fileno())
        os.close(nowhere)
        return count

    def __getattr__(self, name: str) -> object:
        return getattr(self.stream, name)


caught: list[int] = []  # signals that came while there was nothing to save


def end_on_signals() -> None:
    """Before a stage has its own handlers, with nothing to save yet: TERM, HUP and USR1 end with 75, INT with 130."""
    for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGINT):
        signal.signal(number, end_early)


def end_early(number: int, frame: types.FrameType | None) -> None:
    """Leave through every `finally`, past every `except Exception` of a library that is being imported."""
    caught.append(number)
    end_if_caught()


def end_if_caught() -> None:
    """End if a signal came. Asked once more before work starts: a bare `except` of a library may have eaten it."""
    if caught:
        name = signal.Signals(caught[0]).name
        print(f"error: interrupted by {name}; run the same command again", file=sys.stderr)
        raise SystemExit(int(ExitCode.INTERRUPTED if caught[0] == signal.SIGINT else ExitCode.PREEMPTED))
