"""What `rae sample` refuses and works out before torch is imported."""

import json
import subprocess
import sys
from dataclasses import replace

import pytest

from raecli.cli.sample import checked, class_words, intervals, numbers, recipe_of
from raecli.errors import CheckpointError, InputError, StorageError, UsageError
from raecli.recipe.load import load_recipe
from raecli.recipe.recipes import SampleRecipe, TrainDecoderRecipe, TrainDiffusionRecipe
from raecli.recipe.shipped import shipped_files
from raecli.sampling.cost import image_cost
from raecli.store.class_names import class_numbers
from raecli.store.model_cards import AutoencoderCard, DiffusionCard, check_guide, read_diffusion_card
from tests.conftest import environment
from tests.unit.tiny_models import save_decoder, save_diffusion


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """A folder with models of several kinds; not to be changed."""
    folder = tmp_path_factory.mktemp("tiny")
    save_diffusion(folder / "model")
    save_diffusion(folder / "guide", seed=1, depth=1)
    save_diffusion(folder / "other", classes=("apple", "cherry", "banana"))
    save_diffusion(folder / "two", classes=("apple", "banana"))
    save_diffusion(folder / "unnamed", classes=("0", "1", "2"))
    save_diffusion(folder / "free", classes=())
    save_diffusion(folder / "sure", label_dropout=0.0)
    save_decoder(folder / "decoder")
    return folder


def asked(tiny, output, model="model", sweep=None, **options):
    if "guide" in options:
        options["guide"] = str(tiny / options["guide"])
    told = {"autoencoder": str(tiny / "decoder")} | options
    return recipe_of(str(tiny / model), [str(output)], told, sweep or {})


def test_classes_by_name_become_numbers(tiny, tmp_path):
    recipe = asked(tiny, tmp_path, classes=class_words("cherry, 0,Banana"))
    assert recipe.classes == ("cherry", 0, "Banana")
    assert checked(recipe, dry_run=False).classes == (2, 0, 1)
    assert checked(asked(tiny, tmp_path), dry_run=False).classes is None


@pytest.mark.parametrize(
    ("model", "classes", "told"),
    [
        ("model", "bannana", r"'bannana': no such class; did you mean banana \(1\)\?"),
        ("model", "xyz", "there are .*apple"),
        ("model", "0,3", "3: the model has classes 0 to 2"),
        ("model", "-1", "'-1': no such class"),
        ("model", "0,", "'': no such class"),
        ("unnamed", "apple", "by number alone, 0 to 2"),
        ("free", "0", "trained without classes"),
    ],
)
def test_classes_that_are_none_are_refused(tiny, tmp_path, model, classes, told):
    recipe = asked(tiny, tmp_path, model=model, classes=class_words(classes))
    with pytest.raises(UsageError, match=told):
        checked(recipe, dry_run=False)


def test_imagenets_names_are_known_where_a_model_has_its_thousand_classes():
    words = ("tench", "n01443537", "golden retriever", "Golden_Retriever", 999)
    assert class_numbers(words, (), 1000) == (0, 1, 207, 207, 999)
    with pytest.raises(UsageError, match=r"did you mean goldfish \(1\)"):
        class_numbers(("golfish",), (), 1000)
    own = tuple(f"kind{label}" for label in range(1000))  # not ImageNet's folders: its names would mislead
    assert class_numbers(("kind7",), own, 1000) == (7,)
    with pytest.raises(UsageError, match="no such class"):
        class_numbers(("goldfish",), own, 1000)


def test_guides_are_held_against_the_model(tiny, tmp_path):
    for guide in ("guide", "unnamed", "sure"):
        checked(asked(tiny, tmp_path, guide=guide, guidance_scale=1.5), dry_run=False)
    with pytest.raises(InputError, match="label 1 is 'cherry' there and 'banana' here"):
        checked(asked(tiny, tmp_path, guide="other"), dry_run=False)
    with pytest.raises(InputError, match=r"knows 2 classes, .* 3"):
        checked(asked(tiny, tmp_path, guide="two"), dry_run=False)
    with pytest.raises(CheckpointError, match=r"nothing: no such folder"):
        checked(asked(tiny, tmp_path, guide="nothing"), dry_run=False)
    (tmp_path / "empty").mkdir()
    with pytest.raises(CheckpointError, match=r"no trained model here"):
        checked(asked(tiny, tmp_path, guide=tmp_path / "empty"), dry_run=False)
    with pytest.raises(CheckpointError, match=r"is a .rae-decoder., expected .rae-diffusion."):
        checked(asked(tiny, tmp_path, guide="decoder"), dry_run=False)


