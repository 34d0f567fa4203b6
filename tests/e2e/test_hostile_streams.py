"""Streams that are full, closed or cut, in the plainest of locales: a verb ends with its own exit code."""

import os
import subprocess
import sys

import pytest

from tests.conftest import environment

VERBS = {"recipes ls --json": 0, "inspect absent": 3, "flops dith_s --nonsense": 2}
FULL = 6  # the result is lost


@pytest.mark.parametrize("verb", VERBS)
def test_streams_that_take_nothing_leave_no_traceback_and_the_right_code(tmp_path, verb):
    words = " ".join(f"'{word}'" for word in (sys.executable, "-m", "raecli", *verb.split()))
    lost = FULL if VERBS[verb] == 0 else VERBS[verb]
    wanted = {">/dev/full": lost, "2>/dev/full": VERBS[verb], ">/dev/full 2>&1": lost, "2>&-": VERBS[verb]}
    wanted |= {">&-": VERBS[verb], "2>&1 | head -1": VERBS[verb]}
    lines = "; ".join(f"{words} {redirection}; echo code ${{PIPESTATUS[0]}}" for redirection in wanted)
    plain = environment(LC_ALL="C", TERM="dumb")
    result = subprocess.run(["bash", "-c", lines], cwd=tmp_path, env=plain, capture_output=True, text=True, timeout=200)
    codes = [int(line[5:]) for line in result.stdout.splitlines() if line.startswith("code ")]
    assert dict(zip(wanted, codes, strict=True)) == wanted, result.stderr
    told = result.stdout + result.stderr
    assert not any(word in told for word in ("Traceback", "Exception ignored", "\x1b"))
    if lost == FULL:
        assert "standard output: the disk is full" in result.stderr
    assert list(tmp_path.iterdir()) == []


def test_a_training_whose_stdout_is_full_saves_everything_and_says_so(tmp_path, cache):
    train = ("train-diffusion", "digits/diffusion", "output=run", "duration=1 steps", "batch_size=4", f"cache={cache}")
    small = ("model.width=16", "model.heads=2", "model.depth=1")
    with open("/dev/full", "w") as full:  # noqa: PTH123
        command = [sys.executable, "-m", "raecli", *train, *small]
        result = subprocess.run(
            command, cwd=tmp_path, env=environment(), stdout=full, stderr=subprocess.PIPE, text=True, timeout=120
        )
    assert result.returncode == FULL and "Traceback" not in result.stderr, result.stderr
    assert "standard output: the disk is full" in result.stderr
    assert (tmp_path / "run" / "final" / "model.safetensors").is_file()


@pytest.mark.parametrize("utf8", ["0", "1"])
@pytest.mark.parametrize("verb", [*VERBS, "flops dith_s --nonsens\u00e9"])
def test_a_stderr_that_nobody_reads_changes_no_code(tmp_path, verb, utf8):
    """Without UTF-8 mode the streams are ASCII, and typer would write to them in its own way."""
    wanted, plain = VERBS.get(verb, 2), environment(LC_ALL="C", PYTHONUTF8=utf8, PYTHONCOERCECLOCALE="0")
    command = [sys.executable, "-m", "raecli", *verb.split()]
    reader, writer = os.pipe()
    os.close(reader)
    unread = subprocess.run(command, cwd=tmp_path, env=plain, stdout=subprocess.DEVNULL, stderr=writer, timeout=60)
    os.close(writer)
    closed = subprocess.run(["bash", "-c", '"$@" 2>&-', "bash", *command], cwd=tmp_path, env=plain, timeout=60)
    assert (unread.returncode, closed.returncode) == (wanted, wanted)


def test_a_result_that_nobody_reads_is_no_failure_in_an_ascii_locale(tmp_path):
    plain = environment(LC_ALL="C", PYTHONUTF8="0", PYTHONCOERCECLOCALE="0")
    reader, writer = os.pipe()
    os.close(reader)
    command = [sys.executable, "-m", "raecli", "recipes", "ls"]
    done = subprocess.run(command, cwd=tmp_path, env=plain, stdout=writer, stderr=subprocess.PIPE, timeout=60)
    os.close(writer)
    assert (done.returncode, done.stderr) == (0, b"")
