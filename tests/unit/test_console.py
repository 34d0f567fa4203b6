"""Signals that come while libraries are imported: one of them may swallow what a handler raises."""

import signal
import subprocess
import sys

import pytest

from raecli import console
from tests.conftest import environment

STUCK = """
import os, signal, threading, time
from raecli import console

console.UNWIND_SECONDS = 1
console.{install}()
lock = threading.Lock()
lock.acquire()
try:
    os.kill(os.getpid(), signal.SIGINT)
    time.sleep(60)
finally:
    lock.acquire()  # whose owner the interrupt has ended: never to be had
"""


@pytest.mark.parametrize("number, code", [(signal.SIGINT, 130), (signal.SIGTERM, 75), (signal.SIGUSR1, 75)])
def test_a_signal_that_a_library_swallowed_still_ends_before_work_starts(monkeypatch, capsys, number, code):
    monkeypatch.setattr(console, "caught", [])
    monkeypatch.setattr(console, "end_soon", lambda code: None)
    console.end_if_caught()  # nothing came: nothing happens
    with pytest.raises(SystemExit) as first:
        console.end_early(number, None)
    with pytest.raises(SystemExit) as again:
        console.end_if_caught()
    assert first.value.code == again.value.code == code
    assert signal.Signals(number).name in capsys.readouterr().err


@pytest.mark.parametrize("install", ["end_on_signals", "end_workers_soon"])
def test_an_interrupt_that_leaves_a_lock_behind_ends_the_process_all_the_same(install):
    """CPython may raise between a lock's taking and the block that would let go of it, in queue.Queue for one."""
    command = [sys.executable, "-c", STUCK.format(install=install)]
    ended = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=30)
    assert ended.returncode == 130, ended.stderr
