"""What the launcher makes of its surroundings: junk in them, folders of killed launchers, files cut under a rank."""

import fcntl
import json
import signal
import subprocess
import sys
import tempfile
import time

import pytest

from raecli.errors import ExitCode, UsageError
from raecli.launch import error_of_workers, joined_environment
from raecli.launch_folder import LOCK, PREFIX, launch_folder
from raecli.store.run_folder import environment

JUNK = [
    "", " ", "x", "-1", "1.5", "1e3", "0x10", "nan", "inf", "None", "\u0663", "\u00b2", "1 2", "1,2", "2(x4)", "+1",
    "1_0", "99999999999999999999", "a" * 10_000, "node[", "node[1-", "[1-2]", "../..", "$(id)", "\n", "%s", "0",
]  # fmt: skip
TORCHRUN = {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "MASTER_ADDR": "localhost", "MASTER_PORT": "29500"}
SRUN = {
    "SLURM_PROCID": "1", "SLURM_STEP_NUM_TASKS": "2", "SLURM_LOCALID": "0", "SLURM_STEP_NODELIST": "n[1-2]",
    "SLURM_JOB_ID": "7", "SLURM_STEP_ID": "0",
}  # fmt: skip


@pytest.mark.parametrize(("around", "name"), [(around, name) for around in (TORCHRUN, SRUN) for name in around])
def test_junk_in_any_variable_is_understood_or_refused(around, name):
    begin, refused = time.process_time(), 0
    for junk in JUNK:
        try:
            joined = joined_environment(around | {name: junk})
        except UsageError as error:
            refused += 1
            assert "the environment has" in str(error) or "MASTER_ADDR" in str(error)
            continue
        if joined is not None:  # what a rank is then told makes sense
            told = around | {name: junk} | joined
            assert 0 <= int(told["RANK"]) < int(told["WORLD_SIZE"]) and int(told["LOCAL_RANK"]) >= 0
            assert 0 < int(told["MASTER_PORT"]) < 65536 and told["MASTER_ADDR"]
    assert time.process_time() - begin < 1
    assert refused >= 5 or name in ("MASTER_ADDR", "SLURM_STEP_NODELIST")  # any name may be a host's


def test_a_rank_that_died_of_a_cut_file_is_an_input_problem_that_names_the_cache():
    error = error_of_workers({0: 7, 1: -signal.SIGBUS}, "latents/in1k")
    assert error.exit_code == ExitCode.BAD_INPUT
    assert "rank 1" in str(error) and "rae verify latents/in1k" in str(error)
    assert error_of_workers({0: -signal.SIGBUS}).exit_code == ExitCode.BAD_INPUT
    assert error_of_workers({0: 6, 1: -signal.SIGBUS}, "c").exit_code == ExitCode.STORAGE  # what a rank said goes first


@pytest.fixture
def temporary(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    return tmp_path


def test_folders_of_killed_launchers_go_and_those_of_living_ones_stay(temporary):
    program = (
        "import os, signal\nfrom raecli.launch_folder import launch_folder\n"
        "with launch_folder() as folder:\n    (folder / 'recipe.yaml').write_text('x')\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    killed = subprocess.run(
        [sys.executable, "-c", program], env={"TMPDIR": str(temporary), "PYTHONPATH": ":".join(sys.path)}
    )
    assert killed.returncode == -signal.SIGKILL
    (left,) = temporary.iterdir()
    assert left.name.startswith(PREFIX) and (left / "recipe.yaml").is_file()
    living, beginning = temporary / f"{PREFIX}living", temporary / f"{PREFIX}beginning"
    living.mkdir()
    beginning.mkdir()  # has no lock yet
    with (living / LOCK).open("w") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        with launch_folder() as own:
            assert set(temporary.iterdir()) == {living, beginning, own}
        assert set(temporary.iterdir()) == {living, beginning}


def test_a_runs_environment_tells_what_the_user_typed(monkeypatch):
    monkeypatch.setenv("RAE_COMMAND", json.dumps(["rae", "train-diffusion", "a recipe", "x=1"]))
    assert environment()["command"] == ["rae", "train-diffusion", "a recipe", "x=1"]
    monkeypatch.delenv("RAE_COMMAND")
    assert environment()["command"] == sys.argv
