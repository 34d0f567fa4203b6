"""`rae convert` and `rae fetch` from outside: released files to images, refusals, and no network."""

import http.server
import json
import shutil
import threading
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import raecli
from raecli.convert.conversion import convert
from raecli.convert.official import decoder_to_official, diffusion_to_official
from raecli.convert.settings import Request
from raecli.convert.tables import decoder_tables, diffusion_tables
from raecli.models.build import diffusion_of
from raecli.models.decoder import Decoder
from raecli.recipe.blocks import DiffusionModelSpec
from tests.conftest import tree

VECTORS = Path(__file__).parents[1] / "parity" / "vectors"
ENCODER = VECTORS / "encoder_dinov2"
SIDE = 4  # tokens a side: a DiT-DH of 64 channels for the vectors' encoder on images of 64 pixels
HEAD = {"head_width": 32, "head_depth": 1, "head_heads": 2}


def random_weights(module):
    """All weights random: layers that start at zero would make every image grey."""
    generator = torch.Generator().manual_seed(0)
    return {name: torch.randn(value.shape, generator=generator) * 0.1 for name, value in module.state_dict().items()}


@pytest.fixture(scope="module")
def released(tmp_path_factory):
    """A tiny DiT-DH, its guide, a decoder and statistics, as the release lays them out; not to be changed."""
    folder = tmp_path_factory.mktemp("released")
    for name, depth in (("stage2", 2), ("guide", 1)):
        spec = DiffusionModelSpec(
            kind="dit_dh", width=24, depth=depth, heads=2, **HEAD, in_channels=64, input_size=SIDE, num_classes=5
        )
        options = {"backbone_depth": depth, "patch_size": 1, "tables": diffusion_tables(spec)}
        torch.save(diffusion_to_official(random_weights(diffusion_of(spec)), **options), folder / f"{name}.pt")
    decoder = Decoder(in_channels=64, tokens_side=SIDE, width=48, depth=1, heads=4, mlp_width=64, patch_size=16)
    torch.save(decoder_to_official(random_weights(decoder), decoder_tables(SIDE, 48)), folder / "model.pt")
    torch.save({"mean": None, "var": torch.full((64, SIDE, SIDE), 0.8)}, folder / "stat.pt")
    return folder


@pytest.fixture(scope="module")
def converted(released, tmp_path_factory):
    """Artifacts model, guide and decoder; not to be changed."""
    folder = tmp_path_factory.mktemp("converted")
    for name, file in (("model", "stage2.pt"), ("guide", "guide.pt")):
        convert(Request(released / file, folder / name, encoder=str(ENCODER)))
    told = {"encoder": str(ENCODER), "statistics": str(released / "stat.pt"), "settings": {"heads": 4}}
    convert(Request(released / "model.pt", folder / "decoder", **told))
    return folder


def test_released_files_become_images(tmp_path, rae, released, converted):
    rae("convert", released / "stage2.pt", "model", "--encoder", ENCODER)
    decoder = ("--encoder", ENCODER, "--statistics", released / "stat.pt", "--set", "heads=4")
    report = json.loads(rae("convert", released / "model.pt", "decoder", *decoder, "--json").stdout)
    assert tree(tmp_path / "decoder").keys() == tree(converted / "decoder").keys()
    assert report["kind"] == "decoder" and report["sizes"]["width"] == 48 and report["latents"] == [64, SIDE, SIDE]
    assert report["statistics"] == "variance alone"
    arguments = ("--num", "6", "--steps", "3", "--guide", converted / "guide", "-g", "1.4", "--time-grid", "released")
    rae("sample", "model", "samples", "--autoencoder", "decoder", *arguments)
    protocol = json.loads((tmp_path / "samples" / "samples.json").read_text())
    assert protocol["guidance"] == "autoguidance" and len(protocol["labels"]) == 6
    assert protocol["time_shift"] == pytest.approx((64 * SIDE * SIDE / 4096) ** 0.5)
    images = {path.read_bytes() for path in (tmp_path / "samples").glob("0*.png")}
    assert len(images) == 6  # six different pictures
    autoencoder = raecli.load_autoencoder(tmp_path / "decoder")
    assert autoencoder.encode(torch.rand(1, 3, 64, 64)).shape == (1, 64, SIDE, SIDE)


