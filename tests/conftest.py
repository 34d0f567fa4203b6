"""What all tests share: one thread, no network, a folder of small images, the command line in a process of its own.

RAE_TEST_LAUNCH=1 runs every command as a user's shell does; without it those of one rank are forked (tests/forked.py).
"""

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from raecli.store.atomic import sha256_of
from tests.forked import Server

os.environ.setdefault("OMP_NUM_THREADS", "1")  # two cores, two workers: more threads only wait for each other
os.environ["HF_HUB_OFFLINE"] = "1"

REPOSITORY = Path(__file__).parent.parent
LAUNCH_ALL = os.environ.get("RAE_TEST_LAUNCH") == "1"
SEVERAL_RANKS = {"--devices", "--nnodes"}  # options of the launcher
RunRae = Callable[..., subprocess.CompletedProcess[str]]


def environment(**extra: str) -> dict[str, str]:
    """The environment of a child process: as a user's, without the traces of a test runner's workers."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("PYTEST_", "TORCHELASTIC_"))}
    return {**kept, "PYTHONPATH": str(REPOSITORY), **extra}


@pytest.fixture(scope="session")
def forked() -> Iterator[Server]:
    """The server that forks commands; one for each of pytest's workers."""
    server = Server(environment())
    yield server
    server.close()


@pytest.fixture
def rae(tmp_path: Path, forked: Server) -> RunRae:
    """Run `rae ARGUMENTS` in the test's own folder; `code` is the exit code it has to end with.

    As a user does, in a process that the shell starts, where there are several ranks, variables of the environment are
    given, or `launched=True`; else in a forked one.
    """

    def run(
        *arguments: str, code: int = 0, cwd: Path = tmp_path, launched: bool = False, **extra: str
    ) -> subprocess.CompletedProcess[str]:
        told = [str(argument) for argument in arguments]
        if launched or extra or LAUNCH_ALL or not SEVERAL_RANKS.isdisjoint(told):
            command = [sys.executable, "-m", "raecli", *told]
            result = subprocess.run(
                command, cwd=cwd, env=environment(**extra), capture_output=True, text=True, timeout=240
            )
        else:
            result = forked.run(told, cwd, timeout=240)
        assert result.returncode == code, f"exit {result.returncode}\n{result.stdout}\n{result.stderr}"
        return result

    return run


def make_images(folder: Path, classes: int = 3, each: int = 8, side: int = 40, seed: int = 0) -> Path:
    """Class folders of small PNGs with a smooth gradient and noise, deterministic."""
    generator = np.random.default_rng(seed)
    ramp = np.linspace(0, 255, side)
    for label in range(classes):
        (folder / f"class{label}").mkdir(parents=True)
        for index in range(each):
            pixels = (
                ramp[None, :, None] * generator.random(3)
                + generator.normal(0, 12, (side, side + 6 * label, 3))[:, :side]
            )
            image = Image.fromarray(pixels.clip(0, 255).astype(np.uint8))
            image.save(folder / f"class{label}" / f"image{index}.png")
    return folder


@pytest.fixture(scope="session")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """24 images of 3 classes; not to be changed."""
    return make_images(tmp_path_factory.mktemp("images") / "train")


TINY_DIFFUSION = (
    "model.width=16",
    "model.heads=2",
    "model.depth=1",
    "batch_size=8",
    "schedule.warmup=5 steps",
    "save_every=10 steps",
    "log_every=5",
)
TINY_DECODER = (
    "decoder.width=16",
    "decoder.heads=2",
    "decoder.depth=1",
    "decoder.mlp_width=32",
    "batch_size=8",
    "log_every=5",
)


def tree(folder: Path) -> dict[str, str]:
    """Every file below a folder with the sha256 of its bytes: pytest shows two that differ without their bytes."""
    return {file.relative_to(folder).as_posix(): sha256_of(file) for file in folder.rglob("*") if file.is_file()}


def run_command(*arguments: str, cwd: Path) -> None:
    """`rae ARGUMENTS`, which has to work."""
    command = [sys.executable, "-m", "raecli", *map(str, arguments)]
    result = subprocess.run(command, cwd=cwd, env=environment(), capture_output=True, text=True, timeout=240)
    assert result.returncode == 0, f"{command}\n{result.stdout}\n{result.stderr}"


@pytest.fixture(scope="session")
def cache(images: Path, forked: Server, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A latent cache of the images, by the embedded encoder, both views; not to be changed."""
    folder = tmp_path_factory.mktemp("latents")
    arguments = ("--image-size", "32", "--views", "center+flip", "--dtype", "fp32", "--samples-per-shard", "10")
    forked.rae("encode-cache", "--encoder", "digits-mae", images, "cache", *arguments, cwd=folder)
    return folder / "cache"
