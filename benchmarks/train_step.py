"""PERFORMANCE rows 6 and 7: our train step over the authors' released one, same weights, same batch, alternated.

A step is forward, backward, clip, AdamW and the average; ours also normalises the latents and draws its noise by key.
Row 6 is the whole step: CPU seconds, or on a GPU wall milliseconds with images/s and MFU (matrix products as executed).
Row 7 is the step less its matrix products (linear layers and attention, forward and backward): the seconds inside them
are timed in eager steps of both sides, on a GPU by torch.profiler, and taken from each side's whole step. Compiled
or not, the products are the same.
One JSON line a row.

On a GPU: python benchmarks/train_step.py --model dith_xl --device cuda --peer ../RAE --batch 32 --compile
On a CPU: python benchmarks/train_step.py --model dith_s --batch 4 --peer ../RAE model.depth=4 [--compile]
"""

import argparse
import copy
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from released import largest_difference, released_code, released_model
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode

from raecli.models.build import diffusion_of
from raecli.models.flops import diffusion_macs
from raecli.plan import ASSUMED
from raecli.recipe.load import load_recipe
from raecli.recipe.recipes import TrainDiffusionRecipe
from raecli.recipe.shipped import find_recipe
from raecli.stages.train_diffusion import Batch, State, compile_blocks, train_step
from raecli.store.statistics import LatentStatistics
from raecli.training.distributed import Ranks
from raecli.training.ema import Ema
from raecli.training.optimizer import optimizer_of

PRODUCTS = ("mm", "convolution", "attention", "linear_product")  # mm: addmm, bmm too


def resolved_recipe(name: str, overrides: list[str], batch: int, device: str) -> TrainDiffusionRecipe:
    """A shipped recipe for latents of DINOv2-B at 256 pixels; bf16 autocast on a GPU, fp32 on a CPU."""
    told = [f"model.{key}={value}" for key, value in ASSUMED.items()]
    precision = "bf16" if device == "cuda" else "fp32"
    told += [f"batch_size={batch}", f"precision={precision}"]
    return load_recipe(TrainDiffusionRecipe, find_recipe(name), [*told, "flow.time_shift_dim=196608", *overrides])


def our_step(model: nn.Module, batch: Batch, recipe: TrainDiffusionRecipe, ranks: Ranks) -> Callable[[], None]:
    """The stage's own step."""
    shape = tuple(batch.latents.shape[1:])
    state = State(model, model, Ema(model, recipe.ema_decay), optimizer_of(model, recipe), 0)
    statistics_ = LatentStatistics(None, torch.ones(shape)).to(ranks.device).channels_last()

    def step() -> None:
        train_step(state, batch, statistics_, recipe, ranks)
        state.step += 1

    return step


def their_step(code, model: nn.Module, batch: Batch, recipe: TrainDiffusionRecipe, ranks: Ranks) -> Callable[[], None]:
    """What the body of the release's loop does after the encoder (src/train.py)."""
    average = copy.deepcopy(model).requires_grad_(False).eval()
    spec = recipe.optimizer
    optimizer = torch.optim.AdamW(
        [parameter for parameter in model.parameters() if parameter.requires_grad],
        lr=spec.learning_rate, betas=spec.betas, weight_decay=spec.weight_decay, fused=True,
    )  # fmt: skip
    transport = code.create_transport(
        path_type="Linear", prediction="velocity", time_dist_type="logit-normal_0_1",
        time_dist_shift=recipe.flow.time_shift,
    )  # fmt: skip
    latents, labels = batch.latents.to(ranks.device).float(), batch.labels.to(ranks.device)

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        with torch.autocast(ranks.device.type, torch.bfloat16, enabled=recipe.precision == "bf16"):
            loss = transport.training_losses(model, latents, {"y": labels})["loss"].mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), spec.clip_norm)
        optimizer.step()
        code.update_ema(average, model, decay=recipe.ema_decay)
        loss.item()

    return step


def seconds(step: Callable[[], None], device: torch.device) -> float:
    """CPU seconds of a step of this process; on a GPU the wall's, until it is done."""
    if device.type == "cpu":
        begin = time.process_time()
        step()
        return time.process_time() - begin
    torch.cuda.synchronize()
    begin = time.perf_counter()
    step()
    torch.cuda.synchronize()
    return time.perf_counter() - begin


class ProductClock(TorchDispatchMode):
    """CPU seconds spent inside matrix products: linear layers and attention, forward and backward."""

    def __init__(self) -> None:
        super().__init__()
        self.seconds = 0.0

    def __torch_dispatch__(self, operation, types, arguments=(), keywords=None):
        if not any(word in operation.overloadpacket.__name__ for word in PRODUCTS):
            return operation(*arguments, **(keywords or {}))
        begin = time.process_time()
        result = operation(*arguments, **(keywords or {}))
        self.seconds += time.process_time() - begin
        return result


def product_seconds(step: Callable[[], None], device: torch.device) -> float:
    """Seconds of a step inside matrix products. On a GPU those of their kernels."""
    if device.type == "cpu":
        with ProductClock() as clock, torch.compiler.set_stance("force_eager"):
            step()
        return clock.seconds
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as seen:
        seconds(step, device)
    events = [event for event in seen.key_averages() if any(word in event.key for word in PRODUCTS)]
    return sum(event.self_device_time_total for event in events if event.key.startswith("aten::")) / 1e6


