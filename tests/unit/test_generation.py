"""Samples and FID while training goes on, in this process: what is evaluated, and that training does not notice."""

import functools
import json
import shutil

import pytest
import torch
from PIL import Image
from torch import nn

from raecli.errors import InputError, UsageError
from raecli.models.classifier import Classifier, save_classifier
from raecli.models.load import load_diffusion
from raecli.recipe.load import load_recipe
from raecli.recipe.recipes import EncodeCacheRecipe, EvaluateRecipe, SampleRecipe, TrainDiffusionRecipe
from raecli.sampling.online import check_generation, prepare_generation, rank_batches
from raecli.stages import encode_cache, evaluate, sample, train_diffusion
from raecli.store.encoders import resolve_encoder
from raecli.store.latent_cache import open_cache
from raecli.store.manifest import read_manifest
from raecli.store.resolve import resolve_diffusion
from raecli.store.run_folder import read_metrics
from raecli.training.distributed import Ranks
from tests.conftest import TINY_DIFFUSION, make_images, tree

ALONE = Ranks(0, 1, torch.device("cpu"))


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """Images of 8 pixels, a cache of them as their own latents, and a classifier to measure a FID in."""
    folder = tmp_path_factory.mktemp("generation")
    images = make_images(folder / "images", classes=3, each=8, side=8)
    spec = EncodeCacheRecipe(
        stage="encode-cache",
        encoder=resolve_encoder("pixels", image_size=8),
        source=str(images),
        output=str(folder / "cache"),
        image_size=8,
        dtype="fp32",
        precision="fp32",
    )
    encode_cache.run(spec, ALONE)
    torch.manual_seed(0)
    save_classifier(folder / "judge.safetensors", Classifier(image_size=8, classes=3, widths=(8, 8), feature_width=6))
    return folder


def recipe(place, output, *overrides, evaluation=True):
    """12 steps with an evaluation after every 6."""
    evaluated = {
        "every": "6 steps",
        "num": 20,
        "autoencoder": "pixels",
        "reference": place / "images",
        "features": place / "judge.safetensors",
        "steps": 3,
        "batch_size": 8,
        "guidance_scale": 1.5,
        "grid": 9,
    }
    told = [f"evaluation.{key}={value}" for key, value in evaluated.items()] if evaluation else []
    sizes = ("duration=12 steps", "save_every=6 steps", "keep_checkpoints=9", "log_every=3")
    shared = [*TINY_DIFFUSION, *sizes, f"cache={place / 'cache'}", f"output={output}", *told, *overrides]
    return resolve_diffusion(
        load_recipe(TrainDiffusionRecipe, "digits/diffusion", shared), read_manifest(str(place / "cache"))
    )


@pytest.fixture(scope="module")
def trained(place):
    """A run with evaluations; its blocks are compiled (by the backend that needs no compiler)."""
    run = place / "trained"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(nn.Module, "compile", functools.partialmethod(nn.Module.compile, backend="eager"))
        train_diffusion.run(recipe(place, run, "compile=true"), ALONE)
    return run


def fid_lines(run):
    return {line["step"]: line["fid"] for line in read_metrics(run) if "fid" in line}


def test_the_online_figure_is_the_offline_one_of_the_checkpoints_average(place, trained, capsys):
    """Also where blocks are compiled: the release evaluated its average through a forward that ran the raw weights."""
    online = fid_lines(trained)
    assert list(online) == [6, 12]
    for step in online:
        samples = place / f"samples-{step}"
        checkpoint = trained / "checkpoints" / f"step-{step:07d}"
        sample.run(
            SampleRecipe(
                stage="sample",
                model=str(checkpoint),
                autoencoder="pixels",
                output=str(samples),
                num=20,
                steps=3,
                batch_size=8,
                guidance_scale=1.5,
                grid=9,
            ),
            ALONE,
        )
        report = place / f"report-{step}.json"
        evaluate.run(
            EvaluateRecipe(
                stage="eval",
                metrics=("fid",),
                samples=str(samples),
                reference=str(place / "images"),
                features=str(place / "judge.safetensors"),
                output=str(report),
            ),
            ALONE,
        )
        # one sum of features in another order of batches; 1e-6 is promised for any batch size
        assert online[step] == pytest.approx(json.loads(report.read_text())["fid"], rel=1e-6)
        sheet = trained / "samples" / f"step-{step:07d}.png"
        assert sheet.read_bytes() == (samples / "grid.png").read_bytes()


