"""Theorem 1 on one latent: a diffusion transformer for each width, its loss beside its bound. Sec. 4.1, App. G.

Reads images (or draws tokens); writes OUT/report.json, and where matplotlib is installed OUT/figure.png,
OUT/samples.png, and OUT/depth.png of several depths.
"""

import json
import math
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from raecli.data.preprocess import center_square
from raecli.errors import InputError, NonFiniteError
from raecli.evaluation.toy import (
    COLUMNS,
    TIME_EDGES,
    Row,
    aligned,
    breaches,
    check,
    grid_lines,
    mean_lines,
    means,
    table_line,
    verdict_of,
)
from raecli.evaluation.toy_figures import Generated, draw_figures
from raecli.flow.bound import certificate, tail_bound, unremoved_noise, width_bound
from raecli.flow.path import flow_loss, noisy_latents
from raecli.flow.sampler import sample
from raecli.flow.time import training_time
from raecli.models.autoencoder import Autoencoder
from raecli.models.build import encoder_of
from raecli.models.dit import DiT, DiTDH, parameter_count
from raecli.models.load import load_autoencoder
from raecli.models.random_encoder import random_encoder
from raecli.recipe.recipes import OverfitToyRecipe
from raecli.store.atomic import write_json
from raecli.training.distributed import Ranks

SAMPLES = 64  # generated latents a job
SHOWN = 3  # of them in the picture
CURVE_POINTS = 100
WIDE = 384  # from here the matrix products of a step are worth more than one thread


@dataclass(frozen=True)
class Job:
    """One model to train. Different seeds have different weights, noise, and random encoders."""

    width: int
    depth: int
    channels: int
    image: str | None
    seed: int


def run(recipe: OverfitToyRecipe, ranks: Ranks) -> None:
    """Train every (channels, depth, width, image, seed), dealt out to ranks; report, draw, and check the theorem."""
    folder = Path(recipe.output)
    folder.mkdir(parents=True, exist_ok=True)
    limit_threads(recipe)
    screen = sys.stderr if recipe.print_json else sys.stdout
    if ranks.is_main:
        print(heading(recipe), file=screen, flush=True)
    ranks.barrier()
    found = []
    for job in jobs_of(recipe)[ranks.rank :: ranks.world]:
        found.append(measure(job, recipe, ranks))
        print(table_line(found[-1][0], number_of(job, recipe), alike(recipe)), file=screen, flush=True)
    found = in_order([pair for part in ranks.gather(found) for pair in part], jobs_of(recipe))
    if ranks.is_main:
        rows = [row for row, _ in found]
        for line in [*mean_lines(rows), *(grid_lines(rows) if recipe.grid else [])]:
            print(line, file=screen)
        report = write_report(rows, recipe, ranks.device)
        drawn = draw_figures(rows, [generated for _, generated in found if generated], recipe.head, folder)
        print(f"report: {folder / 'report.json'}{drawn}", file=screen, flush=True)
        if recipe.print_json:
            print(json.dumps(report, indent=2), flush=True)
        check(rows)


def write_report(rows: list[Row], recipe: OverfitToyRecipe, device: torch.device) -> dict[str, Any]:
    """report.json: what was overfitted, every row, their means, and what contradicts the theorem."""
    report = {"latent": latent_in_words(recipe), "breaches": breaches(rows), "means": means(rows)}
    report |= {"rows": [asdict(row) for row in rows], "time_edges": TIME_EDGES}
    report |= {"torch": torch.__version__, "device": device.type, "recipe": recipe.to_dict()}
    write_json(Path(recipe.output) / "report.json", report)
    return report


def limit_threads(recipe: OverfitToyRecipe) -> None:
    """One CPU thread for narrow models: more would only wait for one another."""
    if max(recipe.widths) < WIDE and (not recipe.head or recipe.head[0] < WIDE):
        torch.set_num_threads(1)


def jobs_of(recipe: OverfitToyRecipe) -> list[Job]:
    """All jobs, narrow and shallow ones first."""
    return [
        Job(width, depth, channels, image, seed)
        for channels in recipe.channels
        for depth in recipe.depths
        for width in recipe.widths
        for image in recipe.images or (None,)
        for seed in recipe.seeds
    ]


