"""The discriminator's half of a step, and its state. App. E.2, Table 12."""

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from raecli.decoding.learner import Learner, Part
from raecli.losses.adversarial import generator_loss, hinge_loss
from raecli.losses.augment import diff_augment
from raecli.models.discriminator import Discriminator, load_backbone
from raecli.models.discriminator_file import find_backbone
from raecli.recipe.blocks import AdversarialSpec
from raecli.recipe.recipes import TrainDecoderRecipe
from raecli.recipe.spec import duration_in_steps
from raecli.store.checkpoint import check_finite, load_optimizer, optimizer_tensors
from raecli.training.distributed import Ranks
from raecli.training.optimizer import make_optimizer, scheduled_rate, set_learning_rate

WEIGHTS, MOMENTS = "adversary.weights.", "adversary.moments."  # of keys in a checkpoint's optimizer.safetensors


@dataclass(frozen=True)
class Adversary:
    """The discriminator in training. It is in evaluation, and so fixed, except in its own turn."""

    spec: AdversarialSpec
    discriminator: Discriminator
    optimizer: torch.optim.AdamW
    discriminator_start: int  # the first optimiser step that it learns in
    generator_start: int  # the first that the decoder hears of it in

    def generator_loss(self, learner: Learner, images: Tensor, part: Part) -> Tensor:
        """Minus the mean score of reconstructions around [0, 1], augmented by draws of their own; a scalar."""
        draws = part.draws(learner.recipe.seed, "augment generated")
        augmented = diff_augment(images * 2 - 1, draws, cutout=self.spec.cutout)
        with learner.autocast():
            scores = self.discriminator(augmented)
        return generator_loss(scores)

    def turn(self, learner: Learner, parts: list[Part]) -> Tensor:
        """Leave the gradient of the whole batch's hinge loss in the heads; this rank's mean loss, a scalar.

        The frozen tokens of all micro-batches are gathered first and each head sees them at once, real and fake
        together: a batch norm's statistics are those of the large batch, and of all ranks. Head by head, so that one
        head's graph alone is in memory. Gradients are averaged over ranks in one all-reduce: several backwards in a
        step are what DDP's wrapper cannot take.
        """
        self.discriminator.iterate()
        tokens = [self.tokens(learner, part) for part in parts]
        total = torch.zeros((), device=learner.ranks.device)
        heads = self.discriminator.heads.train()
        for index, head in enumerate(heads):
            real = torch.cat([of_part[0][index] for of_part in tokens])
            fake = torch.cat([of_part[1][index] for of_part in tokens])
            with learner.autocast():
                scores = head(torch.cat([real, fake]))
            loss = hinge_loss(*scores.tensor_split(2)) / len(heads)
            loss.backward()
            total += loss.detach()
        heads.eval()
        average_gradients(self.parameters(), learner.ranks)
        return total

    @torch.no_grad()
    def tokens(self, learner: Learner, part: Part) -> tuple[list[Tensor], list[Tensor]]:
        """What the heads see of the images and of their reconstructions, each augmented by its own draws.

        The reconstructions are fresh: without latent noise, clamped, and rounded to 8 bits as they would be saved.
        """
        fakes = learner.decode(part.latents, learner.model).clamp(0, 1).mul(255).round().div(255)
        pair = []
        for images, purpose in ((part.targets, "augment real"), (fakes, "augment fake")):
            draws = part.draws(learner.recipe.seed, purpose)
            with learner.autocast():
                pair.append(self.discriminator.backbone(diff_augment(images * 2 - 1, draws, cutout=self.spec.cutout)))
        return pair[0], pair[1]

    def parameters(self) -> list[torch.nn.Parameter]:
        """What is trained of it."""
        return list(self.discriminator.heads.parameters())

    def set_rate(self, step: int, total: int, samples: int, batch_size: int) -> float:
        """Give its optimiser the rate of a step: its schedule runs from its own first step to the run's end."""
        start = self.discriminator_start
        spec = self.spec
        rate = scheduled_rate(max(0, step - start), total - start, samples, batch_size, spec.optimizer, spec.schedule)
        set_learning_rate(self.optimizer, rate)
        return rate

    def tensors(self, run: Path) -> dict[str, Tensor]:
        """What a checkpoint keeps: heads, spectral norms' vectors, batch norms' statistics, the optimiser's moments."""
        weights = {f"{WEIGHTS}{name}": value for name, value in self.discriminator.heads.state_dict().items()}
        check_finite(weights, run)
        moments = optimizer_tensors(self.discriminator.heads, self.optimizer)
        return weights | {f"{MOMENTS}{name}": value for name, value in moments.items()}

    def load(self, tensors: dict[str, Tensor]) -> None:
        """Go on from what a checkpoint keeps."""
        heads = self.discriminator.heads
        heads.load_state_dict(within(tensors, WEIGHTS))
        load_optimizer(heads, self.optimizer, within(tensors, MOMENTS))


def adversary_of(recipe: TrainDecoderRecipe, samples: int, ranks: Ranks) -> Adversary | None:
    """The adversary that a recipe tells of, fresh from its seed, on the device. None: it tells of none."""
    spec = recipe.adversarial
    if spec is None:
        return None
    backbone = load_backbone(find_backbone(spec.backbone))
    torch.manual_seed(recipe.seed + 1)  # another stream than the decoder's
    discriminator = Discriminator(backbone, norm=spec.discriminator_norm).to(ranks.device)
    discriminator.heads.eval()
    told = spec.optimizer
    optimizer = make_optimizer(
        discriminator.heads, learning_rate=told.learning_rate, betas=told.betas, weight_decay=told.weight_decay
    )
    starts = [
        duration_in_steps(s, samples, recipe.batch_size) for s in (spec.discriminator_start, spec.generator_start)
    ]
    return Adversary(spec, discriminator, optimizer, *starts)


def within(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The tensors under a prefix, without it."""
    return {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}


def average_gradients(parameters: list[torch.nn.Parameter], ranks: Ranks) -> None:
    """Replace gradients by their means over ranks, in one all-reduce."""
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    if ranks.world > 1:
        flat = ranks.sum(torch.cat([gradient.flatten() for gradient in gradients])) / ranks.world
        pieces = flat.split([gradient.numel() for gradient in gradients])
        torch._foreach_copy_(
            gradients, [piece.view_as(gradient) for piece, gradient in zip(pieces, gradients, strict=True)]
        )
