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


def children_of(pid: int) -> list[int]:
    """Processes that this one started."""
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def rank_of(launcher: int, rank: int) -> int:
    """The process of a rank."""
    variables = {pid: Path(f"/proc/{pid}/environ").read_bytes().split(b"\0") for pid in children_of(launcher)}
    return next(pid for pid, told in variables.items() if f"RANK={rank}".encode() in told)


def is_alive(pid: int) -> bool:
    """Whether a process runs (a zombie does not)."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False