def number_of(job: Job, recipe: OverfitToyRecipe) -> int:
    """Which image of the recipe's, from 1; 0: none."""
    return recipe.images.index(job.image) + 1 if job.image else 0


def in_order(found: list[tuple[Row, Generated | None]], jobs: list[Job]) -> list[tuple[Row, Generated | None]]:
    """What all ranks found, in the order of the jobs."""
    place = {job: number for number, job in enumerate(jobs)}
    return sorted(found, key=lambda pair: place[Job(*(getattr(pair[0], name) for name in Job.__dataclass_fields__))])


def measure(job: Job, recipe: OverfitToyRecipe, ranks: Ranks) -> tuple[Row, Generated | None]:
    """Train one model on one latent, then judge it by fresh draws, by its output layer, and by what it generates.

    Also what the picture shows of it: one model for each size.
    """
    started = time.monotonic()
    latents = make_latents(job, recipe).to(ranks.device)  # [1, n, side, side]
    model = build_model(job, recipe).to(ranks.device)
    curve = train(model, latents, job, recipe, show=ranks.is_main)
    losses, times = evaluate(model, latents, job, recipe)
    samples = generate(model, latents, job, recipe)
    tokens = tokens_of(latents)[0].cpu()  # [N, n]
    weight, bias = model.final.linear.weight.cpu(), model.final.linear.bias.cpu()
    output_width = recipe.head[0] if recipe.head else job.width
    bound, floor = width_bound(job.channels, output_width), tail_bound(tokens, output_width)
    loss, error = float(losses.mean()), float(losses.std() / math.sqrt(len(losses)))
    row = Row(
        **asdict(job),
        output_width=output_width,
        bound=bound,
        tail_bound=floor,
        certificate=certificate(weight, bias, tokens),
        loss=loss,
        standard_error=error,
        excess=loss - bound,
        loss_by_time=by_time(losses, times),
        sample_error=float((samples.double() - tokens.double()).square().mean()),
        unremoved_noise=unremoved_noise(weight, tokens, samples),
        verdict=verdict_of(floor, loss),
        parameters=parameter_count(model),
        seconds=round(time.monotonic() - started, 2),
        training_curve=curve,
    )
    first = job.image in (None, *recipe.images[:1]) and job.seed == recipe.seeds[0]
    return row, picture_of(row, tokens, samples[:SHOWN], recipe) if first else None


def generator_of(seed: int, purpose: str, device: torch.device) -> torch.Generator:
    """A stream of its own for each (seed, purpose): the same for all widths, so they differ by width alone."""
    purposes = ["latent", "weights", "training", "evaluation", "sampling"]
    return torch.Generator(device).manual_seed(seed * len(purposes) + purposes.index(purpose))


def make_latents(job: Job, recipe: OverfitToyRecipe) -> Tensor:
    """The latent to overfit, float32 [1, n, side, side], tokens of mean 0 and variance 1 but for an autoencoder's."""
    side = math.isqrt(recipe.tokens)
    generator = generator_of(job.seed, "latent", torch.device("cpu"))
    if job.image is None:
        noise = torch.randn(1, recipe.tokens, job.channels, generator=generator)
        tokens = nn.functional.layer_norm(noise, (job.channels,))
        return tokens.transpose(1, 2).unflatten(2, (side, side)).contiguous()
    image = read_image(job.image, recipe.image_size)
    if recipe.autoencoder:
        latents = autoencoder_at(recipe.autoencoder).encode(image)
    else:
        with torch.no_grad():
            encoder = encoder_of(recipe.encoder) if recipe.encoder else None
            encoder = encoder or random_encoder(job.channels, tokens_side=side, seed=generator.initial_seed())
            latents = encoder(image)
    if latents.shape != (1, job.channels, side, side):
        raise InputError(f"{job.image}: latents are {tuple(latents.shape)}, expected {(1, job.channels, side, side)}")
    return latents.clone()  # out of inference mode


def read_image(path: str, size: int) -> Tensor:
    """An image's centre crop, float [1, 3, size, size] in [0, 1]."""
    pixels = center_square(Path(path).read_bytes(), path, size)
    return torch.from_numpy(pixels.copy()).permute(2, 0, 1)[None].float() / 255


