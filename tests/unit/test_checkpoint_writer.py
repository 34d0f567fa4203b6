"""Checkpoints written in the background: the same bytes, of the moment of the call; its faults come through."""

import errno
import resource
import threading

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

import raecli.store.checkpoint as checkpoint_module
from raecli.errors import ExitCode, NonFiniteError, StorageError
from raecli.stages.worker import ended
from raecli.store import checksum
from raecli.store.checkpoint import check_space, newest_checkpoint, optimizer_tensors, save_checkpoint
from raecli.store.checkpoint_writer import CheckpointWriter
from raecli.store.statistics import LatentStatistics
from raecli.store.tensors import save_tensors, write_tensors
from raecli.training.ema import Ema
from raecli.training.optimizer import make_optimizer, take_step
from tests.conftest import tree


class Run:
    """A small model in training, and its saves."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        self.model = nn.Sequential(nn.Linear(40, 30), nn.Linear(30, 2))
        self.ema = Ema(self.model, 0.9)
        self.optimizer = make_optimizer(self.model, learning_rate=0.1, betas=(0.9, 0.95), weight_decay=0.0)
        self.step = 0

    def advance(self) -> None:
        self.model(torch.randn(5, 40)).square().sum().backward()
        self.ema.update(self.step, take_step(self.model, self.optimizer, 1.0)[1])
        self.step += 1

    def save(self, save, folder):
        return save(
            folder,
            self.step,
            model=self.model.state_dict(),
            ema=self.ema.state(),
            optimizer=optimizer_tensors(self.model, self.optimizer),
            statistics=LatentStatistics(None, torch.ones(2)),
            state={"samples_consumed": 5 * self.step},
            config={"format": "test", "latents": {}},
            keep=2,
        )


@pytest.fixture
def run() -> Run:
    run = Run()
    run.advance()
    return run


def test_background_saves_are_the_state_of_their_moment_byte_for_byte(tmp_path, run):
    with CheckpointWriter() as writer:
        for _ in range(4):
            run.save(save_checkpoint, tmp_path / "waited")
            run.save(writer.save, tmp_path / "behind")
            run.advance()  # while it is written
    assert tree(tmp_path / "waited") == tree(tmp_path / "behind")
    assert sorted(path.name for path in (tmp_path / "behind" / "checkpoints").iterdir()) == [
        "step-0000003",
        "step-0000004",
    ]


def test_a_rank_that_does_not_write_leaves_nothing(tmp_path, run):
    with CheckpointWriter(writes=False) as writer:
        run.save(writer.save, tmp_path)
    assert not list(tmp_path.iterdir())


def test_the_older_checkpoint_stays_until_the_new_one_was_read_back(tmp_path, run, monkeypatch):
    run.save(save_checkpoint, tmp_path)
    reading, go = threading.Event(), threading.Event()
    whole = checkpoint_module.damaged_files

    def slow(folder, digests):
        reading.set()
        assert go.wait(30)
        return whole(folder, digests)

    monkeypatch.setattr(checkpoint_module, "damaged_files", slow)
    with CheckpointWriter() as writer:
        for _ in range(2):
            run.advance()
        run.save(writer.save, tmp_path)
        assert reading.wait(30)
        names = sorted(path.name for path in (tmp_path / "checkpoints").glob("step-*"))
        writer.check()  # neither waits nor complains
        go.set()
    assert names == ["step-0000001", "step-0000003"]


def test_bytes_that_read_back_differently_are_a_storage_error(tmp_path, run, monkeypatch):
    run.save(save_checkpoint, tmp_path)
    run.advance()
    monkeypatch.setattr(checkpoint_module, "damaged_files", lambda folder, digests: ["ema.safetensors"])
    with CheckpointWriter() as writer:
        run.save(writer.save, tmp_path)
        with pytest.raises(StorageError, match="reads back other bytes"):
            writer.wait()


def test_a_disk_that_refuses_in_the_background_is_told_by_the_next_call(tmp_path, run):
    run.save(save_checkpoint, tmp_path)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    with CheckpointWriter() as writer:
        run.advance()
        try:
            resource.setrlimit(resource.RLIMIT_FSIZE, (4096, before[1]))  # as a full disk: no file beyond 4 KiB
            run.save(writer.save, tmp_path)
            with pytest.raises(StorageError, match=r"model.safetensors: \d+ bytes could not be written"):
                run.save(writer.save, tmp_path)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert newest_checkpoint(tmp_path).step == 1
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step-0000001"]  # no debris


def test_weights_that_are_no_numbers_are_not_saved(tmp_path, run):
    with torch.no_grad():
        run.model[0].weight[0, 0] = float("inf")
    with pytest.raises(NonFiniteError, match="1 weights are NaN"), CheckpointWriter() as writer:
        run.save(writer.save, tmp_path)
    assert not list(tmp_path.glob("checkpoints/*"))


def test_our_safetensors_are_the_librarys_byte_for_byte(tmp_path):
    dtypes = (torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.int64, torch.uint8)
    tensors = {f"t{i}": torch.arange(i + 3).to(dtype) for i, dtype in enumerate(dtypes)}
    tensors |= {"scalar": torch.tensor(1.5), "empty": torch.empty(0), "a": torch.randn(3, 4, 5)}
    save_tensors(tensors, tmp_path / "library")
    write_tensors(tensors, tmp_path / "ours")
    assert (tmp_path / "ours").read_bytes() == (tmp_path / "library").read_bytes()
    for name, tensor in load_file(tmp_path / "ours").items():
        assert torch.equal(tensor, tensors[name])


def test_room_that_is_plainly_lacking_is_refused_with_the_bytes(tmp_path):
    check_space(tmp_path, [torch.empty(10)], keep=2)
    huge = [torch.empty(1 << 48, device="meta")]
    with pytest.raises(StorageError, match=rf"{(1 << 50) * 13} bytes are needed for 3 checkpoints"):
        check_space(tmp_path, huge, keep=2)


def test_a_disk_that_fails_under_a_checkpoint_is_told_when_saving_and_passed_over_when_loading(
    tmp_path, run, capsys, monkeypatch
):
    read = checksum.piece_sums

    def fail_under(part):
        def fail(file, *others):
            if part in str(file.name):
                raise OSError(errno.EIO, "Input/output error", file.name)
            return read(file, *others)

        monkeypatch.setattr(checksum, "piece_sums", fail)

    for _ in range(2):
        run.save(save_checkpoint, tmp_path)
        run.advance()
    fail_under("step-0000002")
    assert newest_checkpoint(tmp_path).step == 1
    assert "step-0000002" in capsys.readouterr().err
    fail_under("/step-0000003/")  # under its final name: what is read back
    assert ended(lambda: run.save(save_checkpoint, tmp_path)) == ExitCode.STORAGE
    assert "step-0000003" in capsys.readouterr().err
    assert newest_checkpoint(tmp_path).step == 2