def test_a_model_that_does_not_tell_its_encoder_is_sampled_by_shape(tmp_path, rae, released, converted):
    result = rae("convert", released / "stage2.pt", "untold")
    assert "no --encoder is told" in result.stderr and "64 x 4 x 4" in result.stdout
    rae("sample", "untold", "samples", "--autoencoder", converted / "decoder", "--num", "2", "--steps", "2")
    assert len(list((tmp_path / "samples").glob("0*.png"))) == 2
    convert(Request(VECTORS / "dit_dh.pt", tmp_path / "other"))  # of 8 channels
    result = rae("sample", "other", "no", "--autoencoder", converted / "decoder", "--num", "2", "--steps", "2", code=3)
    assert "not made for the same latents" in result.stderr and "shape: found [64, 4, 4]" in result.stderr


def test_ours_to_official_and_back_is_the_same_artifact(tmp_path, rae, released, converted):
    for artifact, file, more in (
        ("model", "stage2.pt", {}),
        ("decoder", "model.pt", {}),
        ("decoder", "stat.pt", {"kind": "statistics"}),
    ):
        convert(Request(converted / artifact, tmp_path / file, to="official", **more))
        before, after = (torch.load(path / file, weights_only=True) for path in (released, tmp_path))
        assert before.keys() == after.keys()
        for key, value in before.items():
            assert value is after[key] is None or torch.equal(value, after[key]), key
    rae("convert", converted / "model", "cli.pt", "--to", "official")
    assert (tmp_path / "cli.pt").read_bytes()[:2] == b"PK"  # the container that torch.save writes
    convert(Request(tmp_path / "stage2.pt", tmp_path / "again", encoder=str(ENCODER)))
    assert (tmp_path / "again" / "model.safetensors").read_bytes() == (
        converted / "model" / "model.safetensors"
    ).read_bytes()


@pytest.mark.parametrize(
    ("arguments", "code", "told"),
    [
        (("nowhere.pt", "out"), 2, "no such file or folder"),
        (("SRC/stage2.pt", "out", "--set", "haeds=2"), 2, "did you mean heads?"),
        (("SRC/stage2.pt", "SRC"), 2, "--force to replace it"),
        (("SRC/model.pt", "out"), 2, "--encoder NAME"),
        (("SRC/model.pt", "out", "--kind", "diffusion"), 4, "those of a decoder, not of a diffusion"),
        (("SRC/stage2.pt", "out", "--to", "diffusers"), 4, "no artifact of rae"),
        (("SRC/stage2.pt", "out", "--encoder", "dinov2-bb"), 2, "did you mean dinov2-b"),
    ],
)
def test_what_a_user_gets_wrong(tmp_path, rae, released, arguments, code, told):
    result = rae("convert", *(word.replace("SRC", str(released)) for word in arguments), code=code)
    assert told in result.stderr and "Traceback" not in result.stderr
    assert list(tmp_path.iterdir()) == []


def test_unknown_keys_end_with_code_4_and_their_names(tmp_path, rae, released):
    weights = torch.load(released / "stage2.pt", weights_only=True)
    weights["blocks.0.attn.q_norm.weight"] = weights.pop("blocks.1.attn.proj.bias")
    torch.save(weights, tmp_path / "odd.pt")
    result = rae("convert", "odd.pt", "out", code=4)
    assert "2 keys do not fit: missing blocks.1.attn.proj.bias; unknown blocks.0.attn.q_norm.weight" in result.stderr


def test_what_is_published_is_listed(rae):
    listed = rae("fetch", "--list").stdout
    assert "dith-xl-256" in listed and "decoder-xl-dinov2b" in listed and "rae-siglip2-b" in listed
    table = json.loads(rae("fetch", "--list", "--json").stdout)
    assert len(table) == len(listed.splitlines()) == 19
    assert table["dith-xl-256"]["files"] == ["DiTs/Dinov2/wReg_base/ImageNet256/DiTDH-XL/stage2_model.pt"]