@cache
def autoencoder_at(path: str) -> Autoencoder:
    """The autoencoder, loaded once for all jobs."""
    return load_autoencoder(path)


def picture_of(row: Row, tokens: Tensor, samples: Tensor, recipe: OverfitToyRecipe) -> Generated:
    """What the picture shows of a model: the target [N, n] and samples [SHOWN, N, n], decoded where we can."""
    if not recipe.autoencoder:
        return Generated(row, tokens, samples, None)
    side = math.isqrt(recipe.tokens)
    maps = torch.cat([tokens[None], samples]).transpose(1, 2).unflatten(2, (side, side))
    return Generated(row, tokens, samples, autoencoder_at(recipe.autoencoder).decode(maps.float()))


def latent_in_words(recipe: OverfitToyRecipe) -> str:
    """What is overfitted, for table and report."""
    if not recipe.images:
        return "tokens drawn at random (LayerNorm of Gaussian noise), no image; the bound does not depend on the latent"
    images = ", ".join(f"{number}: {path}" for number, path in enumerate(recipe.images, start=1))
    if recipe.autoencoder:
        how = f"normalised latents of the autoencoder {recipe.autoencoder}"
    elif recipe.encoder:
        how = f"by the encoder {recipe.encoder.name}"
    else:
        how = "by a vision transformer of DINOv2's layout with random weights (no trained ones were named: --encoder)"
    return f"image {images}; centre crop of {recipe.image_size} x {recipe.image_size} pixels, {how}"


def tokens_of(latents: Tensor) -> Tensor:
    """[B, n, side, side] -> [B, N, n]."""
    return latents.flatten(2).transpose(1, 2)


def heads_of(width: int, at_most: int | None) -> int:
    """Attention heads: width / 64 or the preset's, or the next lower number that leaves each 4, 8, 12 ... channels."""
    heads = at_most or max(1, width // 64)
    while width % (4 * heads):
        heads -= 1
    return heads


def build_model(job: Job, recipe: OverfitToyRecipe) -> DiT | DiTDH:
    """The transformer of a job, its weights drawn on the CPU from the job's seed."""
    sizes: dict[str, int] = {
        "in_channels": job.channels,
        "input_size": math.isqrt(recipe.tokens),
        "width": job.width,
        "depth": job.depth,
        "heads": heads_of(job.width, recipe.heads),
        "num_classes": 1,
    }
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(generator_of(job.seed, "weights", torch.device("cpu")).initial_seed())
        if recipe.head is None:
            return DiT(**sizes)
        width, depth = recipe.head
        return DiTDH(**sizes, head_width=width, head_depth=depth, head_heads=heads_of(width, recipe.heads))


def draws(
    latents: Tensor, count: int, size: int, purpose: str, job: Job, shift: float
) -> Iterator[tuple[Tensor, Tensor]]:
    """`count` batches of fresh (t [size], noise [size, n, side, side]); logit-normal time, App. F."""
    generator = generator_of(job.seed, purpose, latents.device)
    for _ in range(count):
        uniform = torch.rand(size, generator=generator, device=latents.device)
        noise = torch.randn(size, *latents.shape[1:], generator=generator, device=latents.device)
        t = training_time(uniform, distribution="logit_normal", mean=0.0, std=1.0, maximum=1.0, time_shift=shift)
        yield t, noise


def losses_at(model: nn.Module, latents: Tensor, t: Tensor, noise: Tensor) -> Tensor:
    """The flow's loss of each draw, [B]."""
    targets = latents.expand_as(noise)
    labels = torch.zeros(len(t), dtype=torch.long, device=t.device)
    return flow_loss(model(noisy_latents(targets, noise, t), t, labels), targets, noise)


def train(
    model: nn.Module, latents: Tensor, job: Job, recipe: OverfitToyRecipe, *, show: bool
) -> list[tuple[int, float]]:
    """App. G: AdamW, betas (.9, .95), no weight decay, no EMA. Returns the training curve."""
    # Fused: a third of a narrow model's step is else the optimiser's many small calls.
    optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.95), weight_decay=0.0, fused=True)
    every, curve, since = max(1, recipe.steps // CURVE_POINTS), [], latents.new_zeros(())
    batches = draws(latents, recipe.steps, recipe.batch_size, "training", job, recipe.time_shift)
    label = f"width {job.width}, depth {job.depth}"
    steps = tqdm(batches, label, recipe.steps, leave=False, disable=None if show else True)  # None: if no terminal
    for step, (t, noise) in enumerate(steps, start=1):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step - 1, recipe)
        loss = losses_at(model, latents, t, noise).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        since += loss.detach()
        if step % every == 0:
            curve.append((step, float(since) / every))
            since.zero_()
            if not math.isfinite(curve[-1][1]):
                raise NonFiniteError(f"{label}, seed {job.seed}: the loss is {curve[-1][1]} by step {step}")
    return curve


