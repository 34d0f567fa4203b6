"""The shipped recipes against the paper: its Tables 12 and 13, Appendices E.2, F and H.3, written out here again."""

import re

import pytest
import torch

from raecli.models.build import diffusion_of
from raecli.models.decoder import Decoder
from raecli.recipe.load import dump_recipe, load_recipe
from raecli.recipe.recipes import RECIPES, SampleRecipe, TrainDecoderRecipe, TrainDiffusionRecipe
from raecli.recipe.shipped import shipped_files
from raecli.recipe.strict_yaml import parse_yaml

# Table 13: width, heads, depth.
TABLE_13 = {"s": (384, 6, 12), "b": (768, 12, 12), "l": (1024, 16, 24), "xl": (1152, 16, 28)}
# App. H.3, Table 15: 2 blocks, 2048 wide, which is size G of Table 13: 16 heads.
HEAD = (2048, 16, 2)
# Table 1b's ViT-B, ViT-L, ViT-XL as released: width, heads, depth, width of the MLP.
DECODERS = {"b": (768, 12, 12, 3072), "l": (1024, 16, 24, 4096), "xl": (1152, 16, 28, 4096)}
# Parameters of the released models for 256 tokens of 768 channels; they count the fixed tables too.
PARAMETERS = {
    "dith_s": 196_455_764,
    "dith_b": 294_295_892,
    "dith_l": 621_744_436,
    "dith_xl": 838_675_796,
    "dit_s": 33_649_792,
    "dit_b": 131_884_288,
    "dit_xl": 677_248_384,
    "decoder_b_dinov2b": 86_435_328,
    "decoder_l_dinov2b": 304_150_272,
    "decoder_xl_dinov2b": 415_352_704,
}
# Of the baselines, whose input is another; the paper's Table 18 counts 675M for DiT-XL on SD-VAE. Pixels have
# 3 x 16 x 16 = 768 numbers a token, so their models have DINOv2-B's count.
BASELINE_PARAMETERS = {
    "dit_s_sdvae": 33_071_504,
    "dit_xl_sdvae": 675_515_024,
    "dith_xl_sdvae": 834_728_548,
    "dit_xl_pixels": 677_248_384,
    "dith_xl_pixels": 838_675_796,
}
# Another grid of tokens, or larger patches of pixels.
DECODER_512_PARAMETERS = {"decoder_xl_dinov2b_512": 416_237_440, "decoder_xl_dinov2b_upsample": 418_009_216}
# App. F: "All models are trained for 80 epochs unless otherwise specified"; Table 7: 800; Sec. 5.1: 400 at 512 pixels.
EPOCHS = {"dith_xl": 800, "dith_xl_512": 400}
DITH = ["dith_s", "dith_b", "dith_l", "dith_xl", "dith_xl_512"]
DIT = ["dit_s", "dit_b", "dit_l", "dit_xl"]
DITH_BASELINES = ["dith_xl_sdvae", "dith_xl_pixels"]
DIT_BASELINES = ["dit_s_sdvae", "dit_xl_sdvae", "dit_xl_pixels"]
BASELINES = [*DITH_BASELINES, *DIT_BASELINES]
# App. F: patches of 2 and 16; latents [C, H, W] of 256-pixel images.
BASELINE_LATENTS = {"sdvae": (2, (4, 32, 32)), "pixels": (16, (3, 256, 256))}
# The encoder of each decoder's cache, and the rFID in print: without noise (Table 1), with tau .8 (Table 14).
DECODER_RECIPES = {
    "decoder_b_dinov2b": ("dinov2b", "0.58", None),
    "decoder_l_dinov2b": ("dinov2b", "0.50", None),
    "decoder_xl_dinov2b": ("dinov2b", "0.49", "0.57"),
    "decoder_xl_dinov2s": ("dinov2s", "0.52", "0.64"),
    "decoder_xl_dinov2l": ("dinov2l", "0.52", "0.59"),
    "decoder_xl_siglip2b": ("siglip2b", "0.53", "0.82"),
    "decoder_xl_maeb": ("maeb", "0.16", "0.28"),
    "decoder_xl_siglip2so": ("siglip2so", None, None),  # App. N
    "decoder_xl_dinov3b": ("dinov3b", None, None),  # not the paper's encoder
}
# Table 14c: tau, gFID, rFID.
TAU_RECIPES = {
    "decoder_xl_dinov2b_tau0": (0.0, "4.81", "0.49"),
    "decoder_xl_dinov2b_tau05": (0.5, "4.39", "0.54"),
    "decoder_xl_dinov2b_tau10": (1.0, "4.20", "0.60"),
}
# Table 9, output of 512 pixels: the cache, tokens a side, pixels a token, rFID (and gFID).
DECODER_512_RECIPES = {
    "decoder_xl_dinov2b_512": ("imagenet512-dinov2b", 32, 16, ["0.53"]),
    "decoder_xl_dinov2b_upsample": ("imagenet256-dinov2b", 16, 32, ["0.97", "1.61"]),
}
# Unguided and guided gFID: Sec. 5.1, Tables 5, 7 and 8; Table 2's for DiT-S; Tables 2, 10 and 11 for the baselines. The
# others are not in print.
GFID = {
    "dith_s": ["6.07"],
    "dith_b": ["3.38"],
    "dith_xl": ["1.53", "1.18"],
    "dith_xl_512": ["1.13"],
    "dit_s": ["215.76"],
    "dit_xl": ["4.28"],
    "dit_s_sdvae": ["51.74"],
    "dit_xl_sdvae": ["7.13"],
    "dith_xl_sdvae": ["11.70"],
    "dit_xl_pixels": ["51.09"],
    "dith_xl_pixels": ["30.56"],
}
CLAIMS = {  # recipe of shell/digits/claims.sh: the one it is held against, and all that differs
    "diffusion_narrow_deep": ("diffusion_narrow", {"model.depth": 12}),
    "diffusion_dh_narrow": ("diffusion_dh", {"model.head_width": 24, "model.head_heads": 2}),
    "diffusion_shift1": ("diffusion_fast", {"flow.time_shift_base": 512}),
    "diffusion_shift4": ("diffusion_fast", {"flow.time_shift_base": 32}),
    "decoder_tau0": ("decoder", {"noise_tau": 0.0}),
    "decoder_tau08": ("decoder", {"noise_tau": 0.8}),
}
DIGITS_DIFFUSION = [f"digits/{name}" for name in ("diffusion", "diffusion_dh", "diffusion_fast", "diffusion_narrow")]
DIGITS = ["digits/decoder", "digits/decoder_gan", *DIGITS_DIFFUSION, *(f"digits/{name}" for name in CLAIMS)]
PAPER_DECODERS = [*DECODER_RECIPES, *DECODER_512_RECIPES, *TAU_RECIPES]
# Appendices D, F and L, the release's scale at 256 pixels (FACTS section 3): model, autoencoder, scale, guide, figure.
SAMPLE_RECIPES = {
    "sample_dith_xl_256": ("dith_xl", "decoder_xl_dinov2b", 1.0, None, "1.53"),
    "sample_dith_xl_256_autoguidance": ("dith_xl", "decoder_xl_dinov2b", 1.42, "dith_s_ep20", "1.18"),
    "sample_dith_xl_512_autoguidance": ("dith_xl_512", "decoder_xl_dinov2b_512", 1.5, "dith_s_512_ep20", "1.13"),
    "sample_dit_xl_dinov2s_cfg": ("dit_xl_dinov2s", "decoder_xl_dinov2s", 1.0, None, "1.41"),
}
ALL = sorted([*DITH, *DIT, *BASELINES, *PAPER_DECODERS, "decoder_b_single_gpu", *DIGITS, *SAMPLE_RECIPES])
RESOLVED = ["model.in_channels=768", "model.input_size=16", "model.num_classes=1000"]


