"""Files that want to run code, in every place that rae reads: each is refused in words, and nothing of it runs."""

import hashlib
import io
import json
import pickle
import shutil
import tarfile
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch

from raecli.data.images import open_images
from raecli.errors import CheckpointError, InputError, RaeError, UsageError
from raecli.losses.reconstruction import load_lpips
from raecli.metrics.inception import load_inception
from raecli.metrics.reference import open_images as open_samples
from raecli.metrics.statistics import load_moments
from raecli.models.classifier import load_classifier
from raecli.recipe.load import load_recipe
from raecli.store.checkpoint import newest_checkpoint, save_checkpoint
from raecli.store.encoders import DIGITS_FOLDER, resolve_encoder
from raecli.store.latent_cache import open_cache
from raecli.store.manifest import read_manifest
from raecli.store.statistics import LatentStatistics, load_statistics


class Evil:
    """Makes a file as it is unpickled."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self):
        return Path.touch, (self.target,)


@pytest.fixture
def evil(tmp_path):
    """A pickle that leaves a trace; checked to be one, and that it left none at the test's end."""
    trace = tmp_path / "trace"
    data = pickle.dumps(Evil(trace))
    pickle.loads(data)
    assert trace.exists()
    trace.unlink()
    yield data
    assert not trace.exists(), "the file of a stranger was run"


def digest(path):
    return hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.mark.parametrize("name", ["weights.bin", "weights.safetensors", "weights.pt"])
def test_a_pickle_as_an_encoders_weights(tmp_path, evil, name):
    (tmp_path / name).write_bytes(evil)
    with pytest.raises(RaeError, match=name):
        resolve_encoder("digits-mae", image_size=32, weights=str(tmp_path / name))


def test_a_pickle_in_an_encoders_folder(tmp_path, evil):
    folder = Path(shutil.copytree(DIGITS_FOLDER, tmp_path / "encoder"))
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(evil)
    with pytest.raises(UsageError, match="a pickle, which is not read"):
        resolve_encoder(str(folder), image_size=32)


@pytest.mark.parametrize("load", [load_inception, load_classifier, load_lpips])
@pytest.mark.parametrize("wrapped", [False, True], ids=["a pickle", "torch.save of one"])
def test_a_pickle_as_a_network(tmp_path, evil, load, wrapped):
    path = tmp_path / ("evil.safetensors" if load is load_classifier else "evil.pth")
    if wrapped:
        torch.save({"weight": Evil(tmp_path / "trace")}, path)
    else:
        path.write_bytes(evil)
    with pytest.raises(CheckpointError, match="evil"):
        load(path)


def test_a_pickle_inside_arrays(tmp_path, evil):
    objects = np.array([Evil(tmp_path / "trace")], dtype=object)
    np.savez(tmp_path / "objects.npz", arr_0=objects)
    np.savez(tmp_path / "moments.npz", mu=objects, sigma=np.zeros((1, 1)))
    (tmp_path / "array.npy").write_bytes(evil)
    with zipfile.ZipFile(tmp_path / "member.npz", "w") as archive:
        archive.writestr("arr_0.npy", evil)
    for name in ("objects.npz", "array.npy", "member.npz"):
        with pytest.raises(InputError, match=name):
            open_samples(tmp_path / name)
    with pytest.raises(InputError, match=r"moments\.npz"):
        load_moments(tmp_path / "moments.npz")


def changed_cache(cache, folder, name, content):
    """A copy of a cache with one file exchanged and the digests made to agree."""
    folder = Path(shutil.copytree(cache, folder))
    (folder / name).write_bytes(content)
    told = json.loads((folder / "manifest.json").read_text())
    keys = {"statistics.safetensors": "statistics_sha256", "index.safetensors": "index_sha256"}
    if name in keys:
        told[keys[name]] = digest(folder / name)
    else:
        told["shards"][1] |= {"bytes": len(content), "sha256": digest(folder / name)}
    (folder / "manifest.json").write_text(json.dumps(told))
    return folder


@pytest.mark.parametrize("name", ["statistics.safetensors", "index.safetensors", "shard-000001.tar"])
def test_a_pickle_inside_a_cache_whose_digests_agree(tmp_path, cache, evil, name):
    folder = changed_cache(cache, tmp_path / "latents", name, evil)
    with pytest.raises(InputError, match=name):
        load_statistics(folder / name) if name.startswith("statistics") else open_cache(folder)


def test_a_pickle_inside_a_checkpoint_whose_digests_agree(tmp_path, evil):
    weights = {"weight": torch.ones(2)}
    statistics = LatentStatistics(None, torch.ones(1, 1, 1), 1)
    folder = save_checkpoint(
        tmp_path, 5, model=weights, ema=weights, optimizer={}, statistics=statistics, state={}, config={}, keep=2
    )
    assert newest_checkpoint(tmp_path).step == 5
    (folder / "ema.safetensors").write_bytes(evil)
    told = json.loads((folder / "state.json").read_text())
    told["sha256"]["ema.safetensors"] = digest(folder / "ema.safetensors")
    del told["checksums"], told["seal"]  # as older versions wrote them: sha256 decides
    (folder / "state.json").write_text(json.dumps(told))
    with pytest.raises(CheckpointError, match="none of its 1 checkpoints can be used"):
        newest_checkpoint(tmp_path)


def test_members_of_a_tar_are_neither_run_nor_written_nor_followed(tmp_path, images, evil, rae):
    picture = next(images.rglob("*.png")).read_bytes()
    with tarfile.open(tmp_path / "images.tar", "w") as archive:
        for name, content in (("../../a.png", picture), ("/b.png", picture), ("c.pyd", evil), ("c.png", picture)):
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
        link = tarfile.TarInfo("d.png")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        archive.addfile(link)
    assert len(open_images(tmp_path / "images.tar").items) == 3  # the link is none
    before = set(tmp_path.rglob("*"))
    rae("encode-cache", "--encoder", "digits-mae", "--image-size", "32", "images.tar", "deep/latents")
    made = set(tmp_path.rglob("*")) - before
    assert made and all((tmp_path / "deep") in (path, *path.parents) for path in made)
    assert not Path("/b.png").exists() and not (tmp_path.parent.parent / "a.png").exists()


@pytest.mark.parametrize("name", ["../outside.tar", "/etc/passwd", "a/b.tar", "..", "", "shard-000000.tar\n"])
def test_a_manifest_cannot_name_files_outside_its_folder(tmp_path, cache, name):
    folder = Path(shutil.copytree(cache, tmp_path / "latents"))
    told = json.loads((folder / "manifest.json").read_text())
    told["shards"][0]["name"] = name
    (folder / "manifest.json").write_text(json.dumps(told))
    with pytest.raises(InputError, match=r"shards\.0\.name"):
        read_manifest(folder)


def test_recipes_that_are_hostile(tmp_path, evil):
    bomb = "a: &a [1,1,1,1,1,1,1,1]\n" + "".join(f"b{i}: &b{i} [*a, *a, *a, *a]\n" for i in range(50))
    tagged = b"!!python/object/apply:os.system ['touch trace']"
    for content in (tagged, bomb.encode(), evil, b"\x00" * 100, b"- " * 9999):
        (tmp_path / "recipe.yaml").write_bytes(content)
        with pytest.raises(UsageError, match=r"recipe\.yaml"):
            load_recipe(None, tmp_path / "recipe.yaml")
    assert not Path("trace").exists()
