"""Signals to the parent and to the group, lost and stalled ranks, ports that are taken, Slurm: two ranks throughout."""

import json
import os
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import time

import pytest

from raecli.store.checkpoint import newest_checkpoint
from tests.conftest import REPOSITORY, TINY_DIFFUSION, environment
from tests.e2e.faults import children_of, is_alive, rank_of, start, wait_for

CONSTANT = ("schedule.kind=constant", "schedule.final_learning_rate=null")  # such a run may be made shorter


def diffusion(cache, steps=100_000, *more):
    shared = ("train-diffusion", "digits/diffusion", f"cache={cache}", "output=run", f"duration={steps} steps")
    return (*shared, *TINY_DIFFUSION, *CONSTANT, *more)


def is_at_work(folder):
    """A moment: figures of the run's first steps are there."""
    figures = folder / "run" / "metrics.jsonl"
    return lambda: figures.exists() and figures.stat().st_size


def are_gone(processes, seconds=10):
    """Whether processes end within some seconds."""
    until = time.monotonic() + seconds
    while time.monotonic() < until and any(is_alive(pid) for pid in processes):
        time.sleep(0.05)
    return not any(is_alive(pid) for pid in processes)


@pytest.mark.parametrize(
    ("number", "to_group", "code"),
    [(signal.SIGTERM, True, 75), (signal.SIGINT, True, 130), (signal.SIGUSR1, False, 75)],
)
def test_a_signal_has_all_ranks_save_at_one_step_and_leaves_no_orphan(tmp_path, cache, number, to_group, code):
    process = start(*diffusion(cache, 100_000, "save_every=100000 steps"), "--devices", "2", cwd=tmp_path)
    wait_for(process, is_at_work(tmp_path))
    workers = children_of(process.pid)
    assert len(workers) == 2
    (os.killpg if to_group else os.kill)(process.pid, number)
    _, err = process.communicate(timeout=60)
    assert process.returncode == code, err
    assert "Traceback" not in err and "state saved" in err
    assert are_gone(workers, 0.5)
    (saved,) = (tmp_path / "run" / "checkpoints").iterdir()  # one, whole: no scratch beside it
    last = json.loads((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[-1])["step"]
    assert newest_checkpoint(tmp_path / "run").step == last == int(saved.name[5:])  # the step that all agreed on


def test_a_shard_that_is_cut_while_it_is_mapped_is_an_input_problem(tmp_path, cache):
    shutil.copytree(cache, tmp_path / "latents")
    process = start(*diffusion("latents"), cwd=tmp_path)
    wait_for(process, is_at_work(tmp_path))
    for shard in (tmp_path / "latents").glob("*.tar"):
        os.truncate(shard, 0)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 3, err
    assert "SIGBUS" in err and "rae verify latents" in err and "Traceback" not in err
    told = json.loads((tmp_path / "run" / "environment.json").read_text())
    assert told["command"][:3] == ["rae", "train-diffusion", "digits/diffusion"]  # not the worker's own


def test_a_launchers_folder_that_vanishes_under_a_run_changes_no_exit_code(tmp_path, cache):
    (tmp_path / "temporary").mkdir()
    process = start(*diffusion(cache), cwd=tmp_path, TMPDIR=str(tmp_path / "temporary"))
    wait_for(process, is_at_work(tmp_path))
    (folder,) = (tmp_path / "temporary").glob("rae-launch-*")
    shutil.rmtree(folder)
    process.terminate()
    _, err = process.communicate(timeout=60)
    assert process.returncode == 75, err
    assert "Traceback" not in err and "state saved" in err
    assert newest_checkpoint(tmp_path / "run") is not None


def test_a_second_interrupt_stops_at_once_even_where_a_rank_stalls(tmp_path, cache):
    process = start(*diffusion(cache), "--devices", "2", cwd=tmp_path)
    wait_for(process, lambda: list(tmp_path.glob("run/checkpoints/step-*")))
    workers = children_of(process.pid)
    os.kill(rank_of(process.pid, 1), signal.SIGSTOP)
    os.killpg(process.pid, signal.SIGINT)
    time.sleep(1)
    assert process.poll() is None  # it waits for a rank that never comes
    os.killpg(process.pid, signal.SIGINT)
    _, err = process.communicate(timeout=10)
    assert process.returncode == 130, err
    assert "Traceback" not in err and are_gone(workers, 1)
    assert newest_checkpoint(tmp_path / "run").step >= 10


def test_both_ranks_are_gone_after_their_parent_was_killed(tmp_path, cache):
    process = start(*diffusion(cache), "--devices", "2", cwd=tmp_path)
    wait_for(process, is_at_work(tmp_path))
    workers = children_of(process.pid)
    os.kill(process.pid, signal.SIGKILL)
    assert len(workers) == 2 and are_gone(workers, 10)
    process.communicate()


def test_a_port_that_is_taken_is_told_and_ranks_that_never_come_too(tmp_path, rae, cache):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(taken.getsockname()[1])}
        ranks = {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0"}
        told = rae(*diffusion(cache, 5), "--timeout", "3", code=7, **place, **ranks).stderr
        assert place["MASTER_PORT"] in told and "could not meet" in told and "Traceback" not in told
        rae(*diffusion(cache, 5), "--devices", "2", **place)  # without RANK it is nobody's business


FAKE_SRUN = """#!/usr/bin/env bash
while [[ "$1" == --* ]]; do shift; done
export SLURM_STEP_ID=0 SLURM_STEP_NUM_TASKS=2 SLURM_STEP_NODELIST=node[1-2]
for rank in 0 1; do
    SLURM_PROCID=$rank SLURM_LOCALID=0 "$@" &
    echo $! >> pids
done
worst=0
for pid in $(jobs -p); do wait "$pid"; code=$?; (( code > worst )) && worst=$code; done
exit $worst
"""
FAKE_SCONTROL = """#!/usr/bin/env bash
if [ "$1" = show ]; then echo localhost; echo other; else echo "$@" >> requeued; fi
"""


def test_the_slurm_script_saves_requeues_and_goes_on(tmp_path, cache):
    tools = {"srun": FAKE_SRUN, "scontrol": FAKE_SCONTROL, "rae": f'#!/bin/sh\nexec {sys.executable} -m raecli "$@"\n'}
    (tmp_path / "bin").mkdir()
    for name, text in tools.items():
        (tmp_path / "bin" / name).write_text(text)
        (tmp_path / "bin" / name).chmod(0o755)
    job = str(random.Random(str(tmp_path)).randrange(10_000))  # its port
    slurm = {"SLURM_JOB_NODELIST": "node[1-2]", "SLURM_JOB_ID": job, "SLURM_CPUS_PER_TASK": "1"}
    env = environment(PATH=f"{tmp_path / 'bin'}:{os.environ['PATH']}", GLOO_SOCKET_IFNAME="lo", **slurm)

    def begin(steps):
        command = ["bash", str(REPOSITORY / "shell" / "slurm.sbatch"), *diffusion(cache, steps)]
        return subprocess.Popen(command, cwd=tmp_path, env=env, stderr=subprocess.PIPE, text=True)

    first = begin(100_000)
    wait_for(first, is_at_work(tmp_path))
    for pid in (tmp_path / "pids").read_text().split():
        os.kill(int(pid), signal.SIGUSR1)
    _, err = first.communicate(timeout=60)
    assert first.returncode == 75 and "Traceback" not in err, err
    assert (tmp_path / "requeued").read_text() == f"requeue {job}\n"
    step = newest_checkpoint(tmp_path / "run").step
    again = begin(step + 2)
    _, err = again.communicate(timeout=120)
    assert again.returncode == 0 and f"resuming run at step {step}" in err, err
    assert json.loads((tmp_path / "run" / "environment.json").read_text())["world"] == 2
    assert (tmp_path / "requeued").read_text().count("\n") == 1  # done: no more


def test_the_slurm_script_asks_for_what_it_relies_on():
    text = (REPOSITORY / "shell" / "slurm.sbatch").read_text()
    asked = re.findall(r"^#SBATCH --([a-z-]+)=?(\S*)$", text, re.MULTILINE)
    assert {("signal", "USR1@600"), ("requeue", ""), ("open-mode", "append")} <= set(asked)
    assert text.index("#SBATCH --output") < text.index("set -uo")  # Slurm stops reading them at the first command
