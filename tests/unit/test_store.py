"""What lies on disk: complete or absent, and known to be whole."""

import io
import json
import os
import subprocess
import sys
import tarfile

import numpy as np
import pytest
import torch
import webdataset
from safetensors.torch import load_file
from torch import nn

from raecli.errors import CheckpointError, InputError, UsageError
from raecli.store.atomic import atomic_file, atomic_folder, sweep_scratch, write_json
from raecli.store.checkpoint import (
    load_optimizer,
    newest_checkpoint,
    optimizer_tensors,
    read_checkpoint,
    save_checkpoint,
    save_final,
)
from raecli.store.latent_cache import Mapped, read_index, write_index
from raecli.store.lock import Claims, hold_folder, share_folder
from raecli.store.run_folder import MetricsLog
from raecli.store.samples import begin_samples, by_label, finish_samples, image_file, is_whole_png, write_npz, write_png
from raecli.store.shards import TORCH_DTYPES, ShardLayout, ShardWriter, header_of, quantise
from raecli.store.statistics import LatentStatistics, LatentSums
from raecli.training.optimizer import make_optimizer
from tests.conftest import environment


def test_a_failed_write_leaves_what_was_there(tmp_path):
    write_json(tmp_path / "a.json", {"x": 1})
    with pytest.raises(RuntimeError), atomic_file(tmp_path / "a.json") as scratch:
        scratch.write_text("half")
        raise RuntimeError
    with pytest.raises(RuntimeError), atomic_folder(tmp_path / "b") as scratch:
        (scratch / "half").write_text("half")
        raise RuntimeError
    assert json.loads((tmp_path / "a.json").read_text()) == {"x": 1}
    assert [path.name for path in tmp_path.iterdir()] == ["a.json"]


def test_what_dead_processes_left_is_swept_even_if_it_has_our_number(tmp_path):
    (tmp_path / ".partial-99999999-x").mkdir()
    (tmp_path / f".partial-{os.getpid()}-x").write_text("")  # numbers repeat in containers
    (tmp_path / "kept").write_text("")
    sweep_scratch(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["kept"]
    scratch = tmp_path / f".partial-{os.getpid()}-folder"
    scratch.mkdir()
    (scratch / "old").write_text("")
    with atomic_folder(tmp_path / "folder") as fresh:
        (fresh / "new").write_text("")
    assert [path.name for path in (tmp_path / "folder").iterdir()] == ["new"]


def test_folders_are_replaced_whole_and_can_be_entered_by_others(tmp_path):
    for name in ("a", "b"):
        with atomic_folder(tmp_path / "folder") as scratch:
            (scratch / "sub").mkdir()
            (scratch / "sub" / name).write_text(name)
    assert [path.name for path in (tmp_path / "folder" / "sub").iterdir()] == ["b"]
    assert (tmp_path / "folder" / "sub").stat().st_mode & 0o111  # a folder without x is closed to all but root
    assert [path.name for path in tmp_path.iterdir()] == ["folder"]


def test_a_disk_that_refuses_is_told_with_path_and_bytes(tmp_path):
    code = (
        "import resource, sys, torch; from pathlib import Path; from raecli.store.tensors import save_tensors\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))\n"
        "import signal; signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "try: save_tensors({'w': torch.zeros(9999)}, Path(sys.argv[1]))\n"
        "except Exception as error: print(type(error).__name__, error)\n"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "x.safetensors")]
    told = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=60).stdout
    assert told.startswith("StorageError") and "x.safetensors" in told and "39996 bytes" in told


def test_a_folder_has_one_writer(tmp_path):
    with hold_folder(tmp_path), pytest.raises(UsageError, match=r"host .*, process \d+"), hold_folder(tmp_path):
        pass
    with hold_folder(tmp_path):
        assert (tmp_path / ".lock").exists()
    assert not (tmp_path / ".lock").exists()


