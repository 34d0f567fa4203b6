"""Precision and recall of 50,000 samples against 10,000: time and the most memory held. One JSON line."""

import argparse
import json
import resource
import tempfile
import time
import zipfile
from pathlib import Path

import numpy as np
import torch

from raecli.evaluation.families import Family, family_findings
from raecli.evaluation.sides import open_side
from raecli.training.distributed import Ranks

WIDTH, ROWS = 2048, 1000


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--samples", type=int, default=50_000)
    parser.add_argument("--reference", type=int, default=10_000)
    parser.add_argument("--rule", choices=("exact", "adm"), default="exact")
    told = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        sides = [
            write(Path(folder) / f"{count}.npz", count, seed)
            for seed, count in enumerate((told.samples, told.reference))
        ]
        before, begin = peak_mb(), time.process_time()
        samples, reference = (open_side(str(path)) for path in sides)
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        family = Family(("precision-recall",), ("pool",), no_network, None)
        found = family_findings(family, samples, reference, told.rule, 64, Ranks(0, 1, device))
    seconds = time.process_time() - begin
    line = {"samples": told.samples, "reference": told.reference, "width": WIDTH, "rule": told.rule, "cpu_s": seconds}
    line |= {key: found.figures[key] for key in ("precision", "recall")}
    print(
        json.dumps({**line, "peak_mb": peak_mb(), "peak_before_mb": before, "bar": "< 1000 MB", "device": str(device)})
    )


def write(path: Path, count: int, seed: int) -> Path:
    """A feature file of `count` rows like Inception's pool: not negative, squared norm near 500; block by block."""
    generator = np.random.default_rng(seed)
    with zipfile.ZipFile(path, "w") as archive, archive.open("pool.npy", "w", force_zip64=True) as file:
        header = {"descr": "<f4", "fortran_order": False, "shape": (count, WIDTH)}
        np.lib.format.write_array_header_1_0(file, header)
        for start in range(0, count, ROWS):
            shape = (min(ROWS, count - start), WIDTH)
            file.write((np.abs(generator.standard_normal(shape, np.float32)) * 0.5).tobytes())
    return path


def no_network(layers: tuple[str, ...]) -> None:
    raise AssertionError(f"{layers} are in the files")


def peak_mb() -> float:
    """The most memory that this process has held, MB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e6


if __name__ == "__main__":
    main()
