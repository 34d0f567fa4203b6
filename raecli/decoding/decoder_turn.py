"""The decoder's half of a step: L1 + LPIPS + .75 lambda G, the same for any ranks and micro-batches. App. E.2."""

import torch
from torch import Tensor

from raecli.decoding.adversary import Adversary
from raecli.decoding.learner import Learner, Part
from raecli.losses.adversarial import adaptive_weight
from raecli.losses.reconstruction import feature_loss, l1_loss, lpips_loss

Losses = dict[str, Tensor]


def decoder_turn(learner: Learner, parts: list[Part], adversary: Adversary | None, *, perceptual: bool) -> Losses:
    """Leave the gradient of the whole batch's loss in the decoder's parameters; this rank's mean losses.

    adversary: None as long as its term has not begun. The weights are not touched.
    """
    if adversary is not None:
        return balanced_turn(learner, parts, adversary, perceptual=perceptual)
    totals: Losses = {}
    for part in parts:
        with learner.reducing(last=part is parts[-1]):
            images = learner.decode(learner.noisy(part), learner.forward)
            losses = reconstruction_losses(learner, images, part, perceptual=perceptual)
            (losses["loss"] * part.weight).backward()
        add(totals, losses, part.weight)
    return totals


def balanced_turn(learner: Learner, parts: list[Part], adversary: Adversary, *, perceptual: bool) -> Losses:
    """The turn with the adversarial term, whose weight lambda is known only after the last micro-batch's gradients.

    The two terms' gradients at the images are taken first and kept; they are small. A second pass sends
    reconstruction + .75 lambda adversarial through the decoder, once. One micro-batch needs no second decoding.
    """
    once, totals, gradients = len(parts) == 1, Losses(), []
    balance = Balance(learner, at_layer=adversary.spec.balance == "last_layer")
    for part in parts:
        with torch.set_grad_enabled(once or balance.at_layer):
            images = learner.decode(learner.noisy(part), learner.forward if once else learner.model)
        leaf = images.detach().requires_grad_()
        losses = reconstruction_losses(learner, leaf, part, perceptual=perceptual)
        losses["adversarial"] = adversary.generator_loss(learner, leaf, part)
        pair = torch.stack([torch.autograd.grad(losses[name], leaf)[0] for name in ("loss", "adversarial")])
        balance.add(images, pair * part.weight)
        gradients.append(pair)
        add(totals, losses, part.weight)
    weight = balance.adaptive_weight()
    for part, (reconstruction, adversarial) in zip(parts, gradients, strict=True):
        with learner.reducing(last=part is parts[-1]):
            if not once:
                images = learner.decode(learner.noisy(part), learner.forward)
            images.backward((reconstruction + adversary.spec.weight * weight * adversarial) * part.weight)
    totals["loss"] = totals["loss"] + adversary.spec.weight * weight * totals["adversarial"]
    return totals | {"lambda": weight}


class Balance:
    """The adaptive weight lambda, out of the gradients of the global batch's two mean losses.

    Gradients are summed over micro-batches and ranks before their norms are taken, so lambda is that of the large
    batch and the same on all ranks. At the images the norm is over all images of the batch; at the last layer it is
    of the all-reduced gradient of its weight.
    """

    def __init__(self, learner: Learner, *, at_layer: bool) -> None:
        self.at_layer, self.ranks, self.layer = at_layer, learner.ranks, learner.model.last_layer
        shape = self.layer.shape if at_layer else ()
        self.sums = torch.zeros((2, *shape), device=self.ranks.device)

    def add(self, images: Tensor, pair: Tensor) -> None:
        """Take in a micro-batch. pair: the terms' gradients at its images, [2, b, 3, S, S], of the rank's mean."""
        if not self.at_layer:
            self.sums += pair.square().sum(dim=(1, 2, 3, 4))
            return
        for row, gradient in enumerate(pair):
            self.sums[row] += torch.autograd.grad(images, self.layer, gradient, retain_graph=True)[0]

    def adaptive_weight(self) -> Tensor:
        """lambda, once all micro-batches are in; a scalar."""
        sums = self.ranks.sum(self.sums)
        squares = sums.flatten(1).square().sum(dim=1) if self.at_layer else sums
        return adaptive_weight(*(squares.sqrt() / self.ranks.world))


def reconstruction_losses(learner: Learner, images: Tensor, part: Part, *, perceptual: bool) -> Losses:
    """`l1`, `perceptual` (0 before its start), and `loss`, their weighted sum: means over a micro-batch."""
    spec, targets = learner.recipe.loss, part.targets
    losses = {"l1": l1_loss(images, targets)}
    total = spec.l1_weight * losses["l1"]
    if learner.perceptual is not None:
        losses["perceptual"] = total.new_zeros(())
        if perceptual and spec.perceptual == "lpips":
            losses["perceptual"] = lpips_loss(learner.perceptual, images, targets)
        elif perceptual:
            losses["perceptual"] = feature_loss(learner.perceptual.layers, images, targets)
        total = total + spec.perceptual_weight * losses["perceptual"]
    return {"loss": total, **losses}


def add(totals: Losses, losses: Losses, weight: float) -> None:
    """Add a micro-batch's losses to the rank's means."""
    for name, value in losses.items():
        totals[name] = totals.get(name, 0) + value.detach() * weight