@pytest.mark.parametrize("offline", ["1", "0"])
def test_without_network_fetch_says_soon_what_to_bring(tmp_path, rae, offline):
    hub = {"HF_HOME": str(tmp_path / "hub"), "HF_HUB_OFFLINE": offline, "HF_ENDPOINT": "http://127.0.0.1:9"}
    started = time.monotonic()
    result = rae("fetch", "decoder-xl-dinov2b", code=2, **hub)
    assert time.monotonic() - started < 10
    assert "nyu-visionx/RAE-collections" in result.stderr
    assert "decoders/dinov2/wReg_base/ViTXL_n08/model.pt" in result.stderr
    assert "rae convert DIR/decoders/dinov2/wReg_base/ViTXL_n08/model.pt artifacts/decoder-xl-dinov2b" in result.stderr
    assert "--encoder dinov2-b --statistics DIR/stats/dinov2/wReg_base/imagenet1k/stat.pt" in result.stderr
    assert "did you mean rae-dinov2-b" in rae("fetch", "rae-dinov2b", code=2, **hub).stderr


def cached(hub, repository, file, source, name):
    """A file in the Hugging Face cache, its blob under a name of our choice."""
    folder = hub / "hub" / f"models--{repository.replace('/', '--')}"
    (folder / "refs").mkdir(parents=True)
    (folder / "refs" / "main").write_text("0" * 40)
    (folder / "blobs").mkdir()
    shutil.copy(source, folder / "blobs" / name)
    link = folder / "snapshots" / ("0" * 40) / file
    link.parent.mkdir(parents=True)
    link.symlink_to(folder / "blobs" / name)


def test_a_cached_file_is_converted_on_arrival_and_held_against_the_hubs_digest(tmp_path, rae, released):
    from raecli.store.atomic import sha256_of

    file = "DiTs/Dinov2/wReg_base/ImageNet256/DiTDH-XL/stage2_model.pt"
    digest = sha256_of(released / "stage2.pt")
    cached(tmp_path / "good", "nyu-visionx/RAE-collections", file, released / "stage2.pt", digest)
    rae("fetch", "dith-xl-256", HF_HOME=str(tmp_path / "good"))
    config = json.loads((tmp_path / "artifacts" / "dith-xl-256" / "config.json").read_text())
    assert (
        config["converted"]["sha256"] == digest and config["converted"]["repository"] == "nyu-visionx/RAE-collections"
    )
    assert load_file(tmp_path / "artifacts" / "dith-xl-256" / "model.safetensors")
    assert "--force to replace it" in rae("fetch", "dith-xl-256", code=2, HF_HOME=str(tmp_path / "good")).stderr
    cached(tmp_path / "bad", "nyu-visionx/RAE-collections", file, released / "guide.pt", digest)
    result = rae("fetch", "dith-xl-256", "other", code=3, HF_HOME=str(tmp_path / "bad"))
    assert "its bytes are not the hub's" in result.stderr and not (tmp_path / "other").exists()


def dry(rae, *arguments, **extra):
    """The JSON of a dry run, and its plan."""
    told = json.loads(rae(*arguments, "--dry-run", "--json", **extra).stdout)
    return told, told.pop("plan")


def test_a_dry_conversion_tells_what_the_conversion_does_and_writes_nothing(tmp_path, rae, released, converted):
    decoder = (released / "model.pt", "--encoder", ENCODER, "--statistics", released / "stat.pt", "--set", "heads=4")
    ways = {
        "diffusion": (released / "stage2.pt", "--encoder", ENCODER),
        "decoder": decoder,
        "whole": (*decoder, "--kind", "autoencoder"),
        "inside": (converted / "decoder", "--kind", "autoencoder"),
        "flat.pt": (converted / "model", "--to", "official"),
        "decoder.pt": (converted / "decoder", "--to", "official"),
        "stat.pt": (converted / "decoder", "--to", "official", "--kind", "statistics"),
        "statistics.safetensors": (released / "stat.pt",),
    }
    for output, (source, *options) in ways.items():
        before = {path.name for path in tmp_path.iterdir()}
        told, plan = dry(rae, "convert", source, output, *options)
        assert {path.name for path in tmp_path.iterdir()} == before, output
        assert plan[0] == f"{output} would be written" and plan[-1].startswith(
            f"to run it: rae convert {source} {output}"
        )
        assert "--dry-run" not in plan[-1]
        assert told == json.loads(rae("convert", source, output, *options, "--json").stdout)
        assert (tmp_path / output).exists()
    told = rae("convert", released / "stage2.pt", "again", "--dry-run")
    assert "again: diffusion" in told.stdout and "plan: again would be written" in told.stderr
    assert not (tmp_path / "again").exists()