@pytest.mark.parametrize("sweep", [None, {"scales": (1.0, 1.5), "reference": "."}])
def test_classifier_free_guidance_needs_a_null_label_that_was_trained(tiny, tmp_path, sweep, monkeypatch):
    monkeypatch.setattr("raecli.metrics.inception_file.find_inception", lambda path: None)
    options = {"sweep": sweep} if sweep else {"guidance_scale": 1.5}
    with pytest.raises(UsageError, match="no classes to guide by"):
        checked(asked(tiny, tmp_path, model="free", **options), dry_run=False)
    with pytest.raises(UsageError, match="never saw the null label"):
        checked(asked(tiny, tmp_path, model="sure", **options), dry_run=False)


def test_names_of_classes_that_differ_in_number_alone_are_told_or_mean_nothing(tiny):
    """A card may hold fewer names than labels; an unconditional model's are its cache's, and label nothing."""
    model, free = (read_diffusion_card(str(tiny / name)) for name in ("model", "free"))
    short = replace(model, classes=("apple", "banana"))
    with pytest.raises(InputError, match="label 2 is None there and 'cherry' here"):
        check_guide(model, short)
    with pytest.raises(InputError, match="label 2 is 'cherry' there and None here"):
        check_guide(short, model)
    check_guide(replace(free, classes=("apple", "banana")), replace(free, classes=("apple", "banana", "cherry")))


def test_a_damaged_card_of_a_model_is_no_traceback(tiny, tmp_path):
    card = tmp_path / "model" / "final" / "config.json"
    card.parent.mkdir(parents=True)
    good = json.loads((tiny / "model" / "final" / "config.json").read_text())
    bad = ["[" * 100_000, "{", "[]", "{}", json.dumps(good | {"recipe": 3}), json.dumps(good | {"latents": []})]
    bad += [json.dumps(good | {"recipe": good["recipe"] | {"flow": {"time_shift_dim": "x"}}})]
    for text in bad:
        card.write_text(text)
        with pytest.raises(CheckpointError):
            checked(asked(tmp_path, tmp_path / "out", autoencoder=str(tiny / "decoder")), dry_run=False)


def test_no_room_for_the_images_is_told_before_anything_starts(tiny, tmp_path, monkeypatch):
    monkeypatch.setattr("shutil.disk_usage", lambda path: type("Usage", (), {"free": 1_000_000})())
    with pytest.raises(StorageError, match="needed for 500 images"):
        checked(asked(tiny, tmp_path / "out", num=500), dry_run=False)
    (tmp_path / "out").mkdir()
    for index in range(400):
        (tmp_path / "out" / f"{index:06d}.png").touch()
    checked(asked(tiny, tmp_path / "out", num=500), dry_run=False)  # most are there


def test_an_options_interval_and_sweep_are_read_strictly():
    assert numbers("1.0,1.2", "-g") == (1.0, 1.2) and intervals("0:1,0.1:0.9") == ((0.0, 1.0), (0.1, 0.9))
    for bad in ("", "1:", "a:b", "0-1", "0:1,", "1.2.3:4"):
        with pytest.raises(UsageError, match="reads like 0:1"):
            intervals(bad)
    with pytest.raises(UsageError, match="reads like"):
        numbers("1,x", "--guidance-sweep")


def test_what_an_options_sweep_lacks_is_told(tiny, tmp_path):
    with pytest.raises(UsageError, match="give --ref"):
        asked(tiny, tmp_path, sweep={"scales": (1.0,)})
    with pytest.raises(UsageError, match="belong to --guidance-sweep"):
        asked(tiny, tmp_path, sweep={"reference": "x"})
    with pytest.raises(UsageError, match="first number is above its second"):
        asked(tiny, tmp_path, sweep={"scales": (1.5,), "reference": "x", "intervals": ((0.9, 0.1),)})
    with pytest.raises(UsageError, match="first number is above its second"):
        asked(tiny, tmp_path, guidance_interval=(0.9, 0.1))
    recipe = asked(tiny, tmp_path, sweep={"scales": (1.5,), "reference": str(tmp_path / "none")})
    with pytest.raises(InputError, match="none: no such file"):
        checked(recipe, dry_run=False)


