"""Resampling in torch operations: Pillow's bits, whatever sizes meet in a batch; and who is left to the host."""

import io

import numpy as np
import pytest
import torch
from PIL import Image

from raecli.data import device_resample
from raecli.data.decode import Decoder
from raecli.data.device_resample import center_squares, equals_pillow, host_pixels, resized_windows, suits_device
from raecli.data.images import open_images
from raecli.data.preprocess import center_crop, center_square
from raecli.data.resample import by_pillow, down_first
from raecli.errors import InputError


def random_image(generator: np.random.Generator, wide: int, high: int) -> np.ndarray:
    """Noise, the hardest thing to resample: every overshoot of the cubic is met."""
    return generator.integers(0, 256, (high, wide, 3), dtype=np.uint8)


@pytest.mark.parametrize("kind", ["box", "bicubic"])
def test_windows_of_batches_of_random_sizes_are_pillows_to_the_bit(kind):
    generator, compared = np.random.default_rng(0), 0
    while compared < 300:
        columns, rows = (int(side) for side in generator.integers(1, 60, 2))
        images, sizes, windows = [], [], []
        for _ in range(int(generator.integers(1, 7))):
            wide, high = (int(side) for side in generator.integers(3, 260, 2))
            size = columns + int(generator.integers(100)), rows + int(generator.integers(100))
            if not down_first(wide, high, *size):
                images.append(random_image(generator, wide, high))
                sizes.append(size)
                left, top = (int(generator.integers(room)) for room in (size[0] - columns + 1, size[1] - rows + 1))
                windows.append((left, top, columns, rows))
        if images:
            found = resized_windows([torch.from_numpy(image) for image in images], sizes, windows, kind)
            for image, size, window, own in zip(images, sizes, windows, found.numpy(), strict=True):
                told = f"{image.shape} to {size}, window {window}"
                np.testing.assert_array_equal(own, by_pillow(image, size, window, kind), err_msg=told)
                compared += 1


def test_centre_crops_of_a_batch_of_any_shapes_are_guided_diffusions_to_the_bit(monkeypatch):
    monkeypatch.setattr(device_resample, "TOGETHER", 7)  # several rounds in a batch
    generator, compared, halved = np.random.default_rng(1), 0, 0
    for _ in range(12):
        size = int(generator.integers(8, 100))
        shapes = [tuple(int(side) for side in generator.integers(1, 420, 2)) for _ in range(25)]
        images = [random_image(generator, *shape) for shape in shapes if suits_device(*shape, size)]
        found = center_squares([torch.from_numpy(image) for image in images], size)
        for image, own in zip(images, found, strict=True):
            expected = center_crop(image, size)
            np.testing.assert_array_equal(own.permute(1, 2, 0).numpy(), expected, err_msg=f"{image.shape} to {size}")
            compared += 1
            halved += min(image.shape[:2]) >= 2 * size
    assert compared >= 150 and halved >= 50  # both kinds of pass were met


def test_what_does_not_suit_a_device_comes_to_it_as_the_finished_square():
    generator = np.random.default_rng(2)
    assert suits_device(500, 375, 256) and not suits_device(40, 500, 32) and not suits_device(5000, 4000, 256)
    for wide, high in ((40, 500), (90, 64)):
        buffer = io.BytesIO()
        Image.fromarray(random_image(generator, wide, high)).save(buffer, "JPEG")
        expected = center_square(buffer.getvalue(), "x", 32)
        pixels = host_pixels(buffer.getvalue(), "x", 32, pinned=False)
        assert tuple(pixels.shape) == ((32, 32, 3) if wide == 40 else (64, 90, 3))
        np.testing.assert_array_equal(center_squares([pixels], 32)[0].permute(1, 2, 0).numpy(), expected)


def test_a_decoder_gives_the_same_bits_wherever_it_resamples(tmp_path):
    generator = np.random.default_rng(3)
    for number, (wide, high) in enumerate([(90, 64), (300, 41), (64, 170), (20, 30), (250, 200)]):
        for ending in ("png", "jpg"):
            Image.fromarray(random_image(generator, wide, high)).save(tmp_path / f"{number}.{ending}")
    (tmp_path / "9.jpg").write_bytes((tmp_path / "4.jpg").read_bytes()[:900])  # cut off: its memory is let go
    source = open_images(tmp_path)
    options = {"threads": 2, "skip_bad": True}
    host = Decoder(source, 32, resample_on=None, **options).batch(list(range(11)))
    device = Decoder(source, 32, resample_on=torch.device("cpu"), **options).batch(list(range(11)))
    assert device.indices == host.indices == list(range(10)) and device.skipped == host.skipped
    assert torch.equal(device.images, host.images)
    with pytest.raises(InputError, match="1 unreadable"):
        Decoder(source, 32, threads=1, skip_bad=False, resample_on=torch.device("cpu")).batch([10])


def test_a_device_whose_bits_are_others_leaves_the_work_to_the_host(tmp_path, monkeypatch):
    Image.fromarray(random_image(np.random.default_rng(4), 90, 64)).save(tmp_path / "a.png")
    equals_pillow.cache_clear()
    weighed = device_resample.weighed
    monkeypatch.setattr(device_resample, "weighed", lambda *told: weighed(*told) ^ 1)
    decoder = Decoder(open_images(tmp_path), 32, threads=1, skip_bad=False, resample_on=torch.device("cpu"))
    equals_pillow.cache_clear()
    expected = center_square((tmp_path / "a.png").read_bytes(), "a", 32)
    np.testing.assert_array_equal(decoder.batch([0]).images[0].permute(1, 2, 0).numpy(), expected)
