"""What the launcher makes of its surroundings: junk in them, folders of killed launchers, files cut under a rank."""

import errno
import fcntl
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time

import pytest

from raecli.errors import ExitCode, StorageError, UsageError
from raecli.launch import LaunchOptions, error_of_workers, exit_codes, joined_environment, start
from raecli.launch_folder import HOST, PREFIX, launch_folder, opened_folder, sweep_folders, this_host
from raecli.recipe.load import load_recipe
from raecli.recipe.recipes import TrainDiffusionRecipe
from raecli.stages.worker import EXIT_CODES, work
from raecli.store.lock import locked
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


def test_a_rank_that_died_of_sigbus_is_an_input_problem_only_where_a_shard_is_cut(tmp_path, cache):
    latents = shutil.copytree(cache, tmp_path / "latents")
    for whole in (str(latents), None):
        error = error_of_workers({0: 7, 1: -signal.SIGBUS}, whole)
        assert error.exit_code == ExitCode.WORKER
        assert "rank 1" in str(error) and "SIGBUS" in str(error) and "/dev/shm" in str(error)
    os.truncate(latents / "shard-000001.tar", 5000)
    error = error_of_workers({0: 7, 1: -signal.SIGBUS}, str(latents))
    assert error.exit_code == ExitCode.BAD_INPUT
    assert "shard-000001.tar: 5000 bytes" in str(error) and f"rae verify {latents}" in str(error)
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
    living, beginning, elsewhere = (temporary / f"{PREFIX}{name}" for name in ("living", "beginning", "elsewhere"))
    for folder in (living, beginning, elsewhere):
        folder.mkdir()
    (living / HOST).write_bytes(this_host())  # and the one that is beginning has none yet
    (elsewhere / HOST).write_bytes(b"other-" + this_host())
    with opened_folder(living) as handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        with launch_folder() as own:
            assert set(temporary.iterdir()) == {living, beginning, elsewhere, own}
        assert set(temporary.iterdir()) == {living, beginning, elsewhere}
    with launch_folder() as own:  # the living one has ended
        assert set(temporary.iterdir()) == {beginning, elsewhere, own}


def test_a_launchers_folder_is_locked_itself_as_tmpfiles_wants_it(temporary):
    with launch_folder() as own, opened_folder(own) as another:
        assert (own / HOST).read_bytes() == this_host() and not locked(another, fcntl.LOCK_EX)


def test_where_there_are_no_locks_a_launcher_starts_and_is_swept_by_nobody(temporary, monkeypatch):
    def refuse(file, kind):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", refuse)
    with launch_folder() as own, launch_folder() as other:
        monkeypatch.undo()
        sweep_folders(own.parent)
        assert own.is_dir() and other.is_dir()


def test_a_launchers_folder_that_vanished_means_that_nobody_said_anything(temporary, monkeypatch):
    with launch_folder() as folder:
        monkeypatch.setenv(EXIT_CODES, str(folder / "ends"))
        shutil.rmtree(folder)
        assert work(str(folder / "recipe.yaml"), 1.0) == ExitCode.USAGE  # its own code, not that of a failed write
        assert exit_codes(folder / "ends") == {}


def test_a_runs_environment_tells_what_the_user_typed(monkeypatch):
    monkeypatch.setenv("RAE_COMMAND", json.dumps(["rae", "train-diffusion", "a recipe", "x=1"]))
    assert environment()["command"] == ["rae", "train-diffusion", "a recipe", "x=1"]
    monkeypatch.delenv("RAE_COMMAND")
    assert environment()["command"] == sys.argv


def test_who_writes_first_alone_has_to_be_able_to(tmp_path, capsys):
    """The output may be a disk of node 0's own: its other nodes are not asked."""
    (tmp_path / "file").touch()
    recipe = load_recipe(TrainDiffusionRecipe, "digits/diffusion", [f"output={tmp_path}/file/run"])
    with pytest.raises(StorageError, match="file is no folder"):
        start("train-diffusion", recipe, LaunchOptions(nnodes=2, node_rank=0, rdzv="host:1"), dry_run=True)
    assert capsys.readouterr().out == ""
    start("train-diffusion", recipe, LaunchOptions(nnodes=2, node_rank=1, rdzv="host:1"), dry_run=True)
    assert f"output: {tmp_path}/file/run" in capsys.readouterr().out
