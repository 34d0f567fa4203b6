"""PERFORMANCE row 3: distinct classes in a global batch of 1024 from a class-sorted source, over uniform draws.

ImageNet's counts: 1000 classes of 1281, sorted. `global` and `block` read a cache as encode-cache makes it, which is
permuted; `block, sorted cache` is what blocks would give were it not. Each is checked to be an exact permutation, on
the whole of an epoch. One JSON line an order.    python benchmarks/shuffle.py
"""

import json

import numpy as np

from raecli.data.order import permutation, stream_slice

CLASSES, EACH, BATCH, BATCHES, SEED = 1000, 1281, 1024, 200, 0


def main() -> None:
    size = CLASSES * EACH
    by_class = np.arange(size) // EACH  # label of source image i
    made = by_class[permutation(SEED, "cache", 0, size)]  # labels in the cache's order
    uniform = CLASSES * (1 - (1 - 1 / CLASSES) ** BATCH)  # of 1024 independent draws: 641
    without = np.mean([len(set(np.random.default_rng(n).permutation(by_class)[:BATCH])) for n in range(20)])
    orders = {
        "global": (None, made),
        "block 2048": (2048, made),
        "block 64": (64, made),
        "block 2048, sorted cache": (2048, by_class),
        "block 64, sorted cache": (64, by_class),
    }
    for name, (block, labels) in orders.items():
        order = stream_slice(SEED, size, 0, size, block)
        exact = bool((np.bincount(order, minlength=size) == 1).all())
        batches = [labels[order[start : start + BATCH]] for start in np.arange(BATCHES) * BATCH]
        distinct = float(np.mean([len(set(batch.tolist())) for batch in batches]))
        line = {
            "row": 3,
            "order": name,
            "distinct_classes": distinct,
            "uniform": float(without),
            "ratio": distinct / without,
        }
        print(json.dumps({**line, "with_replacement": uniform, "exact_permutation": exact, "bar": "1.00 +- .02"}))


if __name__ == "__main__":
    main()
