"""Figures of training, averaged between two lines of metrics.jsonl. docs/monitoring.md has every key with its unit."""

import contextlib
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Self, TypeVar

import torch
from torch import Tensor

from raecli.recipe.recipes import TrainingRecipe
from raecli.store.run_folder import MetricsLog
from raecli.training.distributed import Ranks
from raecli.training.peak import peak_flops
from raecli.training.progress import Progress

Batch = TypeVar("Batch")


class Meter:
    """Averages a step's losses over steps and ranks; writes a line every `log_every` steps, and shows the progress.

    The clock is the host's. On a GPU steps queue up and none is waited for; a line's means wait for all of them, so
    that the time between two lines is true. To be used as a context: on leaving it the sinks of the log are closed.
    """

    def __init__(
        self,
        recipe: TrainingRecipe,
        ranks: Ranks,
        *,
        first_step: int,
        total_steps: int,
        samples: int,
        training_flops: float | None = None,
    ) -> None:
        """samples: of an epoch. training_flops: of one image's forward and backward, as executed; for MFU."""
        self.recipe, self.ranks, self.samples, self.total = recipe, ranks, samples, total_steps
        self.first_step, self.training_flops = first_step, training_flops
        self.peak = peak_flops(ranks.device, recipe.precision, recipe.peak_tflops)
        self.log: MetricsLog | None = None
        ranks.main_first(self._open)
        self.progress = Progress(total_steps, "steps", recipe.stage, shown=ranks.is_main, done=first_step)
        self.losses: list[dict[str, Tensor | float]] = []
        self.waited = self.aside_seconds = 0.0
        self.asides: dict[str, float] = {}
        self.since = self.begun = time.monotonic()
        self.begun_step = first_step

    def _open(self) -> None:
        """The log; by rank 0 alone."""
        config = self.recipe.to_dict()
        self.log = MetricsLog(Path(self.recipe.output), self.first_step, self.recipe.tracking, config)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.progress.close()
        if self.log:
            self.log.close()

    def timed(self, batches: Iterable[Batch]) -> Iterator[Batch]:
        """The same batches; the time until each is there counts as waiting for data."""
        asked = time.monotonic()
        for batch in batches:
            self.waited += time.monotonic() - asked
            yield batch
            asked = time.monotonic()

    @contextlib.contextmanager
    def aside(self, name: str) -> Iterator[None]:
        """Work that is no training: `NAME_seconds` in the next line, and left out of its images a second."""
        if self.ranks.device.type == "cuda":
            torch.cuda.synchronize(self.ranks.device)  # steps that are still queued are training's
        begun = time.monotonic()
        yield
        seconds = time.monotonic() - begun
        self.aside_seconds += seconds
        self.asides[f"{name}_seconds"] = self.asides.get(f"{name}_seconds", 0.0) + seconds

    def record(
        self, step: int, losses: dict[str, Tensor | float], rates: dict[str, float], *, last: bool = False
    ) -> None:
        """Take in finished step `step`: scalars of this rank, not looked at before the line; the step's learning rates.

        last: write a line now.
        """
        self.losses.append(losses)
        note = ""
        if step % self.recipe.log_every == 0 or last:
            line = self.line(step, rates)
            self._write(step, line)
            note = ", ".join(f"{name} {line[name]:.4f}" for name in losses)
            self.losses, self.waited, self.aside_seconds = [], 0.0, 0.0
            self.since = time.monotonic()
            if self.begun_step == self.first_step:  # the first steps compile and warm up: no measure of the others
                self.begun, self.begun_step = self.since, step
        self.progress.advance(1, note)

    def tell(self, step: int, figures: dict[str, float | int]) -> None:
        """Write and show what was measured beside training."""
        self._write(step, figures)
        told = ", ".join(f"{name} {value:.4f}" for name, value in figures.items() if isinstance(value, float))
        self.progress.say(f"step {step}: {told}" if told else f"step {step}: evaluated")

    def _write(self, step: int, figures: dict[str, float | int]) -> None:
        """One line of the log, with the time that was spent aside since the line before."""
        if self.log:
            self.log.write({"step": step, **figures, **self.asides})
        self.asides = {}

    def has_told(self, step: int, key: str) -> bool:
        """Whether the log has this key at this step, from before a restart; the same on all ranks."""
        return self.ranks.main_first(lambda: self.log is not None and self.log.has(step, key))

    def show(self, step: int, name: str, png: Path) -> None:
        """A picture for where pictures are shown beside the figures."""
        if self.log:
            self.log.picture(step, name, png)

    def line(self, step: int, rates: dict[str, float]) -> dict[str, float | int]:
        """All figures of the steps since the last line, and how far training is."""
        means, waited = self.means()
        now, batch = time.monotonic(), self.recipe.batch_size
        seconds = max(now - self.since - self.aside_seconds, 1e-9)
        images_per_second = len(self.losses) * batch / seconds
        line = {
            "epoch": step * batch / self.samples,
            "samples": step * batch,
            **means,
            **rates,
            "images_per_second": images_per_second,
            "data_wait_share": min(waited / seconds, 1.0),
            "seconds_per_step": seconds / len(self.losses),
            "eta_seconds": (self.total - step) * (now - self.begun) / max(step - self.begun_step, 1),
        }
        if self.peak and self.training_flops:
            line["mfu"] = images_per_second * self.training_flops / (self.peak * self.ranks.world)
        if self.ranks.device.type == "cuda":
            line["gpu_memory_peak_gib"] = torch.cuda.max_memory_allocated(self.ranks.device) / 2**30
        return line

    def means(self) -> tuple[dict[str, float], float]:
        """Mean of each loss over the steps since the last line and over ranks; seconds of waiting, mean over ranks."""
        names, device = list(self.losses[0]), self.ranks.device
        rows = [
            torch.stack([torch.as_tensor(losses[name], dtype=torch.float32, device=device) for name in names])
            for losses in self.losses
        ]
        own = torch.cat([torch.stack(rows).mean(dim=0), torch.tensor([self.waited], device=device)])
        *means, waited = (self.ranks.sum(own) / self.ranks.world).tolist()
        return dict(zip(names, means, strict=True)), waited
