"""PERFORMANCE row 12: Frechet distance at d = 2048 over one d^3 float64 product, one thread. One JSON line."""

import argparse
import json
import statistics
import time

import numpy as np
import torch

from raecli.metrics.frechet import frechet_distance


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--width", type=int, default=2048)
    width = parser.parse_args().width
    torch.set_num_threads(1)
    generator = torch.Generator().manual_seed(0)
    covariances = []
    for _ in range(2):
        features = torch.randn(2 * width, width, generator=generator, dtype=torch.float64)
        covariances.append((features * torch.linspace(0.1, 2, width, dtype=torch.float64)).T.cov())
    mean = torch.zeros(width, dtype=torch.float64)
    ours, product = [], []
    for _ in range(3):
        begin = time.process_time()
        found = frechet_distance(mean, covariances[0], mean + 0.1, covariances[1])
        ours.append(time.process_time() - begin)
        begin = time.process_time()
        covariances[0] @ covariances[1]
        product.append(time.process_time() - begin)
    seconds = statistics.median(ours), statistics.median(product)
    line = {"row": 12, "ours_s": seconds[0], "product_s": seconds[1], "ratio": seconds[0] / seconds[1]}
    print(json.dumps({**line, "value": float(np.float64(found.value)), "method": found.method, "bar": "<= 4"}))


if __name__ == "__main__":
    main()
