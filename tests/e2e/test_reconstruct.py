"""Reconstructing and measuring on a small trained decoder, and the decoder's validation while it trains."""

import json
import shutil
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from raecli.errors import InputError, UsageError
from raecli.models.load import load_autoencoder
from raecli.recipe.load import load_recipe
from raecli.recipe.recipes import EvaluateReconstructionRecipe, ReconstructRecipe, TrainDecoderRecipe
from raecli.stages import evaluate_reconstruction, reconstruct, train_decoder
from raecli.store.checkpoint import CONFIG
from raecli.store.encoders import DIGITS_FOLDER
from raecli.training.distributed import Ranks
from tests.conftest import TINY_DECODER, make_images, tree
from tests.e2e.faults import kill_group_at, start
from tests.tiny_vae import make_vae

ALONE = Ranks(0, 1, torch.device("cpu"))
PLAIN = ("loss.perceptual=none", "loss.perceptual_weights=null", *TINY_DECODER)


@pytest.fixture(scope="module")
def pictures(tmp_path_factory) -> Path:
    """150 images that no decoder was trained on; not to be changed."""
    return make_images(tmp_path_factory.mktemp("pictures") / "val", each=50, seed=1)


def train(output: Path, images: Path, cache: Path, *more: str) -> Path:
    """A tiny decoder, in this process."""
    told = (f"images={images}", f"cache={cache}", f"output={output}", "duration=20 steps", *PLAIN, *more)
    train_decoder.run(load_recipe(TrainDecoderRecipe, "digits/decoder", told), ALONE)
    return output


@pytest.fixture(scope="module")
def decoder(images, cache, pictures, tmp_path_factory) -> Path:
    """Trained with a validation on `pictures` after 8, 16 and 20 steps; not to be changed."""
    told = (f"validation.images={pictures}", "validation.every=8 steps", "validation.features=digits-mae")
    return train(tmp_path_factory.mktemp("trained") / "decoder", images, cache, *told)


def reconstructed(source: Path, output: Path, autoencoder: object, **told) -> Path:
    """`rae reconstruct` in this process."""
    paths = {"source": str(source), "output": str(output), "autoencoder": str(autoencoder)}
    reconstruct.run(ReconstructRecipe(stage="reconstruct", **paths, **told), ALONE)
    return output


def figures_of(capsys, images: Path, reconstructions: Path, **told) -> dict:
    """`rae eval reconstruction` in this process: its JSON."""
    capsys.readouterr()
    paths = {"images": str(images), "reconstructions": str(reconstructions)}
    standard = {"metrics": ("psnr", "ssim"), "print_json": True}
    recipe = EvaluateReconstructionRecipe(stage="evaluate-reconstruction", **paths, **(standard | told))
    evaluate_reconstruction.run(recipe, ALONE)
    return json.loads(capsys.readouterr().out)


def pixels(path: Path) -> np.ndarray:
    return np.asarray(Image.open(path))


