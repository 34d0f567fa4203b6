"""`rae sample` from outside, on a small trained pair; and the whole journey's last steps."""

import json
import shutil
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import raecli
from raecli.store.atomic import sha256_of
from raecli.store.statistics import LatentStatistics, load_statistics
from tests.conftest import TINY_DECODER, TINY_DIFFUSION, tree
from tests.e2e.faults import kill_group_at, start

OTHER_ENCODER = Path(__file__).parents[1] / "parity" / "vectors" / "vit_mae"


@pytest.fixture(scope="module")
def trained(cache, images, forked, tmp_path_factory):
    """A folder with a decoder, a diffusion model and a weaker guide, all tiny; not to be changed."""
    folder = tmp_path_factory.mktemp("trained")
    no_judge = ("loss.perceptual=none", "loss.perceptual_weights=null", "duration=20 steps")
    forked.rae(
        "train-decoder",
        "digits/decoder",
        f"images={images}",
        f"cache={cache}",
        "output=decoder",
        *TINY_DECODER,
        *no_judge,
        cwd=folder,
    )
    for name, steps, extra in (("model", 40, ()), ("guide", 10, ("model.depth=1", "seed=1"))):
        arguments = (f"cache={cache}", f"output={name}", f"duration={steps} steps", *TINY_DIFFUSION, *extra)
        forked.rae("train-diffusion", "digits/diffusion", *arguments, cwd=folder)
    return folder


def sample(trained, output, *more):
    return ("sample", trained / "model", output, "--autoencoder", trained / "decoder", "--steps", "5", *more)


def pictures(folder):
    return {path.name: path.read_bytes() for path in folder.glob("0*.png")}


def test_images_labels_sheet_npz_and_protocol(tmp_path, rae, trained):
    rae(*sample(trained, "out", "--num", "31", "--format", "both", "--grid", "9", "--batch-size", "8"))
    out = tmp_path / "out"
    protocol = json.loads((out / "samples.json").read_text())
    assert sorted(path.name for path in out.iterdir()) == sorted(
        [*(f"{index:06d}.png" for index in range(31)), "grid.png", "samples.json", "samples.npz"]
    )
    counts = Counter(protocol["labels"])
    assert sorted(counts) == [0, 1, 2] and max(counts.values()) - min(counts.values()) <= 1
    assert protocol["labels"] != sorted(protocol["labels"])  # class order would spoil the Inception Score
    assert {
        "steps",
        "solver",
        "time_grid",
        "guidance_scale",
        "seed",
        "model",
        "autoencoder",
        "time_shift",
    } <= protocol.keys()
    with np.load(out / "samples.npz", allow_pickle=False) as archive:
        stacked = np.stack([np.asarray(Image.open(out / f"{index:06d}.png")) for index in range(31)])
        np.testing.assert_array_equal(archive["arr_0"], stacked)
        assert archive["arr_0"].dtype == np.uint8 and archive["arr_0"].shape == (31, 32, 32, 3)


def test_an_image_depends_on_seed_and_index_alone(tmp_path, rae, trained):
    rae(*sample(trained, "one", "--num", "12", "--batch-size", "4"))
    rae(*sample(trained, "two", "--num", "12", "--batch-size", "4"), "--devices", "2")
    assert pictures(tmp_path / "one") == pictures(tmp_path / "two")
    rae(*sample(trained, "other", "--num", "12", "--batch-size", "12"))
    ours, theirs = (
        np.stack([np.asarray(Image.open(path)) for path in sorted((tmp_path / name).glob("0*.png"))]).astype(int)
        for name in ("one", "other")
    )
    assert np.abs(ours - theirs).max() <= 1  # another batch: matrix products may round otherwise
    rae(*sample(trained, "seed", "--num", "12", "--batch-size", "4", "--seed", "1"))
    assert pictures(tmp_path / "seed") != pictures(tmp_path / "one")


