"""`rae encode-cache` from outside: whole, restartable, the same for any ranks, and clear about bad input."""

import json
import os
import shutil
import signal
import time

import numpy as np
import pytest
import torch
import webdataset

import raecli
from raecli.data.images import open_images
from raecli.data.preprocess import center_crop, decode_rgb
from raecli.errors import InputError
from raecli.models.build import encoder_of
from raecli.store.manifest import read_manifest
from tests.conftest import make_images, tree
from tests.e2e.faults import kill_group_at, start, wait_for

ENCODE = ("encode-cache", "--encoder", "digits-mae", "--image-size", "32")


def test_a_cache_holds_the_encoders_latents_in_a_seeded_order(cache, images):
    opened, source = raecli.open_cache(cache), open_images(images)
    assert len(opened) == 24 and opened.manifest.classes == ("class0", "class1", "class2")
    encoder = encoder_of(read_manifest(cache).encoder)
    by_key = {item.name.removesuffix(".png"): item for item in source.items}
    keys = [opened[i][2] for i in range(24)]
    assert sorted(keys) == sorted(by_key) and keys != sorted(keys)  # all of them, permuted
    for index in (0, 9, 10, 23):  # both sides of a shard's end
        latent, label, key = opened[index]
        item = by_key[key]
        square = center_crop(np.asarray(decode_rgb(item.read(), item.name)), 32)
        pixels = torch.from_numpy(square.copy()).permute(2, 0, 1)[None] / 255
        assert label == item.label
        torch.testing.assert_close(latent, encoder(pixels)[0], atol=1e-5, rtol=0)  # another batch size
        torch.testing.assert_close(opened.latents([index], [True])[0], encoder(pixels.flip(3))[0], atol=1e-5, rtol=0)


def test_statistics_are_those_of_all_views(cache):
    opened = raecli.open_cache(cache)
    views = torch.cat([opened.latents(range(24)), opened.latents(range(24), [True] * 24)]).double()
    torch.testing.assert_close(opened.statistics.mean, views.mean(0).float(), atol=1e-6, rtol=0)
    torch.testing.assert_close(opened.statistics.variance, views.var(0, correction=0).float(), atol=1e-6, rtol=1e-6)


def test_webdataset_reads_the_cache(cache):
    opened = raecli.open_cache(cache)
    urls = [str(cache / shard.name) for shard in opened.manifest.shards]
    samples = list(webdataset.WebDataset(urls, shardshuffle=False).decode())
    assert [sample["__key__"] for sample in samples] == opened.keys
    np.testing.assert_array_equal(samples[13]["latent.npy"], opened[13][0])
    assert [sample["cls"] for sample in samples] == opened.labels.tolist()


def test_killed_and_run_again_or_run_on_two_ranks_it_is_the_same_to_the_byte(tmp_path, rae):
    source = make_images(tmp_path / "images", classes=4, each=60, side=90)
    options = ("--samples-per-shard", "16", "--batch-size", "8", "--views", "center+flip")
    rae(*ENCODE, source, "whole", *options)
    broken = tmp_path / "broken"
    process = start(*ENCODE, source, broken, *options, cwd=tmp_path)
    kill_group_at(process, lambda: len(list(broken.glob("shard-*.json"))) >= 2)
    assert not (broken / "manifest.json").exists()
    rae(*ENCODE, source, "broken", *options, "--devices", "2")
    assert tree(broken) == tree(tmp_path / "whole")
    assert len(tree(broken)) == 15 + 3  # shards; manifest, index, statistics: no debris


def test_a_flipped_bit_is_found_and_the_same_command_mends_it(tmp_path, rae, images, cache):
    shutil.copytree(cache, tmp_path / "cache")
    shard = tmp_path / "cache" / "shard-000001.tar"
    data = bytearray(shard.read_bytes())
    data[5000] ^= 1
    shard.write_bytes(data)
    recipe = ("train-diffusion", "digits/diffusion", "cache=cache", "output=run", "duration=1 steps")
    result = rae(*recipe, code=3)
    assert "shard-000001.tar" in result.stderr and "shard-000000.tar" not in result.stderr
    shared = ("--views", "center+flip", "--dtype", "fp32", "--samples-per-shard", "10")
    rae(*ENCODE, images, "cache", *shared)
    assert tree(tmp_path / "cache") == tree(cache)
    shard.unlink()
    assert "shard-000001.tar: missing" in rae(*recipe, code=3).stderr