def learning_rate(step: int, recipe: OverfitToyRecipe) -> float:
    """Constant, or linear from the first to the final rate."""
    if recipe.final_learning_rate is None:
        return recipe.learning_rate
    return recipe.learning_rate + (recipe.final_learning_rate - recipe.learning_rate) * step / recipe.steps


@torch.inference_mode()
def evaluate(model: nn.Module, latents: Tensor, job: Job, recipe: OverfitToyRecipe) -> tuple[Tensor, Tensor]:
    """Losses of draws the model was not trained on, and their times: float64 [evaluation_draws or a few more]."""
    size = min(recipe.evaluation_draws, 4 * recipe.batch_size)
    count = math.ceil(recipe.evaluation_draws / size)
    batches = draws(latents, count, size, "evaluation", job, recipe.time_shift)
    found = [(losses_at(model, latents, t, noise).double().cpu(), t.double().cpu()) for t, noise in batches]
    return torch.cat([losses for losses, _ in found]), torch.cat([times for _, times in found])


def by_time(losses: Tensor, times: Tensor) -> list[float | None]:
    """Mean loss of the draws in each bin of time; None: no draw fell there."""
    bins = torch.bucketize(times, torch.tensor(TIME_EDGES, dtype=times.dtype))
    means = (losses[bins == number].mean() for number in range(len(TIME_EDGES) + 1))
    return [None if math.isnan(mean) else float(mean) for mean in means]


def generate(model: nn.Module, latents: Tensor, job: Job, recipe: OverfitToyRecipe) -> Tensor:
    """Latents solved from noise by Euler's method, as tokens [SAMPLES, N, n] on the CPU."""
    generator = generator_of(job.seed, "sampling", latents.device)
    noise = torch.randn(SAMPLES, *latents.shape[1:], generator=generator, device=latents.device)
    labels = torch.zeros(SAMPLES, dtype=torch.long, device=latents.device)
    return tokens_of(sample(model, noise, labels, steps=recipe.sample_steps, time_shift=recipe.time_shift)).cpu()


def alike(recipe: OverfitToyRecipe) -> frozenset[str]:
    """Columns of the table that would be the same in every row, or, without a head, d the same as width."""
    told = {"depth": recipe.depths, "n": recipe.channels, "image": recipe.images, "seed": recipe.seeds}
    return frozenset(
        {name for name, values in told.items() if len(values) < 2} | ({"d"} if recipe.head is None else set())
    )


def heading(recipe: OverfitToyRecipe) -> str:
    """What is shown, and the table's first line."""
    channels = ", ".join(str(n) for n in recipe.channels)
    depths = ", ".join(str(depth) for depth in recipe.depths)
    same = ", which is the model's" if recipe.head is None else ""
    return "\n".join(
        [
            f"Theorem 1 on one latent of {recipe.tokens} tokens, n = {channels} channels; blocks: {depths}",
            f"latent: {latent_in_words(recipe)}",
            f"d: width of the output layer{same}; bound: (n - d)/n;",
            f"certificate: the floor under the trained output layer; loss: mean of {recipe.evaluation_draws} draws",
            f"after training, all fresh; sample error: of {SAMPLES} samples by {recipe.sample_steps} Euler steps",
            "",
            aligned(COLUMNS, alike(recipe)),
        ]
    )