def test_killed_and_run_again_the_images_are_the_same_and_only_the_missing_are_made(tmp_path, rae, trained):
    rae(*sample(trained, "whole", "--num", "400", "--batch-size", "10"))
    broken = tmp_path / "broken"
    process = start(*sample(trained, "broken", "--num", "400", "--batch-size", "10"), cwd=tmp_path)
    kill_group_at(process, lambda: (broken / "000025.png").exists())
    kept = (broken / "000000.png").stat().st_mtime_ns
    rae(*sample(trained, "broken", "--num", "400", "--batch-size", "10"))
    assert tree(broken) == tree(tmp_path / "whole")
    assert (broken / "000000.png").stat().st_mtime_ns == kept
    result = rae(*sample(trained, "broken", "--num", "400", "--batch-size", "10", "--steps", "6"), code=3)
    assert "steps: found 5, expected 6" in result.stderr


def test_a_decoder_of_another_cache_decodes_by_the_models_own_statistics(tmp_path, rae, trained):
    shutil.copytree(trained / "decoder" / "final", tmp_path / "decoder")
    statistics = load_statistics(tmp_path / "decoder" / "statistics.safetensors")
    file, card = tmp_path / "decoder" / "statistics.safetensors", tmp_path / "decoder" / "config.json"
    LatentStatistics(statistics.mean + 3, statistics.variance * 9, 5).save(file)
    config = json.loads(card.read_text())
    config["sha256"]["statistics.safetensors"] = sha256_of(file)
    card.write_text(json.dumps(config))
    arguments = ("--num", "4", "--steps", "3")
    rae("sample", trained / "model", "own", "--autoencoder", trained / "decoder", *arguments)
    rae("sample", trained / "model", "other", "--autoencoder", "decoder", *arguments)
    assert pictures(tmp_path / "own") == pictures(tmp_path / "other")


def test_an_npz_run_again_is_left_alone_and_foreign_images_are_refused(tmp_path, rae, trained):
    rae(*sample(trained, "out", "--num", "6", "--format", "npz"))
    made = (tmp_path / "out" / "samples.npz").stat().st_mtime_ns
    rae(*sample(trained, "out", "--num", "6", "--format", "npz"))
    assert (tmp_path / "out" / "samples.npz").stat().st_mtime_ns == made
    assert pictures(tmp_path / "out") == {}
    (tmp_path / "foreign").mkdir()
    Image.new("RGB", (32, 32)).save(tmp_path / "foreign" / "000000.png")
    assert "nothing that says what made it" in rae(*sample(trained, "foreign", "--num", "6"), code=3).stderr


def test_guidance_solver_and_grid_reach_the_images(tmp_path, rae, trained):
    base = sample(trained, "base", "--num", "4")
    rae(*base)
    ways = {
        "cfg": ("--guidance-scale", "3"),
        "auto": ("--guidance-scale", "3", "--guide", trained / "guide"),
        "late": ("--guidance-scale", "3", "--guidance-interval", "0", "0.5"),
        "heun": ("--solver", "heun"),
        "grid": ("--time-grid", "released"),
    }
    seen = [pictures(tmp_path / "base")]
    for name, options in ways.items():
        rae(*sample(trained, name, "--num", "4", *options))
        assert pictures(tmp_path / name) not in seen, name
        seen.append(pictures(tmp_path / name))
    protocol = json.loads((tmp_path / "auto" / "samples.json").read_text())
    assert protocol["guidance"] == "autoguidance" and protocol["guide"]["step"] == 10


def test_some_classes_only(tmp_path, rae, trained):
    rae(*sample(trained, "out", "--num", "6", "--classes", "2,0"))
    assert Counter(json.loads((tmp_path / "out" / "samples.json").read_text())["labels"]) == {0: 3, 2: 3}
    assert "classes 0 to 2" in rae(*sample(trained, "bad", "--classes", "7"), code=2).stderr


