"""As a user who may not write here or read there: the right exit code, the path and what to do, and no traceback.

Root may do everything, so under root the commands run as another user, with an interpreter that this user can start.
"""

import json
import os
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path

import pytest

from tests.conftest import REPOSITORY, TINY_DIFFUSION, environment

NOBODY = 54321  # no line in passwd tells its home
USER = {"user": NOBODY, "group": NOBODY, "extra_groups": []} if os.getuid() == 0 else {}
PACKAGES = os.pathsep.join([str(REPOSITORY), sysconfig.get_paths()["purelib"], sysconfig.get_paths()["platlib"]])


def run_as_user(command, **extra):
    """A command in another user's shoes, its environment without a home unless one is given."""
    told = {name: value for name, value in environment(PYTHONPATH=PACKAGES).items() if name != "HOME"}
    return subprocess.run(
        command, env=told | extra.pop("env", {}), capture_output=True, text=True, timeout=120, **USER, **extra
    )


@pytest.fixture(scope="module")
def python():
    """An interpreter of our version that the user may start; skips where there is none."""
    wanted = f"python{sys.version_info.major}.{sys.version_info.minor}"
    for found in (sys.executable, f"/usr/bin/{wanted}", f"/usr/local/bin/{wanted}", "/usr/bin/python3"):
        code = f"import raecli, torch, sys; sys.exit(sys.version_info[:2] != {sys.version_info[:2]})"
        try:
            if run_as_user([found, "-c", code], cwd="/").returncode == 0:
                return found
        except OSError:
            continue
    pytest.skip(f"no {wanted} that user {NOBODY} may start, with torch")


@pytest.fixture
def place(images, cache):
    """A folder that the user may enter and not write to: images, a cache; and `own`, which is the user's.

    Not pytest's own, which are for their owner alone.
    """
    with tempfile.TemporaryDirectory() as name:
        place = Path(name)
        shutil.copytree(images, place / "images")
        shutil.copytree(cache, place / "cache")
        (place / "own").mkdir()
        if USER:
            os.chown(place / "own", NOBODY, NOBODY)
        for shut in (place, place / "cache", place / "images"):
            shut.chmod(0o555)
        if run_as_user(["test", "-x", place], cwd="/").returncode:
            pytest.skip(f"user {NOBODY} may not enter {place}")
        yield place
        for folder, _, files in os.walk(place):
            for path in (Path(folder), *(Path(folder) / file for file in files)):
                path.chmod(0o755)


@pytest.fixture
def rae(python, place):
    """Run `rae ARGUMENTS` in the user's own folder; `code` is what it ends with."""

    def run(*arguments, code, cwd="own", **extra):
        told = [python, "-m", "raecli", *map(str, arguments)]
        result = run_as_user(told, cwd=place / cwd, env=extra)
        assert result.returncode == code, f"exit {result.returncode}\n{result.stdout}\n{result.stderr}"
        assert "Traceback" not in result.stderr and ".partial" not in result.stderr
        return result

    return run


ENCODE = ("encode-cache", "--encoder", "digits-mae", "--image-size", "32")


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ((*ENCODE, "../images", "../latents"), "../latents: no permission to write in .."),
        ((*ENCODE, "../images", "../latents", "--dry-run"), "../latents: no permission to write in .."),
        ((*ENCODE, "../images", "../cache"), "../cache: no permission to write"),
        (("train-diffusion", "digits/diffusion", "cache=../cache", "output=../run"), "../run: no permission to write"),
        (("eval", "fid", "../images", "--ref", "../images", "--features", "pixels", "--out", "../r.json"), "../r.json"),
        (("overfit-toy", "--width", "16", "--out", "../toy"), "../toy: no permission to write"),
        (("eval", "probe", "../cache", "--out", "../probe.json"), "../probe.json: no permission to write"),
        (("recipes", "cp", "dith_s", "../mine.yaml"), "../mine.yaml: no permission"),
    ],
    ids=lambda value: " ".join(value[:2]) if isinstance(value, tuple) else "",
)
def test_an_output_that_may_not_be_written_ends_with_6_before_any_work(rae, place, arguments, told):
    before = sorted(place.iterdir())
    result = rae(*arguments, code=6)
    assert told in result.stderr and "choose another output, or change its permissions" in result.stderr
    assert "images/s" not in result.stderr and sorted(place.iterdir()) == before


