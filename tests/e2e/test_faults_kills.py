"""kill -9 again and again at random instants, and disks that fill up: the end is the unbroken run's, to the byte."""

import os
import random
import resource
import signal
import subprocess
import time
from pathlib import Path

import pytest

from raecli.store.atomic import sha256_of
from tests.conftest import TINY_DECODER, TINY_DIFFUSION, make_images, tree
from tests.e2e.faults import children_of, start, wait_for

ENCODE = ("encode-cache", "--encoder", "digits-mae", "--image-size", "32", "--samples-per-shard", "16")
ENCODE = (*ENCODE, "--batch-size", "8", "--views", "center+flip")
KILLS = 3
SMALL_FILE = 100_000  # bytes: beyond the figures and the model, within the optimiser's


def diffusion(cache, output, steps=150):
    shared = ("train-diffusion", "digits/diffusion", f"cache={cache}", f"output={output}", f"duration={steps} steps")
    return (*shared, *TINY_DIFFUSION, "save_every=3 steps")


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    return make_images(
        tmp_path_factory.mktemp("pictures") / "images", classes=4, each=60, side=400
    )  # slow to decode: time to kill


@pytest.fixture(scope="module")
def whole_cache(pictures, forked, tmp_path_factory):
    """What an unbroken encode-cache makes of the pictures."""
    folder = tmp_path_factory.mktemp("whole")
    forked.rae(*ENCODE, pictures, "cache", cwd=folder)
    return tree(folder / "cache")


@pytest.fixture(scope="module")
def whole_run(cache, forked, tmp_path_factory):
    """Weights, averages and optimisers of an unbroken run."""
    folder = tmp_path_factory.mktemp("whole")
    forked.rae(*diffusion(cache, "run"), cwd=folder)
    return exact(folder / "run")


def exact(run):
    """All that is exact about a run; no debris among it."""
    files = tree(run)
    assert not [name for name in files if ".partial-" in name or name.endswith((".lock", ".claim"))]
    return {name: data for name, data in files.items() if name.endswith(".safetensors")}


def kill_at_random(command, folder, begun, seed):
    """Start a command, and kill its group a random while after `begun()` is true; its workers are gone after that."""
    process = start(*command, cwd=folder)
    wait_for(process, begun)
    workers = children_of(process.pid)
    time.sleep(random.Random(seed).uniform(0, 0.05))
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()  # until the last who holds its pipes is gone: the workers, too
    assert workers and process.returncode == -signal.SIGKILL, "it had ended already: the test would prove nothing"


def test_encode_cache_killed_again_and_again_is_the_unbroken_one(tmp_path, rae, pictures, whole_cache):
    folder = tmp_path / "cache"
    command = (*ENCODE, pictures, "cache")
    for turn in range(KILLS):
        before = set(folder.glob("shard-*.tar"))
        kill_at_random(command, tmp_path, lambda: set(folder.glob("shard-*.tar")) - before, seed=turn)  # noqa: B023
    assert not (folder / "manifest.json").exists()
    rae(*command)
    assert tree(folder) == whole_cache
    assert len(whole_cache) == 15 + 3  # shards; manifest, index, statistics


def test_training_killed_again_and_again_is_the_unbroken_one(tmp_path, rae, cache, whole_run):
    run = tmp_path / "run"
    for turn in range(KILLS):
        before = newest(run)
        kill_at_random(diffusion(cache, "run"), tmp_path, lambda: newest(run) > before, seed=10 + turn)  # noqa: B023
    assert 0 < newest(run) < 150
    told = rae(*diffusion(cache, "run")).stderr
    assert "resuming run at step" in told and "warning" not in told
    assert exact(run) == whole_run


def newest(run):
    """The last checkpoint's step; 0 for none."""
    return max((int(path.name[5:]) for path in run.glob("checkpoints/step-*")), default=0)


def limit_files(pid, size):
    """From now on the process can write no file beyond `size` bytes: what a full disk does, without a disk."""
    resource.prlimit(pid, resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))


def test_a_disk_that_fills_while_encoding_keeps_what_is_finished(tmp_path, rae, pictures, whole_cache):
    folder = tmp_path / "cache"
    process = start(*ENCODE, pictures, "cache", cwd=tmp_path)
    wait_for(process, lambda: list(folder.glob("shard-*.json")))
    (worker,) = children_of(process.pid)
    limit_files(worker, 20_000)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 6, err
    assert "cache/" in err and "bytes could not be written" in err and "Traceback" not in err
    assert not list(folder.glob(".partial-*"))
    finished = {record.stem for record in folder.glob("shard-*.json")}
    times = {name: (folder / f"{name}.tar").stat().st_mtime_ns for name in finished}
    assert times and all(sha256_of(folder / f"{name}.tar") == whole_cache[f"{name}.tar"] for name in finished)
    rae(*ENCODE, pictures, "cache")
    assert tree(folder) == whole_cache
    assert {name: (folder / f"{name}.tar").stat().st_mtime_ns for name in finished} == times  # not made again


def test_a_disk_that_fills_while_training_keeps_the_last_checkpoint(tmp_path, rae, cache, whole_run):
    run = tmp_path / "run"
    process = start(*diffusion(cache, "run"), cwd=tmp_path)
    wait_for(process, lambda: newest(run))
    (worker,) = children_of(process.pid)
    limit_files(worker, SMALL_FILE)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 6, err
    assert "optimizer.safetensors" in err and "bytes could not be written" in err and "Traceback" not in err
    assert not list(run.rglob(".partial-*")) and newest(run)
    assert "resuming run at step" in rae(*diffusion(cache, "run")).stderr
    assert exact(run) == whole_run


@pytest.fixture
def small_disk(tmp_path):
    """A disk of its own with little room, where this process may mount one; else None."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=600k", "tmpfs", str(folder)]
    mounted = subprocess.run(mount, capture_output=True, check=False).returncode == 0
    yield folder if mounted else None
    if mounted:
        subprocess.run(["umount", "-l", str(folder)], check=True)


def test_room_that_is_plainly_lacking_is_refused_before_any_work(rae, cache, images, pictures, small_disk):
    place = small_disk or Path("/proc")  # where nothing can be written either, if for another reason
    decoder = ("train-decoder", "digits/decoder", f"cache={cache}", f"images={images}", "duration=2 steps")
    decoder = (*decoder, "loss.perceptual=none", "loss.perceptual_weights=null", *TINY_DECODER)
    commands = [(*decoder, "decoder.width=64", f"output={place}/decoder"), (*ENCODE, pictures, place / "cache")]
    for command in commands:
        result = rae(*command, code=6)
        assert str(place) in result.stderr and "Traceback" not in result.stderr
        if small_disk:
            assert "are needed" in result.stderr or "are free" in result.stderr
            assert not [*place.rglob("*.tar"), *place.rglob("*.safetensors"), *place.rglob(".partial-*")]


def test_an_output_that_cannot_be_a_folder_is_told(tmp_path, rae, cache, images):
    (tmp_path / "taken").write_text("a file")
    for command in (diffusion(cache, "taken/run", 2), (*ENCODE, images, "taken"), (*ENCODE, images, "/proc/here")):
        result = rae(*command, code=6)
        assert ("taken" in result.stderr or "/proc" in result.stderr) and "Traceback" not in result.stderr
    assert (tmp_path / "taken").read_text() == "a file"