def test_a_recipe_takes_options_and_overrides_and_a_folder():
    name = "sample_dith_xl_256_autoguidance"
    plain = load_recipe(SampleRecipe, str(shipped_files()[name]))
    assert recipe_of(name, [], {}, {}) == plain
    found = recipe_of(
        f"recipes/{name}.yaml",
        ["here", "num=7"],
        {"steps": 5, "classes": ("a b", 3), "guidance_interval": (0.1, 1.0)},
        {},
    )
    assert found == plain.model_copy(
        update={"output": "here", "num": 7, "steps": 5, "classes": ("a b", 3), "guidance_interval": (0.1, 1.0)}
    )
    swept = recipe_of(name, [], {}, {"scales": (1.0, 1.5), "reference": "x", "intervals": ((0.0, 0.5),)})
    assert swept.sweep.scales == (1.0, 1.5) and swept.sweep.intervals == ((0.0, 0.5),)


@pytest.mark.parametrize(
    ("first", "rest", "options", "told"),
    [
        ("sample_dith_xl_255", [], {}, "did you mean sample_dith_xl_256"),
        ("dith_xl", ["out"], {}, "this is a recipe for train-diffusion; give one for sample"),
        ("sample_dith_xl_256", ["a", "b"], {}, "one folder OUT is asked for, found a and b"),
        ("runs/x", [], {"autoencoder": "y"}, "MODEL needs OUT"),
        ("runs/x", ["out", "num=3"], {"autoencoder": "y"}, "key=value changes a recipe"),
        ("sample_dith_xl_256", ["trajectry=3"], {}, "unknown key; did you mean trajectory"),
    ],
)
def test_words_that_mean_nothing_are_refused(first, rest, options, told):
    with pytest.raises(UsageError, match=told):
        recipe_of(first, rest, options, {})


def test_a_model_without_a_decoder_is_told_what_is_missing(tiny):
    with pytest.raises(UsageError, match="--autoencoder is missing"):
        recipe_of(str(tiny / "model"), ["out"], {}, {})


def test_the_door_needs_no_torch_to_refuse(tiny, tmp_path):
    code = f"""
import sys
sys.argv = ["rae", "sample", {str(tiny / "model")!r}, "out", "-a", {str(tiny / "decoder")!r}, *sys.argv[1:]]
from raecli.__main__ import main
try: main()
except SystemExit as end: print("CODE", end.code)
assert "torch" not in sys.modules
"""
    options = ("--classes", "aple", "--guide", tiny / "guide", "-g", "1.5")
    result = subprocess.run(
        [sys.executable, "-c", code, *map(str, options)],
        env=environment(),
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert result.returncode == 0, result.stderr
    assert "CODE 2" in result.stdout and "did you mean apple (0)?" in result.stderr
    assert list(tmp_path.iterdir()) == []


def card_of(name):
    spec = load_recipe(TrainDiffusionRecipe, str(shipped_files()[name])).model
    spec = spec.model_copy(update={"in_channels": 768, "input_size": 16, "num_classes": 1000})
    latents = {"encoder": None, "shape": [768, 16, 16], "image_size": 256}
    return DiffusionCard(name, latents, spec, 48**0.5, 0.1, ())


def test_the_plan_counts_what_the_paper_figures_come_to():
    decoder = load_recipe(TrainDecoderRecipe, str(shipped_files()["decoder_xl_dinov2b"])).decoder
    autoencoder = AutoencoderCard("decoder", {"encoder": None, "shape": [768, 16, 16]}, decoder, 256)
    recipe = load_recipe(SampleRecipe, str(shipped_files()["sample_dith_xl_256_autoguidance"]))
    model, guide = card_of("dith_xl"), card_of("dith_s")
    # shared/PERFORMANCE.md: 50 steps and decode, unguided and with AutoGuidance, in GFLOP.
    guided = image_cost(recipe, model, guide, autoencoder)
    assert (guided["evaluations"], guided["second_evaluations"]) == (50, 50)
    assert guided["flop"] / 1e9 == pytest.approx(21230, rel=1e-3)
    unguided = image_cost(recipe.model_copy(update={"guidance_scale": 1.0}), model, None, autoencoder)
    assert unguided["flop"] / 1e9 == pytest.approx(16380, rel=1e-3) and unguided["second_evaluations"] == 0