@pytest.mark.parametrize("name", ["index.safetensors", "statistics.safetensors"])
def test_index_and_statistics_are_watched_and_mended_too(tmp_path, rae, images, cache, name):
    shutil.copytree(cache, tmp_path / "cache")
    data = bytearray((tmp_path / "cache" / name).read_bytes())
    data[-2] ^= 64
    (tmp_path / "cache" / name).write_bytes(data)
    with pytest.raises(InputError, match=name):
        raecli.open_cache(tmp_path / "cache")
    rae(*ENCODE, images, "cache", "--views", "center+flip", "--dtype", "fp32", "--samples-per-shard", "10")
    assert tree(tmp_path / "cache") == tree(cache)


def test_interrupted_by_int_it_says_so_without_a_traceback(tmp_path):
    source = make_images(tmp_path / "images", classes=4, each=60, side=90)
    process = start(*ENCODE, source, "cache", "--samples-per-shard", "8", "--batch-size", "4", cwd=tmp_path)
    wait_for(process, lambda: list((tmp_path / "cache").glob("shard-*.json")))
    os.killpg(process.pid, signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130 and "Traceback" not in err and "interrupted" in err
    assert "death signal" not in err  # torch's own words for it


def test_another_cache_in_the_folder_is_refused_with_the_fields_that_differ(tmp_path, rae, images, cache):
    shutil.copytree(cache, tmp_path / "cache")
    result = rae(*ENCODE, images, "cache", "--dtype", "bf16", "--samples-per-shard", "10", code=3)
    assert "dtype: found 'fp32', expected 'bf16'" in result.stderr
    assert "views: found 'center+flip', expected 'center'" in result.stderr
    assert "samples_per_shard" not in result.stderr
    assert tree(tmp_path / "cache") == tree(cache)


def test_bad_images_are_all_named_or_skipped_and_counted(tmp_path, rae):
    source = make_images(tmp_path / "images")
    whole = (source / "class1" / "image3.png").read_bytes()
    (source / "class0" / "image1.png").write_bytes(b"")
    (source / "class1" / "image3.png").write_bytes(whole[: len(whole) // 2])
    (source / "class2" / "text.JPEG").write_text("I am no image")
    bad = {"class0/image1.png", "class1/image3.png", "class2/text.JPEG"}
    result = rae(*ENCODE, source, "cache", code=3)
    assert all(name in result.stderr for name in bad) and "3 unreadable images" in result.stderr
    assert not (tmp_path / "cache" / "manifest.json").exists()
    rae(*ENCODE, source, "skipped", "--on-bad-image", "skip")
    told = rae(*ENCODE, source, "cache", "--on-bad-image", "skip")  # as the message said, in the folder that it left
    assert "cache: 22 samples in 1 shard, 3 images skipped" in told.stdout
    assert tree(tmp_path / "cache") == tree(tmp_path / "skipped")
    manifest = json.loads((tmp_path / "skipped" / "manifest.json").read_text())
    assert {entry["source"] for entry in manifest["skipped"]} == bad
    assert manifest["samples"] == 22 == len(raecli.open_cache(tmp_path / "skipped"))


@pytest.mark.parametrize(
    ("arguments", "code", "told"),
    [
        (("--encoder", "digits-mae", "nowhere", "out"), 3, "nowhere: no such folder"),
        (("--encoder", "dinov2-x", "IMAGES", "out"), 2, "dinov2-"),
        (
            ("--encoder", "dinov2-b", "IMAGES", "out"),
            2,
            "Bring model.safetensors of the Hugging Face repository timm/vit_base_patch14_reg4_dinov2",
        ),
        (("--encoder", "digits-mae", "IMAGES", "out", "--samples-per-shard", "0"), 2, "--samples-per-shard"),
    ],
)
def test_what_a_user_gets_wrong_is_told_before_anything_is_written(tmp_path, rae, images, arguments, code, told):
    arguments = [str(images) if argument == "IMAGES" else argument for argument in arguments]
    begin = time.monotonic()
    result = rae("encode-cache", *arguments, code=code, HF_HOME=str(tmp_path / "empty"))
    assert time.monotonic() - begin < 10  # a model that is not here is no reason to wait for a network
    assert told in result.stderr and "Traceback" not in result.stderr
    assert not (tmp_path / "out").exists()
