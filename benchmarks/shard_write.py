"""PERFORMANCE row 4: latents into plain tars with their index, against plain write() of the same numbers.

CPU seconds of one thread, both sides in turn, medians; new files each time, on the same file system. One JSON line.

    python benchmarks/shard_write.py [--mb 400] [--dtype bf16]
"""

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path

import torch
from latent_cache import SHAPE

from raecli.store.latent_cache import INDEX, write_index
from raecli.store.shards import TORCH_DTYPES, ShardLayout, ShardWriter

BATCH = 64


def write_tar(folder: Path, layout: ShardLayout, latents: torch.Tensor, batches: int) -> None:
    """Ours."""
    writer, keys, labels = ShardWriter(folder / "ours.tar", layout), [], []
    for batch in range(batches):
        keys += [f"n01440764/n01440764_{batch * BATCH + row:05d}" for row in range(BATCH)]
        labels += [batch % 1000] * BATCH
        writer.add(keys[-BATCH:], labels[-BATCH:], [latents])
    writer.close()
    write_index(folder / INDEX, labels, keys)


def write_plain(folder: Path, latents: torch.Tensor, batches: int) -> None:
    """The numbers alone, a batch a call."""
    numbers = memoryview(latents.view(torch.uint8).numpy()).cast("B")
    with (folder / "plain").open("wb", buffering=0) as file:
        for _ in range(batches):
            file.write(numbers)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--mb", type=int, default=400, help="numbers a run")
    parser.add_argument("--dtype", choices=("bf16", "fp16", "fp32"), default="bf16")
    options = parser.parse_args()
    torch.set_num_threads(1)
    layout = ShardLayout(SHAPE, options.dtype, ("latent",))
    latents = torch.randn(BATCH, *SHAPE).to(TORCH_DTYPES[options.dtype])
    batches = max(1, options.mb * 10**6 // (BATCH * layout.latent_bytes))
    ours, plain = [], []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for repeat in range(22):
            for side in ("ours", "plain") if repeat % 2 else ("plain", "ours"):
                begin = time.thread_time()
                if side == "ours":
                    write_tar(folder, layout, latents, batches)
                else:
                    write_plain(folder, latents, batches)
                (ours if side == "ours" else plain).append(time.thread_time() - begin)
                for file in folder.iterdir():
                    file.unlink()
    giga = batches * BATCH * layout.latent_bytes / 1e9
    rates = giga / statistics.median(ours[2:]), giga / statistics.median(plain[2:])
    line = {"row": 4, "tar_gb_per_cpu_s": rates[0], "write_gb_per_cpu_s": rates[1], "ratio": rates[0] / rates[1]}
    print(json.dumps({**line, "dtype": options.dtype, "bar": ">= 0.90"}))


if __name__ == "__main__":
    main()