def test_a_shared_folder_keeps_out_who_does_not_share_and_each_piece_has_one_owner(tmp_path):
    alone = []
    with share_folder(tmp_path, alone.append), share_folder(tmp_path, alone.append):
        assert alone == [True, False]
        with pytest.raises(UsageError, match="another rae"), hold_folder(tmp_path):
            pass
        one, other = Claims(tmp_path), Claims(tmp_path)
        assert one.take("shard-000000") and not other.take("shard-000000") and other.take("shard-000001")
        one.release("shard-000000")
        assert other.take("shard-000000")
    with hold_folder(tmp_path):  # the last one let go
        pass


@pytest.mark.parametrize("dtype", ["bf16", "fp16", "fp32"])
@pytest.mark.parametrize("views", [("latent",), ("latent", "flip")])
def test_shards_are_plain_tars_with_samples_at_known_offsets(tmp_path, dtype, views):
    layout = ShardLayout((3, 5, 5), dtype, views)
    samples = torch.randn(4, len(views), 3, 5, 5).to(TORCH_DTYPES[dtype])
    writer = ShardWriter(tmp_path / "s.tar", layout)
    writer.add(["class/0"], [0], list(samples[:1].unbind(1)))
    writer.add([f"class/{index}" for index in (1, 2, 3)], [7, 14, 21], list(samples[1:].unbind(1)))
    writer.close()
    data = (tmp_path / "s.tar").read_bytes()
    assert len(data) == layout.shard_bytes(4)
    for index in range(4):
        for view in range(len(views)):
            numbers = data[layout.latent_offset(index, view) :][: layout.latent_bytes]
            read = torch.frombuffer(bytearray(numbers), dtype=TORCH_DTYPES[dtype]).view(3, 5, 5)
            assert torch.equal(read, samples[index, view])
    with tarfile.open(tmp_path / "s.tar") as archive:
        assert len(archive.getnames()) == 4 * (len(views) + 1)


def test_the_webdataset_library_reads_our_shards(tmp_path):
    layout = ShardLayout((3, 5, 5), "fp32", ("latent", "flip"))
    samples = torch.randn(3, 2, 3, 5, 5)
    writer = ShardWriter(tmp_path / "s.tar", layout)
    writer.add([f"a/{index}" for index in range(3)], [0, 1, 2], list(samples.unbind(1)))
    writer.close()
    read = list(webdataset.WebDataset(str(tmp_path / "s.tar"), shardshuffle=False).decode())
    assert [sample["cls"] for sample in read] == [0, 1, 2]
    assert [sample["__key__"] for sample in read] == ["a/0", "a/1", "a/2"]
    for ours, theirs in zip(samples, read, strict=True):
        np.testing.assert_array_equal(ours[0], theirs["latent.npy"])
        np.testing.assert_array_equal(ours[1], theirs["flip.npy"])


def test_an_index_comes_back(tmp_path):
    write_index(tmp_path / "i", [3, 1, 2], ["a/b", "c", "long" * 20])
    labels, keys = read_index(tmp_path / "i")
    assert labels.tolist() == [3, 1, 2] and keys == ["a/b", "c", "long" * 20]
    (tmp_path / "i").write_bytes(b"junk")
    with pytest.raises(InputError, match="no index"):
        read_index(tmp_path / "i")


def test_statistics_are_exact_and_the_same_bits_for_any_batch_and_any_shards():
    latents = torch.randn(37, 4, 2, 2, generator=torch.Generator().manual_seed(0)) * 3 + 100  # mean far from zero
    results = []
    for batch, shard in ((37, 37), (1, 37), (5, 37), (8, 8)):
        total = LatentSums((4, 2, 2))
        for start in range(0, 37, shard):
            part = LatentSums((4, 2, 2))
            for rows in latents[start : start + shard].split(batch):
                part.add(rows)
            total.merge(part)
        results.append(total.statistics())
    for result in results:
        torch.testing.assert_close(result.mean, latents.double().mean(0).float(), rtol=1e-7, atol=0)
        torch.testing.assert_close(result.variance, latents.double().var(0, correction=0).float(), rtol=1e-6, atol=0)
    assert all(torch.equal(result.variance, results[0].variance) for result in results[1:3])


