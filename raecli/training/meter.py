"""Figures of training, averaged between two lines of metrics.jsonl."""

import time

import torch
from torch import Tensor

from raecli.store.run_folder import MetricsLog
from raecli.training.distributed import Ranks
from raecli.training.progress import Progress


class Meter:
    """Averages a step's losses over steps and ranks; writes a line every `log_every` steps."""

    def __init__(self, log: MetricsLog | None, ranks: Ranks, *, log_every: int, batch_size: int) -> None:
        self.log, self.ranks, self.log_every, self.batch_size = log, ranks, log_every, batch_size
        self.losses: list[dict[str, Tensor]] = []
        self.since = time.monotonic()

    def record(
        self, step: int, losses: dict[str, Tensor], figures: dict[str, float], progress: Progress, *, last: bool
    ) -> None:
        """Take in finished step `step`: losses are scalars of this rank; figures are the same on all ranks."""
        self.losses.append(losses)
        note = ""
        if step % self.log_every == 0 or last:
            means = self.means()
            seconds = max(time.monotonic() - self.since, 1e-9)
            speed = len(self.losses) * self.batch_size / seconds
            if self.log:
                self.log.write({"step": step, **means, **figures, "images_per_second": speed})
            note = ", ".join(f"{name} {value:.4f}" for name, value in means.items())
            self.losses, self.since = [], time.monotonic()
        progress.advance(1, note)

    def means(self) -> dict[str, float]:
        """Mean of each loss over the steps since the last line, and over ranks."""
        names = list(self.losses[0])
        table = torch.stack([torch.stack([losses[name].float() for name in names]) for losses in self.losses])
        averages = self.ranks.sum(table.mean(dim=0)) / self.ranks.world
        return dict(zip(names, averages.tolist(), strict=True))
