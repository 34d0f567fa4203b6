"""Numbers and laws of FACTS.md that no vector of the release pins: starts, optimisers, noise, ranges, rounding."""

import inspect
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torch_fidelity.defaults import DEFAULTS

from raecli.data.crops import CropSource
from raecli.data.images import open_images
from raecli.decoding.adversary import adversary_of
from raecli.decoding.learner import Learner, Part
from raecli.losses.reconstruction import lpips_loss
from raecli.metrics.kid import kernel_distance
from raecli.models.autoencoder import Autoencoder
from raecli.models.build import decoder_of
from raecli.models.decoder import Decoder
from raecli.models.dit import DiT, DiTDH
from raecli.recipe.blocks import AugmentationSpec
from raecli.recipe.load import load_recipe
from raecli.recipe.recipes import TrainDecoderRecipe, TrainDiffusionRecipe
from raecli.sampling.images import to_bytes
from raecli.store.encoders import PRESETS
from raecli.store.statistics import LatentStatistics
from raecli.training.distributed import Ranks
from raecli.training.optimizer import optimizer_of

ONE = Ranks(0, 1, torch.device("cpu"))
SIZES = {"in_channels": 96, "input_size": 4, "width": 192, "depth": 1, "heads": 3, "num_classes": 200}
HEAD = {"head_width": 256, "head_depth": 1, "head_heads": 4}


def fills(weight: Tensor, bound: float) -> bool:
    """Whether a matrix of thousands is drawn uniformly from [-bound, bound]: its extent and its deviation."""
    deviation = float(weight.detach().std()) / (bound / math.sqrt(3))
    return 0.99 * bound < float(weight.detach().abs().max()) <= bound and abs(deviation - 1) < 0.05


def xavier(weight: Tensor) -> float:
    """sqrt(6 / (inputs + outputs))."""
    return math.sqrt(6 / sum(weight.shape))


def pytorchs(weight: Tensor) -> float:
    """1 / sqrt(inputs): nn.Linear's own."""
    return 1 / math.sqrt(weight.shape[1])


def test_what_both_diffusion_models_start_from():
    """Section 2: patches xavier, labels and the time perceptron N(0, .02), adaLN's last and the output zero."""
    torch.manual_seed(0)
    for model in (DiT(**SIZES), DiTDH(**SIZES, **HEAD)):
        embeds = [model.patch_embed, *([model.head_patch_embed] if isinstance(model, DiTDH) else [])]
        for embed in embeds:
            assert fills(embed.linear.weight, xavier(embed.linear.weight)) and not embed.linear.bias.any()
        for drawn in (model.label_embed.weight, model.time_embed.mlp[0].weight, model.time_embed.mlp[2].weight):
            assert float(drawn.detach().std()) == pytest.approx(0.02, rel=0.02)
        zero = [
            module for name, module in model.named_modules() if name.endswith("modulation") or name == "final.linear"
        ]
        assert len(zero) == (3 if isinstance(model, DiT) else 4)
        assert not any(parameter.any() for module in zero for parameter in module.parameters())


def test_linear_layers_start_xavier_in_dit_and_as_pytorch_has_them_in_dit_dh_and_the_decoder():
    """Sections 1 and 2."""
    torch.manual_seed(0)
    block = DiT(**SIZES).blocks[0]
    for layer in (block.attention.qkv, block.attention.out, block.mlp.gate_and_value, block.mlp.out):
        assert fills(layer.weight, xavier(layer.weight)) and not layer.bias.any()
    model = DiTDH(**SIZES, **HEAD)
    decoder = Decoder(in_channels=96, tokens_side=4, width=192, depth=1, heads=3, mlp_width=256, patch_size=8)
    layers = [model.project, decoder.embed, decoder.predict, decoder.blocks[0].attention.qkv, decoder.blocks[0].mlp_in]
    layers += [getattr(part[0].attention, name) for part in (model.backbone, model.head) for name in ("qkv", "out")]
    for layer in layers:
        assert fills(layer.weight, pytorchs(layer.weight)) and layer.bias.abs().min() > 0


@pytest.mark.parametrize(
    ("name", "told"),
    {  # width, patch, prefix tokens, eps, antialias of the positions, mean of a channel
        "dinov2-s": (384, 14, 5, 1e-6, True, 0.485),
        "dinov2-b": (768, 14, 5, 1e-6, True, 0.485),
        "dinov2-l": (1024, 14, 5, 1e-6, True, 0.485),
        "siglip2-b": (768, 16, 0, 1e-6, False, 0.5),
        "siglip2-so": (1152, 14, 0, 1e-6, False, 0.5),
        "mae-b": (768, 16, 1, 1e-12, False, 0.485),
    }.items(),
)
def test_a_presets_encoder_drops_normalises_and_resamples_as_the_release(name, told):
    """Section 1."""
    preset = PRESETS[name]
    mean, std = preset.statistics
    found = (preset.width, preset.patch_size, preset.prefix_tokens, preset.norm_eps, preset.position_antialias, mean[0])
    assert found == told
    assert (mean, std) == (
        ((0.5,) * 3, (0.5,) * 3) if name.startswith("siglip") else ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    )


