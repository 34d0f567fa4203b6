"""Reading sets of images: folders, npz files, and what is refused."""

import io
import json
import tracemalloc
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from raecli.errors import InputError
from raecli.metrics.reference import image_batches, locate_source, open_images, rank_slice, read_card

PIXELS = np.random.default_rng(0).integers(0, 256, (11, 6, 8, 3), dtype=np.uint8)
EXPECTED = torch.from_numpy(PIXELS).permute(0, 3, 1, 2)


def write_folder(root: Path, pixels: np.ndarray = PIXELS) -> Path:
    """Pixels as 000000.png and so on."""
    root.mkdir(parents=True)
    for index, image in enumerate(pixels):
        Image.fromarray(image).save(root / f"{index:06d}.png")
    return root


def read_all(source: Path, batch_size: int = 4) -> torch.Tensor:
    """Every image of a source, read by batches."""
    images = open_images(source)
    return torch.cat([batch for _, batch in image_batches(images, 0, len(images), batch_size)])


@pytest.mark.parametrize("batch_size", [1, 4, 11, 100])
def test_a_png_folder_and_an_npz_of_the_same_pixels_are_the_same_set(tmp_path, batch_size):
    np.savez(tmp_path / "stored.npz", arr_0=PIXELS)
    np.savez_compressed(tmp_path / "deflated.npz", arr_0=PIXELS)
    np.save(tmp_path / "plain.npy", PIXELS)
    write_folder(tmp_path / "folder")
    for source in ("folder", "stored.npz", "deflated.npz", "plain.npy"):
        assert torch.equal(read_all(tmp_path / source, batch_size), EXPECTED)


def test_a_second_version_header_is_read(tmp_path):
    buffer = io.BytesIO()
    np.lib.format.write_array(buffer, PIXELS, version=(2, 0))
    with zipfile.ZipFile(tmp_path / "v2.npz", "w") as file:
        file.writestr("arr_0.npy", buffer.getvalue())
    assert torch.equal(read_all(tmp_path / "v2.npz"), EXPECTED)


def test_an_npz_is_streamed_and_never_whole_in_memory(tmp_path):
    """60 MB of pixels pass through; a batch is 0.8 MB, two are alive at once."""
    np.savez_compressed(tmp_path / "large.npz", arr_0=np.zeros((320, 256, 256, 3), np.uint8))
    images = open_images(tmp_path / "large.npz")
    tracemalloc.start()
    seen = sum(len(batch) for _, batch in image_batches(images, 0, len(images), 4))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert seen == 320
    assert peak < 10e6


def test_an_array_is_read_at_any_place_forwards_and_backwards(tmp_path):
    np.savez(tmp_path / "a.npz", arr_0=PIXELS)
    images = open_images(tmp_path / "a.npz")
    for start, stop in [(5, 8), (9, 11), (1, 3), (0, 11)]:
        assert torch.equal(images.read(start, stop), EXPECTED[start:stop])


def test_ranks_cover_every_sample_once():
    for count in (0, 1, 7, 8, 50):
        for world in (1, 2, 3, 8):
            slices = [rank_slice(count, rank, world) for rank in range(world)]
            assert [index for start, stop in slices for index in range(start, stop)] == list(range(count))
            assert max(stop - start for start, stop in slices) - min(stop - start for start, stop in slices) <= 1


def test_class_folders_are_read_in_the_order_of_their_paths(tmp_path):
    write_folder(tmp_path / "set" / "b", PIXELS[2:5])
    write_folder(tmp_path / "set" / "a", PIXELS[:2])
    images = open_images(tmp_path / "set")
    assert images.folder_classes() == ["a", "a", "b", "b", "b"]
    assert torch.equal(images.read(0, 5), EXPECTED[:5])
    assert images.names(2, 3) == [str(tmp_path / "set" / "b" / "000000.png")]


def test_a_flat_folder_and_an_array_have_no_classes(tmp_path):
    np.savez(tmp_path / "a.npz", arr_0=PIXELS)
    assert open_images(write_folder(tmp_path / "flat")).folder_classes() is None
    assert open_images(tmp_path / "a.npz").folder_classes() is None


def test_pictures_of_many_samples_and_other_files_are_no_samples(tmp_path):
    root = write_folder(tmp_path / "samples")
    (root / ".partial-1").mkdir()
    for name in ("grid.png", "picture.png", ".hidden.png", ".partial-1/000000.png"):
        Image.fromarray(np.zeros((40, 40, 3), np.uint8)).save(root / name)
    (root / "samples.json").write_text("{}")
    assert len(open_images(root)) == 11


