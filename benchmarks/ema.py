"""PERFORMANCE row 8: one update of the average over the 378 tensors of DiT-DH-XL, ours over the released one's.

By size: `--scales 16` divides every width by 16. Small weights show what a call costs (on a GPU: the launches), large
ones what memory costs: both sides are bound by it. CPU seconds, or on a GPU wall milliseconds. One JSON line a scale.

python benchmarks/ema.py [--device cuda] [--peer ../RAE]   Without a peer the other side is its loop, written out here.
"""

import argparse
import copy
import json
import statistics
import time
from collections import OrderedDict
from pathlib import Path

import torch
from torch import nn

from raecli.training.ema import Ema

TENSORS = 378  # of DiT-DH-XL as released


@torch.no_grad()
def update_ema(average: nn.Module, model: nn.Module, decay: float) -> None:
    """A tensor at a time, by name: what the release does."""
    ours, theirs = OrderedDict(model.named_parameters()), OrderedDict(average.named_parameters())
    for name, parameter in ours.items():
        theirs[name].mul_(decay).add_(parameter.data, alpha=1 - decay)


def released_update(checkout: Path | None):
    """The authors' function, where their checkout is named."""
    if checkout is None:
        return update_ema
    from released import released_code

    return released_code(checkout).update_ema


def many_tensors(scale: int, device: str) -> nn.Module:
    """378 tensors: matrices and vectors as a block of width 1152 has them, by turns, all widths divided."""
    width = max(1, 1152 // scale)
    shapes = [(3 * width, width), (3 * width,), (width, width), (width,), (6 * width, width), (6 * width,)]
    blocks = [nn.ParameterList(torch.randn(shape) for shape in shapes) for _ in range(TENSORS // len(shapes))]
    model = nn.Module()
    model.blocks = nn.ModuleList(blocks)
    return model.to(device)


def seconds(update, device: str, repeats: int) -> float:
    """Median seconds of one update: of this process's CPU, on a GPU by the wall until it is done."""
    clock, taken = (time.process_time if device == "cpu" else time.perf_counter), []
    for _ in range(repeats):
        begin = clock()
        update()
        if device == "cuda":
            torch.cuda.synchronize()
        taken.append(clock() - begin)
    return statistics.median(taken)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--scales", type=int, nargs="+", default=[144, 36, 9, 3])
    parser.add_argument("--peer", type=Path, help="a checkout of bytetriper/RAE")
    told = parser.parse_args()
    released = released_update(told.peer)
    for scale in told.scales:
        model = many_tensors(scale, told.device)
        average, ema = copy.deepcopy(model), Ema(model, 0.9995)
        sides = [lambda ema=ema: ema.update(0), lambda a=average, m=model: released(a, m, decay=0.9995)]
        pairs = [[seconds(side, told.device, 5) for side in sides] for _ in range(7)]
        pair = [statistics.median(column) for column in zip(*pairs, strict=True)]
        for name, parameter in average.named_parameters():
            torch.testing.assert_close(ema.averages[name], parameter.detach(), atol=1e-5, rtol=1e-5)
        count = sum(parameter.numel() for parameter in model.parameters())
        line = {
            "row": 8,
            "tensors": TENSORS,
            "parameters": count,
            "ours_ms": pair[0] * 1e3,
            "released_ms": pair[1] * 1e3,
        }
        told_by = "checkout" if told.peer else "written out"
        print(
            json.dumps(
                {**line, "ratio": pair[0] / pair[1], "released": told_by, "device": told.device, "bar": "<= .05"}
            )
        )


if __name__ == "__main__":
    main()