def test_normalised_latents_come_back_with_and_without_a_mean(tmp_path):
    latents = torch.randn(5, 4, 2, 2) * 3 + 1
    for mean in (latents.mean(0), None):
        statistics = LatentStatistics(mean, latents.var(0), 5)
        torch.testing.assert_close(statistics.denormalise(statistics.normalise(latents)), latents)
        statistics.save(tmp_path / "s")
        from raecli.store.statistics import load_statistics

        loaded = load_statistics(tmp_path / "s")
        assert (loaded.mean is None) == (mean is None) and torch.equal(loaded.variance, statistics.variance)


@pytest.fixture
def trained():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2))
    optimizer = make_optimizer(model, learning_rate=0.1, betas=(0.9, 0.95), weight_decay=0.0)
    for _ in range(3):
        model(torch.randn(5, 4)).square().sum().backward()
        optimizer.step()
    return model, optimizer


def save(run, step, model, optimizer, keep=2):
    return save_checkpoint(
        run,
        step,
        model=model.state_dict(),
        ema=model.state_dict(),
        optimizer=optimizer_tensors(model, optimizer),
        statistics=LatentStatistics(None, torch.ones(1, 1, 1)),
        state={"samples_consumed": step * 8},
        config={"format": "test"},
        keep=keep,
    )


def test_a_checkpoint_brings_model_and_optimiser_back_to_the_bit(tmp_path, trained):
    model, optimizer = trained
    checkpoint = read_checkpoint(save(tmp_path, 3, model, optimizer))
    other = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2))
    again = make_optimizer(other, learning_rate=0.1, betas=(0.9, 0.95), weight_decay=0.0)
    other.load_state_dict(checkpoint.model)
    load_optimizer(other, again, checkpoint.optimizer)
    inputs = torch.randn(5, 4)
    for module, optim in ((model, optimizer), (other, again)):
        optim.zero_grad()
        module(inputs).square().sum().backward()
        optim.step()
    for ours, theirs in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(ours, theirs)
    assert checkpoint.step == 3 and checkpoint.state["samples_consumed"] == 24


def test_only_the_newest_checkpoints_are_kept(tmp_path, trained):
    for step in (1, 2, 3, 4):
        save(tmp_path, step, *trained)
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["step-0000003", "step-0000004"]


@pytest.mark.parametrize("damage", ["flip", "cut", "missing", "no state"])
def test_a_bad_newest_checkpoint_is_named_and_the_one_before_is_used(tmp_path, trained, capsys, damage):
    save(tmp_path, 1, *trained)
    newest = save(tmp_path, 2, *trained)
    file = newest / ("state.json" if damage == "no state" else "model.safetensors")
    data = bytearray(file.read_bytes())
    if damage == "flip":
        data[-3] ^= 1
        file.write_bytes(data)
    elif damage == "cut":
        file.write_bytes(data[:-10])
    else:
        file.unlink()
    assert newest_checkpoint(tmp_path).step == 1
    assert "warning" in capsys.readouterr().err
    save(tmp_path, 2, *trained)  # trained again up to the bad one: it is replaced
    assert newest_checkpoint(tmp_path).step == 2
    assert capsys.readouterr().err == ""
    (newest / "model.safetensors").unlink()
    (tmp_path / "checkpoints" / "step-0000001" / "ema.safetensors").unlink()
    with pytest.raises(CheckpointError, match="none of its 2 checkpoints"):  # never silently from step 0
        newest_checkpoint(tmp_path)


