"""A run that tells of itself, from outside: evaluation on one rank and on two, W&B, curves, refusals at the door."""

import json
import os

import pytest
import torch
from PIL import Image

from raecli.models.classifier import Classifier, save_classifier
from raecli.recipe.recipes import EvaluateRecipe, SampleRecipe
from raecli.stages import evaluate, sample
from raecli.training.distributed import Ranks
from tests.conftest import REPOSITORY, TINY_DECODER, TINY_DIFFUSION

ALONE = Ranks(0, 1, torch.device("cpu"))
FAKE_WANDB = '''
"""What raecli uses of wandb: every call is a line of $WANDB_FAKE; a resumed run starts one past its last step."""
import json, os, pathlib

class Error(Exception): pass

class Image:
    def __init__(self, path): self.path = path

def told(**call):
    with open(os.environ["WANDB_FAKE"], "a") as file:
        file.write(json.dumps(call) + "\\n")

class Run:
    def __init__(self):
        file = pathlib.Path(os.environ["WANDB_FAKE"])
        calls = [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []
        self.step = max((call["step"] + 1 for call in calls if "step" in call), default=0)

    def log(self, figures, step):
        told(step=step, figures=sorted(figures), loss=figures.get("loss"))

    def finish(self): told(finish=True)

def init(project, id, name, dir, config, resume):
    run = Run()
    told(init=id, project=project, name=name, resume=resume, seed=config["seed"])
    return run
'''


def calls(file, key):
    return [call for call in map(json.loads, file.read_text().splitlines()) if key in call]


def sample_and_measure(folder, images):
    """What `rae sample` and `rae eval fid` make of the finished run."""
    recipe = SampleRecipe(
        stage="sample",
        model=str(folder / "run"),
        autoencoder=str(folder / "decoder"),
        output=str(folder / "samples"),
        num=30,
        steps=4,
        batch_size=8,
        grid=9,
    )
    sample.run(recipe, ALONE)
    recipe = EvaluateRecipe(
        stage="eval",
        metrics=("fid",),
        samples=str(folder / "samples"),
        reference=str(images),
        features=str(folder / "judge.safetensors"),
        output=str(folder / "report.json"),
    )
    evaluate.run(recipe, ALONE)
    return json.loads((folder / "report.json").read_text())["fid"]


@pytest.mark.timeout(900)  # a whole journey: minutes where the cores are shared
def test_a_run_is_evaluated_by_one_rank_as_by_two_and_as_offline(tmp_path, rae, images, cache):
    torch.manual_seed(0)
    save_classifier(tmp_path / "judge.safetensors", Classifier(image_size=32, classes=3, feature_width=8))
    (tmp_path / "fake" / "wandb").mkdir(parents=True)
    (tmp_path / "fake" / "wandb" / "__init__.py").write_text(FAKE_WANDB)
    fake = {"PYTHONPATH": f"{tmp_path / 'fake'}{os.pathsep}{REPOSITORY}", "WANDB_FAKE": str(tmp_path / "calls")}
    no_loss = ("loss.perceptual=none", "loss.perceptual_weights=null", "duration=20 steps", "output=decoder")
    rae("train-decoder", "digits/decoder", f"images={images}", f"cache={cache}", *no_loss, *TINY_DECODER)
    evaluation = {
        "every": "1 epochs",
        "num": 30,
        "autoencoder": "decoder",
        "reference": images,
        "features": "judge.safetensors",
        "steps": 4,
        "batch_size": 8,
        "grid": 9,
    }
    command = (
        *("train-diffusion", "digits/diffusion", f"cache={cache}", "output=run", "duration=9 steps"),
        *(*TINY_DIFFUSION, "log_every=3", "tracking.wandb_project=digits"),
        *(f"evaluation.{key}={value}" for key, value in evaluation.items()),
    )
    first = rae(*command, **fake)
    assert "\x1b" not in first.stderr and "evaluate step 9: 30/30 images" in first.stderr
    metrics, sheet = tmp_path / "run" / "metrics.jsonl", tmp_path / "run" / "samples" / "step-0000009.png"
    lines = [json.loads(line) for line in metrics.read_text().splitlines()]
    assert [(line["step"], "fid" in line) for line in lines] == [
        *((3, False), (3, True), (6, False), (6, True), (9, False), (9, True))
    ]
    (alone, picture) = (lines[-1]["fid"], sheet.read_bytes())
    metrics.write_text("".join(json.dumps(line) + "\n" for line in lines[:-1]))  # as if stopped before the last one
    sheet.unlink()
    rae(*command, "--devices", "2", **fake)
    again = [json.loads(line) for line in metrics.read_text().splitlines()]
    assert again[:-1] == lines[:-1]
    assert again[-1]["fid"] == pytest.approx(alone, rel=1e-6)  # sums over ranks are in another order
    assert sheet.read_bytes() == picture

    offline = sample_and_measure(tmp_path, images)  # in this process: each of another takes its seconds
    assert offline == pytest.approx(alone, rel=1e-6)
    assert (tmp_path / "samples" / "grid.png").read_bytes() == picture

    begun = calls(tmp_path / "calls", "init")
    assert len(begun) == 2 and begun[0] == begun[1] and begun[0]["resume"] == "allow"  # one run, gone on with
    logged = [(call["step"], call["loss"]) for call in calls(tmp_path / "calls", "step") if call["loss"] is not None]
    assert logged == [(line["step"], line["loss"]) for line in lines if "loss" in line]
    pictures = [call["step"] for call in calls(tmp_path / "calls", "step") if call["figures"] == ["sheet"]]
    assert pictures == [3, 6, 9]
    assert len(calls(tmp_path / "calls", "finish")) == 2

    told = rae("plot", "run", "--keys", "loss,fid")
    assert told.stdout.startswith("run/curves.png: loss, fid")
    with Image.open(tmp_path / "run" / "curves.png") as curves:
        assert curves.width > curves.height > 300


def test_what_is_missing_is_told_at_the_door(tmp_path, rae, cache):
    broken = tmp_path / "broken" / "tensorboard"
    broken.mkdir(parents=True)
    (broken / "__init__.py").write_text("raise ImportError('cut off')")
    path = {"PYTHONPATH": f"{tmp_path / 'broken'}{os.pathsep}{REPOSITORY}"}
    command = ("train-diffusion", "digits/diffusion", f"cache={cache}", "output=run", *TINY_DIFFUSION)
    evaluated = ("evaluation.every=5 steps", "evaluation.num=4")
    cases = [
        (("tracking.tensorboard=true",), 2, "raecli[tensorboard]"),
        (evaluated, 2, "latents need a decoder"),
        ((*evaluated, "evaluation.autoencoder=nowhere"), 3, "evaluation.autoencoder: nowhere is not there"),
    ]
    for overrides, code, told in cases:
        result = rae(*command, *overrides, code=code, **path)
        assert told in result.stderr and "Traceback" not in result.stderr, result.stderr
    assert not (tmp_path / "run").exists()
    assert "no such folder" in rae("plot", "run", code=3).stderr
