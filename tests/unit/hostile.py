"""The whole command line in this process: a case costs milliseconds here, and seconds in a process of its own."""

import contextlib
import io
import os
import signal
import sys
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple
from unittest import mock

from raecli import __main__, launch
from raecli.stages.worker import work

SECONDS = 60  # a verb that takes longer hangs
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP, signal.SIGALRM)


class Outcome(NamedTuple):
    """What a user sees of a command."""

    code: int
    out: str
    err: str

    @property
    def faults(self) -> list[str]:
        """What no command may ever do, whatever it was given."""
        told = {
            "a bug's exit code": self.code == 1,
            "a traceback": "Traceback" in self.err,
            "ANSI codes where there is no terminal": "\x1b" in self.out + self.err,
            "failed without a word": self.code != 0 and "rror" not in self.err,
            "an endless message": len(self.err) > 20_000,
        }
        return [fault for fault, found in told.items() if found]


class Hang(BaseException):
    """Past every `except Exception`."""


def rae(*arguments: object, cwd: Path, **environment: str) -> Outcome:
    """`rae ARGUMENTS` with its real entry, door and stage; its one rank runs here, not in a worker process."""
    streams = [io.TextIOWrapper(io.BytesIO(), encoding="utf-8", write_through=True) for _ in range(2)]
    code = 0
    with everything_restored(), mock.patch.object(launch, "run_elastic", run_here):
        os.chdir(cwd)
        os.environ.update(environment)
        sys.argv = ["rae", *map(str, arguments)]
        sys.stdout, sys.stderr = streams
        try:
            __main__.main()
        except SystemExit as end:
            code = end.code if isinstance(end.code, int) else int(end.code is not None)
        except Exception:
            traceback.print_exc()
            code = 1
    out, err = (stream.buffer.getvalue().decode("utf-8", "replace") for stream in streams)
    return Outcome(code, out, err)


def run_here(command: list[str], options: launch.LaunchOptions, folder: Path, *, cache: str | None) -> None:
    """The worker's own entry, and the door's verdict on how it ended."""
    if code := work(command[-2], float(command[-1])):
        raise launch.error_of_workers({0: code}, cache)


@contextlib.contextmanager
def everything_restored() -> Iterator[None]:
    """Streams, arguments, folder, environment and handlers of signals as they were; an alarm against hangs."""
    handlers = {number: signal.getsignal(number) for number in SIGNALS}
    before = sys.stdout, sys.stderr, sys.argv, Path.cwd(), dict(os.environ)
    signal.signal(signal.SIGALRM, raise_hang)
    signal.alarm(SECONDS)
    try:
        yield
    finally:
        signal.alarm(0)
        sys.stdout, sys.stderr, sys.argv = before[:3]
        os.chdir(before[3])
        os.environ.clear()
        os.environ.update(before[4])
        for number, handler in handlers.items():
            signal.signal(number, handler)


def raise_hang(number: int, frame: object) -> None:
    raise Hang(f"still at work after {SECONDS} s")
