"""What the log costs: CPU-s of a step's share of the meter / CPU-s of the digits' training step. One JSON line.

Both sides run alternately in one process, in blocks of `log_every` steps, so that a block holds one line of
metrics.jsonl. A step of the digits takes about a tenth of a second here; one of a large model on a GPU takes more.
"""

import argparse
import json
import statistics
import tempfile
import time

import torch

from raecli.models.build import diffusion_of
from raecli.recipe.load import load_recipe
from raecli.recipe.recipes import TrainDiffusionRecipe
from raecli.training.distributed import Ranks
from raecli.training.ema import Ema
from raecli.training.meter import Meter
from raecli.training.optimizer import clip_gradients, optimizer_of

LOG_EVERY, BATCH = 50, 64


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--tensorboard", action="store_true")
    parser.add_argument("--device", default="cpu")
    arguments = parser.parse_args()
    device = torch.device(arguments.device)
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        sizes = ("model.in_channels=32", "model.input_size=4", "model.num_classes=10", f"log_every={LOG_EVERY}")
        tracking = f"tracking.tensorboard={str(arguments.tensorboard).lower()}"
        recipe = load_recipe(TrainDiffusionRecipe, "digits/diffusion", [*sizes, tracking, f"output={folder}"])
        step = training_step(recipe, device)
        logged, trained = [], []
        ranks = Ranks(0, 1, device)
        with Meter(recipe, ranks, first_step=0, total_steps=10**6, samples=1437, training_flops=1e9) as meter:
            for turn in range(arguments.rounds + 1):
                trained.append(cpu_seconds(lambda _: step()))
                steps = meter.timed(range(turn * LOG_EVERY + 1, (turn + 1) * LOG_EVERY + 1))
                logged.append(cpu_seconds(lambda _, steps=steps: record(meter, next(steps), device)))
    ours, theirs = statistics.median(logged[1:]), statistics.median(trained[1:])  # the first turn warms up
    line = {"what": "log", "tensorboard": arguments.tensorboard, "log_us_a_step": 1e6 * ours}
    print(json.dumps({**line, "train_us_a_step": 1e6 * theirs, "share": ours / theirs}))


def cpu_seconds(work) -> float:
    """CPU seconds of one of `LOG_EVERY` steps."""
    begin = time.process_time()
    for index in range(LOG_EVERY):
        work(index)
    return (time.process_time() - begin) / LOG_EVERY


def record(meter: Meter, step: int, device: torch.device) -> None:
    """What the loop does for the log at every step."""
    losses = {name: torch.zeros((), device=device) for name in ("loss", "gradient_norm")}
    meter.record(step, losses, {"learning_rate": 1e-4})


def training_step(recipe: TrainDiffusionRecipe, device: torch.device):
    """A step of the digits' model on random latents."""
    model = diffusion_of(recipe.model).to(device)
    optimizer, ema = optimizer_of(model, recipe), Ema(model, 0.99)
    noisy, t = torch.randn(BATCH, 32, 4, 4, device=device), torch.rand(BATCH, device=device)
    labels = torch.randint(10, (BATCH,), device=device)

    def step() -> None:
        model(noisy, t, labels).square().mean().backward()
        clip_gradients(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        ema.update(0)

    return step


if __name__ == "__main__":
    main()
