"""Images in, orders and draws: the same for any ranks, batches and restarts."""

import io
import tarfile

import numpy as np
import pytest
import torch
from PIL import Image

from raecli.data.feed import Abandoned, LatentFeed, ahead, behind, pooled
from raecli.data.images import open_images, unique_keys
from raecli.data.order import (
    WINDOW_BLOCKS,
    block_permutation,
    key_of,
    normals,
    permutation,
    stream_slice,
    uniforms,
)
from raecli.data.preprocess import center_crop, decode_pixels, decode_rgb, random_crop
from raecli.data.resample import by_pillow, compiled_resample, resized_window
from raecli.errors import InputError
from raecli.store.latent_cache import open_cache


def encoded(image: Image.Image, kind: str = "PNG") -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind)
    return buffer.getvalue()


def guided_diffusion_crop(image: Image.Image, size: int) -> np.ndarray:
    """The published rule, said again in the shortest way, for comparison."""
    while min(*image.size) >= 2 * size:
        image = image.resize(tuple(side // 2 for side in image.size), resample=Image.Resampling.BOX)
    scale = size / min(*image.size)
    image = image.resize(tuple(round(side * scale) for side in image.size), resample=Image.Resampling.BICUBIC)
    pixels = np.array(image)
    top, left = (pixels.shape[0] - size) // 2, (pixels.shape[1] - size) // 2
    return pixels[top : top + size, left : left + size]


@pytest.mark.parametrize("size", [(40, 64), (131, 67), (32, 32), (20, 90), (64, 80)])  # 64: exactly twice too large
def test_center_crop_is_guided_diffusions_to_the_bit(size):
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (*size, 3), dtype=np.uint8))
    np.testing.assert_array_equal(center_crop(np.asarray(image), 32), guided_diffusion_crop(image, 32))


def test_random_crop_reaches_all_corners_and_no_further():
    image = Image.fromarray(np.arange(48 * 48 * 3, dtype=np.uint32).astype(np.uint8).reshape(48, 48, 3))
    whole = np.asarray(image)
    np.testing.assert_array_equal(random_crop(np.asarray(image), 48, 32, 0.0, 0.0), whole[:32, :32])
    np.testing.assert_array_equal(random_crop(np.asarray(image), 48, 32, 0.9999, 0.9999), whole[16:, 16:])


@pytest.mark.parametrize("mode", ["L", "LA", "P", "RGBA", "CMYK", "1", "RGB"])
def test_every_mode_becomes_rgb(mode):
    kind = "TIFF" if mode == "CMYK" else "PNG"
    image = decode_rgb(encoded(Image.new(mode, (5, 4)), kind), "x")
    assert image.mode == "RGB" and image.size == (5, 4)


def test_sixteen_bit_grey_keeps_its_upper_byte():
    deep = Image.fromarray(np.array([[0, 255, 256, 65535]], dtype=np.uint16))
    np.testing.assert_array_equal(np.asarray(decode_rgb(encoded(deep), "x"))[0, :, 0], [0, 0, 1, 255])


@pytest.mark.parametrize("size", [(1, 1), (2000, 1), (1, 3000), (20000, 10)])
def test_strange_shapes_become_squares(size):
    image = decode_rgb(encoded(Image.new("RGB", size, (9, 8, 7))), "x")
    assert (center_crop(np.asarray(image), 256) == (9, 8, 7)).all()


@pytest.mark.parametrize("data", [b"", b"hello", encoded(Image.new("RGB", (64, 64), (1, 2, 3)), "JPEG")[:-200]])
def test_what_is_no_image_is_named(data):
    with pytest.raises(InputError, match=r"^folder/bad\.png: not a readable image"):
        decode_rgb(data, "folder/bad.png")
    with pytest.raises(InputError) as told:
        decode_rgb(b"hello", "a.png")
    assert " at 0x" not in str(told.value)  # the manifest keeps why an image was skipped, and is the same every time


