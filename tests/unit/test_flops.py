"""Counts of multiply-adds against the paper's tables and against what was executed on the released code."""

import json
import re
from types import SimpleNamespace

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from raecli.models.discriminator import Backbone, Discriminator, transformer
from raecli.models.flops import decoder_macs, diffusion_macs, discriminator_macs, encoder_macs, head_macs
from raecli.plan import step_lines
from raecli.recipe.load import load_recipe

GIGA = 1e9
PAPER = 0.005  # half a percent, as the issue asks; the tables are rounded, and do not say what they leave out
BACKBONES = {"s": (384, 12), "b": (768, 12), "l": (1024, 24), "xl": (1152, 28)}
DECODERS = {"b": (768, 12, 3072), "l": (1024, 24, 4096), "xl": (1152, 28, 4096)}
HEAD = {"head_width": 2048, "head_depth": 2}


def diffusion(size, side=16, channels=768, patch_size=1, **head):
    width, depth = BACKBONES[size]
    return diffusion_macs(
        in_channels=channels, input_size=side, patch_size=patch_size, width=width, depth=depth, **head
    )


def decoder(size, side=16, patch_size=16):
    width, depth, mlp_width = DECODERS[size]
    return decoder_macs(
        in_channels=768, tokens_side=side, width=width, depth=depth, mlp_width=mlp_width, patch_size=patch_size
    )


def encoder(side):
    return encoder_macs(tokens_side=side, prefix_tokens=5, width=768, depth=12, mlp_width=3072, patch_size=14)


@pytest.mark.parametrize(("size", "gflops"), [("b", 22.2), ("l", 78.1), ("xl", 106.7)])
def test_table_1b_decoders(size, gflops):
    assert decoder(size).paper / GIGA == pytest.approx(gflops, rel=PAPER)


@pytest.mark.parametrize(("depth", "width", "gflops"), [(6, 1152, 25.65), (4, 2048, 53.14), (2, 2048, 26.78)])
def test_table_15_heads(depth, width, gflops):
    macs = head_macs(tokens=256, width=width, depth=depth, out_channels=768)
    assert macs.paper / GIGA == pytest.approx(gflops, rel=PAPER)


@pytest.mark.parametrize(
    ("macs", "gflops"),
    [
        (diffusion("xl", side=32, channels=4, patch_size=2), 118.64),  # SiT-XL on SD-VAE latents
        (diffusion("xl", side=64, channels=4, patch_size=2), 524.60),
        (diffusion("xl", **HEAD), 145.03),
        (diffusion("xl", side=32, **HEAD), 638.83),
        (encoder(16) + decoder("xl"), 129.02),
        (encoder(32) + decoder("xl", side=32), 513.57),
        (encoder(16) + decoder("xl", patch_size=32), 129.70),  # upsampling
    ],
    ids=["sit 256", "sit 512", "dit-dh 256", "dit-dh 512", "autoencoder 256", "autoencoder 512", "upsampling"],
)
def test_table_18(macs, gflops):
    assert macs.paper / GIGA == pytest.approx(gflops, rel=PAPER)


# GFLOP a forward as executed (2 a multiply-add), counted on the released code: shared/PERFORMANCE.md.
EXECUTED = {
    "dit b": (diffusion("b"), 46.6),
    "dit l": (diffusion("l"), 162.2),
    "dit xl": (diffusion("xl"), 238.1),
    "dit-dh s": (diffusion("s", **HEAD), 96.9),
    "dit-dh b": (diffusion("b", **HEAD), 131.4),
    "dit-dh l": (diffusion("l", **HEAD), 247.1),
    "dit-dh xl": (diffusion("xl", **HEAD), 323.2),
    "dinov2-b": (encoder(16), 47.1),
    "decoder b": (decoder("b"), 46.7),
    "decoder l": (decoder("l"), 162.5),
    "decoder xl": (decoder("xl"), 221.7),
}


@pytest.mark.parametrize("name", EXECUTED)
def test_executed_flops(name):
    macs, gflop = EXECUTED[name]
    assert 2 * macs.executed / GIGA == pytest.approx(gflop, abs=0.06)  # printed with one decimal


def test_a_discriminator_as_pytorch_counts_it():
    with torch.device("meta"):
        backbone = Backbone(transformer(width=64, depth=4, patch_size=4, tokens_side=6))
        discriminator = Discriminator(backbone, norm="batch")
        with FlopCounterMode(display=False) as counter:
            discriminator(torch.zeros(1, 3, 24, 24))
    ours = discriminator_macs(tokens_side=6, patch_size=4, width=64, depth=4, heads=5, kernel=9)
    assert 2 * ours.executed == counter.get_total_flops()


def test_the_verb_counts_a_recipe(rae):
    cost = json.loads(rae("flops", "dith_xl", "--json").stdout)
    assert cost["parameters"] == 838_675_796
    assert cost["paper_gflops"] == pytest.approx(145.03, rel=PAPER)
    assert cost["training_images_per_second_at_peak"] == pytest.approx(815, rel=0.01)  # shared/PERFORMANCE.md
    large = json.loads(rae("flops", "dith_xl_512", "--json").stdout)
    assert large["paper_gflops"] == pytest.approx(638.83, rel=PAPER)
    decoder = rae("flops", "decoder_xl_dinov2b").stdout
    assert "415,352,704" in decoder and "7,386,245" in decoder
    assert re.search(r"paper gflops +106\.\d\d +multiply-adds of a forward", decoder)
    assert "this one is for sample" in rae("flops", "sample_dith_xl_256", code=2).stderr


def test_a_plan_says_where_a_step_takes_more_images_than_there_are(monkeypatch, tmp_path):
    monkeypatch.setattr("raecli.plan.read_manifest", lambda _: SimpleNamespace(samples=60))
    few, enough = (load_recipe(None, "dith_s", [f"cache={tmp_path}", f"batch_size={size}"]) for size in (61, 60))
    assert "more images than the 60" in step_lines(few)[1] and len(step_lines(enough)) == 1
