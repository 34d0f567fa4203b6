"""Files that claim what cannot be, through the real verbs: refused in words, with memory and time bounded."""

import io
import json
import resource
import shutil
import struct
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch

import raecli.models.load as load_module
from raecli.convert.source import read_tensors
from raecli.errors import CheckpointError, InputError
from raecli.evaluation.dinov2 import read_tensors as read_dinov2
from raecli.inspection import arrays_told, tensors_told
from raecli.metrics.inception import load_inception
from raecli.metrics.reference import open_images
from raecli.metrics.statistics import load_moments
from raecli.models.load import load_autoencoder, load_diffusion
from raecli.store.json_file import read_json
from tests.unit.hostile import rae
from tests.unit.tiny_models import save_decoder, save_diffusion

MEBIBYTE = 1024  # of ru_maxrss, which counts kibibytes
PIXELS = np.random.default_rng(0).integers(0, 256, (4, 32, 32, 3), dtype=np.uint8)


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """A diffusion model and a decoder that sample together; to be copied."""
    root = tmp_path_factory.mktemp("models")
    save_diffusion(root / "diffusion")
    save_decoder(root / "decoder")
    assert rae(*SAMPLE, cwd=root).code == 0
    shutil.rmtree(root / "samples")
    return root


SAMPLE = ("sample", "diffusion", "samples", "-a", "decoder", "-n", "1", "--steps", "1")
CLAIMS = [
    ("diffusion", "recipe.model.width", 2**40),
    ("diffusion", "recipe.model.width", 40_000),
    ("diffusion", "recipe.model.depth", 10**9),
    ("diffusion", "recipe.model.num_classes", 2**31),
    ("diffusion", "recipe.model.input_size", 2**20),
    ("diffusion", "recipe.model.in_channels", 2**30),
    ("diffusion", "latents.image_size", float("inf")),
    ("diffusion", "latents.image_size", float("nan")),
    ("diffusion", "latents.encoder", "x" * 5000),
    ("diffusion", "latents.shape", 7),
    ("diffusion", "recipe.flow", []),
    ("decoder", "recipe.decoder.width", 2**40),
    ("decoder", "recipe.decoder.mlp_width", 2**33),
    ("decoder", "recipe.decoder.patch_size", 2**20),
    ("decoder", "latents.image_size", 0),
    ("decoder", "latents.image_size", 2**31),
    ("decoder", "latents.encoder.width", 2**40),
    ("decoder", "latents.encoder.input_size", 2**30),
    ("decoder", "latents.encoder", 1e308),
]


@pytest.mark.parametrize("name, key, value", CLAIMS, ids=[f"{key} {str(value)[:12]}" for _, key, value in CLAIMS])
def test_a_model_that_claims_another_size_is_refused_before_memory_is_taken(models, tmp_path, name, key, value):
    root = Path(shutil.copytree(models, tmp_path / "models"))
    file = root / name / "final" / "config.json"
    config = json.loads(file.read_text())
    *way, last = key.split(".")
    holder = config
    for part in way:
        holder = holder[part]
    holder[last] = value
    file.write_text(json.dumps(config))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    outcome = rae(*SAMPLE, cwd=root)
    assert outcome.code in (3, 4, 6) and outcome.faults == [], outcome.err[-500:]
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 300 * MEBIBYTE
    assert not (root / "samples").exists()
    assert rae("inspect", f"{name}/final", cwd=root).faults == []


@pytest.mark.parametrize("name, build", [("diffusion", "diffusion_of"), ("decoder", "decoder_of")])
def test_only_sizes_are_the_configs_fault_the_lack_of_memory_is_not(models, monkeypatch, name, build):
    load = {"diffusion": load_diffusion, "decoder": lambda path: load_autoencoder(path, encoder=False)}[name]
    real = getattr(load_module, build)

    def fail_on(meta):
        def fail(*sizes):
            if torch.empty(0).is_meta == meta:
                raise RuntimeError("can't allocate memory")
            return real(*sizes)

        monkeypatch.setattr(load_module, build, fail)

    fail_on(meta=False)
    with pytest.raises(RuntimeError, match="allocate"):
        load(models / name)
    fail_on(meta=True)
    with pytest.raises(CheckpointError, match=r"config\.json"):
        load(models / name)


def header(text: bytes, version: int = 1) -> bytes:
    """An .npy with any header, and a hundred bytes of values."""
    length = struct.pack("<H" if version == 1 else "<I", len(text))
    return b"\x93NUMPY" + bytes([version, 0]) + length + text + bytes(100)


def npz(path: Path, member: bytes, packing: int = zipfile.ZIP_STORED) -> bytearray:
    with zipfile.ZipFile(path, "w", packing) as archive:
        archive.writestr("arr_0.npy", member)
    return bytearray(path.read_bytes())


def read_all(path: Path) -> None:
    open_images(path).read(0, 4)


HEADERS = {
    "endless brackets": b"(" * 9000,
    "a call": b"__import__('os').getpid()",
    "negative": b"{'descr': '|u1', 'fortran_order': False, 'shape': (-1, 2, 2, 3)}",
    "no number": b"{'descr': '|u1', 'fortran_order': False, 'shape': (4, 'a', 2, 3)}",
    "over 64 bits": b"{'descr': '|u1', 'fortran_order': False, 'shape': (4, 99999999999999999999999, 0, 3)}",
}


