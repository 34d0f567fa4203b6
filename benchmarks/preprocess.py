"""PERFORMANCE row 5: guided-diffusion's crop by Pillow over ours, CPU seconds a JPEG, outputs equal to the bit.

ImageNet's commonest size, 500 x 375, quality 92, 4:2:0, out of two photographs that scikit-learn brings; both sides in
turn. One JSON line; a ratio of 0 where one bit differs.    python benchmarks/preprocess.py [--size 256]
"""

import argparse
import io
import json
import statistics
import time

import numpy as np
from PIL import Image
from sklearn.datasets import load_sample_images

from raecli.data.preprocess import center_square, decode_pixels, quick_jpeg
from raecli.data.resample import compiled_resample


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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--size", type=int, default=256)
    size = parser.parse_args().size
    files = []
    for pixels in load_sample_images().images:
        for wide, high in ((500, 375), (375, 500), (500, 333)):
            buffer = io.BytesIO()
            image = Image.fromarray(pixels).resize((wide, high), Image.Resampling.BICUBIC)
            image.save(buffer, "JPEG", quality=92)
            files.append(buffer.getvalue())
    equal = all(np.array_equal(center_square(data, "x", size), adm_crop(data, size)) for data in files)
    seconds: dict[str, list[float]] = {"pillow": [], "ours": [], "decode": []}
    for _ in range(60):
        for data in files:
            for name, work in (
                ("pillow", lambda data=data: adm_crop(data, size)),
                ("ours", lambda data=data: center_square(data, "x", size)),
                ("decode", lambda data=data: decode_pixels(data, "x")),
            ):
                begin = time.thread_time()
                work()
                seconds[name].append(time.thread_time() - begin)
    medians = {f"{name}_ms": 1e3 * statistics.median(values) for name, values in seconds.items()}
    ratio = medians["pillow_ms"] / medians["ours_ms"] if equal else 0.0
    made = {"simplejpeg": quick_jpeg() is not None, "compiled": compiled_resample() is not None}
    print(json.dumps({"row": 5, **medians, "ratio": ratio, "equal": equal, **made, "bar": ">= 2.5"}))


if __name__ == "__main__":
    main()