def diffusion(name, overrides=()):
    return load_recipe(TrainDiffusionRecipe, str(shipped_files()[name]), overrides)


def decoder(name):
    return load_recipe(TrainDecoderRecipe, str(shipped_files()[name]))


def size_of(name):
    """The letter of Table 13, or of Table 1b, in a recipe's name."""
    return name.split("_")[1]


def trained(module):
    return sum(parameter.numel() for parameter in module.parameters() if parameter.requires_grad)


def test_the_shipped_recipes_are_these_forty_five():
    assert sorted(shipped_files()) == ALL
    assert len(ALL) == 45


@pytest.mark.parametrize("name", ALL)
def test_a_shipped_recipe_is_complete_names_its_row_and_survives_the_way_to_yaml(name, tmp_path):
    path = shipped_files()[name]
    text = path.read_text(encoding="ascii")
    values = parse_yaml(text.encode()).values
    spec = load_recipe(None, str(path))
    kind = RECIPES[values["stage"]]
    assert next(iter(values)) == "stage"
    assert set(values) == set(kind.model_fields)
    assert values["output"] == f"runs/{name}"
    assert re.match(r"(Table|Section) \d" if "/" not in name else "none: ", values["paper"])
    assert text.startswith("# ")
    assert f"# Run:   rae {values['stage']} {name}" in text
    assert ("# Not measured here" in text) == ("/" not in name)
    copy = tmp_path / "copy.yaml"
    copy.write_text(dump_recipe(spec))
    assert load_recipe(kind, copy) == spec