@pytest.mark.parametrize(
    ("arguments", "code", "told"),
    [
        (("SRC/model.pt", "out", "--encoder", "ENC", "--statistics", "none"), 2, "heads"),
        (("SRC/stage2.pt", "out", "--encoder", "dinov2-bb"), 2, "did you mean dinov2-b"),
        (("SRC/stage2.pt", "folder/file/out"), 6, "folder/file"),
        (("SRC/stage2.pt", "folder/file", "--force"), 2, "is a file; the output is a folder"),
        (("SRC/stat.pt", "folder", "--force"), 2, "is a folder; the output is one file"),
        (("SRC/stage2.pt", "folder"), 2, "--force to replace it"),
    ],
)
@pytest.mark.parametrize("how", [("--dry-run",), ()])
def test_a_dry_conversion_refuses_what_the_conversion_would(tmp_path, rae, released, arguments, code, told, how):
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "file").touch()
    words = (word.replace("SRC", str(released)).replace("ENC", str(ENCODER)) for word in arguments)
    assert told in rae("convert", *words, *how, code=code).stderr
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["file", "folder"]


def test_of_an_encoder_that_is_not_here_a_dry_conversion_tells(tmp_path, rae, released):
    hub = {"HF_HOME": str(tmp_path / "hub"), "HF_HUB_OFFLINE": "0", "HF_ENDPOINT": "http://127.0.0.1:9"}
    asked = ("convert", released / "stage2.pt", "out", "--encoder", "dinov2-b")
    told, plan = dry(rae, *asked, **hub)
    assert told["kind"] is None and "a dry run downloads nothing" in plan[1] and "--weights FILE" in plan[1]
    assert "model.safetensors of the Hugging Face repository" in rae(*asked, code=2, **hub).stderr
    assert not (tmp_path / "out").exists() and not (tmp_path / "hub").exists()


class Hub(http.server.BaseHTTPRequestHandler):
    """A hub that has every file, and remembers what it was asked for."""

    asked: tuple[str, ...] = ()

    def do_HEAD(self):
        Hub.asked += ("HEAD",)
        self.send_response(200)
        self.end_headers()

    def do_GET(self):
        Hub.asked += ("GET",)
        self.send_error(500)

    def log_message(self, *_):
        pass


@pytest.fixture
def hub(monkeypatch):
    """Its address."""
    monkeypatch.setattr(Hub, "asked", ())
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


def test_a_dry_fetch_asks_whether_files_are_there_and_downloads_none(tmp_path, rae, released, hub):
    there = {"HF_HOME": str(tmp_path / "hub"), "HF_HUB_OFFLINE": "0", "HF_ENDPOINT": hub, "no_proxy": "127.0.0.1"}
    told, plan = dry(rae, "fetch", "decoder-xl-dinov2b", "out", **there)
    assert told == {"output": "out", "kind": "decoder", "notes": []}
    assert [line.partition(" would be ")[2] for line in plan[:3]] == [
        "downloaded from nyu-visionx/RAE-collections",
        "downloaded from nyu-visionx/RAE-collections",
        "written out of them",
    ]
    assert plan[3] == "to run it: rae fetch decoder-xl-dinov2b out --json"
    assert Hub.asked == ("HEAD", "HEAD")
    gone = there | {"HF_ENDPOINT": "http://127.0.0.1:9"}
    assert "Bring decoders/" in rae("fetch", "decoder-xl-dinov2b", "out", "--dry-run", code=2, **gone).stderr
    assert list(tmp_path.iterdir()) == []


def test_a_dry_fetch_of_cached_files_checks_the_conversion_too(tmp_path, rae, released):
    from raecli.store.atomic import sha256_of

    file, good = "DiTs/Dinov2/wReg_base/ImageNet256/DiTDH-XL/stage2_model.pt", {"HF_HOME": str(tmp_path / "good")}
    digest = sha256_of(released / "stage2.pt")
    cached(tmp_path / "good", "nyu-visionx/RAE-collections", file, released / "stage2.pt", digest)
    told, plan = dry(rae, "fetch", "dith-xl-256", **good)
    assert file in plan[0] and "is in the Hugging Face cache" in plan[0] and "would be written" in plan[1]
    assert not (tmp_path / "artifacts").exists()
    assert told == json.loads(rae("fetch", "dith-xl-256", "--json", **good).stdout)