def test_the_raw_weights_would_give_another_figure(place, trained):
    told = recipe(place, trained)
    generation = prepare_generation(told.evaluation, told, open_cache(told.cache), ALONE)
    averaged = load_diffusion(trained / "checkpoints" / "step-0000012")
    assert generation.measure(averaged, 12)[0]["fid"] == pytest.approx(fid_lines(trained)[12], rel=1e-9)
    raw = shutil.copytree(trained / "checkpoints" / "step-0000012", place / "raw")
    state = json.loads((raw / "state.json").read_text())
    shutil.copyfile(raw / "model.safetensors", raw / "ema.safetensors")
    state["sha256"]["ema.safetensors"] = state["sha256"]["model.safetensors"]
    (raw / "state.json").write_text(json.dumps(state))
    figure = generation.measure(load_diffusion(raw), 12)[0]["fid"]
    assert figure != pytest.approx(fid_lines(trained)[12], rel=1e-3)


def test_evaluation_changes_no_bit_of_training(place):
    with_it, without = place / "with", place / "without"
    train_diffusion.run(recipe(place, with_it), ALONE)
    train_diffusion.run(recipe(place, without, evaluation=False), ALONE)
    ours, theirs = (
        {name: data for name, data in tree(run).items() if name.endswith(".safetensors")} for run in (with_it, without)
    )
    assert len(ours) == 2 * 4 + 2 and ours == theirs
    losses = [[line["loss"] for line in read_metrics(run) if "loss" in line] for run in (with_it, without)]
    assert losses[0] == losses[1] and len(losses[0]) == 4
    with Image.open(with_it / "samples" / "step-0000012.png") as sheet:
        assert sheet.width == sheet.height > 64


def test_an_evaluation_that_a_stop_left_out_is_made_up_for_and_none_is_made_twice(place, trained):
    before = fid_lines(trained)
    lines = (trained / "metrics.jsonl").read_text().splitlines(keepends=True)
    (trained / "metrics.jsonl").write_text(
        "".join(line for line in lines if '"fid"' not in line or '"step": 6' in line)
    )
    (trained / "samples" / ".partial-1-step-0000012.png").write_bytes(b"left by a killed process")
    told = recipe(place, trained)  # compile=false now, as any operational key may change
    train_diffusion.run(told, ALONE)
    assert fid_lines(trained) == pytest.approx(before, rel=1e-9)
    train_diffusion.run(told, ALONE)
    assert [line["step"] for line in read_metrics(trained) if "fid" in line] == [6, 12]
    assert not list(trained.rglob(".partial-*"))


def test_any_number_of_ranks_shares_the_same_batches():
    for world in (1, 2, 3, 7):
        parts = [rank_batches(50, 8, Ranks(rank, world, torch.device("cpu"))) for rank in range(world)]
        batches = sorted((batch for part in parts for batch in part), key=lambda batch: batch.start)
        assert batches == rank_batches(50, 8, ALONE)
        assert [index for batch in batches for index in batch] == list(range(50))


def test_what_evaluation_needs_and_is_not_there_is_refused_before_training(place, tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.delenv("RAE_INCEPTION", raising=False)
    cases = [
        ("evaluation.autoencoder=nowhere", InputError, "evaluation.autoencoder: nowhere is not there"),
        ("evaluation.reference=nowhere", InputError, "nowhere: no such file or folder"),
        ("evaluation.features=nowhere.safetensors", UsageError, "nowhere.safetensors is no classifier's file"),
        ("evaluation.features=null", UsageError, "FID needs Inception's weights"),
        ("label_dropout=0.0", UsageError, "never sees the null label"),
    ]
    for override, kind, match in cases:
        told = recipe(place, tmp_path / "run", override)
        with pytest.raises(kind, match=match):
            check_generation(told, read_manifest(told.cache))
        with pytest.raises(kind, match=match):
            train_diffusion.run(told, ALONE)
        assert read_metrics(tmp_path / "run") == []  # not one step was made


def test_a_decoder_of_other_latents_is_refused(place):
    told = recipe(place, place / "unused")
    manifest = read_manifest(told.cache)
    other = manifest.model_copy(update={"image_size": 16})
    with pytest.raises(InputError, match="were not made for the same latents"):
        check_generation(told, other)


@pytest.mark.parametrize(
    ("override", "match"),
    [
        ("evaluation.autoencoder=null", "latents need a decoder"),
        ("evaluation.every=0 steps", "every is above 0"),
        ("evaluation.reference=null", "features and inception are for a FID"),
        ("evaluation.inception=weights.pth", "exclude one another"),
        ("evaluation.num=1", "at least 2"),
        ("evaluation.guidence_scale=2.0", "did you mean guidance_scale?"),
    ],
)
def test_an_evaluation_that_cannot_be_is_refused_by_the_recipe(place, override, match):
    with pytest.raises(UsageError, match=match):
        recipe(place, place / "unused", override)