@pytest.mark.parametrize("name", [*DITH, *DIT])
def test_diffusion_sizes_are_those_of_table_13(name):
    model = diffusion(name).model
    assert (model.width, model.heads, model.depth) == TABLE_13[size_of(name)]
    assert model.kind == ("dit_dh" if name in DITH else "dit")
    assert (model.head_width, model.head_heads, model.head_depth) == (HEAD if name in DITH else (None, None, None))
    assert model.patch_size == 1  # App. F


@pytest.mark.parametrize("name", BASELINES)
def test_a_baseline_has_256_tokens_of_its_own_latents_and_the_sizes_of_table_13(name):
    recipe = diffusion(name)
    model, kind = recipe.model, name.rpartition("_")[2]
    patch, shape = BASELINE_LATENTS[kind]
    assert (model.width, model.heads, model.depth) == TABLE_13[size_of(name)]
    head = HEAD if name in DITH_BASELINES else (None, None, None)
    assert (model.head_width, model.head_heads, model.head_depth) == head
    assert (model.patch_size, model.in_channels, model.input_size) == (patch, shape[0], shape[1])
    assert (shape[1] // patch) ** 2 == 256
    assert recipe.cache == f"latents/imagenet256-{kind}"
    # Against a cache of that shape the shift is by all its dimensions: none for SD-VAE, DINOv2-B's for pixels.
    flow = diffusion(name, [f"flow.time_shift_dim={shape[0] * shape[1] * shape[2]}"]).flow
    assert flow.time_shift == pytest.approx({"sdvae": 1.0, "pixels": 48**0.5}[kind], rel=1e-12)


@pytest.mark.parametrize("name", [*DITH, *DIT, *BASELINES])
def test_diffusion_optimisation_is_that_of_appendix_f(name):
    recipe = diffusion(name)
    assert recipe.optimizer.learning_rate == 2e-4
    assert recipe.optimizer.betas == (0.9, 0.95)  # App. G
    assert recipe.optimizer.weight_decay == 0
    assert recipe.batch_size == 1024
    assert recipe.duration == f"{EPOCHS.get(name, 80)} epochs"
    with_head = name in [*DITH, *DITH_BASELINES]
    assert recipe.ema_decay == (0.9995 if with_head else 0.9999)
    assert not recipe.ema_ramp
    assert recipe.optimizer.clip_norm == (1.0 if with_head else None)  # the release's
    schedule = recipe.schedule
    told = (schedule.kind, schedule.warmup, schedule.hold, schedule.final_learning_rate)
    assert told == (("linear", "0 steps", "40 epochs", 2e-5) if with_head else ("constant", "0 steps", "0 steps", None))


@pytest.mark.parametrize("name", [*DITH, *DIT])
def test_the_flow_is_that_of_section_4_with_the_caches_dimension(name):
    flow = diffusion(name).flow
    assert (flow.time_distribution, flow.time_mean, flow.time_std, flow.time_max) == ("logit_normal", 0, 1, 1)
    assert (flow.time_shift_dim, flow.time_shift_base) == (None, 4096)
    pixels = 512 if name.endswith("512") else 256
    assert diffusion(name).cache == f"latents/imagenet{pixels}-dinov2b"
    dimension = (pixels // 16) ** 2 * 768
    # 6.9282 and 13.8564: sqrt(48) and sqrt(192).
    resolved = diffusion(name, [f"flow.time_shift_dim={dimension}"]).flow
    assert resolved.time_shift == pytest.approx({256: 6.9282, 512: 13.8564}[pixels], abs=1e-4)


@pytest.mark.parametrize("name", sorted(GFID))
def test_a_diffusion_recipe_names_the_papers_figures(name):
    assert re.findall(r"\d+\.\d\d", diffusion(name).paper) == GFID[name]


@pytest.mark.parametrize("name", sorted(DECODER_RECIPES))
def test_decoder_sizes_and_caches_are_those_of_table_1(name):
    recipe = decoder(name)
    encoder, clean, noisy = DECODER_RECIPES[name]
    size = recipe.decoder
    assert (size.width, size.heads, size.depth, size.mlp_width) == DECODERS[size_of(name)]
    assert size.patch_size == 16
    assert recipe.cache == f"latents/imagenet256-{encoder}"
    assert set(re.findall(r"\d\.\d\d", recipe.paper)) == {clean, noisy} - {None}


@pytest.mark.parametrize("name", sorted(DECODER_512_RECIPES))
def test_decoders_to_512_pixels_are_those_of_table_9(name):
    recipe = decoder(name)
    cache, side, patch, figures = DECODER_512_RECIPES[name]
    size = recipe.decoder
    assert (size.width, size.heads, size.depth, size.mlp_width) == DECODERS["xl"]
    assert (recipe.cache, size.patch_size, side * patch) == (f"latents/{cache}", patch, 512)
    assert re.findall(r"\d\.\d\d", recipe.paper) == figures
    with torch.device("meta"):
        module = Decoder(in_channels=768, tokens_side=side, **size.model_dump())
    count = trained(module) + (side**2 + 1) * size.width  # with the fixed positions, as the release counts
    assert count == DECODER_512_PARAMETERS[name]
    assert f"{count:,}" in shipped_files()[name].read_text()


@pytest.mark.parametrize("name", sorted(TAU_RECIPES))
def test_the_ablation_of_tau_is_table_14c_and_differs_in_nothing_else(name):
    recipe, default = decoder(name), decoder("decoder_xl_dinov2b")
    tau, gfid, rfid = TAU_RECIPES[name]
    assert recipe.noise_tau == tau
    assert {gfid, rfid} <= set(re.findall(r"\d\.\d\d", recipe.paper))
    own = {"noise_tau", "paper", "output"}
    assert recipe.model_dump(exclude=own) == default.model_dump(exclude=own)


@pytest.mark.parametrize("name", sorted(PAPER_DECODERS))
def test_the_adversary_is_that_of_table_12_and_appendix_e2(name):
    spec = decoder(name).adversarial
    assert (spec.weight, spec.discriminator_norm, spec.balance) == (0.75, "batch", "image")  # App. E.2
    assert spec.cutout == 0.5  # the default of Zhao et al. 2020
    assert (spec.discriminator_start, spec.generator_start) == ("6 epochs", "8 epochs")
    assert decoder(name).loss.perceptual_start == "0 epochs"
    optimizer, schedule = spec.optimizer, spec.schedule
    assert (optimizer.learning_rate, optimizer.betas, optimizer.weight_decay) == (2e-4, (0.5, 0.9), 0.0)
    told = (schedule.kind, schedule.warmup, schedule.hold, schedule.final_learning_rate)
    assert told == ("cosine", "1 epochs", "0 steps", 2e-5)


def test_the_recipe_for_one_card_is_a_quarter_of_the_paper_s_batch_in_micro_batches():
    recipe, whole = decoder("decoder_b_single_gpu"), decoder("decoder_b_dinov2b")
    own = {"paper", "output", "batch_size", "micro_batch_size", "ema_decay", "optimizer", "schedule", "adversarial"}
    assert recipe.model_dump(exclude=own) == whole.model_dump(exclude=own)
    assert (recipe.batch_size, recipe.micro_batch_size) == (128, 16)
    assert recipe.ema_decay == pytest.approx(0.9978 ** (128 / 512), abs=1e-5)
    for block in (recipe, recipe.adversarial):
        assert block.optimizer.learning_rate == pytest.approx(2e-4 * (128 / 512) ** 0.5, rel=1e-12)
        assert block.optimizer.betas == (0.5, 0.9)
        assert block.schedule.final_learning_rate == pytest.approx(1e-5, rel=1e-12)
    assert recipe.adversarial.model_dump(exclude={"optimizer", "schedule"}) == whole.adversarial.model_dump(
        exclude={"optimizer", "schedule"}
    )


@pytest.mark.parametrize("name", sorted(PAPER_DECODERS))
def test_decoder_training_is_that_of_table_12_and_appendix_e2(name):
    recipe = decoder(name)
    optimizer, schedule = recipe.optimizer, recipe.schedule
    assert (optimizer.learning_rate, optimizer.betas, optimizer.weight_decay) == (2e-4, (0.5, 0.9), 0.0)
    assert optimizer.clip_norm is None
    assert (schedule.kind, schedule.warmup, schedule.hold, schedule.final_learning_rate) == (
        "cosine",
        "1 epochs",
        "0 steps",
        2e-5,
    )
    assert (recipe.duration, recipe.batch_size, recipe.ema_decay) == ("16 epochs", 512, 0.9978)
    augmentation = recipe.augmentation
    resize = 768 if name in DECODER_512_RECIPES else 384  # to crops of 512: the same share
    assert (augmentation.resize, augmentation.crop, augmentation.horizontal_flip) == (resize, "random", False)
    assert (recipe.noise_tau, recipe.noise_sigma) == (TAU_RECIPES.get(name, (0.8,))[0], "halfnormal")
    assert recipe.latents == "encoder"  # random crops
    assert (recipe.loss.l1_weight, recipe.loss.perceptual, recipe.loss.perceptual_weight) == (1.0, "lpips", 1.0)


@pytest.mark.parametrize("name", sorted(name for name in PARAMETERS if name.startswith("di")))
def test_a_diffusion_recipes_model_has_the_released_number_of_parameters(name):
    model = diffusion(name, RESOLVED).model
    with torch.device("meta"):
        module = diffusion_of(model)
    # Fixed in the release and counted there: sin-cos positions of 256 tokens, and 256 frequencies of time.
    assert trained(module) + 256 * model.width + 256 == PARAMETERS[name]
    assert f"{PARAMETERS[name]:,}" in shipped_files()[name].read_text()


@pytest.mark.parametrize("name", BASELINES)
def test_a_baselines_model_has_the_told_number_of_parameters(name):
    model = diffusion(name, ["model.num_classes=1000"]).model
    with torch.device("meta"):
        module = diffusion_of(model)
    assert trained(module) + 256 * model.width + 256 == BASELINE_PARAMETERS[name]
    assert f"{BASELINE_PARAMETERS[name]:,}" in shipped_files()[name].read_text()


@pytest.mark.parametrize("name", sorted(name for name in PARAMETERS if name.startswith("decoder")))
def test_a_decoder_recipe_has_the_released_number_of_parameters(name):
    size = decoder(name).decoder
    with torch.device("meta"):
        module = Decoder(in_channels=768, tokens_side=16, **size.model_dump())
    # Fixed in the release and counted there: sin-cos positions of 256 tokens and the class token's zeros.
    assert trained(module) + 257 * size.width == PARAMETERS[name]
    assert f"{PARAMETERS[name]:,}" in shipped_files()[name].read_text()


@pytest.mark.parametrize("name", sorted(SAMPLE_RECIPES))
def test_sampling_is_that_of_appendices_d_and_f(name):
    recipe = load_recipe(SampleRecipe, str(shipped_files()[name]))
    model, autoencoder, scale, guide, figure = SAMPLE_RECIPES[name]
    assert (recipe.solver, recipe.steps, recipe.time_grid) == ("euler", 50, "paper")  # App. F
    assert (recipe.model, recipe.autoencoder) == (f"runs/{model}", f"runs/{autoencoder}")
    assert (recipe.guidance_scale, recipe.guide) == (scale, guide and f"runs/{guide}")
    assert recipe.guidance_interval == (0.0, 1.0)  # App. D names an interval for CFG alone
    assert (recipe.classes, recipe.unconditional, recipe.pixel_rounding) == (None, False, "round")
    assert re.findall(r"gFID (\d\.\d\d)", recipe.paper) == [figure]
    if guide:  # DiT-DH-S after 20 epochs, made by the command in the recipe's head
        text = shipped_files()[name].read_text()
        assert "rae train-diffusion dith_s " in text and f'duration="20 epochs" output=runs/{guide}' in text
    if recipe.sweep:  # "careful grid search over scale and interval": the one row of the paper with CFG
        assert name == "sample_dit_xl_dinov2s_cfg" and len(recipe.sweep.scales) * len(recipe.sweep.intervals) == 40
        assert (0.0, 1.0) in recipe.sweep.intervals and 1.0 in recipe.sweep.scales
    else:
        assert recipe.num == 50_000  # App. J


def test_the_digits_settings_are_those_that_were_measured_to_work():
    recipe = decoder("digits/decoder")
    assert recipe.decoder.model_dump() == {"width": 64, "depth": 2, "heads": 4, "mlp_width": 256, "patch_size": 8}
    assert (recipe.noise_tau, recipe.duration, recipe.optimizer.learning_rate) == (0.3, "500 steps", 2e-3)
    sizes = {
        "diffusion": ("dit", 96, 4, 4, None, None, None, "3000 steps"),
        "diffusion_fast": ("dit", 96, 4, 4, None, None, None, "1500 steps"),
        "diffusion_narrow": ("dit", 24, 4, 2, None, None, None, "1500 steps"),
        "diffusion_dh": ("dit_dh", 24, 4, 2, 96, 2, 4, "1500 steps"),
    }
    for name, size in sizes.items():
        recipe = diffusion(f"digits/{name}")
        m = recipe.model
        found = (m.kind, m.width, m.depth, m.heads, m.head_width, m.head_depth, m.head_heads, recipe.duration)
        assert found == size
        assert recipe.flow.time_shift == 2.0
        assert recipe.optimizer.learning_rate == 2e-3
        assert recipe.schedule.final_learning_rate == pytest.approx(0.02 * 2e-3, rel=1e-12)
        assert not recipe.horizontal_flip


def test_the_digits_diffusion_recipes_differ_in_size_and_steps_alone():
    texts = {name: diffusion(f"digits/{name}").to_dict() for name in ("diffusion", "diffusion_fast", "diffusion_dh")}
    for values in texts.values():
        for key in ("model", "duration", "paper", "output"):
            values.pop(key)
    assert texts["diffusion"] == texts["diffusion_fast"] == texts["diffusion_dh"]


def flat(values, prefix=""):
    """Keys with dots to values."""
    items = (flat(v, f"{prefix}{k}.") if isinstance(v, dict) else {f"{prefix}{k}": v} for k, v in values.items())
    return {key: value for part in items for key, value in part.items()}


@pytest.mark.parametrize("name", sorted(CLAIMS))
def test_a_claims_recipe_differs_in_what_the_claim_is_about_alone(name):
    base, changed = CLAIMS[name]
    load = decoder if name.startswith("decoder") else diffusion
    ours, theirs = (flat(load(f"digits/{which}").to_dict()) for which in (name, base))
    differing = {key: value for key, value in ours.items() if value != theirs[key]}
    assert differing.pop("output") == f"runs/digits/{name}"
    differing.pop("paper")
    assert differing == changed


@pytest.mark.parametrize(("name", "alpha"), [("diffusion_shift1", 1), ("diffusion_fast", 2), ("diffusion_shift4", 4)])
def test_the_digits_shifts(name, alpha):
    assert diffusion(f"digits/{name}").flow.time_shift == alpha
