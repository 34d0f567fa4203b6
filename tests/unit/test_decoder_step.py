"""A step of the decoder and its adversary, in one process: the gradient is the formula's for any micro-batches."""

import math
from dataclasses import replace

import pytest
import torch
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from raecli.data.crops import Crops
from raecli.decoding.adversary import Adversary
from raecli.decoding.decoder_turn import decoder_turn
from raecli.decoding.learner import Learner
from raecli.errors import NonFiniteError
from raecli.losses.adversarial import hinge_loss
from raecli.losses.augment import diff_augment
from raecli.models.decoder import Decoder
from raecli.models.discriminator import Backbone, Discriminator
from raecli.recipe.load import load_recipe
from raecli.recipe.recipes import TrainDecoderRecipe
from raecli.stages.train_decoder import State, check_finite_step, train_step
from raecli.training.distributed import Ranks
from raecli.training.ema import Ema
from raecli.training.optimizer import make_optimizer

ONE = Ranks(0, 1, torch.device("cpu"))
TINY_VIT = {"img_size": 16, "patch_size": 4, "embed_dim": 16, "depth": 4, "num_heads": 1, "num_classes": 0}


class Squares(nn.Module):
    """A stand-in for the perceptual network: its one layer."""

    def layers(self, images):
        return [images.square()]


def recipe_of(*overrides: str) -> TrainDecoderRecipe:
    told = ("loss.perceptual=features", "loss.perceptual_weights=none", "loss.perceptual_weight=0.5")
    return load_recipe(TrainDecoderRecipe, "digits/decoder_gan", (*told, "adversarial.cutout=0.25", *overrides))


def learner_of(recipe: TrainDecoderRecipe) -> Learner:
    torch.manual_seed(0)
    model = Decoder(in_channels=8, tokens_side=4, width=16, depth=1, heads=2, mlp_width=32, patch_size=4)
    mean, std = torch.full((3, 1, 1), 0.45), torch.full((3, 1, 1), 0.25)
    return Learner(model, model, None, 16, Squares(), mean, std, recipe, ONE)


def adversary_of(recipe: TrainDecoderRecipe) -> Adversary:
    torch.manual_seed(1)
    discriminator = Discriminator(Backbone(VisionTransformer(**TINY_VIT)), norm=recipe.adversarial.discriminator_norm)
    discriminator.heads.eval()
    optimizer = make_optimizer(discriminator.heads, learning_rate=1e-3, betas=(0.5, 0.9), weight_decay=0.0)
    return Adversary(recipe.adversarial, discriminator, optimizer, 0, 0)


def crops(first: int = 0, count: int = 6) -> Crops:
    generator = torch.Generator().manual_seed(first)
    images = torch.randint(0, 256, (count, 3, 16, 16), dtype=torch.uint8, generator=generator)
    latents = torch.randn(count, 8, 4, 4, generator=generator)
    names = [f"image{index}" for index in range(first, first + count)]
    return Crops(range(first, first + count), names, images, latents)


def gradients_of(recipe: TrainDecoderRecipe) -> tuple[dict, list[torch.Tensor], list[torch.Tensor]]:
    """Losses, the decoder's gradient, the heads' gradient, of one step's two turns."""
    learner, adversary = learner_of(recipe), adversary_of(recipe)
    parts = learner.parts(crops())
    losses = decoder_turn(learner, parts, adversary, perceptual=True)
    losses["discriminator"] = adversary.turn(learner, parts)
    grads = [parameter.grad for parameter in learner.model.parameters()]
    return losses, grads, [parameter.grad for parameter in adversary.parameters() if parameter.grad is not None]