def test_a_decompression_bomb_is_refused(monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    with pytest.raises(InputError, match="bomb"):
        decode_rgb(encoded(Image.new("RGB", (12, 12))), "bomb.png")


def test_keys_are_unique_ascii_without_dots():
    names = [
        "a/x.png",
        "a/x.jpg",
        "a.b/x.y.png",
        "a_b/x_y.png",
        "é/ü.png",
        "deep/" * 40 + "x.png",
        "deep/" * 40 + "y.png",
    ]
    keys = unique_keys(names)
    assert len(set(keys)) == len(names)
    assert all("." not in key and key.isascii() and 0 < len(key) <= 80 for key in keys)
    assert keys[0] == "a/x"


def test_class_folders_are_classes_in_the_order_of_their_names(images):
    source = open_images(images)
    assert source.classes == ("class0", "class1", "class2") and len(source.items) == 24
    assert [item.name for item in source.items] == sorted(item.name for item in source.items)
    assert {item.name.partition("/")[0]: item.label for item in source.items} == {f"class{n}": n for n in range(3)}


def test_a_flat_folder_has_no_classes_and_a_mixed_one_is_refused(tmp_path):
    (tmp_path / "a.png").write_bytes(encoded(Image.new("L", (4, 4))))
    assert open_images(tmp_path).classes == ()
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "b.png").write_bytes(encoded(Image.new("L", (4, 4))))
    with pytest.raises(InputError, match="beside class folders"):
        open_images(tmp_path)


def test_missing_and_empty_sources_are_refused(tmp_path):
    with pytest.raises(InputError, match="no such folder"):
        open_images(tmp_path / "nowhere")
    with pytest.raises(InputError, match="no images"):
        open_images(tmp_path)


def write_tar(path, members: dict[str, bytes]) -> None:
    with tarfile.open(path, "w") as archive:
        for name, data in members.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(data)
            archive.addfile(entry, io.BytesIO(data))


def test_webdataset_tars_are_read_in_place(tmp_path):
    pixels = [encoded(Image.new("RGB", (8, 8), (value, 0, 0))) for value in (10, 20, 30)]
    write_tar(tmp_path / "a.tar", {"0.png": pixels[0], "0.cls": b"1", "1.png": pixels[1], "1.cls": b"0"})
    write_tar(tmp_path / "b.tar", {"0.png": pixels[2], "0.cls": b"2", "0.json": b"{}"})
    source = open_images(tmp_path)
    assert [item.label for item in source.items] == [1, 0, 2] and source.classes == ("0", "1", "2")
    assert [np.asarray(decode_rgb(item.read(), item.name))[0, 0, 0] for item in source.items] == [10, 20, 30]


def test_broken_tars_are_refused(tmp_path):
    image = encoded(Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 40, 3), dtype=np.uint8)))
    write_tar(tmp_path / "a.tar", {"0.png": image, "0.cls": b"x"})
    with pytest.raises(InputError, match="not a class number"):
        open_images(tmp_path)
    write_tar(tmp_path / "a.tar", {"0.png": image, "0.cls": b"1", "1.png": image})
    with pytest.raises(InputError, match=r"1 of 2 images have no \.cls"):
        open_images(tmp_path)
    write_tar(tmp_path / "a.tar", {"0.png": image})
    whole = (tmp_path / "a.tar").read_bytes()
    (tmp_path / "a.tar").write_bytes(whole[:1500])
    with pytest.raises(InputError, match=r"cut off|not a readable tar"):
        open_images(tmp_path)
    (tmp_path / "a.tar").write_bytes(b"no tar at all" * 100)
    with pytest.raises(InputError, match="not a readable tar"):
        open_images(tmp_path)


@pytest.mark.parametrize("damage", ["cut between members", "flipped header"])
def test_a_tar_that_ends_too_early_is_refused(tmp_path, damage):
    image = encoded(Image.new("RGB", (8, 8)))
    write_tar(tmp_path / "a.tar", {f"{index}.png": image for index in range(4)})
    data = bytearray((tmp_path / "a.tar").read_bytes())
    member = 512 + -(-len(image) // 512) * 512
    if damage == "flipped header":
        data[2 * member + 3] ^= 1
    else:
        data = data[: 2 * member]
    (tmp_path / "a.tar").write_bytes(data)
    with pytest.raises(InputError, match="end of archive"):
        open_images(tmp_path)


def test_two_images_of_one_key_in_a_tar_are_refused(tmp_path):
    image = encoded(Image.new("RGB", (8, 8)))
    write_tar(tmp_path / "a.tar", {"0.png": image, "0.seg.png": image, "0.cls": b"1"})
    with pytest.raises(InputError, match=r"0\.png and 0\.seg\.png have one key"):
        open_images(tmp_path)


def test_linked_class_folders_are_classes_too_and_loops_end(tmp_path, images):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "x.png").write_bytes(encoded(Image.new("L", (4, 4))))
    (tmp_path / "b").symlink_to(images / "class0")
    (tmp_path / "a" / "loop").symlink_to(tmp_path)
    (tmp_path / ".hidden").mkdir()
    (tmp_path / ".hidden" / "y.png").write_bytes(b"")
    source = open_images(tmp_path)
    assert source.classes == ("a", "b") and len(source.items) == 9


