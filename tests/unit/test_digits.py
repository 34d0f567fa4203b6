"""The demo's scripts: the digits on disk, the shipped encoder, the judges, the report."""

import importlib
import json
import re
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from sklearn.datasets import load_digits

from raecli.models.classifier import load_classifier
from raecli.models.encoder import build_encoder
from raecli.store.encoder_config import read_folder_config

ROOT = Path(__file__).parents[2]
ASSET = ROOT / "raecli" / "assets" / "digits_mae"


def load_script(name):
    """A script of shell/digits as a module; they import each other by plain names."""
    sys.path.insert(0, str(ROOT / "shell" / "digits"))
    try:
        return importlib.import_module(name)
    finally:
        sys.path.pop(0)


data = load_script("data")
train_encoder = load_script("train_encoder")
train_judges = load_script("train_judges")
report = load_script("report")
claims = load_script("claims")


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    """The 1797 digits as the demo writes them."""
    folder = tmp_path_factory.mktemp("digits") / "digits"
    assert data.main([str(folder)]) == 0
    return folder


@pytest.fixture
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def files_of(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def test_every_digit_is_written_once_in_the_folder_of_its_class(digits):
    paths = sorted(digits.rglob("*.png"))
    assert len(paths) == 1797
    assert sorted(int(path.stem) for path in paths) == list(range(1797))
    target = load_digits().target
    assert all(target[int(path.stem)] == int(path.parent.name) for path in paths)
    assert len(files_of(digits)) == 1797


def test_the_split_is_stratified(digits):
    whole = Counter(load_digits().target.tolist())
    test = Counter(int(path.parent.name) for path in digits.glob("test/*/*.png"))
    assert sum(test.values()) == 360
    for label, count in whole.items():
        assert abs(test[label] - count * 360 / 1797) < 1


def test_the_pictures_are_the_packages_digits_enlarged(digits):
    images = load_digits().images
    paths = sorted(digits.rglob("*.png"))[::100]
    assert len(paths) == 18
    for path in paths:
        picture = Image.open(path)
        assert (picture.mode, picture.size) == ("L", (32, 32))
        shrunk = np.asarray(picture, dtype=float).reshape(8, 4, 8, 4).mean((1, 3))
        # averaging 4x4 blocks undoes the enlargement but for bicubic's smoothing: measured .98 and more
        assert np.corrcoef(shrunk.ravel(), images[int(path.stem)].ravel())[0, 1] > 0.95


def test_the_digits_are_the_same_bytes_again_and_are_not_written_twice(digits, tmp_path):
    assert data.main([str(tmp_path / "deep" / "again")]) == 0
    assert files_of(tmp_path / "deep" / "again") == files_of(digits)
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["again"]
    before = digits.stat().st_mtime_ns, digits.stat().st_ino
    assert data.main([str(digits)]) == 0
    assert (digits.stat().st_mtime_ns, digits.stat().st_ino) == before


def test_a_folder_of_something_else_is_left_alone(tmp_path, capsys):
    (tmp_path / "notes.txt").write_text("mine")
    assert data.main([str(tmp_path)]) == 3
    assert str(tmp_path) in capsys.readouterr().err
    assert files_of(tmp_path) == {"notes.txt": b"mine"}


def test_random_affine_of_no_size_is_the_identity():
    images = torch.rand(4, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    still = data.random_affine(images, torch.Generator().manual_seed(1), degrees=0, shift=0, scale=0)
    torch.testing.assert_close(still, images, atol=1e-4, rtol=0)  # bilinear weights at the pixels' centres: float32


def test_random_affine_moves_by_no_more_than_it_says():
    images = torch.zeros(200, 1, 32, 32)
    images[..., 15:17, 15:17] = 1  # a dot in the middle
    moved = data.random_affine(images, torch.Generator().manual_seed(1), degrees=0, shift=0.25, scale=0)
    rows = (moved.sum((1, 3)) * torch.arange(32.0)).sum(1) / moved.sum((1, 2, 3)) - 15.5
    assert 7 < rows.abs().max() <= 8.01  # a quarter of 32 pixels
    assert rows.min() < 0 < rows.max()


def test_the_shipped_encoder_is_small_half_precision_and_as_its_config_says():
    assert sum(path.stat().st_size for path in ASSET.iterdir()) < 150_000
    config = json.loads((ASSET / "config.json").read_text())
    expected = {
        "model_type": "vit_mae",
        "hidden_size": 32,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "intermediate_size": 128,
        "image_size": 32,
        "patch_size": 8,
        "num_channels": 3,
        "layer_norm_eps": 1e-12,
        "hidden_act": "gelu",
        "qkv_bias": True,
    }
    assert {key: config[key] for key in expected} == expected
    weights = load_file(ASSET / "model.safetensors")
    assert {value.dtype for value in weights.values()} == {torch.float16}
    assert all(value.isfinite().all() for value in weights.values())
    assert weights["vit.embeddings.position_embeddings"].shape == (1, 17, 32)
    layers = {name.split(".")[3] for name in weights if name.startswith("vit.encoder.layer.")}
    assert layers == {"0", "1", "2"}
    assert all(name.startswith("vit.") for name in weights)


def test_the_shipped_encoder_drops_an_affine_that_is_the_identity():
    weights = load_file(ASSET / "model.safetensors")
    assert (weights["vit.layernorm.weight"] == 1).all()
    assert (weights["vit.layernorm.bias"] == 0).all()


def test_the_script_writes_a_folder_like_the_shipped_one_and_the_same_twice(tmp_path, one_thread):
    for name in ("a", "b"):
        train_encoder.write_folder(train_encoder.train(steps=3, seed=0), tmp_path / name)
    assert files_of(tmp_path / "a") == files_of(tmp_path / "b")
    shipped, fresh = load_file(ASSET / "model.safetensors"), load_file(tmp_path / "a" / "model.safetensors")
    assert {name: value.shape for name, value in fresh.items()} == {
        name: value.shape for name, value in shipped.items()
    }
    for name in ("config.json", "preprocessor_config.json"):
        assert (tmp_path / "a" / name).read_bytes() == (ASSET / name).read_bytes()
    other = train_encoder.huggingface_weights(train_encoder.train(steps=3, seed=1))
    assert any(not torch.equal(other[name], fresh[name]) for name in fresh)


def test_the_folder_is_loaded_as_the_network_that_was_trained(tmp_path, one_thread):
    model = train_encoder.train(steps=3, seed=0)  # a few steps, so that no bias is zero
    train_encoder.write_folder(model, tmp_path / "folder")
    told = read_folder_config(tmp_path / "folder")
    loaded = build_encoder(
        loader="folder",
        architecture=told.model_type,
        path=str(tmp_path / "folder"),
        weights=str(tmp_path / "folder" / "model.safetensors"),
        family=told.family,
        input_size=32,
        patch_size=told.patch_size,
        width=told.width,
        prefix_tokens=told.prefix_tokens,
        norm_eps=told.norm_eps,
        position_antialias=told.position_antialias,
        mean=told.mean,
        std=told.std,
    )
    images = torch.rand(5, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        tokens = model.half().float().encode(images)  # the file's weights are rounded to fp16
        latents = loaded(images)
    # float32 rounding: two orders of the same sums
    torch.testing.assert_close(latents, tokens.mT.reshape(5, 32, 4, 4), atol=1e-5, rtol=0)


def test_the_encoder_sees_the_same_tokens_in_any_order_of_the_patches():
    torch.manual_seed(0)
    model = train_encoder.MaskedAutoencoder().eval()
    images = torch.rand(2, 3, 32, 32)
    order = torch.stack([torch.randperm(16), torch.randperm(16)])
    with torch.no_grad():
        plain, permuted = model.encode(images), model.encode(images, order)
    # float32 sums of attention in another order
    torch.testing.assert_close(permuted, plain.gather(1, order[:, :, None].expand(-1, -1, 32)), atol=1e-5, rtol=0)


def test_masked_patches_do_not_reach_the_encoder():
    torch.manual_seed(0)
    model = train_encoder.MaskedAutoencoder().eval()
    images = torch.rand(1, 3, 32, 32)
    changed = images.clone()
    changed[..., :8, :8] = 0  # patch 0, which is masked
    kept = torch.arange(8, 16)[None]
    with torch.no_grad():
        assert torch.equal(model(images, kept), model(changed, kept))
        assert not torch.equal(model(images, kept - 8), model(changed, kept - 8))


def test_training_the_judges_twice_writes_the_same_bytes(digits, tmp_path, one_thread):
    for name in ("a", "b"):
        assert train_judges.main([str(digits), str(tmp_path / name), "--steps", "4"]) == 0
    assert files_of(tmp_path / "a") == files_of(tmp_path / "b")
    assert sorted(files_of(tmp_path / "a")) == ["judge.safetensors", "judges.json", "loss.safetensors"]
    judge, loss = (load_classifier(tmp_path / "a" / f"{name}.safetensors") for name in ("judge", "loss"))
    assert not torch.equal(judge.scores.weight, loss.scores.weight)


def test_judges_that_are_there_are_not_trained_again(digits, tmp_path, one_thread, capsys):
    arguments = [str(digits), str(tmp_path), "--steps", "2"]
    assert train_judges.main(arguments) == 0
    before = (tmp_path / "judge.safetensors").stat().st_mtime_ns
    assert train_judges.main(arguments) == 0
    assert (tmp_path / "judge.safetensors").stat().st_mtime_ns == before
    assert "already" in capsys.readouterr().out


def test_a_judge_learns_quickly_and_is_measured_on_the_test_split(digits, one_thread):
    images, labels = train_judges.read_images(digits / "train")
    assert images.shape == (1437, 3, 32, 32)
    model = train_judges.train_classifier(images, labels, seed=3, steps=60)
    accuracy = train_judges.measure_accuracy(model, *train_judges.read_images(digits / "test"))
    assert accuracy > 0.7  # measured .9 after 60 of 600 steps; chance is .1


def test_judges_without_data_end_with_a_message(tmp_path, capsys):
    assert train_judges.main([str(tmp_path / "none"), str(tmp_path / "out")]) == 3
    assert "none" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.fixture
def run(tmp_path, digits):
    """A run folder as the demo leaves it, its samples copies of real digits."""
    for name, value in {"fid": 7.5, "fid_floor": 4.1, "fid_untrained": 300.0}.items():
        (tmp_path / f"eval_{name}.json").write_text(json.dumps({"fid": value}))
    (tmp_path / "eval_accuracy.json").write_text(json.dumps({"accuracy": 0.99}))
    (tmp_path / "eval_reconstruction.json").write_text(json.dumps({"rfid": 5.25, "psnr": 30.5}))
    (tmp_path / "judges").mkdir()
    judges = {"test_accuracy": {"judge": 1.0, "loss": 0.997}}
    (tmp_path / "judges" / "judges.json").write_text(json.dumps(judges))
    (tmp_path / "samples").mkdir()
    for i in range(20):
        source = sorted((digits / "train" / str(i % 10)).glob("*.png"))[0]
        (tmp_path / "samples" / f"{i:06d}.png").write_bytes(source.read_bytes())
    (tmp_path / "samples" / "samples.json").write_text(json.dumps({"labels": [i % 10 for i in range(20)]}))
    return tmp_path


def test_the_report_holds_the_figures_and_draws_the_panels(run, digits, capsys):
    assert report.main([str(run), "--data", str(digits)]) == 0
    written = json.loads((run / "report.json").read_text())
    assert (written["fid"], written["accuracy"], written["judge_accuracy"], written["missed"]) == (7.5, 0.99, 1.0, [])
    screen = capsys.readouterr().out
    assert all(
        part in screen for part in ("99.0%", "7.50", "4.10", "300.00", "5.25", "30.50", "at least 97 %", "below 20")
    )
    two_panels = Image.open(run / "picture.png").size
    reconstructions = run / "reconstructions" / "0"
    reconstructions.mkdir(parents=True)
    for path in (digits / "test" / "0").glob("*.png"):
        (reconstructions / path.name).write_bytes(path.read_bytes())
    assert report.main([str(run), "--data", str(digits)]) == 0
    assert Image.open(run / "picture.png").size[0] > two_panels[0]


@pytest.mark.parametrize(
    ("file", "content", "figure"),
    [
        ("eval_accuracy.json", {"accuracy": 0.969}, "accuracy"),
        ("eval_fid.json", {"fid": 20.0}, "fid"),
        ("eval_fid.json", {"fid": float("nan")}, "fid"),
    ],
)
def test_a_missed_bar_ends_with_1_and_is_named(run, digits, capsys, file, content, figure):
    (run / file).write_text(json.dumps(content))
    assert report.main([str(run), "--data", str(digits)]) == 1
    assert json.loads((run / "report.json").read_text())["missed"] == [figure]
    captured = capsys.readouterr()
    assert "MISSED" in captured.out
    assert captured.err.rstrip().endswith(figure)


@pytest.mark.parametrize("file", ["eval_fid.json", "judges/judges.json", "samples/samples.json"])
def test_a_missing_figure_is_told_by_its_file(run, digits, capsys, file):
    (run / file).unlink()
    assert report.main([str(run), "--data", str(digits)]) == 3
    assert file in capsys.readouterr().err
    assert not (run / "report.json").exists()


def write_claim(run, name, seed, accuracy, fid, loss):
    (run / f"{name}-{seed}").mkdir(parents=True)
    (run / f"{name}-{seed}" / "metrics.jsonl").write_text(f'{{"loss": 9.0}}\n{{"loss": {loss}}}\n')
    (run / f"{name}-{seed}-decoder-accuracy.json").write_text(json.dumps({"accuracy": accuracy}))
    (run / f"{name}-{seed}-decoder-fid.json").write_text(json.dumps({"fid": fid}))


def test_claims_are_averaged_over_seeds_and_kept_apart_by_model(tmp_path, capsys):
    write_claim(tmp_path, "diffusion_narrow", 0, 0.1, 140.0, 1.2)
    write_claim(tmp_path, "diffusion_narrow_deep", 0, 0.5, 90.0, 1.1)
    write_claim(tmp_path, "diffusion_fast", 0, 0.9, 4.0, 0.4)
    write_claim(tmp_path, "diffusion_fast", 1, 0.8, 6.0, 0.5)
    (tmp_path / "decoder.json").write_text('{"rfid": 0.5, "psnr": 30.53, "kind": "reconstruction"}')
    assert claims.main([str(tmp_path)]) == 0
    shown = capsys.readouterr().out.splitlines()
    assert shown[1].split()[-4:] == ["2", "0.450", "85.0%", "5.0"]
    assert shown[3].split()[-4:] == ["1", "1.100", "50.0%", "90.0"]
    found = json.loads((tmp_path / "report.json").read_text())
    assert found["models"][0]["fids"] == [4.0, 6.0]
    assert found["decoders"] == [{"decoder": "decoder", "rfid": 0.5, "psnr": 30.53}]


def test_claims_without_figures_or_with_a_cut_one_say_so(tmp_path, capsys):
    assert claims.main([str(tmp_path)]) == 3
    assert "claims.sh width" in capsys.readouterr().err
    write_claim(tmp_path, "diffusion_fast", 0, 0.9, 4.0, 0.4)
    (tmp_path / "diffusion_fast-0-decoder-fid.json").write_text('{"fid"')
    assert claims.main([str(tmp_path)]) == 3
    assert "not a whole report" in capsys.readouterr().err


def test_every_script_and_recipe_that_a_shell_script_names_is_there():
    root = Path(__file__).parents[2]
    named = []
    for script in sorted(root.glob("shell/**/*.sh")):
        text = script.read_text()
        named += [(script.name, root / path) for path in re.findall(r"shell/[a-z_/]+\.(?:py|sh|sbatch)", text)]
        recipes = re.findall(r"\bdigits/((?:decoder|diffusion)[a-z_0-9]*)", text)
        named += [(script.name, root / "recipes" / "digits" / f"{recipe}.yaml") for recipe in recipes]
    assert [(name, str(path)) for name, path in named if not path.is_file()] == []
    assert len(named) >= 11