def test_a_checkpoint_of_a_version_without_checksums_is_read_and_checked_by_its_sha256(tmp_path, trained):
    folder = save(tmp_path, 1, *trained)
    told = json.loads((folder / "state.json").read_text())
    del told["checksums"], told["seal"]
    (folder / "state.json").write_text(json.dumps(told))
    assert read_checkpoint(folder).step == 1
    data = bytearray((folder / "ema.safetensors").read_bytes())
    data[-3] ^= 1
    (folder / "ema.safetensors").write_bytes(data)
    with pytest.raises(CheckpointError, match=r"ema\.safetensors: its bytes changed"):
        read_checkpoint(folder)


@pytest.mark.parametrize("kind", ["checksums", "sha256"])
@pytest.mark.parametrize("name", ["model.safetensors", "statistics.safetensors", "config.json", None])
def test_a_checkpoint_whose_state_leaves_files_out_is_refused(tmp_path, trained, kind, name):
    folder = save(tmp_path, 1, *trained)
    told = json.loads((folder / "state.json").read_text())
    del told["seal"]
    if kind == "sha256":
        del told["checksums"]
    told[kind] = {file: digest for file, digest in told[kind].items() if name not in (file, None)}
    (folder / "state.json").write_text(json.dumps(told))
    with pytest.raises(CheckpointError, match=rf"state\.json: has no digest of {name or 'model'}"):
        read_checkpoint(folder)


def test_a_checkpoint_that_tells_of_other_files_or_has_a_pipe_among_its_own_is_refused_at_once(tmp_path, trained):
    folder = save(tmp_path, 1, *trained)
    os.mkfifo(tmp_path / "pipe")
    told = json.loads((folder / "state.json").read_text())
    del told["seal"]
    told["checksums"]["../../pipe"] = "0"
    write_json(folder / "state.json", told)
    with pytest.raises(CheckpointError, match=r"no checkpoint has: \.\./\.\./pipe"):
        read_checkpoint(folder)
    del told["checksums"]["../../pipe"]
    write_json(folder / "state.json", told)
    (folder / "ema.safetensors").unlink()
    os.mkfifo(folder / "ema.safetensors")
    with pytest.raises(CheckpointError, match=r"ema\.safetensors missing, or no regular file"):
        read_checkpoint(folder)


def test_a_flipped_bit_of_a_checkpoints_step_is_found(tmp_path, trained):
    folder = save(tmp_path, 3, *trained)
    text = (folder / "state.json").read_text()
    (folder / "state.json").write_text(text.replace('"step": 3', '"step": 2'))
    with pytest.raises(CheckpointError, match=r"state\.json: its bytes changed"):
        read_checkpoint(folder)
    (folder / "state.json").write_text(json.dumps(json.loads(text)))  # another layout is no damage
    assert read_checkpoint(folder).step == 3


def test_no_checkpoint_at_all_is_a_fresh_start(tmp_path):
    assert newest_checkpoint(tmp_path) is None


def test_a_final_model_replaces_the_one_before(tmp_path):
    for value in (1.0, 2.0):
        folder = save_final(
            tmp_path,
            weights={"w": torch.full((2,), value)},
            statistics=LatentStatistics(None, torch.ones(1)),
            config={"format": "test", "step": value},
            card="# card\n",
        )
    assert torch.equal(load_file(folder / "model.safetensors")["w"], torch.full((2,), 2.0))
    assert sorted(path.name for path in folder.iterdir()) == [
        "README.md",
        "config.json",
        "model.safetensors",
        "statistics.safetensors",
    ]