def alternated(steps: list[Callable], device: torch.device, repeats: int) -> tuple[list[float], list[float]]:
    """Medians of each step's seconds and of those inside its products, all taken in turn: a busy machine hits all."""
    measures = [(measure, step) for step in steps for measure in (seconds, product_seconds)]
    rounds = [[measure(step, device) for measure, step in measures] for _ in range(repeats)]
    medians = [statistics.median(column) for column in zip(*rounds, strict=True)]
    return medians[::2], medians[1::2]


def redrawn(model: nn.Module) -> nn.Module:
    """The model with its zero layers drawn anew, so that its output is not 0."""
    for module in model.modules():
        if isinstance(module, nn.Linear) and not module.weight.any():
            nn.init.normal_(module.weight, std=0.02)
    return model


def random_batch(recipe: TrainDiffusionRecipe, *, pinned: bool) -> Batch:
    """Latents, labels and times of a batch; pinned, as the feed has them on a GPU."""
    side = recipe.model.input_size
    shape = (recipe.batch_size, recipe.model.in_channels, side, side)
    latents: Tensor = torch.randn(shape, dtype=torch.bfloat16)
    labels, t = torch.randint(recipe.model.num_classes, (recipe.batch_size,)), torch.rand(recipe.batch_size)
    if pinned:
        latents, labels, t = latents.pin_memory(), labels.pin_memory(), t.pin_memory()
    return Batch(range(recipe.batch_size), ["random"] * recipe.batch_size, latents, labels, t)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("overrides", nargs="*", help="KEY=VALUE of the recipe")
    parser.add_argument("--model", default="dith_s", help="a shipped recipe")
    parser.add_argument("--batch", type=int, default=4, help="images a step")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--compile", action="store_true", help="our step, compiled a block; theirs stays as it is")
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--peak", type=float, default=790.0, help="TFLOP/s of the GPU in bf16: H200 790, H100 750")
    parser.add_argument("--peer", type=Path, required=True, help="a checkout of bytetriper/RAE")
    told = parser.parse_args()
    torch.manual_seed(0)
    ranks = Ranks(0, 1, torch.device(told.device))
    recipe = resolved_recipe(told.model, told.overrides, told.batch, told.device)
    batch = random_batch(recipe, pinned=told.device == "cuda")
    model, code = redrawn(diffusion_of(recipe.model)), released_code(told.peer)
    theirs = released_model(code, recipe.model, model.state_dict())
    difference = largest_difference(model, theirs, batch.latents[:2].float(), batch.t[:2], batch.labels[:2])
    assert difference < 1e-5, f"outputs differ by {difference}: the two sides are not the same model"
    model, theirs = model.to(ranks.device), theirs.to(ranks.device)
    steps = [our_step(model, batch, recipe, ranks), their_step(code, theirs, batch, recipe, ranks)]
    for step in steps * 2:  # warm: the allocator, the optimiser's state
        step()
    if told.compile:
        compile_blocks(model)
        for _ in range(3):
            steps[0]()
    whole, products = alternated(steps, ranks.device, told.repeats)
    rest = [one - other for one, other in zip(whole, products, strict=True)]
    shared = {
        "model": told.model, "overrides": told.overrides, "batch": told.batch, "compile": told.compile,
        "device": torch.cuda.get_device_name() if told.device == "cuda" else "cpu", "outputs_differ_by": difference,
    }  # fmt: skip
    print(json.dumps({"row": 6, **figures(whole), **speeds(whole, recipe, told), **shared, "bar": BARS[told.device]}))
    inside = {"ours_products_ms": products[0] * 1e3, "released_products_ms": products[1] * 1e3}
    print(json.dumps({"row": 7, **figures(rest), **inside, **shared, "bar": "<= 0.25"}))


BARS = {"cpu": "<= 0.85", "cuda": "<= 0.55 and >= 0.65 MFU for dith_xl"}


def figures(pair: list[float]) -> dict[str, float]:
    """Both sides in milliseconds, and their ratio."""
    return {"ours_ms": pair[0] * 1e3, "released_ms": pair[1] * 1e3, "ratio": pair[0] / pair[1]}


def speeds(pair: list[float], recipe: TrainDiffusionRecipe, told: argparse.Namespace) -> dict[str, float]:
    """Images a second of both, and on a GPU the share of its peak that matrix products take."""
    keys = ("in_channels", "input_size", "patch_size", "width", "depth", "head_width", "head_depth", "mlp_ratio")
    macs = diffusion_macs(**{key: getattr(recipe.model, key) for key in keys})
    rates = [told.batch / value for value in pair]
    speed = {"ours_images_per_s": rates[0], "released_images_per_s": rates[1]}
    if told.device == "cpu":
        return speed
    shares = [rate * 6 * macs.executed / (told.peak * 1e12) for rate in rates]
    return {**speed, "ours_mfu": shares[0], "released_mfu": shares[1]}


if __name__ == "__main__":
    main()
