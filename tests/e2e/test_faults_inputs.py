"""Bad checkpoints, bad shards, numbers that are none: what a run does with each. Two ranks where ranks could differ."""

import shutil
from pathlib import Path

import pytest
from safetensors.torch import load_file

import raecli
import raecli.stages.train_diffusion as stage
from raecli.errors import InputError
from raecli.store.atomic import sha256_of
from raecli.store.checkpoint import newest_checkpoint, outdated
from raecli.store.latent_cache import VIEWS
from raecli.store.manifest import read_manifest
from raecli.store.shards import ShardLayout
from raecli.training.distributed import join_ranks
from tests.conftest import TINY_DIFFUSION, make_images, tree


def diffusion(cache, output, steps=30, *more):
    shared = ("train-diffusion", "digits/diffusion", f"cache={cache}", f"output={output}", f"duration={steps} steps")
    return (*shared, *TINY_DIFFUSION, *more)


@pytest.fixture(scope="module")
def whole(cache, forked, tmp_path_factory):
    """A run of 30 steps: checkpoints of 20 and 30."""
    folder = tmp_path_factory.mktemp("whole")
    forked.rae(*diffusion(cache, "run"), cwd=folder)
    return folder / "run"


@pytest.fixture
def run(whole, tmp_path):
    return Path(shutil.copytree(whole, tmp_path / "run"))


def cut(file):
    file.write_bytes(file.read_bytes()[:-100])


def flip(file, at=-100):
    data = bytearray(file.read_bytes())
    data[at] ^= 4
    file.write_bytes(data)


def empty(file):
    file.write_bytes(b"")


DAMAGES = {"cut": cut, "flipped": flip, "missing": Path.unlink, "empty": empty}


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("name", ["model", "ema", "optimizer", "statistics", "config.json", "state.json"])
def test_any_damage_of_the_newest_checkpoint_is_named_and_the_one_before_used(run, capsys, damage, name):
    file = run / "checkpoints" / "step-0000030" / (name if "." in name else f"{name}.safetensors")
    if (damage, name) == ("flipped", "state.json"):
        flip(file, file.read_text().index('"ema.safetensors": "') + 25)  # a digit of a digest
    else:
        DAMAGES[damage](file)
    assert newest_checkpoint(run).step == 20
    told = capsys.readouterr().err
    assert told.startswith("warning: ") and "step-0000030" in told and "step-0000020" not in told


def test_a_run_goes_on_from_the_one_before_and_ends_as_it_would_have(run, whole, cache, rae):
    DAMAGES["flipped"](run / "checkpoints" / "step-0000030" / "optimizer.safetensors")
    shutil.rmtree(run / "final")
    told = rae(*diffusion(cache, "run")).stderr
    assert "step-0000030/optimizer.safetensors: its bytes changed" in told and "resuming run at step 20" in told
    weights = [{k: v for k, v in tree(folder).items() if k.endswith(".safetensors")} for folder in (run, whole)]
    assert weights[0] == weights[1]


def test_no_checkpoint_that_loads_is_exit_4_and_nothing_is_touched(run, cache, rae):
    for folder in (run / "checkpoints").iterdir():
        shutil.rmtree(folder)
        folder.mkdir()  # a name without a file
    (run / "checkpoints" / "step-0000010").write_text("a file where a folder belongs")
    before = tree(run)
    told = rae(*diffusion(cache, "run"), code=4).stderr
    for name in ("step-0000010", "step-0000020", "step-0000030"):
        assert name in told
    assert "none of its 3 checkpoints" in told and "Traceback" not in told
    after = tree(run)
    assert before.keys() == after.keys() and before["metrics.jsonl"] == after["metrics.jsonl"]
    assert (run / "final" / "model.safetensors").is_file()


def test_a_bad_newer_checkpoint_never_pushes_out_a_good_one():
    folders = [Path(f"step-{step}") for step in (30, 20, 15, 10, 5)]  # 30 and 20 were bad, the run went on from 10
    assert outdated(folders, Path("step-15"), 1) == [Path("step-30"), Path("step-20"), Path("step-10"), Path("step-5")]
    assert outdated(folders, Path("step-15"), 2) == [Path("step-30"), Path("step-20"), Path("step-5")]
    assert outdated(folders, Path("step-30"), 9) == []


@pytest.fixture
def copied(cache, tmp_path):
    shutil.copytree(cache, tmp_path / "cache")
    manifest = read_manifest(cache)
    return tmp_path / "cache", manifest, ShardLayout(manifest.latent_shape, manifest.dtype, VIEWS[manifest.views])