def test_resumed_figures_drop_what_lies_after_the_resumed_step(tmp_path):
    log = MetricsLog(tmp_path, 0)
    for step in (10, 20, 30):
        log.write({"step": step, "loss": 1.0})
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 40, "lo')  # killed in the middle of a line
    MetricsLog(tmp_path, 20).write({"step": 25, "loss": 1.0})
    steps = [json.loads(line)["step"] for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert steps == [10, 20, 25]


def test_samples_as_npz_are_what_adm_reads(tmp_path):
    images = np.random.default_rng(0).integers(0, 256, (5, 8, 8, 3), dtype=np.uint8)
    for index, pixels in enumerate(images):
        write_png(image_file(tmp_path, index), pixels)
    with np.load(write_npz(tmp_path, 5), allow_pickle=False) as archive:
        np.testing.assert_array_equal(archive["arr_0"], images)


def test_a_cut_png_is_not_whole(tmp_path):
    write_png(tmp_path / "a.png", np.zeros((8, 8, 3), np.uint8))
    assert is_whole_png(tmp_path / "a.png")
    (tmp_path / "a.png").write_bytes((tmp_path / "a.png").read_bytes()[:-5])
    assert not is_whole_png(tmp_path / "a.png")
    assert not is_whole_png(tmp_path / "none.png")


def test_a_samples_folder_belongs_to_one_protocol(tmp_path):
    begin_samples(tmp_path, {"seed": 0, "steps": 50})
    begin_samples(tmp_path, {"seed": 0, "steps": 50})  # a restart
    with pytest.raises(InputError, match="steps: found 50, expected 25"):
        begin_samples(tmp_path, {"seed": 0, "steps": 25})
    finish_samples(tmp_path, {"seed": 0, "steps": 50})
    with pytest.raises(InputError, match="seed"):
        begin_samples(tmp_path, {"seed": 1, "steps": 50})


def test_a_sheet_puts_one_class_beside_itself():
    assert by_label([2, 0, 1, 0, 2, 1], 4) == [1, 3, 2, 0]


def test_npy_members_are_real_npy_files():
    layout = ShardLayout((2, 3, 3), "fp16", ("latent",))
    numbers = np.arange(18, dtype=np.float16).reshape(2, 3, 3)
    read = np.load(io.BytesIO(layout.prefix + numbers.tobytes()), allow_pickle=False)
    np.testing.assert_array_equal(read, numbers)


def test_int8_is_within_half_a_step_and_its_reader_gets_what_the_writer_said(tmp_path):
    layout = ShardLayout((3, 4, 4), "int8", ("latent", "flip"))
    views = [torch.randn(5, 3, 4, 4) * torch.tensor([1.0, 100.0, 0.0])[:, None, None] for _ in range(2)]
    writer = ShardWriter(tmp_path / "s.tar", layout)
    stored = writer.add([f"a/{index}" for index in range(5)], list(range(5)), views)
    writer.close()
    assert (tmp_path / "s.tar").stat().st_size == layout.shard_bytes(5)
    shard, row = Mapped(tmp_path / "s.tar", layout, 5), torch.empty(48, dtype=torch.bfloat16)
    for view in range(2):
        numbers, scales = quantise(views[view])
        assert ((numbers.float() * scales - views[view]).abs() <= scales * (0.5 + 1e-5)).all()
        for sample in range(5):
            shard.dequantise(sample, view, row)
            assert torch.equal(row.view(3, 4, 4), stored[view][sample])
    read = list(webdataset.WebDataset(str(tmp_path / "s.tar"), shardshuffle=False).decode())
    assert [sample["cls"] for sample in read] == list(range(5))
    theirs = read[3]["flip.npy"] * read[3]["flip_scale.npy"]
    np.testing.assert_allclose(theirs, stored[1][3].float().numpy(), rtol=2**-8)


def test_headers_are_tarfiles_own():
    sizes = {"a.cls": 1, "n01440764/n01440764_00001.latent.npy": 393344, "x" * 100: 8**11 - 1}
    for name, size in sizes.items():
        key, dot, ending = (part.encode() for part in name.partition("."))
        expected = tarfile.TarInfo(name)
        expected.size = size
        assert header_of(key, sum(key), dot + ending, size) == expected.tobuf(tarfile.USTAR_FORMAT)
    for key, ending in ((b"x" * 101, b""), (b"x" * 97, b".cls")):
        with pytest.raises(ValueError, match=f"{(key + ending).decode()}: a tar's name has room for 100"):
            header_of(key, sum(key), ending, 1)
    for key in (b"", b"a\0b"):
        with pytest.raises(ValueError, match="is no name"):
            header_of(key, sum(key), b".cls", 1)
