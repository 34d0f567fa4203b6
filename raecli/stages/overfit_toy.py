"""Theorem 1 on one latent: a diffusion transformer for each width, its loss beside its bound. Sec. 4.1, App. G.

Reads nothing: the latent is drawn. Writes OUT/report.json, and OUT/figure.png where matplotlib is installed.
"""

import json
import math
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from raecli.errors import ExitCode, NonFiniteError, RaeError
from raecli.flow.bound import certificate, tail_bound, unremoved_noise, width_bound
from raecli.flow.path import flow_loss, noisy_latents
from raecli.flow.sampler import sample
from raecli.flow.time import training_time
from raecli.models.dit import DiT, DiTDH, parameter_count
from raecli.recipe.recipes import OverfitToyRecipe
from raecli.store.atomic import atomic_file, write_json
from raecli.training.distributed import Ranks

LATENT = "a synthetic token map (LayerNorm of Gaussian noise); the bound does not depend on the latent"
NEAR = 0.06  # excess of a trained model; .048 is the most seen, at d = n = 64, the slowest case
SAMPLES = 64  # generated latents a job
CURVE_POINTS = 100
WIDE = 384  # from here the matrix products of a step are worth more than one thread
ERRORS_ALLOWED = 4  # standard errors: by chance 1 mean in 30,000 lies further below its expectation
ROUNDING = 1e-6  # of the certificate: a float32 layer in float64 algebra


@dataclass(frozen=True)
class Job:
    """One model to train. Different seeds have different latents, weights and noise."""

    width: int
    depth: int
    seed: int


@dataclass(frozen=True)
class Row:
    """What was found for one job. Losses and errors are a channel's mean square."""

    width: int
    depth: int
    seed: int
    output_width: int  # d, what the bound knows of the model: the head's width where there is a head
    bound: float  # (n - d) / n
    tail_bound: float  # the sharper one, for many tokens
    certificate: float  # the floor under this trained output layer
    loss: float  # of fresh draws after training
    standard_error: float
    excess: float  # loss - bound
    sample_error: float  # mean ||z_0 - x||^2 / n
    unremoved_noise: float  # the part of it outside the output layer's reach
    verdict: str
    parameters: int
    seconds: float
    training_curve: list[tuple[int, float]]  # (step, mean training loss since the last point): never held to the bound


def run(recipe: OverfitToyRecipe, ranks: Ranks) -> None:
    """Train every (width, depth, seed), jobs dealt out to ranks in turn; report, draw, and check the theorem."""
    folder = Path(recipe.output)
    folder.mkdir(parents=True, exist_ok=True)
    limit_threads(recipe)
    screen = sys.stderr if recipe.print_json else sys.stdout
    if ranks.is_main:
        print(heading(recipe), file=screen, flush=True)
    ranks.barrier()
    rows = []
    for job in jobs_of(recipe)[ranks.rank :: ranks.world]:
        rows.append(measure(job, recipe, ranks))
        print(table_line(rows[-1]), file=screen, flush=True)
    rows = sorted(
        (row for part in ranks.gather(rows) for row in part), key=lambda row: (row.depth, row.width, row.seed)
    )
    if ranks.is_main:
        report = {"latent": LATENT, "breaches": breaches(rows), "rows": [asdict(row) for row in rows]}
        report |= {"torch": torch.__version__, "device": ranks.device.type, "recipe": recipe.to_dict()}
        write_json(folder / "report.json", report)
        figure = draw_figure(rows, recipe, folder / "figure.png")
        print(f"report: {folder / 'report.json'}{figure}", file=screen, flush=True)
        if recipe.print_json:
            print(json.dumps(report, indent=2), flush=True)
        check(rows)


def limit_threads(recipe: OverfitToyRecipe) -> None:
    """One CPU thread for narrow models: more would only wait for one another."""
    if max(recipe.widths) < WIDE and (not recipe.head or recipe.head[0] < WIDE):
        torch.set_num_threads(1)


def jobs_of(recipe: OverfitToyRecipe) -> list[Job]:
    """All jobs, narrow and shallow ones first."""
    return [Job(width, depth, seed) for depth in recipe.depths for width in recipe.widths for seed in recipe.seeds]


