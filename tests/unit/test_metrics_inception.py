"""Inception with random weights: layers, order, resize, and how its weight file is found. No network."""

import json
import os
import socket
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
from torch_fidelity.interpolate_compat_tensorflow import interpolate_bilinear_2d_like_tensorflow1x

from raecli.errors import CheckpointError, UsageError
from raecli.metrics.full_precision import full_float32
from raecli.metrics.inception import Inception, load_inception
from raecli.metrics.inception_file import WEIGHTS_NAME, find_inception, hub_folder
from raecli.recipe.recipes import EvaluateRecipe
from raecli.stages import evaluate
from raecli.training.distributed import Ranks

IMAGES = torch.randint(0, 256, (4, 3, 32, 32), generator=torch.Generator().manual_seed(0)).byte()


class Trap:
    """Makes a folder where it is unpickled."""

    def __init__(self, folder: str) -> None:
        self.folder = folder

    def __reduce__(self) -> tuple:
        return os.mkdir, (self.folder,)


def random_network() -> FeatureExtractorInceptionV3:
    """Kaiming convolutions, and batch statistics of one pass over IMAGES: else features explode or are constant."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "load", lambda *args, **kwargs: {})  # the constructor always loads a file
        patch.setattr(FeatureExtractorInceptionV3, "load_state_dict", lambda self, weights: None)
        network = FeatureExtractorInceptionV3("random", ["2048"], "no file")
    torch.manual_seed(1)
    for module in network.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight)
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = 1.0
    nn.init.normal_(network.fc.weight, std=0.015)
    network.train()
    with torch.no_grad():
        network(IMAGES)
    return network.eval()


@pytest.fixture(scope="session")
def weight_file(tmp_path_factory) -> Path:
    """A file of random weights in the published file's form."""
    path = tmp_path_factory.mktemp("inception") / WEIGHTS_NAME
    torch.save(random_network().state_dict(), path)
    return path


@pytest.fixture(scope="session")
def inception(weight_file) -> Inception:
    """The network with every layer on, made with the network card unplugged."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(socket, "socket", None)
        return load_inception(weight_file, ("pool", "spatial", "logits"))


@pytest.fixture(scope="session")
def features(inception) -> dict[str, Tensor]:
    """All layers of IMAGES, in one batch."""
    return inception(IMAGES)


def test_layers_have_the_widths_of_adms_evaluator(features):
    assert {name: tuple(value.shape) for name, value in features.items()} == {
        "pool": (4, 2048),
        "spatial": (4, 2023),
        "logits": (4, 1008),
    }
    assert features["pool"].std(0).min() > 0  # not constant over images: the tests below compare something


def test_one_image_at_a_time_gives_the_same_features(inception, features):
    """1e-5: float32 convolutions may block differently for another batch size."""
    alone = [inception(image[None]) for image in IMAGES[:2]]
    for name, value in features.items():
        torch.testing.assert_close(torch.cat([one[name] for one in alone]), value[:2], rtol=1e-5, atol=1e-5)


def test_logits_are_the_pool_times_the_weights_without_bias(inception, features):
    expected = features["pool"].double() @ inception.network.fc.weight.double().T
    torch.testing.assert_close(features["logits"], expected)
    assert inception.network.fc.bias.abs().max() > 0


def test_spatial_features_are_mixed_6s_first_seven_channels_row_column_channel(inception, features):
    seen = []
    handle = inception.network.Mixed_6d.branch1x1.bn.register_forward_hook(lambda *args: seen.append(args[2].clone()))
    inception(IMAGES[:1])
    handle.remove()
    relu = seen[0].clamp_min(0)
    assert relu.shape == (1, 192, 17, 17)
    for row, column, channel in [(0, 0, 0), (0, 1, 3), (5, 2, 6), (16, 16, 1)]:
        index = (row * 17 + column) * 7 + channel
        torch.testing.assert_close(features["spatial"][0, index], relu[0, channel, row, column], rtol=1e-5, atol=1e-5)


def test_only_the_layers_asked_for_are_returned(weight_file):
    network = load_inception(weight_file)
    assert not network.training
    assert list(network(IMAGES[:1])) == ["pool"]


def test_autocast_outside_changes_nothing(inception, features):
    with torch.autocast("cpu", dtype=torch.bfloat16):
        torch.testing.assert_close(inception(IMAGES[:1])["pool"], features["pool"][:1], rtol=1e-5, atol=1e-5)


def test_tf32_is_off_inside_and_restored_outside(inception):
    seen = []
    handle = inception.network.Conv2d_1a_3x3.register_forward_hook(
        lambda *_: seen.append(torch.backends.cudnn.allow_tf32)
    )
    before = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = True
    try:
        inception(IMAGES[:1])
        assert (seen, torch.backends.cudnn.allow_tf32) == ([False], True)
    finally:
        handle.remove()
        torch.backends.cudnn.allow_tf32 = before


def test_matrix_products_are_float32_inside_and_as_before_outside():
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")  # as TORCH_ALLOW_TF32_CUBLAS_OVERRIDE=1 of NVIDIA's containers does
    try:
        with pytest.raises(KeyError), full_float32(torch.device("cpu")):
            assert torch.get_float32_matmul_precision() == "highest"
            raise KeyError
        assert torch.get_float32_matmul_precision() == "high"
    finally:
        torch.set_float32_matmul_precision(before)


@pytest.mark.parametrize("size", [7, 256, 299, 320])
def test_images_are_resized_as_tensorflow_1_did(size):
    """Source of output pixel i is i * in / out, no half pixel, the last row repeated; not torch's bilinear."""
    image = np.random.default_rng(2).integers(0, 256, (size, size)).astype(np.float64)
    place = np.arange(299) * (size / 299)
    low = np.floor(place).astype(int)
    high, part = np.minimum(low + 1, size - 1), place - low
    rows = image[low] * (1 - part)[:, None] + image[high] * part[:, None]
    expected = rows[:, low] * (1 - part) + rows[:, high] * part
    batch = torch.from_numpy(image)[None, None].float()
    resized = interpolate_bilinear_2d_like_tensorflow1x(batch, size=(299, 299), align_corners=False)[0, 0].numpy()
    np.testing.assert_allclose(resized, expected, atol=0.02)  # float32 places: 3.5e-5 px x 255 grey levels x 2 axes
    if size != 299:
        torchs = nn.functional.interpolate(batch, (299, 299), mode="bilinear", align_corners=False)[0, 0].numpy()
        assert np.abs(torchs - expected).max() > 1


