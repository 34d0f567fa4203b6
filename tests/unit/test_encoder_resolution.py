"""From an encoder's name to a complete spec: what is found, what is refused, and how soon."""

import hashlib
import http.server
import json
import os
import shutil
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from raecli.errors import ExitCode, InputError, UsageError
from raecli.recipe.blocks import EncoderSpec
from raecli.store import encoders
from raecli.store.encoder_weights import problem_with
from raecli.store.encoders import PRESETS, resolve_encoder

VECTORS = Path(__file__).parents[1] / "parity" / "vectors"
NAMES = ["dinov2-s", "dinov2-b", "dinov2-l", "siglip2-b", "siglip2-so", "mae-b", "dinov3-s", "dinov3-b", "dinov3-l"]

# Resolve in a process of its own, because the hub's client reads its environment once; told on one line of JSON.
RESOLVE = """
import json, sys
from raecli.errors import RaeError
from raecli.store.encoders import resolve_encoder
try:
    told = {"weights": resolve_encoder(sys.argv[1], image_size=256).weights}
except RaeError as error:
    told = {"code": int(error.exit_code), "message": str(error)}
print(json.dumps(told | {"torch": "torch" in sys.modules}))
"""


def resolve_elsewhere(name: str, home: Path, **environment: str) -> dict:
    """Resolve a name in a fresh process whose Hugging Face home is `home`."""
    clean = {
        key: value for key, value in os.environ.items() if not key.startswith("HF_") and "proxy" not in key.lower()
    }
    done = subprocess.run(
        [sys.executable, "-c", RESOLVE, name],
        env=clean | {"HF_HOME": str(home), "PYTHONPATH": os.pathsep.join(sys.path)} | environment,
        capture_output=True,
        text=True,
        check=True,
    )
    return json.loads(done.stdout)


@pytest.fixture
def weights(tmp_path) -> Path:
    """A small safetensors file; the door does not look at its keys."""
    path = tmp_path / "weights.safetensors"
    save_file({"tensor": torch.arange(8.0)}, path)
    return path


@pytest.fixture
def folder(tmp_path) -> Path:
    """A Hugging Face folder to be spoiled."""
    return Path(shutil.copytree(VECTORS / "vit_mae", tmp_path / "vit_mae"))


def change_config(folder: Path, name: str = "config.json", **values: object) -> None:
    """Rewrite keys of a folder's JSON file."""
    path = folder / name
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


@pytest.mark.parametrize("name", NAMES)
def test_preset_with_weights_is_complete_and_needs_no_network(name, weights):
    spec = resolve_encoder(name, image_size=256, weights=str(weights), offline=True)
    assert spec.tokens_side == 16  # 16x16 tokens for 256 pixels, whatever the patch
    assert spec.weights_sha256 == hashlib.sha256(weights.read_bytes()).hexdigest()
    assert Path(spec.weights).is_absolute()
    assert EncoderSpec.model_validate_json(spec.model_dump_json()) == spec


def test_presets_are_the_nine_of_the_manual():
    assert list(PRESETS) == NAMES


@pytest.mark.parametrize(
    ("name", "image_size", "input_size", "side"),
    [
        ("dinov2-b", 256, None, 224),
        ("dinov2-b", 512, None, 448),
        ("dinov2-b", 256, 518, 518),
        ("siglip2-so", 256, None, 224),
        ("siglip2-b", 256, None, 256),
        ("mae-b", 512, 224, 224),
        ("dinov3-l", 512, None, 512),
    ],
)
def test_side_that_the_encoder_sees(name, image_size, input_size, side, weights):
    spec = resolve_encoder(name, image_size=image_size, input_size=input_size, weights=str(weights))
    assert spec.input_size == side


@pytest.mark.parametrize(
    ("name", "image_size", "input_size", "nearest"),
    [("dinov2-b", 250, None, "240 or 256"), ("mae-b", 250, None, "240 or 256"), ("dinov2-b", 256, 256, "252 or 266")],
)
def test_side_that_patches_do_not_tile_is_refused(name, image_size, input_size, nearest, weights):
    with pytest.raises(UsageError, match=nearest):
        resolve_encoder(name, image_size=image_size, input_size=input_size, weights=str(weights))