def test_a_recipes_decoder_is_built_with_the_mlp_that_it_tells():
    """Section 1: ViT-XL's is 4096 wide, not 4 x 1152."""
    recipe = load_recipe(TrainDecoderRecipe, "decoder_xl_dinov2b")
    encoder = SimpleNamespace(width=768, tokens_side=16)
    with torch.device("meta"):
        module = decoder_of(recipe.decoder, encoder)
    assert sum(p.numel() for p in module.parameters()) + 257 * 1152 == 415_352_704


def test_the_decoders_norms_have_the_releases_epsilon():
    """Section 1: LN eps 1e-12, so that tokens of deviation 1e-5 are still normalised."""
    decoder = Decoder(in_channels=8, tokens_side=2, width=64, depth=1, heads=1, mlp_width=8, patch_size=2)
    for norm in (decoder.blocks[0].norm1, decoder.blocks[0].norm2, decoder.norm):
        tokens = 1e-5 * torch.randn(4, 64)
        torch.testing.assert_close(norm(tokens).var(dim=1, unbiased=False), torch.ones(4), atol=0.02, rtol=0)


def test_statistics_normalise_with_1e_5_inside_the_root():
    """Section 1: (z - mean) / sqrt(var + 1e-5), and its inverse in decode."""
    mean, variance = torch.full((3, 1, 1), 0.5), torch.tensor([0.0, 3e-5, 0.0]).view(3, 1, 1)
    raw = torch.tensor([0.5 + 1e-5**0.5, 0.5 - 4e-5**0.5, 0.5]).view(1, 3, 1, 1)
    normal = torch.tensor([1.0, -1.0, 0.0]).view(1, 3, 1, 1)
    statistics = LatentStatistics(mean, variance)
    torch.testing.assert_close(statistics.normalise(raw), normal, atol=1e-4, rtol=0)
    torch.testing.assert_close(statistics.denormalise(normal), raw)
    pixels = torch.zeros(3), torch.ones(3)
    autoencoder = Autoencoder(nn.Identity(), nn.Identity(), mean, variance, pixels)
    torch.testing.assert_close(autoencoder.encode(raw), normal, atol=1e-4, rtol=0)
    torch.testing.assert_close(autoencoder.decode(normal), raw)


@pytest.mark.parametrize(
    ("law", "mean", "square"), [("halfnormal", math.sqrt(2 / math.pi), 1.0), ("uniform", 0.5, 1 / 3)]
)
def test_each_sample_of_decoder_training_has_its_own_sigma_of_its_law(law, mean, square):
    """Section 6: |N(0, tau^2)| of the paper, tau U(0, 1) of the release. The noise's deviation tells sigma."""
    recipe = load_recipe(TrainDecoderRecipe, "digits/decoder", (f"noise_sigma={law}", "noise_tau=0.8"))
    count = 2000
    learner = Learner(nn.Identity(), nn.Identity(), None, 8, None, torch.zeros(1), torch.ones(1), recipe, ONE)
    images, clean = torch.zeros(count, 3, 1, 1, dtype=torch.uint8), torch.full((count, 16, 4, 4), 7.0)
    noise = learner.noisy(Part(range(count), 1.0, images, clean)) - clean
    sigma = noise.flatten(1).std(dim=1) / 0.8
    # Standard errors: of a mean of 2000, .013 of the half normal; of its square, .03.
    assert float(sigma.mean()) == pytest.approx(mean, abs=0.05)
    assert float(sigma.square().mean()) == pytest.approx(square, abs=0.12)
    assert bool((sigma > 1.3).any()) == (law == "halfnormal")
    later = learner.noisy(Part(range(5, 7), 1.0, images[:2], clean[:2])) - clean[:2]
    assert torch.equal(later, noise[5:7])  # keyed by position


