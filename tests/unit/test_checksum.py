"""The checksum of checkpoints: the same by whatever way it is computed, and what it finds for certain."""

import errno
import itertools
import os

import numpy as np
import pytest

from raecli.store import checksum
from raecli.store.checksum import COLUMNS, GRID, PIECE, Checksum, GridMemory, checksums, piece_sums, sums_of


@pytest.fixture(params=["compiled", "plain"])
def way(request, monkeypatch):
    """Both ways to the same sums: memory.c, and numpy where there is no compiler."""
    if request.param == "plain":
        monkeypatch.setattr(checksum, "compiled_sums", lambda: None)
    assert (checksum.compiled_sums() is not None) == (request.param == "compiled")


def in_parts(data: bytes, generator: np.random.Generator) -> str:
    """The checksum of bytes that come in parts of random sizes."""
    found, start = Checksum(), 0
    while start < len(data):
        size = int(generator.integers(1, max(2, len(data) // 3)))
        found.update(memoryview(data)[start : start + size])
        start += size
    return found.hexdigest()


@pytest.mark.parametrize("size", [0, 1, 9, GRID - 1, GRID, GRID + 3, 3 * GRID, PIECE + GRID + 5])
def test_parts_of_any_size_and_pieces_on_threads_give_one_checksum(tmp_path, size, monkeypatch):
    generator = np.random.default_rng(size)
    data = generator.bytes(size)
    (tmp_path / "file").write_bytes(data)
    (tmp_path / "longer").write_bytes(data + b"\0")
    found = checksums(tmp_path, ["file", "longer"])
    assert in_parts(data, generator) == in_parts(data, generator) == found["file"] != found["longer"]
    monkeypatch.setattr(checksum, "compiled_sums", lambda: None)  # numpy's are those of memory.c
    assert in_parts(data, generator) == found["file"]
    assert checksums(tmp_path, ["file", "longer"]) == found


def test_a_file_that_is_cut_while_it_is_read_and_one_that_cannot_be_read_are_errors_that_name_it(tmp_path, way):
    path, memory = tmp_path / "file", GridMemory()
    path.write_bytes(bytes(3 * GRID))
    with path.open("rb", buffering=0) as file:
        assert len(piece_sums(file, GRID, 3 * GRID, memory)) == 2 * len(piece_sums(file, 0, 1, memory))
        os.truncate(path, GRID + 5)
        with pytest.raises(OSError, match="cut while") as error:
            piece_sums(file, 0, 3 * GRID, memory)
    assert error.value.errno == errno.EIO and error.value.filename == str(path)
    with (tmp_path / "unreadable").open("wb", buffering=0) as file, pytest.raises(OSError, match="descriptor") as error:
        piece_sums(file, 0, 8, memory)
    assert error.value.errno == errno.EBADF and error.value.filename == str(tmp_path / "unreadable")


def test_a_read_that_brings_a_part_is_gone_on_with(tmp_path, monkeypatch):
    """The compiled form loops in the same way; no file system of a test reads in parts."""
    data, read = np.random.default_rng(3).bytes(2 * GRID + 9), os.preadv
    (tmp_path / "file").write_bytes(data)
    whole = checksums(tmp_path, ["file"])
    monkeypatch.setattr(checksum, "compiled_sums", lambda: None)
    monkeypatch.setattr(os, "preadv", lambda handle, memory, offset: read(handle, [memory[0][:300_001]], offset))
    assert checksums(tmp_path, ["file"]) == whole


def test_a_file_goes_to_where_its_parts_are_wanted_and_nowhere_else(tmp_path, way):
    generator = np.random.default_rng(4)
    size = 2 * PIECE + GRID + 77
    data = generator.integers(0, 256, size, np.uint8)
    (tmp_path / "file").write_bytes(data)
    cuts = np.unique([8, 9, 13, 4099, GRID - 1, GRID, PIECE - 3, 2 * PIECE, *generator.integers(8, size, 40), size])
    memory = np.full(size + 64 * len(cuts), 7, np.uint8)
    places, expected, start = [], memory.copy(), 5  # parts lie in memory with gaps, at addresses of any kind
    for number, (begin, end) in enumerate(itertools.pairwise(cuts.tolist())):
        if number % 5 != 2:  # some parts nobody wants
            places.append((begin, end, memory.ctypes.data + start))
            expected[start : start + end - begin] = data[begin:end]
            start += end - begin + number % 7
    plain = checksums(tmp_path, ["file"])
    assert checksums(tmp_path, ["file"], lambda name: np.array(places)) == plain
    np.testing.assert_array_equal(memory, expected)


def words(seed: int) -> np.ndarray:
    """A grid of weights: float32, as checkpoints hold them."""
    return np.random.default_rng(seed).normal(size=GRID // 4).astype(np.float32).view("<u8")


def test_a_flipped_bit_is_found_wherever_it_is():
    data, generator = words(0), np.random.default_rng(1)
    told = sums_of(data.tobytes())
    for bit in range(64):
        changed = data.copy()
        changed[generator.integers(len(data))] ^= np.uint64(1) << np.uint64(bit)
        assert sums_of(changed.tobytes()) != told


def test_up_to_three_wrong_words_are_found_even_where_their_sum_is_kept():
    data, generator = words(0), np.random.default_rng(2)
    told = sums_of(data.tobytes())
    for trial in range(60):
        changed = data.copy()
        places = generator.choice(len(data), 3 - trial % 2, replace=False)
        if trial % 3 == 0:  # in one row; and in one column
            places = places % COLUMNS if trial % 2 else places // COLUMNS * COLUMNS
        if len(set(places)) < len(places):
            continue
        change = generator.integers(1, 2**63, len(places), dtype=np.uint64)
        change[-1] = -int(change[:-1].sum(dtype=np.uint64)) % 2**64
        changed[places] += change
        assert changed.sum(dtype=np.uint64) == data.sum(dtype=np.uint64) and sums_of(changed.tobytes()) != told
    top = data.copy()
    top[[5, 5 + COLUMNS]] ^= np.uint64(1 << 63)  # two highest bits: a sum alone would not see them
    assert sums_of(top.tobytes()) != told


def test_a_lost_page_and_pages_that_changed_places_are_found():
    data = np.concatenate([words(0), words(1)]).view(np.uint8)
    told, stale = sums_of(data.tobytes()), words(2).view(np.uint8)
    for start in (0, 4096 * 7, 1000, GRID - 2048):  # also across rows, and across grids
        for content in (np.zeros(4096, np.uint8), stale[:4096]):
            changed = data.copy()
            changed[start : start + 4096] = content
            assert sums_of(changed.tobytes()) != told
    pages = data.reshape(-1, 4096).copy()
    pages[[3, 9]] = pages[[9, 3]]
    assert sums_of(pages.tobytes()) != told
    assert sums_of(np.roll(data, 8).tobytes()) != told


def test_what_it_cannot_see_is_what_it_says():
    data = words(0)
    changed = data.copy()
    for place, sign in ((0, 1), (1, -1), (COLUMNS, -1), (COLUMNS + 1, 1)):  # four words, cancelling in rows and columns
        changed[place] = (int(changed[place]) + sign) % 2**64
    assert sums_of(changed.tobytes()) == sums_of(data.tobytes())