def test_images_that_may_not_be_read_are_named_and_never_left_out(rae, place):
    (place / "images" / "class1" / "image3.png").chmod(0)
    told = rae(*ENCODE, "../images", "latents", code=3).stderr
    assert "class1/image3.png: not a readable file: Permission denied" in told
    assert "1 image skipped" in rae(*ENCODE, "../images", "kept", "--on-bad-image", "skip", code=0).stdout
    (place / "images" / "class1").chmod(0)  # its 8 images would be missing without a word
    told = rae(*ENCODE, "../images", "other", "--on-bad-image", "skip", code=3).stderr
    assert "../images/class1: this folder cannot be read: Permission denied" in told
    (place / "images" / "class1").rename(place / "images" / "lost+found")  # of a disk's root
    assert "16 samples" in rae(*ENCODE, "../images", "another", code=0).stdout


@pytest.mark.parametrize(
    "name", ["shard-000001.tar", "index.safetensors", "statistics.safetensors", "manifest.json", "."]
)
def test_a_cache_that_may_not_be_read_is_bad_input(rae, place, name):
    (place / "cache" / name).chmod(0)
    for verb in (("train-diffusion", "digits/diffusion", *TINY_DIFFUSION, "cache=../cache"), ("inspect", "../cache")):
        told = rae(*verb, code=3).stderr
        assert name in told and "cannot be read" in told and "choose another output" not in told
    if name == "shard-000001.tar":
        assert "shard-000001.tar: cannot be read: Permission denied" in rae("verify", "../cache", code=3).stderr
    assert not list((place / "own").rglob("*.safetensors"))


def test_the_doctor_tells_where_may_not_be_written(rae, place):
    rows = json.loads(rae("doctor", "--json", code=0, TMPDIR=str(place)).stdout)
    told = {row["name"]: row["remark"] for row in rows}
    assert told["disk here"] == "" and told["disk for scratch"].startswith("you may not write there: set TMPDIR")
    rows = json.loads(rae("doctor", "--json", code=0, cwd="images", TMPDIR=str(place / "absent")).stdout)
    told = {row["name"]: row["remark"] for row in rows}
    assert told["disk here"].startswith("you may not write there") and "No such file" in told["disk for scratch"]


def test_a_recipe_in_a_folder_that_may_not_be_entered(rae, place):
    (place / "images").chmod(0)
    assert "no permission to look into its folder" in rae("recipes", "validate", "../images/a.yaml", code=2).stderr
    (place / "images").chmod(0o755)


@pytest.mark.skipif(not USER, reason="root alone can be a user without a home")
def test_without_a_home_everything_works_that_needs_none(rae, place):
    """Neither $HOME nor a line in passwd: a container's `--user 54321`."""
    assert "24 samples in 1 shard," in rae(*ENCODE, "../images", "latents", code=0).stdout
    assert "VGG16 (LPIPS)" in rae("doctor", code=0).stdout
    assert "bring vgg16-397923af.pth" in rae("train-decoder", "decoder_xl_dinov2b", "cache=../cache", code=2).stderr
    asked = ("eval", "fid", "../images", "--ref", "../images")
    assert "weights-inception-2015-12-05-6726825d.pth" in rae(*asked, code=2).stderr
    assert [path.name for path in (place / "own").iterdir()] == ["latents"]  # no folder named ~


def test_a_home_that_may_not_be_written_is_done_without(rae, place):
    assert "24 samples" in rae(*ENCODE, "../images", "latents", code=0, HOME=str(place)).stdout
    assert sorted(path.name for path in place.iterdir()) == ["cache", "images", "own"]


def test_a_current_folder_that_may_not_be_entered_or_is_gone(rae, python, place):
    shut = 'cd "$1" && chmod 0 . && shift && exec "$@"'
    encode = (python, "-m", "raecli", *ENCODE, place / "images")
    result = run_as_user(["bash", "-c", shut, "bash", place / "own", *encode, "latents"])
    assert result.returncode == 6 and "latents: no permission to write in" in result.stderr, result.stderr
    (place / "own").chmod(0o755)
    gone = 'mkdir "$1" && cd "$1" && rmdir "$1" && shift && exec "$@"'
    result = run_as_user(["bash", "-c", gone, "bash", place / "own" / "gone", *encode, place / "own" / "latents"])
    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr == "error: the folder that this was started in is gone; change to one that is there\n"


def test_the_user_is_not_root(python):
    told = run_as_user([python, "-c", "import os; print(os.getuid())"]).stdout.strip()
    assert told == str(NOBODY if USER else os.getuid()) and told != "0"
