"""PERFORMANCE row 5: guided-diffusion's crop by Pillow over ours, CPU seconds a JPEG, outputs equal to the bit.

ImageNet's commonest sizes, 500 x 375 and the like, quality 92, 4:2:0, out of two photographs that scikit-learn brings;
all sides in turn, medians of this thread's CPU seconds. Two JSON lines; a ratio of 0 where one bit differs. The first:
all of it on the CPU. The second: the resample on a device, whose CPU cost is what the host still does, for batches of
64: decode into pinned memory, the tables of coefficients, anew for every batch, and on a GPU the uploads and the
launches; without a GPU those two are left out, and the line says so.

    python benchmarks/preprocess.py [--size 256] [--device cuda]
"""

import argparse
import io
import json
import statistics
import time
from collections.abc import Callable

import numpy as np
import torch
from PIL import Image
from sklearn.datasets import load_sample_images

from raecli.data.device_resample import center_squares, host_pixels, host_tables
from raecli.data.preprocess import center_square, center_window, decode_pixels, quick_jpeg, shorter_sides
from raecli.data.resample import coefficients, compiled_resample

BATCH = 64


def adm_crop(data: bytes, size: int) -> np.ndarray:
    """The published rule, by Pillow alone."""
    image = Image.open(io.BytesIO(data)).convert("RGB")
    while min(*image.size) >= 2 * size:
        image = image.resize(tuple(side // 2 for side in image.size), resample=Image.Resampling.BOX)
    scale = size / min(*image.size)
    image = image.resize(tuple(round(side * scale) for side in image.size), resample=Image.Resampling.BICUBIC)
    pixels = np.array(image)
    top, left = (pixels.shape[0] - size) // 2, (pixels.shape[1] - size) // 2
    return pixels[top : top + size, left : left + size]


def photographs() -> list[bytes]:
    """JPEGs of three sizes."""
    files = []
    for pixels in load_sample_images().images:
        for wide, high in ((500, 375), (375, 500), (500, 333)):
            buffer = io.BytesIO()
            image = Image.fromarray(pixels).resize((wide, high), Image.Resampling.BICUBIC)
            image.save(buffer, "JPEG", quality=92)
            files.append(buffer.getvalue())
    return files


def cpu_seconds(work: Callable[[], object]) -> float:
    """Of this thread, in one run."""
    begin = time.thread_time()
    work()
    return time.thread_time() - begin


def on_device(files: list[bytes], size: int, device: torch.device) -> None:
    """What the host does for one batch: all of it on a GPU, everything but uploads and launches without one."""
    coefficients.cache_clear()
    pixels = [host_pixels(data, "x", size, pinned=device.type == "cuda") for data in files]
    if device.type == "cuda":
        center_squares([image.to(device, non_blocking=True) for image in pixels], size)
        return
    sizes = [shorter_sides(image.shape[1], image.shape[0], size)[1] for image in pixels]
    host_tables([image.shape for image in pixels], sizes, [center_window(*told, size) for told in sizes], "bicubic")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=int, default=256)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    told = parser.parse_args()
    size, device, files = told.size, torch.device(told.device), photographs()
    batch = [files[number % len(files)] for number in range(BATCH)]
    crops = [adm_crop(data, size) for data in files]
    equal = all(np.array_equal(center_square(data, "x", size), crop) for data, crop in zip(files, crops, strict=True))
    squares = center_squares([host_pixels(data, "x", size, pinned=False).to(device) for data in files], size)
    equal_there = np.array_equal(squares.permute(0, 2, 3, 1).cpu().numpy(), np.stack(crops))
    sides: dict[str, list[float]] = {"pillow": [], "ours": [], "decode": [], "device": []}
    for _ in range(30):
        for data in files:
            sides["pillow"].append(cpu_seconds(lambda data=data: adm_crop(data, size)))
            sides["ours"].append(cpu_seconds(lambda data=data: center_square(data, "x", size)))
            sides["decode"].append(cpu_seconds(lambda data=data: decode_pixels(data, "x")))
        sides["device"].append(cpu_seconds(lambda: on_device(batch, size, device)) / BATCH)
    pillow, ours, decode, host = (1e3 * statistics.median(values) for values in sides.values())
    made = {"simplejpeg": quick_jpeg() is not None, "compiled": compiled_resample() is not None}
    line = {"row": 5, "pillow_ms": pillow, "ours_ms": ours, "decode_ms": decode, "ratio": equal * pillow / ours}
    print(json.dumps({**line, "equal": equal, **made, "bar": ">= 2.5"}))
    line = {"row": 5, "resample_on": device.type, "pillow_ms": pillow, "host_ms": host, "equal": equal_there}
    left_out = [] if device.type == "cuda" else ["uploads and launches: not measured, no GPU"]
    print(json.dumps({**line, "ratio": equal_there * pillow / host, "left_out": left_out, "bar": ">= 3.8"}))


if __name__ == "__main__":
    main()
