"""`rae train-decoder` with its discriminator from outside: ranks, restarts, cached latents, what stops it."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from timm.models.vision_transformer import VisionTransformer

from tests.conftest import TINY_DECODER, tree
from tests.e2e.faults import kill_group_at, start


@pytest.fixture(scope="module")
def backbone(tmp_path_factory):
    """A frozen network of random weights, in timm's layout."""
    torch.manual_seed(0)
    network = VisionTransformer(img_size=16, patch_size=4, embed_dim=16, depth=4, num_heads=1, num_classes=0)
    path = tmp_path_factory.mktemp("dino") / "dino.safetensors"
    save_file(network.state_dict(), path)
    return path


@pytest.fixture
def training(backbone, images, cache):
    """The command line of a small adversarial run: random crops through the encoder, noise, all losses."""

    def command(output, steps, *more):
        told = (
            f"images={images}",
            f"cache={cache}",
            f"output={output}",
            f"duration={steps} steps",
            f"adversarial.backbone={backbone}",
            "adversarial.discriminator_start=0 steps",
            "adversarial.generator_start=1 steps",
            "adversarial.cutout=0.5",
            "adversarial.schedule.warmup=2 steps",
            "schedule.warmup=2 steps",
            "optimizer.learning_rate=2e-4",  # Table 12's
            "adversarial.optimizer.learning_rate=2e-4",
            "latents=encoder",
            "augmentation.crop=random",
            "augmentation.resize=36",
            "save_every=5 steps",
        )
        return ("train-decoder", "digits/decoder_gan", *told, *TINY_DECODER, *more)

    return command


def newest(run):
    folder = sorted((run / "checkpoints").glob("step-*"))[-1]
    return {name: load_file(folder / f"{name}.safetensors") for name in ("model", "ema", "optimizer")}


@pytest.mark.parametrize(("norm", "balance"), [("batch", "image"), ("instance", "last_layer")])
def test_two_ranks_equal_one_with_the_double_batch_after_five_alternating_steps(tmp_path, rae, training, norm, balance):
    told = (f"adversarial.discriminator_norm={norm}", f"adversarial.balance={balance}")
    rae(*training("one", 5, *told))
    rae(*training("two", 5, *told, "micro_batch_size=3"), "--devices", "2")  # 4 a rank: 3 and 1
    one, two = newest(tmp_path / "one"), newest(tmp_path / "two")
    heads = [name for name in one["optimizer"] if name.startswith("adversary.weights.")]
    assert len(heads) > 5 * 8 and any("left" in name for name in heads)
    assert any("running_mean" in name for name in heads) == (norm == "batch")
    for kind, names in (("model", one["model"]), ("ema", one["ema"]), ("optimizer", heads)):
        for name in names:
            torch.testing.assert_close(two[kind][name], one[kind][name], atol=1e-5, rtol=0, msg=name)
    lines = [json.loads(text) for text in (tmp_path / "one" / "metrics.jsonl").read_text().splitlines()]
    assert lines[-1]["lambda"] > 0 and lines[-1]["discriminator"] > 0
    assert lines[-1]["learning_rate"] == pytest.approx(1e-4) == lines[-1]["discriminator_learning_rate"]  # both minima


def exact(run):
    files = {**tree(run / "checkpoints"), **tree(run / "final")}
    return {name: data for name, data in files.items() if name.endswith(".safetensors")}


def test_killed_with_the_discriminator_on_and_resumed_equals_unbroken_to_the_byte(tmp_path, rae, training):
    rae(*training("whole", 40))
    broken = tmp_path / "broken"
    process = start(*training("broken", 40), cwd=tmp_path)
    kill_group_at(process, lambda: (broken / "checkpoints" / "step-0000010").exists())
    assert "resuming" in rae(*training("broken", 40)).stderr
    assert exact(broken) == exact(tmp_path / "whole") and len(exact(broken)) == 2 * 4 + 2
    final, saved = load_file(broken / "final" / "model.safetensors"), newest(broken)
    assert final.keys() == saved["ema"].keys() and all(torch.equal(final[name], saved["ema"][name]) for name in final)
    assert not all(torch.equal(final[name], saved["model"][name]) for name in final)  # averages, not raw weights
    frozen = ("backbone", "encoder", "patch_embed")  # are in no checkpoint
    assert not [name for part in saved.values() for name in part if any(word in name for word in frozen)]
    rae(*training("broken", 40))  # a finished run may be run again
    assert exact(broken) == exact(tmp_path / "whole")


def test_what_stops_it_and_cached_latents(tmp_path, rae, training, images):
    absent = training("run", 5, "adversarial.backbone=null")
    told = rae(*absent, code=2, HF_HOME=str(tmp_path / "empty")).stderr
    assert "vit_small_patch8_224.dino" in told and "adversarial.backbone" in told and "Traceback" not in told
    cached = ("latents=cached", "augmentation.crop=center", "augmentation.horizontal_flip=true")
    assert "random; the cache has centre crops" in rae(*training("run", 5, "latents=cached"), code=3).stderr
    rae(*training("run", 5, *cached))
    told = rae(*training("run", 5, *cached, "adversarial.balance=last_layer"), code=3).stderr
    assert "adversarial" in told and "another recipe" in told
    explosive = ("adversarial.optimizer.learning_rate=1e30", "adversarial.schedule.final_learning_rate=1e29")
    told = rae(*training("nan", 40, *cached, *explosive, "save_every=1 steps"), code=5).stderr
    assert "discriminator" in told or "adversary" in told or "weights are NaN" in told
    for part in newest(tmp_path / "nan").values():
        assert all(value.isfinite().all() for value in part.values())