def measure(job: Job, recipe: OverfitToyRecipe, ranks: Ranks) -> Row:
    """Train one model on one latent, then judge it by fresh draws, by its output layer, and by what it generates."""
    started = time.monotonic()
    latents = make_latents(recipe, job.seed).to(ranks.device)  # [1, n, side, side]
    model = build_model(job, recipe).to(ranks.device)
    curve = train(model, latents, job, recipe, show=ranks.is_main)
    losses = evaluate(model, latents, job, recipe)
    samples = generate(model, latents, job, recipe)
    tokens = tokens_of(latents)[0].cpu()  # [N, n]
    weight, bias = model.final.linear.weight.cpu(), model.final.linear.bias.cpu()
    output_width = recipe.head[0] if recipe.head else job.width
    bound, floor = width_bound(recipe.channels, output_width), tail_bound(tokens, output_width)
    loss, error = float(losses.mean()), float(losses.std() / math.sqrt(len(losses)))
    return Row(
        **asdict(job),
        output_width=output_width,
        bound=bound,
        tail_bound=floor,
        certificate=certificate(weight, bias, tokens),
        loss=loss,
        standard_error=error,
        excess=loss - bound,
        sample_error=float((samples.double() - tokens.double()).square().mean()),
        unremoved_noise=unremoved_noise(weight, tokens, samples),
        verdict=verdict_of(floor, loss),
        parameters=parameter_count(model),
        seconds=round(time.monotonic() - started, 2),
        training_curve=curve,
    )


def generator_of(seed: int, purpose: str, device: torch.device) -> torch.Generator:
    """A stream of its own for each (seed, purpose): the same for all widths, so they differ by width alone."""
    purposes = ["latent", "weights", "training", "evaluation", "sampling"]
    return torch.Generator(device).manual_seed(seed * len(purposes) + purposes.index(purpose))


def make_latents(recipe: OverfitToyRecipe, seed: int) -> Tensor:
    """One latent to overfit, float32 [1, n, side, side]: tokens of mean 0, variance 1, as an encoder's."""
    side = math.isqrt(recipe.tokens)
    noise = torch.randn(1, recipe.tokens, recipe.channels, generator=generator_of(seed, "latent", torch.device("cpu")))
    tokens = nn.functional.layer_norm(noise, (recipe.channels,))
    return tokens.transpose(1, 2).unflatten(2, (side, side)).contiguous()


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
        "in_channels": recipe.channels,
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
def evaluate(model: nn.Module, latents: Tensor, job: Job, recipe: OverfitToyRecipe) -> Tensor:
    """Losses of draws the model was not trained on, float64 [evaluation_draws or a few more]."""
    size = min(recipe.evaluation_draws, 4 * recipe.batch_size)
    count = math.ceil(recipe.evaluation_draws / size)
    batches = draws(latents, count, size, "evaluation", job, recipe.time_shift)
    return torch.cat([losses_at(model, latents, t, noise).double().cpu() for t, noise in batches])


def generate(model: nn.Module, latents: Tensor, job: Job, recipe: OverfitToyRecipe) -> Tensor:
    """Latents solved from noise by Euler's method, as tokens [SAMPLES, N, n] on the CPU."""
    generator = generator_of(job.seed, "sampling", latents.device)
    noise = torch.randn(SAMPLES, *latents.shape[1:], generator=generator, device=latents.device)
    labels = torch.zeros(SAMPLES, dtype=torch.long, device=latents.device)
    return tokens_of(sample(model, noise, labels, steps=recipe.sample_steps, time_shift=recipe.time_shift)).cpu()


def verdict_of(floor: float, loss: float) -> str:
    """What the reader may conclude."""
    if loss - floor > NEAR:
        return "not converged yet"
    return "cannot be trained away" if floor > 0 else "converged"


def breaches(rows: list[Row]) -> list[str]:
    """Rows that contradict the theorem, each with its evidence: our bug, if there is one."""
    found = []
    for row in rows:
        who = f"width {row.width} (output {row.output_width}), depth {row.depth}, seed {row.seed}"
        if not row.certificate >= row.tail_bound - ROUNDING:
            found.append(f"{who}: certificate {row.certificate:.9f} is below the bound {row.tail_bound:.9f}")
        if not row.loss + ERRORS_ALLOWED * row.standard_error >= row.tail_bound:
            loss = f"{row.loss:.6f} +- {row.standard_error:.6f}"
            found.append(f"{who}: loss {loss} is over {ERRORS_ALLOWED} s.e. below the bound {row.tail_bound:.6f}")
    return found


def check(rows: list[Row]) -> None:
    """Fail, as a bug, where the theorem is contradicted."""
    found = breaches(rows)
    if found:
        error = RaeError(
            "\n  ".join(["Theorem 1 is contradicted, so this program has a bug; please report it", *found])
        )
        error.exit_code = ExitCode.BUG
        raise error


COLUMNS = ("width", "depth", "seed", "d", "bound", "certificate", "loss +- s.e.", "excess", "sample error", "verdict")
SIZES = (5, 5, 4, 4, 7, 11, 18, 7, 12, 0)


