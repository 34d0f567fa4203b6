"""What a decoder remembers of the networks that judged it, and whether it may go on under others."""

import hashlib

import pytest

from raecli.errors import InputError
from raecli.recipe.load import load_recipe
from raecli.recipe.recipes import TrainDecoderRecipe
from raecli.stages.train_decoder import crop_source, latents_of
from raecli.store.latent_cache import open_cache
from raecli.store.resolve import check_same_latents_as_before


@pytest.fixture
def remembered(cache, images, tmp_path, monkeypatch):
    """What a decoder of this recipe remembers; torch hub's cache holds a VGG."""
    hub = tmp_path / "torch" / "hub" / "checkpoints"
    hub.mkdir(parents=True)
    (hub / "vgg16-397923af.pth").write_bytes(b"vgg")
    (tmp_path / "judge").write_bytes(b"judge")
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))

    def of(*overrides):
        told = (f"cache={cache}", f"images={images}", "adversarial=null", *overrides)
        recipe, opened = load_recipe(TrainDecoderRecipe, "digits/decoder", told), open_cache(cache)
        return latents_of(opened, crop_source(recipe, opened), recipe)

    return of


@pytest.mark.parametrize(
    ("perceptual", "weights", "data"),
    [
        ("lpips", "null", b"vgg"),  # from torch hub's cache
        ("lpips", "judge", b"judge"),
        ("features", "judge", b"judge"),
        ("none", "judge", None),
    ],
)
def test_the_perceptual_network_is_remembered_by_its_digest(remembered, tmp_path, perceptual, weights, data):
    file = weights if weights == "null" else tmp_path / weights
    latents = remembered(f"loss.perceptual={perceptual}", f"loss.perceptual_weights={file}")
    assert latents.get("perceptual_sha256") == (data and hashlib.sha256(data).hexdigest())


def test_a_run_does_not_go_on_under_another_network_unless_it_never_told_of_one(remembered):
    now = remembered("loss.perceptual=lpips", "loss.perceptual_weights=null")
    check_same_latents_as_before(now, now, "run")
    with pytest.raises(InputError, match="perceptual_sha256"):
        check_same_latents_as_before(now | {"perceptual_sha256": "0" * 64}, now, "run")
    older = {key: value for key, value in now.items() if key != "perceptual_sha256"}
    check_same_latents_as_before(older, now, "run")
    with pytest.raises(InputError, match="images_sha256"):
        check_same_latents_as_before({**older, "images_sha256": "0" * 64}, now, "run")