def test_grey_and_transparent_images_become_rgb(tmp_path):
    (tmp_path / "mixed").mkdir()
    grey = PIXELS[0, :, :, 0]
    Image.fromarray(grey).save(tmp_path / "mixed" / "0.png")
    Image.fromarray(np.dstack([PIXELS[1], grey])).save(tmp_path / "mixed" / "1.png")
    images = open_images(tmp_path / "mixed").read(0, 2)
    assert torch.equal(images[0], torch.from_numpy(grey).expand(3, -1, -1))
    assert torch.equal(images[1], EXPECTED[1])


def test_a_folder_with_one_npz_and_no_image_means_the_npz(tmp_path):
    np.savez(tmp_path / "samples.npz", arr_0=PIXELS)
    assert locate_source(str(tmp_path)) == tmp_path / "samples.npz"
    write_folder(tmp_path / "more")
    assert locate_source(str(tmp_path)) == tmp_path


def test_the_protocol_is_read_in_the_folder_or_beside_the_npz(tmp_path):
    root = write_folder(tmp_path / "samples")
    assert read_card(root) == {}
    (root / "samples.json").write_text(json.dumps({"seed": 7}))
    assert read_card(root) == read_card(root / "samples.npz") == {"seed": 7}
    for text in ("[1]", "{"):
        (root / "samples.json").write_text(text)
        with pytest.raises(InputError, match=r"samples\.json"):
            read_card(root)


@pytest.mark.parametrize(
    ("array", "said"),
    [
        (PIXELS.astype(np.float32), "float32"),
        (PIXELS[..., :1], r"\[11, 6, 8, 1\]"),
        (PIXELS[..., 0], r"\[11, 6, 8\]"),
        (PIXELS[:0], r"\[0, 6, 8, 3\]"),
        (np.asfortranarray(PIXELS), "Fortran"),
    ],
)
def test_arrays_that_hold_no_rgb_bytes_are_refused(tmp_path, array, said):
    np.savez(tmp_path / "bad.npz", arr_0=array)
    with pytest.raises(InputError, match=said):
        open_images(tmp_path / "bad.npz")


def test_statistics_alone_hold_no_images(tmp_path):
    np.savez(tmp_path / "statistics.npz", mu=np.zeros(2), sigma=np.eye(2))
    with pytest.raises(InputError, match="arr_0 is missing"):
        open_images(tmp_path / "statistics.npz")


def test_a_torn_npz_is_refused(tmp_path):
    np.save(tmp_path / "whole.npy", PIXELS)
    torn = tmp_path / "torn.npy"
    torn.write_bytes((tmp_path / "whole.npy").read_bytes()[:-10])
    assert torch.equal(open_images(torn).read(0, 10), EXPECTED[:10])
    with pytest.raises(InputError, match="ends before image 10 of 11"):
        open_images(torn).read(8, 11)
    (tmp_path / "torn.npz").write_bytes(b"PK\x03\x04 nothing")
    with pytest.raises(InputError, match="cannot be read"):
        open_images(tmp_path / "torn.npz")


def test_images_of_another_size_are_refused_by_name(tmp_path):
    root = write_folder(tmp_path / "mixed")
    Image.fromarray(np.zeros((6, 9, 3), np.uint8)).save(root / "000004.png")
    with pytest.raises(InputError, match=r"000004\.png: 9 x 6 pixels, but 000000\.png has 8 x 6"):
        read_all(root)


def test_files_that_are_no_8_bit_images_are_refused_by_name(tmp_path):
    root = write_folder(tmp_path / "broken")
    (root / "000003.png").write_bytes(b"not an image")
    with pytest.raises(InputError, match=r"000003\.png: cannot be read"):
        read_all(root)
    Image.fromarray(np.zeros((6, 8), np.uint16)).save(root / "000003.png")
    with pytest.raises(InputError, match=r"000003\.png: pixels of mode I;16"):
        read_all(root)


def test_what_is_no_set_of_images_is_refused(tmp_path):
    with pytest.raises(InputError, match="no such file"):
        locate_source(str(tmp_path / "absent"))
    with pytest.raises(InputError, match="no PNG or JPEG"):
        open_images(tmp_path)
    (tmp_path / "notes.txt").write_text("text")
    with pytest.raises(InputError, match="neither a folder nor an"):
        open_images(tmp_path / "notes.txt")


def test_a_folder_of_reconstructions_is_no_set_of_samples(tmp_path):
    for part in ("reconstructions", "originals"):
        (tmp_path / part).mkdir()
        Image.new("RGB", (8, 8)).save(tmp_path / part / "a.png")
    (tmp_path / "reconstructions.json").write_text("{}")
    with pytest.raises(InputError, match="rae eval reconstruction IMAGES"):
        locate_source(str(tmp_path))
    assert len(open_images(locate_source(str(tmp_path / "reconstructions")))) == 1
