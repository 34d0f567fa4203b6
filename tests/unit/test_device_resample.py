"""Resampling in torch operations: Pillow's bits, whatever sizes meet in a batch; and who is left to the host."""

import io
import threading
import time

import numpy as np
import pytest
import torch
from PIL import Image

from raecli.data import decode, device_resample
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


@pytest.fixture
def groups(monkeypatch):
    """Pixels of the images of each group that was resampled."""
    seen = []

    def watched(images, size):
        seen.append([image.shape[0] * image.shape[1] for image in images])
        return center_squares(images, size)

    monkeypatch.setattr(device_resample, "center_squares", watched)
    return seen


def set_room(monkeypatch, pixels: int) -> None:
    for module in (decode, device_resample):
        monkeypatch.setattr(module, "GROUP_PIXELS", pixels)


def test_a_batch_of_large_images_is_resampled_in_groups_to_the_same_bits(tmp_path, monkeypatch, groups):
    generator = np.random.default_rng(5)
    sides = [(300, 200), (90, 64), (310, 190), (280, 220), (40, 500), (500, 480), (64, 90), (305, 195), (299, 201)]
    for number, (wide, high) in enumerate(sides):
        Image.fromarray(random_image(generator, wide, high)).save(tmp_path / f"{number}.png")
    (tmp_path / "3.png").write_bytes((tmp_path / "3.png").read_bytes()[:900])
    source, indices = open_images(tmp_path), [7, 0, 1, 2, 3, 4, 5, 6, 8]
    options = {"threads": 2, "skip_bad": True}
    host = Decoder(source, 32, resample_on=None, **options).batch(indices)
    set_room(monkeypatch, 130_000)
    device = Decoder(source, 32, resample_on=torch.device("cpu"), **options).batch(indices)
    assert torch.equal(device.images, host.images) and device.images.stride() == host.images.stride()
    assert device.indices == host.indices == [7, 0, 1, 2, 4, 5, 6, 8] and device.skipped == host.skipped
    assert [len(group) for group in groups] == [3, 2, 1, 2]
    assert all(sum(group) <= 130_000 for group in groups if len(group) > 1)  # the one alone is larger than that


def test_a_batch_of_imagenets_size_stays_one_group(tmp_path, groups):
    image = Image.fromarray(random_image(np.random.default_rng(6), 500, 375))
    for number in range(2):
        image.save(tmp_path / f"{number}.jpg")
    decoder = Decoder(open_images(tmp_path), 64, threads=2, skip_bad=False, resample_on=torch.device("cpu"))
    assert len(decoder.batch([0, 1] * 64).images) == 128
    assert groups == [[500 * 375] * 128]


def test_what_is_decoded_ahead_is_bounded_and_ends_with_the_batch(tmp_path, monkeypatch):
    Image.fromarray(random_image(np.random.default_rng(7), 100, 100)).save(tmp_path / "a.png")
    set_room(monkeypatch, 40_000)
    decoder = Decoder(open_images(tmp_path), 32, threads=2, skip_bad=False, resample_on=torch.device("cpu"))
    lock, begun, taken, most, one = threading.Lock(), 0, 0, 0, decoder.one

    def watched(index):
        nonlocal begun, most
        with lock:
            begun += 1
            most = max(most, begun - taken)
        return one(index)

    monkeypatch.setattr(decoder, "one", watched)
    for _ in decoder.decoded([0] * 40):
        with lock:
            taken += 1
        time.sleep(0.005)  # a device that is slower than the threads
    assert begun == taken == 40
    assert most <= 40_000 // 10_000 + 2 + 1 + 1  # in the room, at work, waiting for a thread, and in our hands


def test_a_device_whose_bits_are_others_leaves_the_work_to_the_host(tmp_path, monkeypatch):
    Image.fromarray(random_image(np.random.default_rng(4), 90, 64)).save(tmp_path / "a.png")
    equals_pillow.cache_clear()
    weighed = device_resample.weighed
    monkeypatch.setattr(device_resample, "weighed", lambda *told: weighed(*told) ^ 1)
    decoder = Decoder(open_images(tmp_path), 32, threads=1, skip_bad=False, resample_on=torch.device("cpu"))
    equals_pillow.cache_clear()
    expected = center_square((tmp_path / "a.png").read_bytes(), "a", 32)
    np.testing.assert_array_equal(decoder.batch([0]).images[0].permute(1, 2, 0).numpy(), expected)