@pytest.mark.parametrize("norm", ["batch", "instance"])
@pytest.mark.parametrize("balance", ["image", "last_layer"])
def test_micro_batches_give_the_large_batchs_gradients_and_lambda(norm, balance):
    told = (f"adversarial.discriminator_norm={norm}", f"adversarial.balance={balance}")
    whole = gradients_of(recipe_of(*told))
    micro = gradients_of(recipe_of(*told, "micro_batch_size=4"))  # 4 and 2: unequal
    assert whole[0].keys() == micro[0].keys() and whole[0]["lambda"] > 0
    for name, value in whole[0].items():
        torch.testing.assert_close(micro[0][name], value, atol=1e-6, rtol=1e-5)
    for ours, theirs in zip(whole[1] + whole[2], micro[1] + micro[2], strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("balance", ["image", "last_layer"])
def test_the_decoders_gradient_is_that_of_the_papers_loss(balance):
    recipe = recipe_of(f"adversarial.balance={balance}")
    losses, found, _ = gradients_of(recipe)
    learner, adversary = learner_of(recipe), adversary_of(recipe)
    (part,) = learner.parts(crops())
    images = learner.decode(learner.noisy(part), learner.model)
    rec = (images - part.targets).abs().mean() + 0.5 * (images.square() - part.targets.square()).square().mean()
    augmented = diff_augment(images * 2 - 1, part.draws(recipe.seed, "augment generated"), cutout=0.25)
    gan = -adversary.discriminator(augmented).mean()
    at = images if balance == "image" else learner.model.predict.weight
    norms = [torch.autograd.grad(loss, at, retain_graph=True)[0].norm() for loss in (rec, gan)]
    weight = norms[0] / (norms[1] + 1e-6)
    torch.testing.assert_close(losses["lambda"], weight, rtol=1e-5, atol=0)
    total = rec + 0.75 * weight * gan
    torch.testing.assert_close(losses["loss"], total.detach())
    expected = torch.autograd.grad(total, list(learner.model.parameters()))
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-7, rtol=1e-4)


def test_the_discriminators_fakes_are_clean_and_of_8_bits_and_its_turn_leaves_the_decoder_alone():
    recipe = recipe_of("noise_tau=5.0")
    learner, adversary = learner_of(recipe), adversary_of(recipe)
    (part,) = learner.parts(crops())
    loss = adversary.turn(learner, [part])
    assert all(parameter.grad is None for parameter in learner.model.parameters())
    assert not adversary.discriminator.heads.training
    again = adversary_of(recipe)
    again.discriminator.iterate()
    fakes = (learner.decode(part.latents, learner.model).clamp(0, 1) * 255).round() / 255
    draws = [part.draws(recipe.seed, f"augment {what}") for what in ("real", "fake")]
    assert not torch.equal(*draws)  # independent
    pair = [diff_augment(x.detach() * 2 - 1, d, cutout=0.25) for x, d in zip((part.targets, fakes), draws, strict=True)]
    again.discriminator.heads.train()
    scores = again.discriminator(torch.cat(pair))
    torch.testing.assert_close(loss, hinge_loss(scores[:6], scores[6:]).detach())


def test_a_turn_follows_the_singular_vectors_by_one_power_iteration_however_many_micro_batches():
    expected = adversary_of(recipe_of()).discriminator
    before = {name: value.clone() for name, value in expected.heads.named_buffers()}
    expected.iterate()
    for micro in ("6", "2"):
        recipe = recipe_of(f"micro_batch_size={micro}")
        learner, adversary = learner_of(recipe), adversary_of(recipe)
        adversary.turn(learner, learner.parts(crops()))
        for name, value in adversary.discriminator.heads.named_buffers():
            if name.endswith(("left", "right")):
                assert torch.equal(value, expected.heads.get_buffer(name))
                assert ".score." in name or not torch.equal(value, before[name])  # of one row: found at once


def state_of(recipe: TrainDecoderRecipe) -> State:
    learner, adversary = learner_of(recipe), adversary_of(recipe)
    optimizer = make_optimizer(learner.model, learning_rate=1e-3, betas=(0.5, 0.9), weight_decay=0.0)
    return State(learner, Ema(learner.model, 0.9), optimizer, adversary, 0, {}, 0)


def test_before_its_start_the_adversary_neither_learns_nor_is_heard():
    recipe = recipe_of()
    state = state_of(recipe)
    state.adversary = replace(state.adversary, discriminator_start=1, generator_start=2)
    before = {name: value.clone() for name, value in state.adversary.discriminator.heads.state_dict().items()}
    seen = []
    for step in range(3):
        state.step = step
        losses = train_step(state, crops(6 * step), recipe, ONE)
        seen.append((losses["discriminator"].item() > 0, losses["lambda"].item() > 0))
        if step == 0:
            now = state.adversary.discriminator.heads.state_dict()
            assert all(torch.equal(now[name], value) for name, value in before.items())
    assert seen == [(False, False), (True, False), (True, True)]