def test_an_upsampling_decoders_encoder_sees_its_crops_without_aliases():
    """Table 9; docs/encoders.md. Every fourth column is white: a quarter of the light, wherever pixels fall."""

    class Asked(nn.Module):
        def forward(self, images: Tensor) -> Tensor:
            self.seen = images
            return images

    recipe, encoder = load_recipe(TrainDecoderRecipe, "digits/decoder", ("precision=fp32",)), Asked()
    learner = Learner(nn.Identity(), nn.Identity(), encoder, 8, None, torch.zeros(1), torch.ones(1), recipe, ONE)
    stripes = (torch.arange(32) % 4 == 0).float().expand(1, 3, 32, 32)
    learner.encode(stripes)
    assert encoder.seen.shape == (1, 3, 8, 8)
    torch.testing.assert_close(encoder.seen[..., 2:-2], torch.full((1, 3, 8, 4), 0.25), atol=0.03, rtol=0)
    learner.encode(stripes[..., :8, :8])
    assert torch.equal(encoder.seen, stripes[..., :8, :8])


def test_lpips_is_asked_about_images_in_minus_one_to_one():
    """Section 4."""

    class Asked(nn.Module):
        def forward(self, images: Tensor, targets: Tensor) -> Tensor:
            self.seen = images, targets
            return torch.ones(2, 1, 1, 1)

    network, (images, targets) = Asked(), torch.rand(2, 2, 3, 4, 4)
    assert lpips_loss(network, images, targets) == 1
    for seen, given in zip(network.seen, (images, targets), strict=True):
        torch.testing.assert_close(seen, 2 * given - 1)


@pytest.mark.parametrize("betas", ["[0.5,0.9]", "[0.9,0.95]"])
def test_optimisers_are_adamw_with_the_recipes_betas_and_decay(betas, tmp_path):
    """Section 6. The decoder's, its adversary's and the diffusion model's."""
    network = VisionTransformer(img_size=16, patch_size=4, embed_dim=16, depth=4, num_heads=1, num_classes=0)
    save_file(network.state_dict(), tmp_path / "dino.safetensors")
    told = (f"optimizer.betas={betas}", "optimizer.weight_decay=0.03")
    adversarial = tuple(f"adversarial.{text}" for text in told)
    names = (f"adversarial.backbone={tmp_path}/dino.safetensors", *told, *adversarial)
    decoder = load_recipe(TrainDecoderRecipe, "digits/decoder_gan", names)
    diffusion = load_recipe(TrainDiffusionRecipe, "digits/diffusion", told)
    adversary = adversary_of(decoder, 100, ONE)
    assert adversary is not None
    module = nn.Linear(2, 2)
    for optimizer in (optimizer_of(module, decoder), optimizer_of(module, diffusion), adversary.optimizer):
        (group,) = optimizer.param_groups
        assert isinstance(optimizer, torch.optim.AdamW) and not group["amsgrad"]
        assert list(group["betas"]) == [float(text) for text in betas.strip("[]").split(",")]
        assert (group["weight_decay"], group["eps"]) == (0.03, 1e-8)


def test_pixels_are_rounded_or_truncated_and_never_wrap():
    """Section 1: saved rounded, or truncated as the release does."""
    levels = torch.tensor([-0.2, 0.0, 0.4, 0.6, 1.5, 254.4, 254.6, 255.0, 300.0]) / 255
    images = levels.view(1, 1, 1, -1).expand(1, 3, 1, -1)
    rounded, floored = (to_bytes(images, rule)[0, 0, :, 0].tolist() for rule in ("round", "floor"))
    assert rounded == [0, 0, 0, 1, 2, 254, 255, 255, 255]
    assert floored == [0, 0, 0, 0, 1, 254, 254, 255, 255]


def test_kid_has_torch_fidelitys_defaults():
    """EVALUATION section 5: 100 subsets of 1000."""
    told = inspect.signature(kernel_distance).parameters
    for ours, theirs in (("subsets", "kid_subsets"), ("size", "kid_subset_size"), ("seed", "rng_seed")):
        assert told[ours].default == DEFAULTS[theirs]
    assert (DEFAULTS["kid_subsets"], DEFAULTS["kid_subset_size"]) == (100, 1000)


def test_random_crops_lie_anywhere_in_both_directions(tmp_path):
    """Section 4: resized by the shorter side, then a random crop; no flip unless it is asked for."""
    rows, columns = np.mgrid[:48, :64]
    Image.fromarray(np.stack([rows, columns, rows * 0], 2).astype(np.uint8)).save(tmp_path / "place.png")
    spec = AugmentationSpec(resize=48, crop="random")
    crops = CropSource(open_images(tmp_path), 32, 0, spec, 1).crops(range(400)).images
    corners = crops[:, :2, 0, 0].long()  # each pixel tells its own row and column
    assert torch.equal(crops[:, 1, 0, -1].long(), corners[:, 1] + 31)  # not mirrored
    assert set(corners[:, 0].tolist()) == set(range(17)) and set(corners[:, 1].tolist()) == set(range(33))
    assert abs(np.corrcoef(corners.T.numpy())[0, 1]) < 0.2  # four standard errors of 400