def test_models_of_different_encoders_are_refused(tmp_path, rae, trained, images):
    rae("encode-cache", "--encoder", OTHER_ENCODER, "--image-size", "32", images, "latents")
    rae("train-diffusion", "digits/diffusion", "cache=latents", "output=other", "duration=1 steps", *TINY_DIFFUSION)
    result = rae("sample", "other", "out", "--autoencoder", trained / "decoder", code=3)
    assert "weights_sha256" in result.stderr and "not made for the same latents" in result.stderr
    assert not list((tmp_path / "out").glob("*.png"))


def test_artifacts_that_cannot_be_used_end_with_code_4(tmp_path, rae, trained):
    swapped = ("sample", trained / "decoder", "out", "--autoencoder", trained / "decoder")
    assert "expected 'rae-diffusion'" in rae(*swapped, code=4).stderr
    assert (
        "no trained model here" in rae("sample", tmp_path, "out", "--autoencoder", trained / "decoder", code=4).stderr
    )
    shutil.copytree(trained / "model" / "final", tmp_path / "model")
    file = tmp_path / "model" / "model.safetensors"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    result = rae("sample", "model", "out", "--autoencoder", trained / "decoder", code=4)
    assert "its bytes changed" in result.stderr and "Traceback" not in result.stderr


def test_the_python_api_does_what_the_verb_does(tmp_path, rae, trained):
    rae(*sample(trained, "out", "--num", "3", "--seed", "5"))
    from raecli.data.order import normals

    model, autoencoder = raecli.load_diffusion(trained / "model"), raecli.load_autoencoder(trained / "decoder")
    labels = torch.tensor(json.loads((tmp_path / "out" / "samples.json").read_text())["labels"])
    noise = normals(model.latent_shape, 5, "sample", range(3), "cpu")
    decoded = autoencoder.decode(raecli.sample(model, noise, labels, steps=5))
    ours = (decoded * 255).round().to(torch.uint8).permute(0, 2, 3, 1).numpy()
    theirs = np.stack([np.asarray(Image.open(tmp_path / "out" / f"{index:06d}.png")) for index in range(3)])
    np.testing.assert_array_equal(ours, theirs)


def test_unconditional_training_and_sampling(tmp_path, rae, cache, trained):
    rae(
        "train-diffusion",
        "digits/diffusion",
        f"cache={cache}",
        "output=free",
        "duration=5 steps",
        "model.class_conditional=false",
        *TINY_DIFFUSION,
    )
    rae("sample", "free", "out", "--autoencoder", trained / "decoder", "--num", "4", "--steps", "3")
    assert set(json.loads((tmp_path / "out" / "samples.json").read_text())["labels"]) == {0}
    guided = ("sample", "free", "guided", "--autoencoder", trained / "decoder", "--guidance-scale", "2")
    assert "no classes to guide by" in rae(*guided, code=2).stderr


def test_a_recipe_swept_on_two_ranks_is_measured_as_eval_does(tmp_path, rae, trained, images):
    told = (f"model={trained / 'model'}", f"autoencoder={trained / 'decoder'}", "steps=4", "precision=fp32")
    rest = ("compile=false", "format=png", "grid=4", "trajectory=1", "batch_size=4", "solver=sde")
    options = ("--num", "12", "--guidance-sweep", "1,2", "--interval-sweep", "0:0.5", "--devices", "2", "--json")
    judge = ("--ref", images, "--features", "digits-mae")
    rae("recipes", "cp", "sample_dith_xl_256", "mine.yaml")
    result = rae("sample", "mine.yaml", "out", *told, *rest, *options, *judge)
    rows = json.loads(result.stdout)["rows"]
    assert [row["folder"] for row in rows] == ["unguided", "scale-2_interval-0-0.5"]
    assert {"000011.png", "grid.png", "trajectory.png", "samples.json"} <= {
        path.name for path in (tmp_path / "out" / "unguided").iterdir()
    }
    measured = json.loads(rae("eval", "fid", tmp_path / "out" / rows[1]["folder"], *judge, "--json").stdout)
    assert measured["fid"] == pytest.approx(rows[1]["fid"], rel=1e-6)
