"""Standard streams that may go away, and signals that come before there is anything to save. For door and workers."""

import os
import pwd
import re
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
            nowhere = open(os.devnull, "w", encoding="utf-8", errors="backslashreplace")  # noqa: PTH123, SIM115
            setattr(sys, name, nowhere)
        elif not isinstance(stream, Guarded):
            setattr(sys, name, Guarded(stream, name))


def settle_home() -> None:
    """Of a user without $HOME and without a line in passwd, as containers have them, say a home that is not there.

    Who looks there for a cache then finds none, and writes none; `~` would be an error, or a folder of that name.
    """
    if not os.environ.get("HOME"):
        try:
            pwd.getpwuid(os.getuid())
        except KeyError:
            os.environ["HOME"] = "/nonexistent"


CONTROL = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f]")  # all but tab, newline, return


def escaped(match: re.Match[str]) -> str:
    """A control character as Python writes it: \\x1b."""
    return f"\\x{ord(match[0]):02x}"


class Guarded:
    """A text stream whose writes go nowhere once its reader is gone. What it cannot encode is written escaped."""

    def __init__(self, stream: TextIO, name: str = "stdout") -> None:
        self.stream, self.name = stream, name
        self.error: OSError | None = None
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")

    def write(self, text: str) -> int:
        """Write, unless nobody reads. A file's name may hold codes that steer a terminal: they are escaped.

        A single bar of tqdm moves by carriage returns alone, which pass.
        """
        try:
            return self.stream.write(CONTROL.sub(escaped, text))
        except OSError as error:
            return self.lost(error, len(text))

    def flush(self) -> None:
        """Flush, unless nobody reads."""
        try:
            self.stream.flush()
        except OSError as error:
            self.lost(error, 0)

    def lost(self, error: OSError, count: int) -> int:
        """What cannot be written goes nowhere; a result that a full disk loses is told by finish_output."""
        if self.name == "stdout" and not isinstance(error, BrokenPipeError):
            self.error = OSError(error.errno, error.strerror, "standard output")
        return self.leave(count)

    def leave(self, count: int) -> int:
        """Send what is buffered, and all that follows, to nowhere: Python flushes once more as it ends."""
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, self.stream.fileno())
        os.close(nowhere)
        return count

    def __getattr__(self, name: str) -> object:
        if name == "buffer":  # where the locale is ASCII, typer would write there, past this guard
            raise AttributeError(name)
        return getattr(self.stream, name)


def finish_output() -> None:
    """Flush stdout; raise the OSError that lost what was written there, so that a lost result is no success."""
    sys.stdout.flush()
    if isinstance(sys.stdout, Guarded) and sys.stdout.error is not None:
        raise sys.stdout.error


UNWIND_SECONDS = 10  # from an interrupt to the end of the process
caught: list[int] = []  # signals that came while there was nothing to save


def end_on_signals() -> None:
    """Before a stage has its own handlers, with nothing to save yet: TERM, HUP and USR1 end with 75, INT with 130."""
    for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGINT):
        signal.signal(number, end_early)


def end_early(number: int, frame: types.FrameType | None) -> None:
    """Leave through every `finally`, past every `except Exception` of a library that is being imported."""
    caught.append(number)
    end_soon(ending_of(number))
    end_if_caught()


def end_workers_soon() -> None:
    """For a worker: INT is a KeyboardInterrupt, whose unwinding has an end. Stages that save have their own handler."""

    def interrupt(number: int, frame: types.FrameType | None) -> None:
        end_soon(ExitCode.INTERRUPTED)
        raise KeyboardInterrupt

    signal.signal(signal.SIGINT, interrupt)


def end_soon(code: ExitCode) -> None:
    """End by force in UNWIND_SECONDS: an exception out of a handler may leave a queue locked, and its threads waiting.

    What is on disk is whole at any instant, so nothing is lost by it.
    """
    signal.signal(signal.SIGALRM, lambda number, frame: os._exit(int(code)))
    signal.alarm(UNWIND_SECONDS)


def ending_of(number: int) -> ExitCode:
    """The exit code after a signal."""
    return ExitCode.INTERRUPTED if number == signal.SIGINT else ExitCode.PREEMPTED


def end_if_caught() -> None:
    """End if a signal came. Asked once more before work starts: a bare `except` of a library may have eaten it."""
    if caught:
        name = signal.Signals(caught[0]).name
        print(f"error: interrupted by {name}; run the same command again", file=sys.stderr)
        raise SystemExit(int(ending_of(caught[0])))
