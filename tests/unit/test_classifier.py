"""The classifier of the demo: its shapes, its file, what it refuses."""

import json

import pytest
import torch
from safetensors.torch import save_file

from raecli.errors import CheckpointError
from raecli.models.classifier import Classifier, load_classifier, save_classifier


@pytest.fixture
def model():
    torch.manual_seed(0)
    return Classifier(image_size=20, classes=7, channels=2, widths=(4, 6), feature_width=5).eval()


@pytest.fixture
def images():
    return torch.rand(3, 2, 20, 20, generator=torch.Generator().manual_seed(1))


def test_a_saved_classifier_comes_back_the_same(model, images, tmp_path):
    save_classifier(tmp_path / "c.safetensors", model)
    loaded = load_classifier(tmp_path / "c.safetensors")
    assert torch.equal(loaded(images), model(images))
    assert loaded.config == model.config
    assert not loaded.training
    assert not any(parameter.requires_grad for parameter in loaded.parameters())
    assert [path.name for path in tmp_path.iterdir()] == ["c.safetensors"]


def test_the_same_weights_are_written_as_the_same_bytes(model, tmp_path):
    save_classifier(tmp_path / "a", model)
    save_classifier(tmp_path / "b", load_classifier(tmp_path / "a"))
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_scores_are_linear_in_the_features(model, images):
    features = model.features(images)
    assert features.shape == (3, 5)
    assert torch.equal(model(images), features @ model.scores.weight.T + model.scores.bias)


@pytest.mark.parametrize(("side", "sides"), [(32, [16, 8, 4]), (28, [14, 7, 4]), (33, [17, 9, 5])])
def test_each_layer_halves_the_side_rounding_up(side, sides):
    model = Classifier(image_size=side, classes=10)
    images = torch.rand(2, 3, side, side)
    shapes = [tuple(layer.shape) for layer in model.layers(images)]
    assert shapes == [(2, width, s, s) for width, s in zip((24, 48, 64), sides, strict=True)]
    assert model(images).shape == (2, 10)


@pytest.mark.parametrize("size", [(10, 10), (40, 40), (20, 33)])
def test_images_of_another_size_are_resized(model, size):
    grey = torch.tensor([0.2, 0.7]).view(1, 2, 1, 1)
    # a plain image stays plain under any resizing, up to the rounding of the interpolation's weights
    torch.testing.assert_close(model(grey.expand(1, 2, *size)), model(grey.expand(1, 2, 20, 20)), atol=1e-5, rtol=0)


def test_resizing_tells_left_from_right(model):
    image = torch.zeros(1, 2, 40, 40)
    image[..., :20] = 1
    assert not torch.allclose(model(image), model(image.flip(3)), atol=1e-4)


def test_gradients_reach_the_images_through_frozen_weights(model, images, tmp_path):
    save_classifier(tmp_path / "c", model)
    images.requires_grad_(True)
    sum(layer.square().mean() for layer in load_classifier(tmp_path / "c").layers(images)).backward()
    assert images.grad is not None
    assert images.grad.abs().sum() > 0


def write_text(path):
    path.write_text("not a classifier")


def write_plain_safetensors(path):
    save_file({"weight": torch.zeros(2)}, path)


def write_other_kind(path):
    save_file({"weight": torch.zeros(2)}, path, metadata={"config": json.dumps({"kind": "decoder"})})


def write_broken_header(path):
    save_file({"weight": torch.zeros(2)}, path, metadata={"config": "{"})


def write_wrong_weights(path):
    config = {"kind": "classifier", "image_size": 8, "classes": 2, "channels": 3, "widths": [4], "feature_width": 4}
    save_file({"weight": torch.zeros(2)}, path, metadata={"config": json.dumps(config)})


def write_short_header(path):
    save_file({"weight": torch.zeros(2)}, path, metadata={"config": json.dumps({"kind": "classifier"})})


def write_cut_file(path):
    save_classifier(path, Classifier(image_size=8, classes=2))
    path.write_bytes(path.read_bytes()[:-100])


@pytest.mark.parametrize(
    "write",
    [
        lambda path: None,
        lambda path: path.mkdir(),
        write_text,
        write_plain_safetensors,
        write_other_kind,
        write_broken_header,
        write_wrong_weights,
        write_short_header,
        write_cut_file,
    ],
)
def test_a_file_that_is_no_classifier_is_refused_by_its_name(write, tmp_path):
    path = tmp_path / "foreign.safetensors"
    write(path)
    with pytest.raises(CheckpointError, match=r"foreign\.safetensors.*classifier"):
        load_classifier(path)