def test_an_image_that_vanished_is_a_bad_image(tmp_path):
    (tmp_path / "a.png").write_bytes(encoded(Image.new("L", (4, 4))))
    item = open_images(tmp_path).items[0]
    (tmp_path / "a.png").unlink()
    with pytest.raises(InputError, match=r"a\.png: not a readable file"):
        item.read()


def test_the_fingerprint_of_a_source_knows_names_sizes_and_labels(images, tmp_path):
    from tests.conftest import make_images

    same = make_images(tmp_path / "same")
    assert open_images(same).fingerprint() == open_images(images).fingerprint()
    (same / "class0" / "image0.png").rename(same / "class0" / "other.png")
    assert open_images(same).fingerprint() != open_images(images).fingerprint()


def test_each_epoch_is_a_permutation_and_epochs_differ():
    stream = stream_slice(3, 10, 0, 30).reshape(3, 10)
    assert (np.sort(stream, axis=1) == np.arange(10)).all()
    assert (stream[0] != stream[1]).any() and (stream[1] != stream[2]).any()


@pytest.mark.parametrize("ranks", [1, 2, 3, 4])
def test_the_ranks_share_a_step_in_order_across_the_end_of_an_epoch(ranks):
    whole = stream_slice(0, 10, 0, 24)
    shares = [
        stream_slice(0, 10, step * 12 + rank * (12 // ranks), 12 // ranks) for step in range(2) for rank in range(ranks)
    ]
    np.testing.assert_array_equal(np.concatenate(shares), whole)


def test_draws_depend_on_seed_purpose_and_index_alone():
    alone = torch.stack([normals((3,), 1, "noise", range(i, i + 1), "cpu")[0] for i in range(5)])
    torch.testing.assert_close(normals((3,), 1, "noise", range(5), "cpu"), alone, atol=0, rtol=0)
    assert len({key_of(1, "a", 0), key_of(2, "a", 0), key_of(1, "b", 0), key_of(1, "a", 1)}) == 4
    assert (normals((3,), 1, "other", range(5), "cpu") != alone).any()


def test_draws_have_their_distribution():
    draws = normals((1000,), 0, "noise", range(50), "cpu")
    assert abs(draws.mean()) < 0.02 and abs(draws.std() - 1) < 0.02  # 50 000 draws: 4.5 standard errors
    uniform = uniforms(0, "time", range(5000))
    assert uniform.min() > 0 and uniform.max() < 1
    assert abs(uniform.mean() - 0.5) < 0.02 and abs(uniform.var() - 1 / 12) < 0.005


def test_a_permutation_is_one_and_depends_on_its_seed():
    orders = [permutation(seed, "cache", 0, 100) for seed in (0, 1)]
    assert (np.sort(orders) == np.arange(100)).all() and (orders[0] != orders[1]).any()


def test_work_ahead_keeps_its_order_and_hands_on_failures():
    assert list(ahead(lambda x: x * 2, range(20))) == list(range(0, 40, 2))
    made = []

    def make(x: int) -> int:
        made.append(x)
        if x == 3:
            raise InputError("three")
        return x

    with pytest.raises(InputError, match="three"):
        list(ahead(make, range(100)))
    assert len(made) == 4
    assert pooled(lambda x: x + 1, range(5), 3) == [1, 2, 3, 4, 5]


def test_a_reader_that_leaves_early_stops_the_thread():
    feed = ahead(lambda x: x, iter(int, 1))  # endless
    assert next(feed) == 0
    feed.close()  # would hang if the thread did not notice
    with pytest.raises(StopIteration):
        next(feed)


def test_windows_of_a_resized_image_are_pillows_to_the_bit():
    assert compiled_resample() is not None  # this machine has a compiler: else only Pillow would be tested
    generator = np.random.default_rng(0)
    for _ in range(150):
        wide, high = (int(side) for side in generator.integers(3, 260, 2))
        size = tuple(int(side) for side in generator.integers(3, 160, 2))
        left, top = int(generator.integers(size[0])), int(generator.integers(size[1]))
        window = (
            left,
            top,
            int(generator.integers(1, size[0] - left + 1)),
            int(generator.integers(1, size[1] - top + 1)),
        )
        pixels = generator.integers(0, 256, (high, wide, 3), dtype=np.uint8)
        for kind in ("box", "bicubic"):
            found = resized_window(pixels, size, window, kind)
            np.testing.assert_array_equal(found, by_pillow(pixels, size, window, kind), err_msg=f"{wide} {high} {size}")


def test_crops_of_any_shape_are_guided_diffusions_to_the_bit():
    generator = np.random.default_rng(1)
    for _ in range(60):
        wide, high = (int(side) for side in generator.integers(20, 400, 2))
        image = Image.fromarray(generator.integers(0, 256, (high, wide, 3), dtype=np.uint8))
        size = int(generator.integers(8, 100))
        np.testing.assert_array_equal(
            center_crop(np.asarray(image), size), guided_diffusion_crop(image, size), err_msg=f"{image} {size}"
        )


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"subsampling": 0},
        {"subsampling": 1},
        {"progressive": True},
        {"quality": 30},
        {"mode": "L"},
        {"mode": "CMYK"},
        {"orientation": 6},
        {"restart_marker_blocks": 3},
    ],
)
def test_jpegs_of_all_kinds_decode_as_pillow_decodes_them(options):
    options = dict(options)
    generator, exif = np.random.default_rng(2), Image.Exif()
    mode = options.pop("mode", "RGB")
    exif[0x0112] = options.pop("orientation", 1)
    for wide, high in ((64, 48), (63, 41), (1, 1), (17, 90)):
        noise = Image.fromarray(generator.integers(0, 256, (high // 4 + 1, wide // 4 + 1, 3), dtype=np.uint8))
        buffer = io.BytesIO()
        noise.resize((wide, high)).convert(mode).save(buffer, "JPEG", exif=exif, **options)
        data = buffer.getvalue()
        np.testing.assert_array_equal(decode_pixels(data, "x"), np.asarray(decode_rgb(data, "x")))
    with pytest.raises(InputError, match="not a readable image"):
        decode_pixels(data[: len(data) // 2], "x")


def test_blocks_are_exact_permutations_that_stay_near_one_another():
    for size, block in ((1000, 7), (1000, 64), (10, 64), (257, 1)):
        orders = [block_permutation(3, epoch, size, block) for epoch in range(2)]
        assert (np.sort(orders, axis=1) == np.arange(size)).all()
        assert size < 20 or (orders[0] != orders[1]).any()
        for start in range(0, size, block * WINDOW_BLOCKS):  # a window of the order reads no more runs than it may
            window = orders[0][start : start + block * WINDOW_BLOCKS]
            assert len(set(window // block)) <= WINDOW_BLOCKS + 1
    whole = stream_slice(0, 100, 0, 250, 8)
    parts = [stream_slice(0, 100, first, 25, 8) for first in range(0, 250, 25)]
    np.testing.assert_array_equal(np.concatenate(parts), whole)


def test_work_behind_gets_all_items_and_failures_go_both_ways():
    got = []
    with behind(got.extend) as put:
        for item in range(10):
            put(item)
    assert got == list(range(10))

    def fail(items):
        next(items)
        raise InputError("disk")

    with pytest.raises(InputError, match="disk"), behind(fail) as put:
        for item in range(10):
            put(item)
    cleaned = []

    def tidy(items):
        try:
            list(items)
        except Abandoned:
            cleaned.append(True)
            raise

    with pytest.raises(KeyError), behind(tidy) as put:
        put(1)
        raise KeyError
    assert cleaned == [True]


def test_the_feed_gives_each_step_its_samples_while_a_batch_is_in_use(cache):
    opened = open_cache(cache)

    def samples_of(step: int) -> tuple[np.ndarray, list[bool]]:
        return stream_slice(0, len(opened), step * 5, 5), [step % 2 == 0] * 5

    feed = LatentFeed(opened, samples_of, 5, torch.device("cpu"))
    before = None
    for step, (indices, latents) in enumerate(ahead(feed.batch, range(40))):
        np.testing.assert_array_equal(indices, samples_of(step)[0])
        assert torch.equal(latents, opened.latents(indices, samples_of(step)[1]))
        if before is not None:  # its copy to a GPU may still be under way
            assert torch.equal(before[0], before[1])
        before = (latents, latents.clone())
    assert len({buffer.data_ptr() for buffer in feed.buffers}) == len(feed.buffers) == 5
