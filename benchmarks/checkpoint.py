"""PERFORMANCE row 11: (a) what a save makes the loop wait, (b) loading, (c) finding a sample in mid-epoch.

The other side of (a) and (b) is memcpy of the same state (weights, average, two moments) into memory that is warm; (a)
is a save after the first, while nothing is being written; (b) reads, checks every file and fills model, average and
optimiser, whose moments get new memory: a second line has memcpy do so too. Wall seconds, medians. (c) is the order of
a batch at any position of ImageNet's 1,281,167, and the first call in an epoch, which draws its permutation, in CPU
seconds.
One JSON line each: python benchmarks/checkpoint.py [--width 384] [--folder DISK]
"""

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch

from raecli.data.order import permutation, stream_slice
from raecli.models.dit import DiT
from raecli.store.checkpoint import EMA, MODEL, load_optimizer, load_weights, optimizer_tensors, read_checkpoint
from raecli.store.checkpoint_writer import CheckpointWriter
from raecli.store.memory import fresh_memory
from raecli.store.statistics import LatentStatistics
from raecli.training.ema import Ema
from raecli.training.optimizer import make_optimizer, take_step

IMAGENET = 1_281_167


def seconds(work: Callable[[], object]) -> float:
    """Wall seconds of a call."""
    begin = time.perf_counter()
    work()
    return time.perf_counter() - begin


def cpu_seconds(work: Callable[[], object]) -> float:
    """CPU seconds of a call."""
    begin = time.process_time()
    work()
    return time.process_time() - begin


def line(part: str, ours: list[float], other: list[float], bar: str, **more: object) -> None:
    """Print a row's part."""
    pair = statistics.median(ours), statistics.median(other)
    told = {"row": 11, "part": part, "ours_s": pair[0], "memcpy_s": pair[1], "ratio": pair[0] / pair[1]}
    print(json.dumps({**told, **more, "bar": bar}))


class Training:
    """A DiT, its average and its optimiser after one step, and memory of the same size."""

    def __init__(self, width: int, depth: int) -> None:
        self.model = DiT(in_channels=64, input_size=4, width=width, depth=depth, heads=width // 64, num_classes=10)
        self.ema = Ema(self.model, 0.9995)
        self.optimizer = make_optimizer(self.model, learning_rate=1e-4, betas=(0.9, 0.95), weight_decay=0.0)
        noisy, t = torch.randn(1, 64, 4, 4), torch.rand(1)
        self.model(noisy, t, torch.tensor([1])).square().sum().backward()
        take_step(self.model, self.optimizer, None)
        self.copies = {name: value.clone() for name, value in self.tensors().items()}

    def tensors(self) -> dict[str, torch.Tensor]:
        """The whole state by name."""
        parts = {"model": self.model.state_dict(), "ema": self.ema.state()}
        parts["optimizer"] = optimizer_tensors(self.model, self.optimizer)
        return {f"{part}/{name}": value for part, tensors in parts.items() for name, value in tensors.items()}

    def memcpy(self) -> None:
        """The state into other memory."""
        for name, value in self.tensors().items():
            self.copies[name].copy_(value)

    def memcpy_to_new(self) -> None:
        """The same, but the moments into memory that is asked for now, as a load must."""
        tensors = self.tensors()
        moments = {name: value for name, value in tensors.items() if name.startswith("optimizer/")}
        memory, start = torch.from_numpy(fresh_memory(sum(value.nbytes for value in moments.values()))), 0
        for name, value in tensors.items():
            to = self.copies[name]
            if name in moments:
                to = memory[start : start + value.nbytes].view(value.dtype).view(value.shape)
                start += value.nbytes
            to.copy_(value)

    def save(self, writer: CheckpointWriter, run: Path, step: int) -> None:
        """As a stage does."""
        writer.save(
            run, step, model=self.model.state_dict(), ema=self.ema.state(),
            optimizer=optimizer_tensors(self.model, self.optimizer), statistics=LatentStatistics(None, torch.ones(64)),
            state={}, config={}, keep=1,
        )  # fmt: skip

    def load(self, folder: Path) -> None:
        """As a stage does."""
        into = {MODEL: self.model.state_dict(keep_vars=True), EMA: self.ema.state()}
        checkpoint = read_checkpoint(folder, into)
        load_weights(self.model, checkpoint.model)
        self.ema.load(checkpoint.ema)
        load_optimizer(self.model, self.optimizer, checkpoint.optimizer)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--width", type=int, default=384)
    parser.add_argument("--depth", type=int, default=12)
    parser.add_argument("--folder", help="where to write; a temporary folder otherwise")
    parser.add_argument("--repeats", type=int, default=9)
    told = parser.parse_args()
    training = Training(told.width, told.depth)
    size = sum(value.nbytes for value in training.tensors().values()) / 1e9
    with tempfile.TemporaryDirectory(dir=told.folder) as folder, CheckpointWriter() as writer:
        first = seconds(lambda: training.save(writer, Path(folder), 0))
        blocked, copied, copied_to_new, loaded = [], [], [], []
        for step in range(1, told.repeats + 1):
            writer.wait()
            blocked.append(seconds(lambda step=step: training.save(writer, Path(folder), step)))
            writer.wait()
            copied.append(seconds(training.memcpy))
            copied_to_new.append(seconds(training.memcpy_to_new))
            loaded.append(seconds(lambda step=step: training.load(Path(folder) / f"checkpoints/step-{step:07d}")))
        line("a, the loop waits", blocked, copied, "<= 1.1", first_save_s=first, gigabytes=size)
        line("b, load", loaded, copied, "<= 1.2", gigabytes=size)
        line("b, load, memory for moments new on both sides", loaded, copied_to_new, "<= 1.2")
    positions = [epoch * IMAGENET + part * 128_001 for epoch in (3, 4, 5) for part in range(10)]
    places = [cpu_seconds(lambda first=first: stream_slice(0, IMAGENET, first, 1024)) for first in positions]
    fresh = [
        cpu_seconds(lambda epoch=epoch: permutation.__wrapped__(0, "epoch", epoch, IMAGENET)) for epoch in range(5)
    ]
    seek = {"row": 11, "part": "c, seek", "worst_s": max(places), "median_s": statistics.median(places)}
    print(json.dumps({**seek, "new_epoch_s": statistics.median(fresh), "samples": IMAGENET, "bar": "<= .05 s"}))


if __name__ == "__main__":
    main()