def test_the_network_sees_resized_pixels_less_128_over_128(inception):
    seen = []
    handle = inception.network.Conv2d_1a_3x3.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    inception(IMAGES[:1])
    handle.remove()
    resized = interpolate_bilinear_2d_like_tensorflow1x(IMAGES[:1].float(), size=(299, 299), align_corners=False)
    torch.testing.assert_close(seen[0], (resized - 128) / 128)


def test_only_bytes_are_accepted(inception):
    with pytest.raises(ValueError, match="uint8"):
        inception(IMAGES.float())


def test_adms_stored_statistics_alone_are_a_reference(weight_file, features, tmp_path):
    """Against N(0, 1) in every feature the distance is |mean|^2 + sum over all of (deviation - 1)^2."""
    np.savez(tmp_path / "adm.npz", mu=np.zeros(2048, np.float32), sigma=np.eye(2048))
    np.savez(tmp_path / "samples.npz", arr_0=IMAGES.permute(0, 2, 3, 1).numpy())
    paths = {"samples": str(tmp_path / "samples.npz"), "reference": str(tmp_path / "adm.npz")}
    recipe = EvaluateRecipe(
        stage="eval", metrics=("fid",), inception=str(weight_file), output=str(tmp_path / "r"), **paths
    )
    evaluate.run(recipe, Ranks(0, 1, torch.device("cpu")))
    report = json.loads((tmp_path / "r").read_text())
    pool = features["pool"].double()
    deviations = torch.linalg.svdvals(pool - pool.mean(0)) / 3**0.5
    expected = pool.mean(0).square().sum() + (deviations[:3] - 1).square().sum() + 2048 - 3
    assert report["fid"] == pytest.approx(expected.item(), rel=1e-6)
    assert (report["samples"], report["reference_samples"], report["method"]) == (4, None, "cholesky")
    assert any("not the published ones" in warning for warning in report["warnings"])


def test_a_file_with_another_digest_is_used_only_where_named_by_path(weight_file, monkeypatch):
    found = find_inception(str(weight_file))
    assert (found.path, found.published, len(found.sha256)) == (weight_file, False, 64)
    monkeypatch.setenv("RAE_INCEPTION", str(weight_file))
    with pytest.raises(UsageError, match=r"RAE_INCEPTION.*--inception"):
        find_inception()


def test_the_option_outranks_the_environment_and_that_torch_hubs_cache(tmp_path, monkeypatch):
    monkeypatch.setattr("raecli.metrics.inception_file.sha256_of", lambda path: "6726825d" + "0" * 56)
    cached = tmp_path / "hub" / "checkpoints" / WEIGHTS_NAME
    told, option = tmp_path / "told.pth", tmp_path / "option.pth"
    cached.parent.mkdir(parents=True)
    for path in (cached, told, option):
        path.write_bytes(b"weights")
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.delenv("RAE_INCEPTION", raising=False)
    assert find_inception().path == cached
    monkeypatch.setenv("RAE_INCEPTION", str(told))
    assert find_inception().path == told
    assert find_inception(str(option)).path == option
    assert find_inception().published


@pytest.mark.parametrize("told", [{"TORCH_HOME": "/a"}, {"XDG_CACHE_HOME": "/b"}, {}])
def test_torch_hubs_folder_is_found_without_torch(monkeypatch, told):
    for name in ("TORCH_HOME", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    for name, value in told.items():
        monkeypatch.setenv(name, value)
    assert hub_folder() == Path(torch.hub.get_dir()) / "checkpoints"


def test_without_weights_the_message_names_file_release_and_options(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.delenv("RAE_INCEPTION", raising=False)
    with pytest.raises(UsageError) as caught:
        find_inception()
    for word in (WEIGHTS_NAME, "torch-fidelity", "v0.2.0", "--inception PATH", "--features FILE"):
        assert word in str(caught.value)
    with pytest.raises(UsageError, match="no such file"):
        find_inception(str(tmp_path / "absent.pth"))


def test_a_file_that_is_no_inception_is_refused(tmp_path):
    (tmp_path / "text.pth").write_text("no weights")
    torch.save({"fc.weight": torch.zeros(2)}, tmp_path / "other.pth")
    torch.save([1], tmp_path / "list.pth")
    torch.save({"weights": Trap(str(tmp_path / "sprung"))}, tmp_path / "pickle.pth")
    for name in ("text.pth", "other.pth", "list.pth", "pickle.pth"):
        with pytest.raises(CheckpointError, match=name):
            load_inception(tmp_path / name)
    assert not (tmp_path / "sprung").exists()  # nothing that a file holds is run