def test_folder_is_read_from_its_own_files(folder):
    change_config(folder, "preprocessor_config.json", image_mean=[0.1, 0.2, 0.3], image_std=[0.4, 0.5, 0.6])
    spec = resolve_encoder(str(folder), image_size=48)
    assert (spec.family, spec.loader, spec.architecture) == ("mae", "folder", "vit_mae")
    assert (spec.input_size, spec.patch_size, spec.width, spec.prefix_tokens) == (48, 8, 32, 1)
    assert (spec.norm_eps, spec.position_antialias) == (1e-12, False)
    assert (spec.mean, spec.std) == ((0.1, 0.2, 0.3), (0.4, 0.5, 0.6))
    assert spec.weights_sha256 == hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()


@pytest.mark.parametrize(("name", "mean"), [("vit_mae", (0.485, 0.456, 0.406)), ("siglip", (0.5, 0.5, 0.5))])
def test_folder_without_preprocessor_has_its_familys_statistics(name, mean, tmp_path):
    folder = Path(shutil.copytree(VECTORS / name, tmp_path / name))
    (folder / "preprocessor_config.json").unlink()
    assert resolve_encoder(str(folder), image_size=48).mean == mean


def test_registers_are_counted_as_prefix_tokens():
    spec = resolve_encoder(str(VECTORS / "encoder_dinov2"), image_size=256)
    assert (spec.prefix_tokens, spec.position_antialias, spec.input_size) == (5, True, 224)


def test_embedded_default_is_a_folder_of_the_package(folder, monkeypatch):
    monkeypatch.setattr(encoders, "DIGITS_FOLDER", folder)
    spec = resolve_encoder("digits-mae", image_size=32)
    assert (spec.name, spec.path, spec.input_size) == ("digits-mae", str(folder), 32)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"model_type": "clip"}, UsageError, "model_type is 'clip'; known are dinov2"),
        ({"hidden_size": "32"}, InputError, "hidden_size is '32'"),
        ({"num_attention_heads": 5}, InputError, "hidden_size 32 does not divide"),
        ({"num_channels": 1}, InputError, "num_channels is 1"),
        ({"hidden_act": "mish"}, InputError, "hidden_act is 'mish'"),
        ({"layer_norm_eps": -1}, InputError, "layer_norm_eps is -1"),
        ({"qkv_bias": 1}, InputError, "qkv_bias is 1"),
        ({"patch_size": [8, 16]}, InputError, r"patch_size is \[8, 16\]"),
    ],
)
def test_config_that_makes_no_encoder_is_refused(change, error, message, folder):
    change_config(folder, **change)
    with pytest.raises(error, match=message):
        resolve_encoder(str(folder), image_size=48)


@pytest.mark.parametrize("text", ["{", "[1]", "\x00"])
def test_config_that_is_no_json_object_is_refused(text, folder):
    (folder / "config.json").write_text(text)
    with pytest.raises(InputError, match=r"config\.json: "):
        resolve_encoder(str(folder), image_size=48)


def test_image_statistics_that_are_no_triples_are_refused(folder):
    change_config(folder, "preprocessor_config.json", image_std=[0.5, 0.0, 0.5])
    with pytest.raises(InputError, match="image_std"):
        resolve_encoder(str(folder), image_size=48)


@pytest.mark.parametrize(
    ("missing", "instead", "message"),
    [
        ("config.json", None, "no config.json"),
        ("model.safetensors", None, "no model.safetensors; bring it, or give another file with --weights FILE"),
        ("model.safetensors", "model.safetensors.index.json", "several shards"),
        ("model.safetensors", "pytorch_model.bin", "a pickle"),
    ],
)
def test_folder_that_lacks_a_file_is_refused(missing, instead, message, folder):
    (folder / missing).unlink()
    if instead:
        (folder / instead).touch()
    with pytest.raises(UsageError, match=message):
        resolve_encoder(str(folder), image_size=48)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"not tensors at all", "not a complete safetensors file"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "Git LFS pointer"),
        (b"", "not a complete safetensors file"),
        (None, "not a complete safetensors file"),
    ],
    ids=["text", "lfs", "empty", "cut"],
)
def test_weights_that_are_no_safetensors_are_refused(content, message, weights):
    weights.write_bytes(weights.read_bytes()[:-1] if content is None else content)
    with pytest.raises(InputError, match=message):
        resolve_encoder("dinov2-b", image_size=256, weights=str(weights))


