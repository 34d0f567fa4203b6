"""Several jobs that make one cache in one folder, without a word between them."""

import json
import os
import signal

import pytest
import torch

import raecli
from tests.conftest import make_images, tree
from tests.e2e.faults import start, wait_for

ENCODE = ("encode-cache", "--encoder", "digits-mae", "--image-size", "32", "--batch-size", "8")


def test_two_jobs_at_once_and_one_that_dies_make_the_cache_that_one_makes(tmp_path, rae):
    source = make_images(tmp_path / "images", classes=4, each=60, side=90)
    options = ("--samples-per-shard", "12")
    rae(*ENCODE, source, "alone", *options)
    jobs = [start(*ENCODE, source, "shared", *options, "--join", cwd=tmp_path) for _ in range(3)]
    wait_for(jobs[0], lambda: len(list((tmp_path / "shared").glob("shard-*.json"))) >= 2)
    os.killpg(jobs[0].pid, signal.SIGKILL)  # what it had claimed is taken over
    told = [job.communicate(timeout=120) for job in jobs[1:]]
    assert [job.returncode for job in jobs[1:]] == [0, 0], told
    rae(*ENCODE, source, "shared", *options, "--join")  # where it died after the others had looked last
    found = {name: data for name, data in tree(tmp_path / "shared").items() if not name.startswith(".")}
    assert found == tree(tmp_path / "alone")


def test_int8_is_near_and_says_how_near(tmp_path, rae, images):
    rae(*ENCODE, images, "exact", "--dtype", "fp32", "--views", "center+flip")
    rae(*ENCODE, images, "int8", "--dtype", "int8", "--views", "center+flip")
    exact, small = raecli.open_cache(tmp_path / "exact"), raecli.open_cache(tmp_path / "int8")
    views = [[cache.latents(range(24), [flip] * 24).double() for flip in (False, True)] for cache in (exact, small)]
    wanted, given = torch.cat(views[0]), torch.cat(views[1])
    error = ((given - wanted).square().sum() / wanted.square().sum()).sqrt().item()
    told = json.loads((tmp_path / "int8" / "manifest.json").read_text())["quantisation_error"]
    assert told == pytest.approx(error, rel=1e-3) and 0 < told < 0.01
    torch.testing.assert_close(small.statistics.mean, given.mean(0).float(), atol=1e-6, rtol=0)
    assert exact.keys == small.keys and exact.labels.tolist() == small.labels.tolist()