@pytest.mark.parametrize("whose", ["decoder", "adversary"])
def test_nan_stops_before_an_optimiser_or_the_average_is_touched(whose):
    recipe = recipe_of()
    state = state_of(recipe)
    train_step(state, crops(), recipe, ONE)
    poisoned = (
        state.learner.model.norm.weight if whose == "decoder" else state.adversary.discriminator.heads[2].score.bias
    )
    with torch.no_grad():
        poisoned[0] = math.nan
    models = (state.learner.model, state.adversary.discriminator.heads)
    before = [value.clone() for model in models for value in model.parameters()]
    average = [value.clone() for value in state.ema.averages.values()]
    with pytest.raises(NonFiniteError, match=r"step 0: .*image0"):
        train_step(state, crops(), recipe, ONE)
    after = [value for model in models for value in model.parameters()]
    for old, new in zip(before + average, after + list(state.ema.averages.values()), strict=True):
        torch.testing.assert_close(old, new, equal_nan=True, atol=0, rtol=0)


def test_a_loss_that_is_nan_stops_even_where_its_gradient_is_zero():
    losses = {"discriminator": torch.tensor(math.nan)}
    with pytest.raises(NonFiniteError, match="step 7: discriminator"):
        check_finite_step(7, losses, {"gradient_norm": torch.tensor(0.0)}, crops(), ONE)


def test_both_schedules_reach_their_minimum():
    recipe = recipe_of()
    adversary = replace(adversary_of(recipe), discriminator_start=60)
    rates = [adversary.set_rate(step, 160, 320, 32) for step in range(160)]
    assert rates[:60] == [rates[60]] * 60
    assert max(rates) == recipe.adversarial.optimizer.learning_rate == pytest.approx(rates[80], rel=1e-6)
    assert rates[-1] == pytest.approx(recipe.adversarial.schedule.final_learning_rate)
    assert adversary.optimizer.param_groups[0]["lr"] == rates[-1]


def test_what_a_checkpoint_keeps_of_the_adversary_brings_it_back(tmp_path):
    recipe = recipe_of()
    state = state_of(recipe)
    train_step(state, crops(), recipe, ONE)
    kept = {name: value.clone() for name, value in state.adversary.tensors(tmp_path).items()}
    other = replace(state, adversary=adversary_of(recipe))
    other.adversary.load(kept)
    found = other.adversary.tensors(tmp_path)
    assert found.keys() == kept.keys() and all(torch.equal(found[name], kept[name]) for name in kept)
    assert any(name.endswith("running_mean") for name in kept) and any(name.endswith("left") for name in kept)
    assert any(name.endswith("exp_avg_sq") for name in kept)


def test_before_its_start_the_perceptual_term_is_zero():
    recipe = recipe_of()
    learner = learner_of(recipe)
    parts = learner.parts(crops())
    before = decoder_turn(learner, parts, None, perceptual=False)
    assert before["perceptual"] == 0 and before["loss"] == before["l1"]
    assert decoder_turn(learner, parts, None, perceptual=True)["perceptual"] > 0


def test_a_step_hears_of_the_perceptual_term_from_its_start_on():
    state = replace(state_of(recipe_of()), adversary=None, perceptual_start=2)
    seen = []
    for step in range(3):
        state.step = step
        seen.append(train_step(state, crops(6 * step), recipe_of(), ONE)["perceptual"].item() > 0)
    assert seen == [False, False, True]


@pytest.mark.parametrize("weight", [0.0, 2.5])
def test_the_loss_weighs_l1(weight):
    learner = learner_of(recipe_of(f"loss.l1_weight={weight}"))
    losses = decoder_turn(learner, learner.parts(crops()), None, perceptual=True)
    torch.testing.assert_close(losses["loss"], weight * losses["l1"] + 0.5 * losses["perceptual"])
