"""Copies between addresses: what is asked for, nothing beside it, by either way; and what reads the cache by them."""

import ctypes
import os

import numpy as np
import pytest
import torch
from torch import nn

from raecli import compiled
from raecli.errors import InputError
from raecli.store import latent_cache, memory
from raecli.store.latent_cache import PROBE, Mapped, open_cache
from raecli.store.memory import CACHE, copy_memory, copy_tensors


@pytest.fixture(params=["compiled", "plain"])
def way(request, monkeypatch):
    """memory.c, and memmove where there is no compiler."""
    if request.param == "plain":
        monkeypatch.setattr(memory, "native", lambda: None)
    assert (memory.native() is not None) == (request.param == "compiled")


@pytest.mark.parametrize("most", [300, CACHE // 8])  # in the cache's size, and past it
def test_bytes_arrive_from_any_address_at_any_address(way, most):
    generator = np.random.default_rng(most)
    source = generator.integers(0, 256, 8 * CACHE, np.uint8)
    target = np.full(8 * CACHE, 7, np.uint8)
    expected, start, asked = target.copy(), 1, []
    while start < len(target) - most - 40:
        size = int(generator.integers(0, most))
        begin = int(generator.integers(0, len(source) - size))
        asked.append((target.ctypes.data + start, source.ctypes.data + begin, size))
        expected[start : start + size] = source[begin : begin + size]
        start += size + int(generator.integers(1, 40))
        if len(asked) == 40 and most == 300:
            break
    assert (sum(size for *_, size in asked) > CACHE) == (most != 300)
    copy_memory(*np.array(asked).T)
    np.testing.assert_array_equal(target, expected)


def test_nothing_is_copied_where_nothing_is_asked_for(way):
    memory = np.arange(64, dtype=np.uint8)
    before = memory.copy()
    copy_memory(*np.empty((3, 0), np.int64))
    copy_memory(*np.array([(memory.ctypes.data, memory.ctypes.data + 32, 0)]).T)
    np.testing.assert_array_equal(memory, before)


def test_tensors_of_all_kinds_are_filled(way):
    model = nn.Linear(700, 1500)
    wanted = [torch.randn(1500, 700), torch.randn(1500), torch.randn(4, 6), torch.arange(5.0), torch.tensor(3.0)]
    filled = [
        model.weight,
        model.bias,
        torch.zeros(6, 4).T,  # not dense in this order
        torch.zeros(5, dtype=torch.int64),  # another dtype
        torch.zeros(()),
    ]
    copy_tensors(list(zip(filled, wanted, strict=True)))
    for to, source in zip(filled, wanted, strict=True):
        assert torch.equal(to.detach(), source.to(to.dtype))
    assert model.weight.requires_grad and model.weight.grad_fn is None


def test_without_a_compiler_there_is_no_library(tmp_path, monkeypatch):
    source = tmp_path / "one.c"
    source.write_text("int one(void) { return 1; }\n")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("CC", "/nonexistent/cc")
    assert compiled.library_of.__wrapped__(source) is None
    assert list((tmp_path / "cache" / "rae").iterdir()) == []  # no debris
    monkeypatch.delenv("CC")
    assert compiled.library_of.__wrapped__(source).one() == 1
    old = tmp_path / "cache" / "rae" / "compiling-killed"
    old.mkdir()
    os.utime(old, (0, 0))
    source.write_text("int one(void) { return 2; }\n")
    monkeypatch.setenv("CC", "cc -O1")  # with its options
    assert compiled.library_of.__wrapped__(source).one() == 2 and not old.exists()
    monkeypatch.setenv("XDG_CACHE_HOME", "cache")  # relative: not to be followed
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert compiled.built(source).parent == tmp_path / "home" / ".cache" / "rae"
    monkeypatch.setenv("CC", "'")
    source.write_text("int one(void) { return 3; }\n")
    assert compiled.library_of.__wrapped__(source) is None
    monkeypatch.setenv("XDG_CACHE_HOME", str(source / "no folder"))
    assert compiled.library_of.__wrapped__(source) is None
    assert isinstance(compiled.library_of(memory.SOURCE), ctypes.CDLL)


def test_a_cache_gives_the_same_by_either_way(way, cache):
    opened = open_cache(cache)
    flips = [index % 3 == 0 for index in range(len(opened))] if opened.has_flips else None
    order = torch.randperm(len(opened), generator=torch.Generator().manual_seed(0)).tolist()
    batch = opened.latents(order, flips)
    for row, index in enumerate(order):
        shard = int(np.searchsorted(opened.starts, index, side="right")) - 1
        data = (cache / opened.manifest.shards[shard].name).read_bytes()
        view = int(flips[row]) if flips else 0
        begin = opened.layout.latent_offset(index - int(opened.starts[shard]), view)
        assert batch[row].view(torch.uint8).numpy().tobytes() == data[begin : begin + opened.layout.latent_bytes]


def test_samples_that_a_cache_does_not_have_and_rows_that_do_not_fit_are_refused(cache):
    opened = open_cache(cache)
    for wrong in ([-1], [len(opened)], [0, 1 << 60]):
        with pytest.raises(IndexError, match=f"of a cache of {len(opened)}"):
            opened.latents(wrong)
    shape, dtype = opened.layout.latent_shape, opened.dtype
    other = torch.float64
    for out in (
        torch.empty((1, *shape), dtype=other),
        torch.empty((1, *shape[:2], shape[2] + 1), dtype=dtype),
        torch.empty((1, *shape[1:], shape[0]), dtype=dtype).permute(0, 3, 1, 2),
    ):
        with pytest.raises(ValueError, match="dense"):
            opened.latents([0], out=out)
    with pytest.raises(ValueError, match="rows"):
        opened.latents([0, 1], out=torch.empty((1, *shape), dtype=dtype))


def test_a_shard_that_was_cut_after_the_cache_was_opened_is_told_when_it_is_mapped(cache, tmp_path):
    opened = open_cache(cache)
    record = opened.manifest.shards[0]
    cut = tmp_path / record.name
    cut.write_bytes((cache / record.name).read_bytes()[:-600])
    with pytest.raises(InputError, match=f"which {record.samples} samples do not take"):
        Mapped(cut, opened.layout, record.samples)


def test_a_part_is_asked_about_while_all_is_in_memory_and_all_when_something_is_not(cache, monkeypatch):
    opened, asked = open_cache(cache), []
    missing = set()

    def will_need(self, sample, view):
        asked.append(sample)
        return sample in missing

    monkeypatch.setattr(latent_cache.Mapped, "will_need", will_need)
    batch = list(range(min(16, opened.manifest.shards[0].samples)))
    counts = []
    for gone in (set(), set(), {batch[PROBE]}, {batch[1]}, set(), set()):
        missing, before = gone, len(asked)
        opened.read_ahead(batch)
        counts.append(len(asked) - before)
    few, whole = -(-len(batch) // PROBE), len(batch)
    assert counts == [whole, few, few + whole, whole, whole, few]
    opened.remote = object()  # shards that are not here yet have to be sent for
    before = len(asked)
    opened.read_ahead(batch)
    assert len(asked) - before == whole
