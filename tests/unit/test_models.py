"""The modules: their sizes, their starts, and what each part does to a token."""

import pytest
import torch

from raecli.models.decoder import Decoder
from raecli.models.dit import DiT, DiTDH, parameter_count
from raecli.models.fused import rotate
from raecli.models.layers import PatchEmbed, TimeEmbed, rotary_angles, sincos_positions, unpatchify

SIZES = {"s": (384, 12, 6), "b": (768, 12, 12), "l": (1024, 24, 16), "xl": (1152, 28, 16)}  # Table 13
# FACTS section 2, run on the released code.
DIT = {"s": 33_649_792, "b": 131_884_288, "xl": 677_248_384}
DIT_DH = {"s": 196_455_764, "b": 294_295_892, "l": 621_744_436, "xl": 838_675_796}
DECODERS = {  # Table 1b and FACTS section 1: width, depth, heads, mlp width, parameters with the fixed positions
    "b": (768, 12, 12, 3072, 86_435_328),
    "l": (1024, 24, 16, 4096, 304_150_272),
    "xl": (1152, 28, 16, 4096, 415_352_704),
}
SMALL = {"in_channels": 8, "input_size": 4, "width": 24, "depth": 2, "heads": 2, "num_classes": 5}
HEAD = {"head_width": 32, "head_depth": 1, "head_heads": 2}


@pytest.mark.parametrize("size", DIT)
def test_parameters_of_dit(size):
    width, depth, heads = SIZES[size]
    with torch.device("meta"):
        model = DiT(in_channels=768, input_size=16, width=width, depth=depth, heads=heads, num_classes=1000)
    assert parameter_count(model) == DIT[size]


@pytest.mark.parametrize("size", DIT_DH)
def test_parameters_of_dit_dh(size):
    width, depth, heads = SIZES[size]
    with torch.device("meta"):
        model = DiTDH(in_channels=768, input_size=16, width=width, depth=depth, heads=heads, num_classes=1000)
    assert parameter_count(model) == DIT_DH[size]


@pytest.mark.parametrize("size", DECODERS)
def test_parameters_of_decoders(size):
    width, depth, heads, mlp_width, count = DECODERS[size]
    with torch.device("meta"):
        model = Decoder(
            in_channels=768, tokens_side=16, width=width, depth=depth, heads=heads, mlp_width=mlp_width, patch_size=16
        )
    positions = 257 * width  # the release counts them
    assert sum(parameter.numel() for parameter in model.parameters()) + positions == count


@pytest.mark.parametrize("model", [DiT(**SMALL), DiTDH(**SMALL, **HEAD)], ids=["dit", "dit_dh"])
def test_a_fresh_model_says_zero_and_learns_from_every_parameter(model):
    noisy, t, labels = torch.randn(2, 8, 4, 4), torch.rand(2), torch.tensor([1, 5])
    assert model(noisy, t, labels).abs().max() == 0
    for parameter in model.parameters():  # zero layers pass no gradient on: draw them anew
        torch.nn.init.normal_(parameter, std=0.1)
    model(noisy, t, labels).square().sum().backward()
    silent = [name for name, parameter in model.named_parameters() if not parameter.grad.abs().sum() > 0]
    assert silent == []


def test_dit_starts_with_zero_biases_and_dit_dh_with_torch_own():
    assert DiT(**SMALL).blocks[0].attention.qkv.bias.abs().max() == 0
    assert DiTDH(**SMALL, **HEAD).backbone[0].attention.qkv.bias.abs().max() > 0


@pytest.mark.parametrize("patch_size", [1, 2])
def test_models_keep_the_shape_for_any_patch(patch_size):
    for model in (DiT(**SMALL, patch_size=patch_size), DiTDH(**SMALL, **HEAD, patch_size=patch_size)):
        assert model(torch.randn(2, 8, 4, 4), torch.rand(2), torch.tensor([0, 1])).shape == (2, 8, 4, 4)
    with pytest.raises(ValueError, match="multiple"):
        DiT(**SMALL, patch_size=3)


def test_patches_come_back_where_they_were():
    maps = torch.arange(2 * 3 * 4 * 4, dtype=torch.float32).view(2, 3, 4, 4)
    embed = PatchEmbed(3, 12, 2)
    torch.nn.init.eye_(embed.linear.weight)
    torch.nn.init.zeros_(embed.linear.bias)
    tokens = embed(maps)  # channels first inside a patch
    channels_last = tokens.unflatten(2, (3, 2, 2)).permute(0, 1, 3, 4, 2).flatten(2)
    torch.testing.assert_close(unpatchify(channels_last, 2), maps)


def test_sincos_positions_tell_the_column_first_and_the_row_second():
    table = sincos_positions(4, 16).view(4, 4, 16)
    assert (table[0, :, :8] == table[3, :, :8]).all()  # the first half knows no row
    assert (table[:, 0, 8:] == table[:, 3, 8:]).all()  # the second knows no column
    torch.testing.assert_close(table[0, 3, :4], torch.tensor([3.0, 0.3, 0.03, 0.003]).sin())
    torch.testing.assert_close(table[2, 0, 12:], torch.tensor([2.0, 0.2, 0.02, 0.002]).cos())


def test_rotary_attention_sees_distances_alone_rows_in_the_first_half():
    angles = rotary_angles(4, 8).double().view(4, 4, 4)
    query, key = torch.randn(2, 8, dtype=torch.float64)

    def score(a: tuple[int, int], b: tuple[int, int]) -> float:
        turned = [rotate(x, angles[place].cos(), angles[place].sin()) for x, place in ((query, a), (key, b))]
        return float(turned[0] @ turned[1])

    assert score((0, 1), (2, 3)) == pytest.approx(score((1, 0), (3, 2)))
    assert score((0, 1), (2, 3)) != pytest.approx(score((0, 1), (3, 3)))
    assert (angles[:, 0, :2] != angles[:, 1, :2]).sum() == 0  # row angles do not know the column
    assert (angles[0, :, 2:] != angles[1, :, 2:]).sum() == 0


def test_the_null_label_is_one_more_than_the_classes():
    model = DiT(**SMALL)
    assert model.null_label == 5 and model.label_embed.num_embeddings == 6
    unconditional = DiT(**{**SMALL, "num_classes": 0})
    assert unconditional.null_label == 0
    assert unconditional(torch.randn(1, 8, 4, 4), torch.rand(1), torch.zeros(1, dtype=torch.long)).shape == (1, 8, 4, 4)


def test_decoder_upsamples_by_its_patch():
    decoder = Decoder(in_channels=8, tokens_side=4, width=16, depth=1, heads=2, mlp_width=32, patch_size=6)
    assert decoder(torch.randn(2, 8, 4, 4)).shape == (2, 3, 24, 24)
    assert decoder.last_layer is decoder.predict.weight


def test_time_frequencies_are_standard_normal():
    torch.manual_seed(0)
    drawn = torch.cat([TimeEmbed(8).frequencies for _ in range(40)])  # 10 240 draws
    assert abs(drawn.mean()) < 0.04 and abs(drawn.std() - 1) < 0.03  # four standard errors
