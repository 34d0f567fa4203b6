"""Kills and signals from outside, at a moment that a file on disk tells."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

from tests.conftest import environment


def start(*arguments: str, cwd: Path, **extra: str) -> subprocess.Popen[str]:
    """Start `rae ARGUMENTS` in a process group of its own."""
    command = [sys.executable, "-m", "raecli", *map(str, arguments)]
    pipe = subprocess.PIPE
    return subprocess.Popen(
        command, cwd=cwd, env=environment(**extra), stdout=pipe, stderr=pipe, text=True, start_new_session=True
    )


def wait_for(process: subprocess.Popen[str], moment: Callable[[], object], seconds: float = 120) -> None:
    """Wait until `moment()` is true, while the process lives."""
    until = time.monotonic() + seconds
    while not moment():
        assert process.poll() is None, f"ended too early with {process.returncode}: {process.communicate()}"
        assert time.monotonic() < until, "the moment never came"
        time.sleep(0.002)


def kill_group_at(process: subprocess.Popen[str], moment: Callable[[], object]) -> None:
    """kill -9 of the whole group at a moment; the group was still at work then."""
    wait_for(process, moment)
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    assert process.returncode == -signal.SIGKILL, "it had ended already: the test would prove nothing"