def heading(recipe: OverfitToyRecipe) -> str:
    """What is shown, and the table's first line."""
    return "\n".join(
        [
            f"Theorem 1 on one latent of {recipe.tokens} tokens, n = {recipe.channels} channels: {LATENT}",
            "d: width of the output layer; bound: (n - d)/n; certificate: the floor under the trained output layer;",
            f"loss: mean of {recipe.evaluation_draws} fresh draws after training; "
            f"sample error: of {SAMPLES} samples by {recipe.sample_steps} Euler steps",
            "",
            aligned(COLUMNS),
        ]
    )


def table_line(row: Row) -> str:
    """One row of the table."""
    loss = f"{row.loss:.4f} +- {row.standard_error:.5f}"
    numbers = [f"{row.bound:.4f}", f"{row.certificate:.4f}", loss, f"{row.excess:.4f}", f"{row.sample_error:.4f}"]
    sizes = [str(value) for value in (row.width, row.depth, row.seed, row.output_width)]
    return aligned((*sizes, *numbers, row.verdict))


def aligned(cells: tuple[str, ...]) -> str:
    """Cells to the right of their columns."""
    return "  ".join(cell.rjust(size) for cell, size in zip(cells, SIZES, strict=True))


def draw_figure(rows: list[Row], recipe: OverfitToyRecipe, path: Path) -> str:
    """Loss against width beside the bound, and training curves, as the paper's Figure 3. Returns what to say of it."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return "; no figure: matplotlib is missing (pip install 'raecli[plots]')"
    figure = Figure(figsize=(12, 4.8), layout="constrained")
    left, right = figure.subplots(1, 2)
    plot_losses(left, rows, recipe)
    plot_curves(right, rows)
    head = f", head of width {recipe.head[0]} and depth {recipe.head[1]}" if recipe.head else ""
    sizes = f"n = {recipe.channels}, {recipe.tokens} tokens, {recipe.steps} steps{head}"
    figure.suptitle(f"Theorem 1 on one latent: {sizes}")
    with atomic_file(path) as scratch:
        figure.savefig(scratch, dpi=120, format="png")
    return f", figure: {path}"


def plot_losses(axis: Any, rows: list[Row], recipe: OverfitToyRecipe) -> None:
    """Loss against width on a log axis, where a bound of 0 has no place: it falls off the axis at d = n."""
    lowest, highest = min(row.loss for row in rows) / 2, max(2.0, *(row.loss * 1.5 for row in rows))
    for number, depth in enumerate(sorted({row.depth for row in rows})):
        of_depth = [row for row in rows if row.depth == depth]
        axis.errorbar(
            [row.width for row in of_depth],
            [row.loss for row in of_depth],
            yerr=[ERRORS_ALLOWED * row.standard_error for row in of_depth],
            fmt=f"C{number}o",
            capsize=3,
            label=f"loss +- {ERRORS_ALLOWED} s.e., depth {depth}",
        )
    certified = [row for row in rows if row.certificate > 0]
    points = [row.width for row in certified], [row.certificate for row in certified]
    axis.plot(*points, "kx", label="certificate of the trained output layer")
    widths = sorted({row.width for row in rows})
    margin = (widths[-1] - widths[0]) / 12 or widths[0] / 4
    begin, end = widths[0] - margin, widths[-1] + margin
    line = [begin + (end - begin) * k / 1000 for k in range(1001)]
    bounds = [max(lowest / 10, rows[0].bound if recipe.head else 1 - width / recipe.channels) for width in line]
    axis.plot(line, bounds, "k--", label=f"bound (n - d)/n; n = {recipe.channels}")
    axis.fill_between(line, bounds, lowest / 10, color="0.9", label="out of reach")
    axis.set(yscale="log", xlim=(begin, end), ylim=(lowest, highest), xticks=widths)
    axis.set(xlabel="width" + (" of the backbone" if recipe.head else " d"), ylabel="mean squared error, fresh draws")
    axis.legend(fontsize="small", loc="upper right")


def plot_curves(axis: Any, rows: list[Row]) -> None:
    """Training losses over steps, window means, each with its bound in its colour."""
    for number, row in enumerate(rows):
        name = f"width {row.width}, depth {row.depth}" + (f", seed {row.seed}" if row.seed else "")
        axis.plot(*zip(*row.training_curve, strict=True), color=f"C{number % 10}", linewidth=1, label=name)
        if row.bound > 0:
            axis.axhline(row.bound, color=f"C{number % 10}", linewidth=0.8, linestyle="--")
    axis.set(yscale="log", xlabel="step", ylabel="training loss (window mean); dashed: bound")
    axis.legend(fontsize="small", ncols=1 + len(rows) // 8, loc="best")
