"""safetensors files read by ourselves: as the library reads them, to where they belong; and those that are refused."""

import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from raecli.errors import CheckpointError
from raecli.store.checkpoint import (
    EMA,
    MODEL,
    OPTIMIZER,
    load_optimizer,
    load_weights,
    newest_checkpoint,
    read_checkpoint,
    save_checkpoint,
)
from raecli.store.checksum import checksums
from raecli.store.statistics import LatentStatistics
from raecli.store.tensors import DTYPES, places_for, read_header, write_tensors
from raecli.training.beginning import resumed_from
from raecli.training.distributed import Ranks
from raecli.training.ema import Ema


def some_tensors():
    """Of every dtype, of none to three dimensions, one empty, odd sizes."""
    generator = torch.Generator().manual_seed(0)
    shapes = [(), (3,), (0, 4), (5, 7), (2, 3, 5), (11,), (1, 1), (6,), (300, 999), (2, 2)]
    assert len(shapes) == len(DTYPES)
    return {
        f"part.{number}": torch.randint(0, 2, shape, generator=generator).to(dtype)
        for number, (shape, dtype) in enumerate(zip(shapes, DTYPES, strict=True))
    }


@pytest.mark.parametrize("writer", ["safetensors", "ours"])
def test_tensors_are_those_that_safetensors_reads(tmp_path, writer):
    if writer == "ours":
        write_tensors(some_tensors(), tmp_path / "a")
    else:
        save_file(some_tensors(), tmp_path / "a", metadata={"format": "pt"})
    tensors, places = places_for(tmp_path / "a", {})
    checksums(tmp_path, ["a"], lambda name: places)
    expected = load_file(tmp_path / "a")
    assert set(tensors) == set(expected) and len(expected) == 10
    for name, tensor in tensors.items():
        assert tensor.dtype == expected[name].dtype and torch.equal(tensor, expected[name])
        assert tensor.data_ptr() % 64 == 0 or not tensor.numel()


def file_of(path, entries, data=16, length=None):
    """A file with this header."""
    text = entries if isinstance(entries, bytes) else json.dumps(entries).encode()
    path.write_bytes((len(text) if length is None else length).to_bytes(8, "little") + text + bytes(data))
    return path


def entry(begin=0, end=16, shape=(4,), dtype="F32"):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": [begin, end]}


