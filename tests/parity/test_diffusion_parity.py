"""Our models and solvers give the released code's numbers, on its own random weights (tests/parity/vectors)."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from raecli.convert.official import decoder_from_official, diffusion_from_official
from raecli.errors import CheckpointError
from raecli.flow.guidance import guided_velocity
from raecli.flow.path import flow_loss, noisy_latents
from raecli.flow.sampler import sample
from raecli.flow.time import logit_normal_time, shift_time, time_grid
from raecli.models.decoder import Decoder
from raecli.models.dit import DiT, DiTDH
from raecli.store.statistics import LatentStatistics

VECTORS = Path(__file__).parent / "vectors"
MODEL = {"atol": 1e-5, "rtol": 0}  # fp32 sums in another order; seen: 3e-7 a forward, 1e-6 a trajectory
EXACT = {"atol": 1e-6, "rtol": 0}  # stored in fp32, computed in fp64
ALPHAS = {"1.0000": 1.0, "6.9282": 48**0.5}


def released(name: str) -> nn.Module:
    """A model with the released code's random weights."""
    sizes = json.loads((VECTORS / "models.json").read_text())[name]
    weights = torch.load(VECTORS / f"{name}.pt", weights_only=True)
    shared = {
        "in_channels": sizes["in_channels"],
        "input_size": sizes["input_size"],
        "num_classes": sizes["num_classes"],
    }
    if name == "dit":
        model = DiT(**shared, width=sizes["hidden_size"], depth=sizes["depth"], heads=sizes["num_heads"])
        model.load_state_dict(diffusion_from_official(weights, backbone_depth=None))
        return model
    (width, head_width), (depth, head_depth), (heads, head_heads) = (
        sizes["hidden_size"],
        sizes["depth"],
        sizes["num_heads"],
    )
    model = DiTDH(
        **shared,
        width=width,
        depth=depth,
        heads=heads,
        head_width=head_width,
        head_depth=head_depth,
        head_heads=head_heads,
    )
    model.load_state_dict(diffusion_from_official(weights, backbone_depth=depth))
    return model


@pytest.fixture(scope="module")
def io() -> dict[str, Tensor]:
    return load_file(VECTORS / "dit_dh_io.safetensors")


@pytest.fixture(scope="module")
def flow() -> dict[str, Tensor]:
    return load_file(VECTORS / "flow.safetensors")


def test_dit_dh_velocity_with_a_label_and_without(io):
    model = released("dit_dh")
    torch.testing.assert_close(model(io["x"], io["t"], io["y"]), io["v"], **MODEL)
    null = torch.full_like(io["y"], model.null_label)
    torch.testing.assert_close(model(io["x"], io["t"], null), io["v_null"], **MODEL)


def test_dit_velocity():
    vectors = load_file(VECTORS / "dit_io.safetensors")
    torch.testing.assert_close(released("dit")(vectors["x"], vectors["t"], vectors["y"]), vectors["v"], **MODEL)


def each_alone(velocity, io: dict[str, Tensor]) -> Tensor:
    """Velocities of samples at times of their own: a guided velocity takes one time a batch."""
    rows = [velocity(io["x"][i : i + 1], float(io["t"][i]), io["y"][i : i + 1]) for i in range(len(io["x"]))]
    return torch.cat(rows)


def test_classifier_free_guidance_includes_the_ends_of_its_interval(io):
    model = released("dit_dh")
    velocity = guided_velocity(model, scale=1.5, interval=(0.1, 0.9), null_label=model.null_label)
    torch.testing.assert_close(each_alone(velocity, io), io["v_cfg_1.5_0.1_0.9"], **MODEL)
    assert {0.1, 0.9} <= {round(value, 6) for value in io["t"].tolist()}  # the vectors do lie on the ends


def test_autoguidance(io):
    velocity = guided_velocity(released("dit_dh"), scale=1.42, guide=released("dit_dh_guide"))
    torch.testing.assert_close(each_alone(velocity, io), io["v_autoguidance_1.42"], **MODEL)


@pytest.mark.parametrize("alpha", ALPHAS)
@pytest.mark.parametrize("steps", [25, 50])
def test_released_time_grid(flow, alpha, steps):
    grid = time_grid(steps, kind="released", time_shift=ALPHAS[alpha])
    torch.testing.assert_close(grid.float(), flow[f"grid_{alpha}_{steps}"], **EXACT)


@pytest.mark.parametrize("alpha", ALPHAS)
def test_truncated_logit_normal_time_from_the_same_uniforms(flow, alpha):
    t = shift_time(logit_normal_time(flow["u"], maximum=0.999), ALPHAS[alpha])
    torch.testing.assert_close(t, flow[f"t_logitnormal_{alpha}"], atol=1e-12, rtol=0)  # both in fp64


@pytest.mark.parametrize("alpha", ALPHAS)
def test_trajectories_with_and_without_autoguidance(flow, io, alpha):
    settings = {"steps": 25, "time_grid": "released", "time_shift": ALPHAS[alpha]}
    model, guide = released("dit_dh"), released("dit_dh_guide")
    plain = sample(model, io["x"][:2], io["y"][:2], **settings)
    torch.testing.assert_close(plain, flow[f"euler_final_{alpha}_25"], **MODEL)
    guided = sample(model, io["x"][:2], io["y"][:2], **settings, guidance_scale=1.42, guide=guide)
    torch.testing.assert_close(guided, flow[f"euler_autoguidance_{alpha}_25"], **MODEL)


def test_training_loss(flow, io):
    noisy = noisy_latents(flow["loss_x0"], flow["loss_eps"], io["t"])
    torch.testing.assert_close(noisy, flow["loss_xt"], **EXACT)
    losses = flow_loss(released("dit_dh")(noisy, io["t"], io["y"]), flow["loss_x0"], flow["loss_eps"])
    torch.testing.assert_close(losses, flow["loss_per_sample"], **EXACT)


def test_decoder_with_statistics_without_a_mean():
    vectors = load_file(VECTORS / "decoder_dinov2_io.safetensors")
    decoder = Decoder(in_channels=64, tokens_side=16, width=96, depth=2, heads=4, mlp_width=128, patch_size=16)
    decoder.load_state_dict(decoder_from_official(torch.load(VECTORS / "decoder_dinov2.pt", weights_only=True)))
    latents = LatentStatistics(None, vectors["variance"]).denormalise(vectors["latents"])
    std, mean = torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1), torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1)
    torch.testing.assert_close(decoder(latents) * std + mean, vectors["reconstruction"], **MODEL)


def test_unknown_keys_are_named():
    with pytest.raises(CheckpointError, match=r"blocks\.0\.attn\.mystery"):
        diffusion_from_official({"blocks.0.attn.mystery": torch.zeros(1)}, backbone_depth=None)
    with pytest.raises(CheckpointError, match="decoder_surprise"):
        decoder_from_official({"decoder_surprise": torch.zeros(1)})