def log_of(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def test_from_the_images_to_the_figures(tmp_path, rae, pictures, decoder):
    told = ("--autoencoder", decoder, "--save-originals", "--sheet", "6", "--batch-size", "32")
    assert "150 images of 32 pixels" in rae("reconstruct", pictures, "out", *told).stdout
    out = tmp_path / "out"
    names = {file.relative_to(pictures).as_posix() for file in pictures.rglob("*.png")}
    for kind in ("reconstructions", "originals"):
        assert tree(out / kind).keys() == names
    assert sorted(path.name for path in out.iterdir()) == [
        "originals",
        "reconstructions",
        "reconstructions.json",
        "sheet.png",
    ]
    autoencoder = load_autoencoder(decoder)
    crop = (
        torch.from_numpy(pixels(out / "originals" / "class1" / "image7.png").copy()).permute(2, 0, 1)[None].float()
        / 255
    )
    expected = (autoencoder.decode(autoencoder.encode(crop))[0] * 255).round().permute(1, 2, 0).numpy()
    found = pixels(out / "reconstructions" / "class1" / "image7.png").astype(float)
    assert np.abs(found - expected).max() <= 1  # another batch: matrix products may round otherwise
    ways = {"images": (pictures,), "crops": (out / "originals", "--devices", "2", "--batch-size", "7")}
    reports = {}
    for name, way in ways.items():
        rest = (out, "--metrics", "rfid,psnr,ssim", "--features", "digits-mae", "--out", f"{name}.json")
        shown = rae("eval", "reconstruction", way[0], *rest, *way[1:]).stdout
        assert "rfid" in shown and "150 of 32 x 32 pixels" in shown and "lpips" not in shown
        reports[name] = json.loads((tmp_path / f"{name}.json").read_text())
    one, two = reports["images"], reports["crops"]
    assert one["kind"] == "reconstruction" and one["pairs"] == 150 and one["warnings"] == two["warnings"] == []
    assert one["protocol"] == json.loads((out / "reconstructions.json").read_text())
    for name in ("psnr", "ssim", "pixels_sha256"):
        assert one[name] == two[name], name  # to the bit, on two ranks and in other batches
    assert one["rfid"] == pytest.approx(two["rfid"], rel=1e-9)
    last = log_of(decoder)[-1]  # the decoder's own validation at its last step: the same images, in another order
    assert last["step"] == 20
    assert last["validation_psnr"] == pytest.approx(one["psnr"], abs=1e-3)
    assert last["validation_rfid"] == pytest.approx(one["rfid"], rel=1e-2)


def test_killed_and_run_again_or_on_two_ranks_the_images_are_the_same(tmp_path, rae, pictures, decoder):
    command = ("reconstruct", pictures, "broken", "--autoencoder", decoder, "--batch-size", "2", "--save-originals")
    process = start(*command, cwd=tmp_path)
    broken, whole = tmp_path / "broken", tmp_path / "whole"
    kill_group_at(process, lambda: (broken / "reconstructions" / "class0" / "image13.png").exists())
    assert not (broken / "reconstructions.json").exists()
    kept = next((broken / "reconstructions").rglob("image0.png"))
    made = kept.stat().st_mtime_ns
    rae(*command, "--devices", "2")  # two ranks go on where one was
    assert kept.stat().st_mtime_ns == made
    reconstructed(pictures, whole, decoder, batch_size=2, save_originals=True)  # one rank, unbroken
    assert tree(broken) == tree(whole)
    assert not (broken / "unfinished.json").exists()


def test_a_finished_folder_is_left_alone_mended_and_kept_from_others(tmp_path, pictures, decoder):
    out = reconstructed(pictures, tmp_path / "out", decoder)
    times = {path: path.stat().st_mtime_ns for path in out.rglob("*") if path.is_file()}
    before = tree(out)
    reconstructed(pictures, out, decoder)
    assert {path: path.stat().st_mtime_ns for path in out.rglob("*") if path.is_file()} == times
    (out / "reconstructions" / "class2" / "image4.png").unlink()
    cut = out / "reconstructions" / "class0" / "image9.png"
    cut.write_bytes(cut.read_bytes()[:-20])
    reconstructed(pictures, out, decoder)
    assert tree(out) == before
    with pytest.raises(InputError, match="pixel_rounding: found 'round', expected 'floor'"):
        reconstructed(pictures, out, decoder, pixel_rounding="floor")
    foreign = out / "reconstructions" / "class0" / "other.png"
    shutil.copy(cut, foreign)
    with pytest.raises(InputError, match=r"other\.png: is no image of this source"):
        reconstructed(pictures, out, decoder)
    with pytest.raises(UsageError, match="trained on images of 32 pixels"):
        reconstructed(pictures, tmp_path / "larger", decoder, image_size=64)
    with pytest.raises(UsageError, match="lies in the images' own folder"):
        reconstructed(pictures, pictures / "again", decoder)


def test_other_images_than_those_reconstructed_are_refused(tmp_path, rae, capsys, pictures, decoder):
    few = shutil.copytree(pictures, tmp_path / "few")
    out = reconstructed(pictures, tmp_path / "out", decoder)
    (few / "class1" / "image3.png").unlink()
    refused = rae("eval", "reconstruction", few, out, "--metrics", "psnr", code=3).stderr
    assert "149 images, 150 reconstructions, 1 without a partner\n  class1/image3: not in" in refused
    assert "Traceback" not in refused
    shutil.copy(few / "class1" / "image4.png", few / "class1" / "image3.png")  # a name that fits, another image
    assert "matched by name alone" in figures_of(capsys, few, out)["warnings"][0]


def test_baselines_tars_and_converted_autoencoders_that_hold_their_encoder(tmp_path, capsys, pictures, decoder):
    small = tmp_path / "small"
    shutil.copytree(pictures / "class0", small / "class0")
    exact = reconstructed(small, tmp_path / "pixels", "pixels", image_size=32)
    report = figures_of(capsys, small, exact)
    assert (report["psnr"], report["ssim"]) == (100, 1)
    assert report["protocol"]["encoder"]["family"] == "pixels" and report["protocol"]["image_size"] == 32
    vae = reconstructed(small, tmp_path / "vae", f"sdvae:{make_vae(tmp_path / 'sd')}", image_size=32)
    assert 0 < figures_of(capsys, small, vae)["psnr"] < 40
    inside = shutil.copytree(decoder / "final", tmp_path / "inside")
    shutil.copytree(DIGITS_FOLDER, inside / "encoder")
    config = json.loads((inside / CONFIG).read_text())
    config["latents"]["encoder"] |= {"path": "encoder", "weights": "encoder/model.safetensors"}
    (inside / CONFIG).write_text(json.dumps(config))
    with tarfile.open(tmp_path / "small.tar", "w") as archive:
        for file in sorted((small / "class0").iterdir()):
            archive.add(file, arcname=file.name)
    own, converted = tmp_path / "own", tmp_path / "converted"
    reconstructed(small, own, decoder)
    reconstructed(tmp_path / "small.tar", converted, inside)
    assert list(tree(own / "reconstructions").values()) == list(tree(converted / "reconstructions").values())
    assert figures_of(capsys, tmp_path / "small.tar", converted)["psnr"] == figures_of(capsys, small, own)["psnr"]


def test_an_upsampling_decoder_is_compared_at_the_size_it_makes(tmp_path, capsys, images, cache):
    told = ("decoder.patch_size=16", "augmentation.resize=96", "augmentation.crop=random", "duration=4 steps")
    run = train(tmp_path / "run", images, cache, *told, f"validation.images={images}", "validation.every=4 steps")
    out = reconstructed(images, tmp_path / "out", run, save_originals=True)
    report = figures_of(capsys, images, out)
    assert report["size"] == [64, 64] and report["protocol"]["image_size"] == 32
    assert pixels(out / "originals" / "class0" / "image0.png").shape == (64, 64, 3)
    assert figures_of(capsys, out / "originals", out)["psnr"] == report["psnr"]
    assert log_of(run)[-1]["validation_psnr"] == pytest.approx(report["psnr"], abs=1e-3)


def test_training_is_the_same_to_the_bit_with_a_validation(tmp_path, images, cache, decoder):
    plain = train(tmp_path / "plain", images, cache)
    exact = {f"checkpoints/step-0000020/{name}.safetensors" for name in ("model", "ema", "optimizer")}
    exact.add("final/model.safetensors")
    with_validation, without = tree(decoder), tree(plain)
    assert exact <= without.keys()
    for name in exact:
        assert with_validation[name] == without[name], name
    lines = [line for line in log_of(decoder) if "validation_psnr" in line]
    assert [line["step"] for line in lines] == [8, 16, 20]
    assert lines[-1]["validation_psnr"] > lines[0]["validation_psnr"]
    losses = [{key: line[key] for key in ("step", "loss")} for line in log_of(decoder) if "loss" in line]
    assert losses == [{key: line[key] for key in ("step", "loss")} for line in log_of(plain)]
    assert sorted(path.name for path in (decoder / "samples").iterdir()) == [
        f"step-{step:07d}.png" for step in (8, 16, 20)
    ]
    assert not (plain / "samples").exists()
    step = ("validation.images=nowhere",)
    with pytest.raises(InputError, match="nowhere"):
        train(tmp_path / "absent", images, cache, *step)


def test_two_processes_validate_as_one(tmp_path, rae, images, cache, pictures, decoder):
    """Weights of two ranks differ by rounding alone; so do the figures, of 150 images that two do not share evenly."""
    told = (f"validation.images={pictures}", "validation.every=8 steps", "validation.features=digits-mae")
    shared = (f"images={images}", f"cache={cache}", "output=run", "duration=20 steps", *PLAIN, *told)
    rae("train-decoder", "digits/decoder", *shared, "--devices", "2")
    lines = [[line for line in log_of(run) if "validation_psnr" in line] for run in (tmp_path / "run", decoder)]
    assert [line["step"] for line in lines[0]] == [8, 16, 20]
    for two, one in zip(*lines, strict=True):
        for figure in ("validation_psnr", "validation_ssim", "validation_rfid"):
            assert two[figure] == pytest.approx(one[figure], rel=1e-3), (
                figure
            )  # 8-bit rounding of slightly other images
    sheets = [pixels(run / "samples" / "step-0000020.png").astype(int) for run in (tmp_path / "run", decoder)]
    assert np.abs(sheets[0] - sheets[1]).max() <= 2
