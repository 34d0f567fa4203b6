"""The door of train-decoder: frozen networks whose files are not here are refused together, before any torch."""

import pytest

from raecli.cli.train import check_networks
from raecli.errors import UsageError
from raecli.recipe.load import load_recipe
from raecli.recipe.recipes import TrainDecoderRecipe
from raecli.recipe.shipped import find_recipe


@pytest.fixture(autouse=True)
def empty_caches(tmp_path, monkeypatch):
    """No network's weights lie where they are looked for."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    monkeypatch.delenv("RAE_INCEPTION", raising=False)
    monkeypatch.setattr("huggingface_hub.try_to_load_from_cache", lambda *_: None)


def recipe_of(*overrides: str) -> TrainDecoderRecipe:
    return load_recipe(TrainDecoderRecipe, find_recipe("decoder_xl_dinov2b"), overrides)


def test_every_missing_file_is_named_with_its_key_at_once(tmp_path):
    told = ("validation.images=val", "validation.metrics=[rfid,lpips]", "validation.lpips_weights=mine.pth")
    with pytest.raises(UsageError) as caught:
        check_networks(
            recipe_of("loss.perceptual_weights=vgg.pth", "adversarial.backbone=dino.safetensors", *told), False
        )
    said = str(caught.value)
    for words in ("vgg.pth", "loss.perceptual_weights", "dino.safetensors", "adversarial.backbone"):
        assert words in said
    for words in ("mine.pth", "validation.lpips_weights", "--inception"):
        assert words in said


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        ((), "vgg16-397923af.pth"),
        ((), "^files are missing\n  LPIPS .* loss.perceptual=none trains without .*\n  the discriminator"),
        (("adversarial=null",), "loss.perceptual_weights"),
        (("loss.perceptual=none",), "fetch disc-dino-s8"),
        (("loss.perceptual=features", "loss.perceptual_weights=judge.safetensors", "adversarial=null"), "judge.safet"),
        (
            ("loss.perceptual=none", "adversarial=null", "validation.images=v", "validation.features=j.safetensors"),
            "validation.features: j.safetensors",
        ),
    ],
)
def test_a_missing_network_is_refused(overrides, said):
    with pytest.raises(UsageError, match=said):
        check_networks(recipe_of(*overrides), False)


def test_an_unknown_option_is_answered_with_the_form_of_a_recipes_key(rae):
    said = rae("train-diffusion", "dith_s", "--batch-size", "4", code=2).stderr
    assert "No such option: --batch-size (a recipe's value is changed as batch_size=VALUE)" in said
    assert "VALUE)" not in rae("train-diffusion", "dith_s", "--device", "4", code=2).stderr  # --devices is meant
    assert "VALUE)" not in rae("inspect", "runs", "--batch-size", "4", code=2).stderr  # it takes no keys


def test_what_is_there_or_not_asked_for_passes(tmp_path, capsys):
    for name in ("vgg.pth", "dino.safetensors"):
        (tmp_path / name).write_bytes(b"x")
    here = (f"loss.perceptual_weights={tmp_path}/vgg.pth", f"adversarial.backbone={tmp_path}/dino.safetensors")
    for overrides in (("loss.perceptual=none", "adversarial=null", "validation.images=v"), here):
        check_networks(recipe_of(*overrides), False)  # refuses nothing
        check_networks(recipe_of(*overrides), True)
        assert "missing" not in capsys.readouterr().err


def test_a_plan_tells_of_them_and_goes_on(capsys):
    check_networks(recipe_of(), True)
    said = capsys.readouterr().err
    assert said.count("plan: missing: ") == 2 and "vgg16-397923af.pth" in said