@pytest.mark.parametrize(("name", "message"), [("gone.safetensors", "no such file"), ("w.pth", "only .safetensors")])
def test_weights_that_are_absent_or_another_format_are_refused(name, message, tmp_path):
    (tmp_path / "w.pth").touch()
    with pytest.raises(UsageError, match=message):
        resolve_encoder("dinov2-b", image_size=256, weights=str(tmp_path / name))


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("dinov2b", "did you mean dinov2-b"),
        ("digit-mae", "did you mean digits-mae"),
        ("./dinov2-b", "no such folder"),
        ("timm:vit_base_patch16_223", "near are .*vit_base_patch16_224"),
        ("timm:resnet18", "not a plain vision transformer"),
        ("timm:test_vit4", "ends in RmsNorm"),
    ],
)
def test_unknown_name_is_refused_with_what_it_may_mean(name, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UsageError, match=message):
        resolve_encoder(name, image_size=256, offline=True)


def test_timm_name_is_described_by_timm(weights):
    spec = resolve_encoder("timm:test_vit", image_size=96, weights=str(weights))
    assert (spec.family, spec.loader, spec.architecture) == ("timm", "timm", "test_vit")
    assert (spec.width, spec.patch_size, spec.prefix_tokens, spec.input_size) == (64, 16, 1, 96)


def test_no_weights_offline_names_the_file_to_bring(tmp_path):
    told = resolve_elsewhere("dinov2-b", tmp_path, HF_HUB_OFFLINE="1")
    assert told["code"] == ExitCode.USAGE
    for part in ("model.safetensors", "timm/vit_base_patch14_reg4_dinov2.lvd142m", "--weights FILE", "offline"):
        assert part in told["message"]
    assert not told["torch"]


@pytest.mark.parametrize("listening", [False, True], ids=["refused", "silent"])
def test_no_weights_and_no_network_fails_in_under_10_seconds(listening, tmp_path):
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        if listening:
            server.listen()  # takes the connection, and never answers
        start = time.monotonic()
        told = resolve_elsewhere("mae-b", tmp_path, HF_ENDPOINT=f"http://127.0.0.1:{server.getsockname()[1]}")
    assert time.monotonic() - start < 10
    assert told["code"] == ExitCode.USAGE
    assert "model.safetensors of the Hugging Face repository timm/vit_base_patch16_224.mae" in told["message"]
    assert not told["torch"]


class Hub(http.server.BaseHTTPRequestHandler):
    """A hub of one file. The path `/N` answers with status N."""

    content = b""

    def do_HEAD(self) -> None:
        told = self.path.removeprefix("/")
        status = int(told) if told.isdigit() else 200
        self.send_response(status)
        if status == 302:
            self.send_header("Location", "/404")
        self.send_header("ETag", f'"{hashlib.sha256(self.content).hexdigest()}"')
        self.send_header("X-Repo-Commit", "0" * 40)
        self.send_header("Content-Length", str(len(self.content)))
        self.end_headers()

    def do_GET(self) -> None:
        self.do_HEAD()
        if self.path.startswith("/timm/vit_small_patch16_dinov3.lvd1689m/"):
            self.wfile.write(self.content)

    def log_message(self, *args: object) -> None:
        """Say nothing."""


@pytest.fixture
def hub(weights, monkeypatch):
    """The address of a hub on this machine that has the weights."""
    monkeypatch.setattr(Hub, "content", weights.read_bytes())
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub) as server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


def test_weights_are_downloaded_once_and_then_found_offline(hub, weights, tmp_path):
    told = resolve_elsewhere("dinov3-s", tmp_path, HF_ENDPOINT=hub)
    assert Path(told["weights"]).read_bytes() == weights.read_bytes()
    assert resolve_elsewhere("dinov3-s", tmp_path, HF_HUB_OFFLINE="1") == told


@pytest.mark.parametrize("status", [200, 302, 401])
def test_hub_that_answers_is_left_to_its_own_client(status, hub):
    assert problem_with(f"{hub}/{status}") is None


@pytest.mark.parametrize("status", [404, 503])
def test_hub_that_cannot_give_the_file_is_told_by_its_status(status, hub):
    assert problem_with(f"{hub}/{status}") == f"HTTP status {status}"


def test_hub_address_that_is_none_is_told(tmp_path):
    told = resolve_elsewhere("dinov3-s", tmp_path, HF_ENDPOINT="nowhere")
    assert told["code"] == ExitCode.USAGE
    assert "unknown url type" in told["message"]
