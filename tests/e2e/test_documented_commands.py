"""The tutorial on own images, and the snippets of file formats and Python API, run as they are printed, in order."""

import subprocess
import sys

import pytest

from tests.conftest import REPOSITORY, environment, make_images, run_command
from tests.documented import commands_of, snippets_of

DOCS = REPOSITORY / "docs"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder of photos in which own_data.md was followed to its end; the demo's places point to what it made."""
    folder = tmp_path_factory.mktemp("reader")
    make_images(folder / "photos")
    tutorial = commands_of(DOCS / "own_data.md")
    assert len(tutorial) == 10
    for words in tutorial:
        run_command(*words, cwd=folder)
    (folder / "runs" / "digits").mkdir()
    (folder / "data" / "digits").mkdir(parents=True)
    places = {
        "latents/digits": "latents/photos",
        "data/digits/test": "photos",
        "runs/digits/decoder": "runs/photos_decoder",
        "runs/digits/diffusion": "runs/photos",
    }
    for place, made in places.items():
        (folder / place).symlink_to(folder / made)
    return folder


def run_snippets(page, cwd):
    """All snippets of a page in one fresh interpreter."""
    code = "\n".join(snippets_of(page))
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=cwd, env=environment(), capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_own_data_ends_with_images(folder):
    assert len(list((folder / "samples" / "photos").glob("[0-9]*.png"))) == 4


def test_file_formats_are_read_without_rae(folder):
    page = DOCS / "file_formats.md"
    first, last = commands_of(page)
    run_command(*first, cwd=folder)
    assert len(snippets_of(page)) == 6 and "raecli" not in "".join(snippets_of(page))
    told = run_snippets(page, folder)
    assert (
        "(32, 4, 4) class" in told and "24 samples;" in told and "(4, 32, 32, 3) uint8" in told and "24 pairs" in told
    )
    run_command(*last, cwd=folder)
    assert (folder / "fid.json").is_file()


def test_the_python_api_does_what_its_page_says(folder):
    page = DOCS / "python_api.md"
    assert len(snippets_of(page)) == 4
    told = run_snippets(page, folder)
    assert "torch.Size([3, 32, 4, 4])" in told and "torch.Size([2, 3, 32, 32])" in told and "4 runs/nowhere" in told
