"""Arbitrary bytes where rae reads files of others: the answer is a value or one RaeError, never another exception."""

import io
import json
import tarfile
from pathlib import Path

import pytest
import yaml
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from raecli.data.images import open_images
from raecli.errors import InputError, RaeError, UsageError
from raecli.recipe.load import dump_recipe, load_recipe
from raecli.recipe.recipes import RECIPES
from raecli.recipe.shipped import shipped_files
from raecli.recipe.strict_yaml import parse_yaml
from raecli.store.json_file import read_json
from raecli.store.manifest import Manifest, read_manifest

quickly = settings(
    max_examples=120, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
RECIPE = shipped_files()["digits/diffusion"].read_bytes()
plain = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=True) | st.text(max_size=12)
values = st.recursive(plain, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner))


@st.composite
def edited(draw, original):
    """The original with some bytes cut out, put in or changed."""
    data = bytearray(original)
    for _ in range(draw(st.integers(1, 4))):
        place = draw(st.integers(0, len(data)))
        gone = draw(st.integers(0, 40))
        data[place : place + gone] = draw(st.binary(max_size=12))
    return bytes(data)


@quickly
@given(st.binary(max_size=200) | edited(RECIPE))
@example(b"a: &x [*x, *x]")
@example(b"{" * 5000)
@example("a: \ud800".encode("utf-8", "surrogatepass"))
def test_any_bytes_are_parsed_or_have_problems_with_lines(data):
    document = parse_yaml(data)
    assert document.values is not None or document.problems
    for problem in document.problems:
        assert problem.text and (problem.line is None or problem.line >= 1)


@quickly
@given(edited(RECIPE))
def test_an_edited_recipe_is_read_or_refused(tmp_path, data):
    path = tmp_path / "recipe.yaml"
    path.write_bytes(data)
    try:
        spec = load_recipe(None, path)
    except UsageError as error:
        assert str(path) in str(error)
        return
    path.write_text(dump_recipe(spec), encoding="utf-8")  # what was read is written so that it reads as the same
    assert load_recipe(None, path) == spec


@quickly
@given(st.sampled_from(sorted(RECIPES)), st.dictionaries(st.text(max_size=12), values, max_size=5))
def test_any_yaml_values_are_refused_in_words(tmp_path, stage, content):
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump({**content, "stage": stage}), encoding="utf-8")
    with pytest.raises(UsageError) as refusal:
        load_recipe(None, path)
    assert "Traceback" not in str(refusal.value) and str(refusal.value).isprintable() is False  # lines, one a problem


def a_manifest():
    digest = "0" * 64
    encoder = {
        "name": "x", "family": "mae", "loader": "folder", "architecture": "vit_mae", "path": "/x", "weights": "/x/w",
        "weights_sha256": digest, "input_size": 32, "patch_size": 8, "width": 32, "prefix_tokens": 1, "norm_eps": 1e-12,
        "position_antialias": False, "mean": (0.5, 0.5, 0.5), "std": (0.5, 0.5, 0.5),
    }  # fmt: skip
    manifest = Manifest(
        encoder=encoder, image_size=32, latent_shape=(32, 4, 4), dtype="fp32", precision="fp32", views="center",
        classes=("a", "b"), samples=3, samples_per_shard=3, seed=0, source_sha256=digest, index_sha256=digest,
        statistics_sha256=digest, shards=({"name": "shard-000000.tar", "samples": 3, "bytes": 9, "sha256": digest},),
    )  # fmt: skip
    return manifest.to_dict()


def paths_of(value, path=()):
    """Every place in nested dicts and lists."""
    yield path
    inside = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in inside:
        yield from paths_of(inner, (*path, key))


@quickly
@given(st.data())
def test_a_changed_manifest_is_read_or_refused(tmp_path, data):
    told = a_manifest()
    place = data.draw(st.sampled_from([path for path in paths_of(told) if path]))
    holder = told
    for key in place[:-1]:
        holder = holder[key]
    holder[place[-1]] = data.draw(values)
    (tmp_path / "manifest.json").write_text(json.dumps(told), encoding="utf-8")
    try:
        assert isinstance(read_manifest(tmp_path), Manifest)
    except InputError as error:
        assert "manifest.json" in str(error)


def test_the_manifest_that_is_changed_above_is_a_good_one(tmp_path):
    (tmp_path / "manifest.json").write_text(json.dumps(a_manifest()), encoding="utf-8")
    assert read_manifest(tmp_path).samples == 3


@quickly
@given(edited(json.dumps(a_manifest()).encode()) | st.binary(max_size=60))
@example(b"[" * 100_000)
@example(b'{"a":' * 50_000)
def test_any_bytes_as_json_are_an_object_or_refused(tmp_path, data):
    (tmp_path / "manifest.json").write_bytes(data)
    for read in (lambda: read_manifest(tmp_path), lambda: read_json(tmp_path / "manifest.json")):
        try:
            assert isinstance(read(), Manifest | dict)
        except InputError as error:
            assert "manifest.json" in str(error)


def a_tar() -> bytes:
    """Two images and their classes."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.USTAR_FORMAT) as archive:
        for key in ("a", "b"):
            for ending, content in (("png", b"not looked at" * 50), ("cls", b"1")):
                member = tarfile.TarInfo(f"{key}.{ending}")
                member.size = len(content)
                archive.addfile(member, io.BytesIO(content))
    return buffer.getvalue()


@quickly
@given(edited(a_tar()) | st.binary(max_size=2000))
@example(a_tar()[:1536])  # cut at a member's boundary
@example(a_tar()[:700])  # cut inside a member
@example(b"")
def test_an_edited_tar_of_images_is_listed_or_refused(tmp_path, data):
    path = tmp_path / "images.tar"
    path.write_bytes(data)
    try:
        source = open_images(path)
    except RaeError as error:
        assert isinstance(error, InputError) and "images.tar" in str(error)
        return
    for item in source.items:  # what is listed lies inside the file
        assert item.offset >= 0 and item.offset + item.size <= len(data)
        assert item.file == Path(path)


def test_the_tar_that_is_edited_above_is_a_good_one(tmp_path):
    path = tmp_path / "images.tar"
    path.write_bytes(a_tar())
    assert [item.label for item in open_images(path).items] == [1, 1]