@pytest.mark.parametrize("version", [1, 2, 3, 9])
@pytest.mark.parametrize("name", HEADERS)
def test_headers_of_arrays_that_cannot_be(tmp_path, name, version):
    npz(tmp_path / "bad.npz", header(HEADERS[name], version))
    with pytest.raises(InputError, match=r"bad\.npz"):
        open_images(tmp_path / "bad.npz")
    if name not in ("negative", "no number", "over 64 bits"):  # inspect tells what a header says
        with pytest.raises(InputError, match=r"bad\.npz"):
            arrays_told(tmp_path / "bad.npz")


PACKINGS = [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA]


@pytest.mark.parametrize("packing", PACKINGS)
def test_archives_torn_in_the_middle_locked_or_packed_in_an_unknown_way(tmp_path, packing):
    path, buffer = tmp_path / "bad.npz", io.BytesIO()
    np.save(buffer, PIXELS)
    whole = npz(path, buffer.getvalue(), packing)
    read_all(path)
    directory = whole.rfind(b"PK\x01\x02")
    torn, locked, unknown = whole.copy(), whole.copy(), whole.copy()
    torn[len(whole) // 2 : len(whole) // 2 + 40] = bytes(40)
    locked[6] |= 1
    locked[directory + 8] |= 1
    unknown[8] = unknown[directory + 10] = 99
    for bad in (locked, unknown, *([torn] if packing != zipfile.ZIP_STORED else [])):
        path.write_bytes(bad)
        with pytest.raises(InputError, match=r"bad\.npz"):
            read_all(path)
    with pytest.raises(InputError, match=r"bad\.npz"):
        path.write_bytes(locked)
        arrays_told(path)


@pytest.mark.parametrize("count", [np.array(np.inf), np.array(np.nan), np.zeros(2)])
def test_statistics_of_a_count_that_is_none(tmp_path, count):
    np.savez(tmp_path / "bad.npz", mu=np.zeros(3), sigma=np.eye(3), n=count)
    with pytest.raises(InputError, match=r"bad\.npz"):
        load_moments(tmp_path / "bad.npz")


@pytest.mark.parametrize("load", [load_inception, read_dinov2, read_tensors])
@pytest.mark.parametrize("content", [b"stage: train", b"\x80\x02.", b"(dp0", b"\x80\x04\x95" + b"\xff" * 8, b""])
def test_whatever_a_pickle_reader_raises_is_told_as_a_file_that_cannot_be_read(tmp_path, load, content):
    (tmp_path / "bad.pth").write_bytes(content)
    with pytest.raises(CheckpointError, match=r"bad\.pth"):
        load(tmp_path / "bad.pth")


@pytest.mark.parametrize("shape", [b'["a"]', b"[1e400]", b"5", b"[[1]]", b"[" + b"9" * 400 + b"]"])
def test_shapes_of_weights_that_are_none_are_told_and_not_multiplied(tmp_path, shape):
    text = b'{"a":{"dtype":"F32","shape":' + shape + b',"data_offsets":[0,4]}}'
    (tmp_path / "bad.safetensors").write_bytes(struct.pack("<Q", len(text)) + text + bytes(4))
    outcome = rae("inspect", "bad.safetensors", cwd=tmp_path)
    assert outcome.faults == [] and outcome.code in (0, 3)
    if outcome.code == 0:
        assert tensors_told(tmp_path / "bad.safetensors") == "1 tensors, 0 numbers"


def test_numbers_that_no_float_holds_are_refused_where_json_is_read(tmp_path):
    (tmp_path / "a.json").write_text('{"fid": 1' + "0" * 400 + "}")
    (tmp_path / "b.json").write_text('{"fid": 1.5, "seed": 18446744073709551615}')
    assert read_json(tmp_path / "b.json")["seed"] == 2**64 - 1
    outcome = rae("eval", "compare", "a.json", "b.json", cwd=tmp_path)
    assert outcome.code == 3 and "a number of 401 digits" in outcome.err and outcome.faults == []


@pytest.mark.parametrize("rows", ["5", '{"a": 1}', '[{"fid": true}, 7, {"fid": "x"}]'])
def test_a_sweep_without_rows_is_told_as_it_is(tmp_path, rows):
    (tmp_path / "sweep.json").write_text(f'{{"rows": {rows}}}')
    outcome = rae("inspect", ".", cwd=tmp_path)
    assert outcome.code == 0 and "none yet" in outcome.out and outcome.faults == []


def test_half_a_character_in_foreign_json_comes_into_a_report_escaped(models, tmp_path):
    root = Path(shutil.copytree(models, tmp_path / "models"))
    recipe = rae("recipes", "show", "digits/diffusion", cwd=root).out
    (root / "diffusion" / "recipe.yaml").write_text(recipe)
    (root / "diffusion" / "environment.json").write_text('{"platform": "\\ud800"}')
    outcome = rae("report", "diffusion", cwd=root)
    assert outcome.code == 0 and outcome.faults == [], outcome.err
    assert "\\ud800" in (root / "diffusion" / "report.html").read_text(encoding="utf-8")


def test_a_report_of_no_run_makes_no_folder(tmp_path):
    assert rae("report", "absent", cwd=tmp_path).code == 3
    assert list(tmp_path.iterdir()) == []