REFUSED = {
    "a gap": {"a": entry(4, 16, (3,))},
    "one over another": {"a": entry(0, 8, (2,)), "b": entry(4, 16, (3,))},
    "bytes that are nobody's": {"a": entry(0, 8, (2,))},
    "more than there is": {"a": entry(0, 32, (8,))},
    "a shape of another size": {"a": entry(shape=(5,))},
    "a negative shape": {"a": entry(shape=(-2, -2))},
    "a place before the data": {"a": entry(-8, 16, (6,))},
    "a shape of more than memory counts": {"a": entry(), "b": entry(16, 16, (1 << 40, 1 << 40, 0))},
    "half an element": {"a": entry(0, 14, (3.5,))},
    "a place that is no number": {"a": entry(0.0, 16.0)},
    "a shape of truths": {"a": entry(0, 4, (True,)), "b": entry(4, 16, (3,))},
    "a shape of words": {"a": entry(shape=("4",))},
    "no such dtype": {"a": entry(dtype="F31")},
    "three offsets": {"a": {**entry(), "data_offsets": [0, 8, 16]}},
    "no offsets": {"a": {"dtype": "F32", "shape": [4]}},
    "a list": [entry()],
    "no JSON": b"{",
    "deep JSON": b"[" * 100_000,
    "not UTF-8": b'{"\xff": 1}',
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_header_that_makes_no_sense_is_refused_before_anything_is_read(tmp_path, name):
    with pytest.raises((ValueError, KeyError, TypeError, AttributeError, RecursionError)):
        read_header(file_of(tmp_path / "a", REFUSED[name]))


@pytest.mark.parametrize("length", [100, 1 << 40, (1 << 64) - 1])
def test_a_header_longer_than_its_file_is_refused(tmp_path, length):
    with pytest.raises(ValueError, match="cut short"):
        read_header(file_of(tmp_path / "a", {"a": entry()}, length=length))


def test_a_file_of_less_than_a_header_is_refused(tmp_path):
    (tmp_path / "a").write_bytes(b"\0\0\0")
    with pytest.raises(ValueError, match="cut short"):
        read_header(tmp_path / "a")


class Run:
    """A model with a buffer, its average, and checkpoints of both."""

    def __init__(self, folder, seed):
        torch.manual_seed(seed)
        self.folder = folder
        self.model = nn.Sequential(nn.Linear(40, 30), nn.BatchNorm1d(30))
        self.ema = Ema(self.model, 0.5)

    def into(self):
        return {MODEL: self.model.state_dict(keep_vars=True), EMA: self.ema.averages}

    def save(self, step):
        return save_checkpoint(
            self.folder, step, model=self.model.state_dict(), ema=self.ema.state(), optimizer={"a": torch.ones(3)},
            statistics=LatentStatistics(None, torch.ones(1, 1, 1)), state={}, config={}, keep=3,
        )  # fmt: skip

    def weights(self):
        return {name: value.clone() for name, value in self.model.state_dict().items()}


def test_weights_are_read_to_where_they_belong_and_nothing_is_copied_after(tmp_path):
    run, other = Run(tmp_path, 0), Run(tmp_path, 1)
    with torch.no_grad():
        for parameter in run.model.parameters():
            parameter.add_(1)
    checkpoint = read_checkpoint(run.save(1), other.into())
    for name, parameter in other.model.named_parameters():
        assert checkpoint.model[name] is parameter  # so that load_state_dict has nothing to do
        assert checkpoint.ema[name] is other.ema.averages[name]
    load_weights(other.model, checkpoint.model)
    other.ema.load(checkpoint.ema)
    for name, value in run.model.state_dict().items():
        assert torch.equal(other.model.state_dict()[name], value)
        assert torch.equal(other.ema.state()[name], run.ema.state()[name])
    assert all(torch.equal(a, b) for a, b in zip(run.ema.sources, other.ema.sources, strict=True))  # its flat views


def test_what_goes_on_to_a_gpu_stays_in_the_file_and_is_checked_all_the_same(tmp_path):
    run, other = Run(tmp_path, 0), Run(tmp_path, 1)
    folder = run.save(1)
    into = {MODEL: dict(list(other.into()[MODEL].items())[:1])}
    checkpoint = read_checkpoint(folder, into, mapped=True)
    assert checkpoint.model["0.weight"] is other.model[0].weight  # what is here is filled in any case
    for name, value in run.model.state_dict().items():
        assert torch.equal(checkpoint.model[name], value) and torch.equal(checkpoint.ema[name], value)
    files = [line.split()[-1] for line in Path("/proc/self/maps").read_text().splitlines() if str(folder) in line]
    assert {Path(name).name for name in files} == {MODEL, EMA, OPTIMIZER}
    data = bytearray((folder / EMA).read_bytes())
    data[-5] ^= 4
    (tmp_path / "changed").write_bytes(data)
    (tmp_path / "changed").replace(folder / EMA)
    with pytest.raises(CheckpointError, match=r"ema\.safetensors: its bytes changed"):
        read_checkpoint(folder, mapped=True)


def test_nothing_of_a_checkpoint_that_was_read_stays_mapped(tmp_path):
    folder = Run(tmp_path, 0).save(1)
    checkpoint = read_checkpoint(folder)
    assert checkpoint.model and str(folder) not in Path("/proc/self/maps").read_text()


def test_after_a_bad_checkpoint_the_one_before_fills_everything(tmp_path, capsys):
    run = Run(tmp_path, 0)
    run.save(1)
    wanted = run.weights()
    with torch.no_grad():
        for parameter in run.model.parameters():
            parameter.mul_(2)
    data = bytearray((run.save(2) / MODEL).read_bytes())
    data[-5] ^= 4
    (tmp_path / "checkpoints" / "step-0000002" / MODEL).write_bytes(data)
    other = Run(tmp_path, 1)
    checkpoint = newest_checkpoint(tmp_path, other.into())
    assert checkpoint.step == 1 and "step-0000002" in capsys.readouterr().err
    load_weights(other.model, checkpoint.model)
    assert all(torch.equal(other.weights()[name], value) for name, value in wanted.items())


def test_a_model_of_other_shapes_or_names_is_refused_not_overrun(tmp_path):
    folder = Run(tmp_path, 0).save(1)
    wide = nn.Sequential(nn.Linear(40, 31), nn.BatchNorm1d(31))
    before = {name: value.clone() for name, value in wide.state_dict().items()}
    checkpoint = read_checkpoint(folder, {MODEL: wide.state_dict(keep_vars=True)})
    assert checkpoint.model["0.weight"].shape == (30, 40)
    with pytest.raises(CheckpointError, match="size mismatch"):
        load_weights(wide, checkpoint.model)
    assert all(torch.equal(wide.state_dict()[name], value) for name, value in before.items() if value.dim())


def test_averages_and_optimisers_of_another_model_are_refused(tmp_path):
    checkpoint = read_checkpoint(Run(tmp_path, 0).save(1))
    wide = nn.Sequential(nn.Linear(40, 31), nn.BatchNorm1d(31))
    with pytest.raises(CheckpointError, match=r"averages of another model.*0\.weight"):
        Ema(wide, 0.5).load(checkpoint.ema)
    optimizer = torch.optim.AdamW(wide.parameters())
    with pytest.raises(CheckpointError, match="a is of no parameter"):
        load_optimizer(wide, optimizer, checkpoint.optimizer)


def test_averages_are_not_read_to_the_models_own_buffers(tmp_path):
    run, latents = Run(tmp_path, 0), {"encoder": {}}
    wanted = run.weights()
    save_checkpoint(
        tmp_path, 1, model=wanted, ema={name: value + 5 for name, value in wanted.items()},  # as no run of ours has it
        optimizer={}, statistics=LatentStatistics(None, torch.ones(1)), state={}, config={"latents": latents}, keep=1,
    )  # fmt: skip
    other = Run(tmp_path, 1)
    recipe, ranks = SimpleNamespace(output=str(tmp_path)), Ranks(0, 1, torch.device("cpu"))
    checkpoint = resumed_from(recipe, latents, 10, ranks, other.model, other.ema)
    assert all(torch.equal(other.weights()[name], value) for name, value in wanted.items())
    assert all(torch.equal(average, wanted[name] + 5) for name, average in other.ema.averages.items())
    assert checkpoint.model["0.weight"] is other.model[0].weight
    assert "checkpoints/step-" not in Path("/proc/self/maps").read_text()  # on a CPU


def test_a_model_of_another_dtype_is_not_read_to(tmp_path):
    folder, half = Run(tmp_path, 0).save(1), Run(tmp_path, 1).model.half()
    before = half[0].weight.clone()
    checkpoint = read_checkpoint(folder, {MODEL: half.state_dict(keep_vars=True)})
    assert checkpoint.model["0.weight"].dtype == torch.float32 and torch.equal(half[0].weight, before)


def test_a_checkpoint_that_tells_no_latents_is_refused(tmp_path):
    run = Run(tmp_path, 0)
    run.save(1)
    recipe = SimpleNamespace(output=str(tmp_path))
    with pytest.raises(CheckpointError, match="does not tell which latents"):
        resumed_from(recipe, {}, 10, Ranks(0, 1, torch.device("cpu")), run.model, run.ema)


def test_damage_of_the_header_is_told_as_damage_of_the_checkpoint(tmp_path):
    folder = Run(tmp_path, 0).save(1)
    data = bytearray((folder / EMA).read_bytes())
    for place in np.random.default_rng(0).integers(0, 300, 40).tolist():
        changed = bytearray(data)
        changed[place] ^= 1 << (place % 7)
        (folder / EMA).write_bytes(changed)
        with pytest.raises(CheckpointError):
            read_checkpoint(folder)
    (folder / EMA).write_bytes(data)
    assert read_checkpoint(folder).step == 1
