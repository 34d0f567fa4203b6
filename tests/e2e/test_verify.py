"""`rae verify` from outside: every kind of damage is named, and mended to the byte."""

import json
import shutil

import pytest

from raecli.store.latent_cache import VIEWS, cache_problems
from raecli.store.manifest import read_manifest
from raecli.store.shards import ShardLayout
from tests.conftest import tree


def damage(shard, kind, layout):
    data = bytearray(shard.read_bytes())
    if kind == "missing":
        shard.unlink()
        return
    if kind == "flipped bit":
        data[layout.latent_offset(3, 1) + 10] ^= 4
    elif kind == "flipped header":
        data[3 * layout.sample_bytes + 20] ^= 4
    else:
        ends = {
            "cut at a member": layout.member_bytes,
            "cut inside a member": layout.member_bytes + 700,
            "cut at a sample": 0,
        }
        data = data[: 2 * layout.sample_bytes + ends[kind]] if kind in ends else b""
    shard.write_bytes(data)


CASES = {
    "missing": "missing",
    "empty": "empty",
    "cut at a member": "cut at the end of a member, after 2 of 10",
    "cut at a sample": "cut at the end of a member, after 2 of 10",
    "cut inside a member": "cut inside a member, after 2 of 10",
    "flipped header": "no header of a member at byte",
    "flipped bit": "sha256 differs",
}


@pytest.fixture
def copied(cache, tmp_path):
    shutil.copytree(cache, tmp_path / "cache")
    manifest = read_manifest(cache)
    return tmp_path / "cache", manifest, ShardLayout(manifest.latent_shape, manifest.dtype, VIEWS[manifest.views])


@pytest.mark.parametrize("kind", CASES)
def test_every_damage_of_a_shard_is_told(copied, kind):
    folder, manifest, layout = copied
    assert cache_problems(folder, manifest, fast=False) == []
    damage(folder / "shard-000001.tar", kind, layout)
    for fast in (False, True):
        problems = cache_problems(folder, manifest, fast=fast)
        if fast and kind == "flipped bit":
            assert problems == []  # --fast reads no numbers
        else:
            assert [name for name, _ in problems] == ["shard-000001.tar"] and CASES[kind] in problems[0][1]


@pytest.mark.parametrize("name", ["index.safetensors", "statistics.safetensors"])
def test_damaged_tables_are_told_beside_bad_shards(copied, name):
    folder, manifest, layout = copied
    (folder / name).write_bytes((folder / name).read_bytes()[:-1])
    damage(folder / "shard-000000.tar", "flipped bit", layout)
    assert [found for found, _ in cache_problems(folder, manifest, fast=False)] == [name, "shard-000000.tar"]


def test_bad_shards_end_with_3_and_are_repaired_to_the_byte(copied, cache, images, rae):
    folder, _, layout = copied
    assert "every byte as written" in rae("verify", "cache").stdout
    damage(folder / "shard-000000.tar", "flipped bit", layout)
    damage(folder / "shard-000002.tar", "missing", layout)
    told = rae("verify", "cache", code=3).stderr
    assert "shard-000000.tar" in told and "shard-000002.tar: missing" in told and "shard-000001.tar" not in told
    assert "--source" in rae("verify", "cache", "--repair", code=2).stderr
    told = rae("verify", "cache", "--repair", "--source", images, "--json")
    assert sorted(json.loads(told.stdout)["problems"]) == ["shard-000000.tar", "shard-000002.tar"]
    assert tree(folder) == tree(cache)


def test_a_dry_repair_tells_what_it_would_make_and_changes_nothing(copied, cache, images, rae, tmp_path):
    folder, _, layout = copied
    repair = ("verify", "cache", "--repair", "--source", images)
    assert "--repair" in rae("verify", "cache", "--dry-run", code=2).stderr
    assert "--devices is 0" in rae(*repair, "--dry-run", "--devices", "0", code=2).stderr
    assert json.loads(rae(*repair, "--dry-run", "--json").stdout)["plan"] == ["nothing to repair"]
    damage(folder / "shard-000001.tar", "flipped bit", layout)
    (folder / "index.safetensors").unlink()
    before = tree(folder)
    told = rae(*repair, "--dry-run")
    assert "shard-000001.tar: its bytes changed" in told.stderr and "index.safetensors: missing" in told.stderr
    assert (
        f"to run it: rae verify cache --repair --source {images}\n" in told.stderr
        and "stage: encode-cache" in told.stdout
    )
    told = json.loads(rae(*repair, "--dry-run", "--json").stdout)
    assert sorted(told) == ["cache", "plan", "problems", "recipe", "shards"]
    assert sorted(told["problems"]) == ["index.safetensors", "shard-000001.tar"]
    assert told["recipe"]["output"] == "cache" and told["plan"][-1].startswith("to run it: ")
    assert tree(folder) == before and sorted(path.name for path in tmp_path.iterdir()) == ["cache"]
    rae(*repair)
    assert tree(folder) == tree(cache)


def test_a_dry_repair_refuses_what_the_repair_would(copied, images, rae, tmp_path):
    folder, _, layout = copied
    damage(folder / "shard-000001.tar", "flipped bit", layout)
    shutil.copytree(images, tmp_path / "fewer")
    next((tmp_path / "fewer").rglob("*.png")).unlink()
    before = tree(folder)
    for dry in ((), ("--dry-run",)):
        told = rae("verify", "cache", "--repair", "--source", "fewer", *dry, code=3).stderr
        assert "source_sha256" in told and tree(folder) == before
        rae("verify", "cache", "--repair", "--source", "absent", *dry, code=3)
    other = json.loads((folder / "manifest.json").read_text())
    other["encoder"]["weights_sha256"] = "0" * 64
    (folder / "manifest.json").write_text(json.dumps(other))
    before = tree(folder)
    for dry in ((), ("--dry-run",)):
        told = rae("verify", "cache", "--repair", "--source", images, *dry, code=3).stderr
        assert "encoder digits-mae" in told and "weights_sha256" in told and tree(folder) == before


def test_a_cache_from_another_machine_is_repaired_by_its_encoders_name(copied, cache, images, rae):
    folder, _, layout = copied
    manifest = json.loads((folder / "manifest.json").read_text())
    for key in ("path", "weights"):
        manifest["encoder"][key] = manifest["encoder"][key].replace("/raecli/", "/elsewhere/")
    (folder / "manifest.json").write_text(json.dumps(manifest))
    damage(folder / "shard-000001.tar", "flipped bit", layout)
    rae("verify", "cache", "--repair", "--source", images)
    whole = tree(folder)
    assert {name: whole[name] for name in whole if name != "manifest.json"} == {
        name: digest for name, digest in tree(cache).items() if name != "manifest.json"
    }