def test_every_bad_shard_under_a_run_is_named(tmp_path, rae):
    source = make_images(tmp_path / "images", classes=2, each=12)
    shared = ("--image-size", "32", "--views", "center+flip", "--dtype", "fp32", "--samples-per-shard", "4")
    rae("encode-cache", "--encoder", "digits-mae", source, "cache", *shared)
    folder, manifest = tmp_path / "cache", read_manifest(tmp_path / "cache")
    layout = ShardLayout(manifest.latent_shape, manifest.dtype, VIEWS[manifest.views])
    shards = [folder / shard.name for shard in manifest.shards]
    assert len(shards) == 6
    flip(shards[0], layout.latent_offset(3, 1) + 10)
    shards[1].write_bytes(shards[1].read_bytes()[: 2 * layout.sample_bytes + layout.member_bytes])
    shards[2].write_bytes(shards[2].read_bytes()[: layout.member_bytes + 700])
    empty(shards[3])
    shards[4].unlink()
    told = rae(*diffusion("cache", "run"), "--devices", "2", code=3).stderr
    wanted = ["its bytes changed", "cut at the end of a member", "cut inside a member", "empty", "missing"]
    for shard, problem in zip(shards, wanted, strict=False):
        assert f"{shard.name}: " in told and problem in told
    assert shards[5].name not in told and "Traceback" not in told
    assert not list((tmp_path / "run").rglob("*.safetensors"))


@pytest.mark.parametrize("damage", ["flipped", "missing", "cut"])
def test_shards_of_a_cache_too_large_to_read_first_are_verified_at_first_use(copied, monkeypatch, damage):
    folder, _, layout = copied
    monkeypatch.setattr(stage, "VERIFY_BYTES", 0)
    recipe = type("Recipe", (), {"cache": str(folder), "remote_cache_gb": 1.0})
    cache = stage.open_verified(recipe, join_ranks(10))
    shard = folder / "shard-000001.tar"  # samples 10 to 19; damaged after the run began
    if damage == "missing":
        shard.unlink()
    else:
        flip(shard, layout.latent_offset(3, 1)) if damage == "flipped" else cut(shard)
    assert cache.latents([0, 9, 20]).isfinite().all()
    with pytest.raises(InputError, match=r"shard-000001\.tar"):
        cache.latents([0, 13])


def test_a_latent_that_is_no_number_stops_all_ranks_and_is_named(copied, tmp_path, rae):
    folder, manifest, layout = copied
    shard, nan = folder / manifest.shards[1].name, b"\0\0\xc0\x7f"  # float32, little-endian
    data = bytearray(shard.read_bytes())
    data[layout.latent_offset(2, 0) : layout.latent_offset(2, 0) + 4] = nan
    shard.write_bytes(data)
    text = (folder / "manifest.json").read_text().replace(manifest.shards[1].sha256, sha256_of(shard))
    (folder / "manifest.json").write_text(text)  # its digests are right: only the numbers tell
    bad = raecli.open_cache(folder).keys[manifest.shards[0].samples + 2]
    result = rae(*diffusion("cache", "run", 30, "save_every=1 steps"), "--devices", "2", code=5)
    assert f"the loss of {bad} is NaN or infinite" in result.stderr and "Traceback" not in result.stderr
    for file in (tmp_path / "run").rglob("*.safetensors"):  # what was saved before that step
        assert all(value.isfinite().all() for value in load_file(file).values()), file


def test_any_mix_of_shards_ranks_and_batches_trains_alike(tmp_path, rae):
    source = make_images(tmp_path / "images", classes=1, each=5)
    shared = ("encode-cache", "--encoder", "digits-mae", "--image-size", "32", "--dtype", "fp32", source)
    rae(*shared, "cache", "--samples-per-shard", "4")
    rae(*shared, "three", "--samples-per-shard", "4", "--devices", "3")  # more ranks than shards
    assert tree(tmp_path / "three") == tree(tmp_path / "cache")
    assert [shard.samples for shard in read_manifest(tmp_path / "cache").shards] == [4, 1]
    rae(*diffusion("cache", "one", 6))  # a batch of 8: larger than a shard, and than the cache
    rae(*diffusion("cache", "two", 6), "--devices", "2")
    one, two = (load_file(tmp_path / name / "final" / "model.safetensors") for name in ("one", "two"))
    assert max((one[name] - two[name]).abs().max() for name in one) < 1e-5  # sums in another order
