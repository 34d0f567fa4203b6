"""`rae overfit-toy` from outside, very small: the table, the report, the theorem; and what it says of bad input."""

import dataclasses
import json
import sys
from pathlib import Path

import pytest
import torch

import raecli
from raecli.cli.overfit_toy import (
    EVERY_PRESET,
    PRESETS,
    Preset,
    build_recipe,
    choose_preset,
    images_of,
    latents_of_autoencoder,
    parse_numbers,
    resolved_encoder,
    scaled,
    with_tokens,
)
from raecli.errors import ExitCode, InputError, NonFiniteError, RaeError, UsageError
from raecli.evaluation.toy import Row, check, grid_lines, mean_lines, verdict_of
from raecli.evaluation.toy_figures import principal_colours
from raecli.recipe.recipes import OverfitToyRecipe
from raecli.stages import overfit_toy as stage
from raecli.stages.overfit_toy import build_model, by_time, jobs_of, make_latents, measure, run, tokens_of
from raecli.stages.worker import ended
from raecli.training.distributed import Ranks
from tests.conftest import TINY_DECODER

ALONE = Ranks(0, 1, torch.device("cpu"))


def small_recipe(output: Path, **changed) -> OverfitToyRecipe:
    values = {
        "stage": "overfit-toy",
        "preset": "tiny",
        "widths": (8, 16, 24),
        "depths": (2,),
        "heads": 2,
        "channels": (16,),
        "tokens": 4,
        "batch_size": 32,
        "steps": 120,
        "learning_rate": 6e-3,
        "final_learning_rate": 3e-4,
        "time_shift": 1.0,
        "evaluation_draws": 4096,
        "sample_steps": 25,
        "seeds": (0,),
        "output": str(output),
    }
    return OverfitToyRecipe(**values | changed)


def report_text(folder: Path) -> str:
    return json.loads((folder / "report.json").read_text())["latent"]


def check_theorem(rows: list[dict]) -> None:
    """The chain of floors, each row."""
    for row in rows:
        assert row["bound"] == max(0, 16 - row["output_width"]) / 16
        assert row["bound"] - 1e-6 <= row["tail_bound"] <= row["certificate"] + 1e-6  # float64 algebra
        assert row["loss"] + 4 * row["standard_error"] >= row["certificate"]
        assert row["unremoved_noise"] <= row["sample_error"] + 1e-6


def test_the_command_shows_the_table_and_writes_what_the_same_run_finds_here(tmp_path, rae):
    options = ("--preset", "tiny", "--channels", "16", "--width", "8,16..24..8", "--steps", "120")
    shown = rae("overfit-toy", *options, "--out", "toy")
    lines = [line.split() for line in shown.stdout.splitlines()]
    table = [line for line in lines if line and line[0] in ("8", "16", "24")]
    assert [line[0] for line in table] == ["8", "16", "24"]
    assert "china.jpg; centre crop of 56 x 56 pixels" in shown.stdout
    assert "random weights" in report_text(tmp_path / "toy")
    assert "preset tiny, as asked" in shown.stderr
    report = json.loads((tmp_path / "toy" / "report.json").read_text())
    check_theorem(report["rows"])
    assert report["breaches"] == []
    assert [f"{row['loss']:.4f}" for row in report["rows"]] == [
        line[3] for line in table
    ]  # depth, n, image, seed, d: all alike, and left out
    for name in ("figure.png", "samples.png"):
        assert (tmp_path / "toy" / name).read_bytes().startswith(b"\x89PNG")
    recipe = small_recipe(tmp_path, widths=(16,), images=images_of(None, needed=True))
    row, _ = measure(jobs_of(recipe)[0], recipe, ALONE)  # another process, seeded the same
    assert row.loss == pytest.approx(report["rows"][1]["loss"], rel=1e-3)  # threads may round otherwise


def test_a_narrow_model_keeps_its_noise_and_a_wide_one_converges(tmp_path, capsys):
    run(small_recipe(tmp_path / "toy", widths=(8, 24), steps=300, print_json=True), ALONE)
    printed = capsys.readouterr()
    report = json.loads(printed.out)  # nothing else on stdout
    assert "certificate" in printed.err
    check_theorem(report["rows"])
    narrow, wide = report["rows"]
    assert (wide["verdict"], wide["unremoved_noise"]) == ("converged", 0)
    assert narrow["sample_error"] >= narrow["unremoved_noise"] > 0.4  # .5 expected; 64 samples of 4 tokens: +- .02


def test_the_tiny_preset_trains_to_within_a_few_hundredths_of_the_bound(tmp_path):
    asked = {"preset": "tiny", "widths": (48,), "seeds": (0,), "output": str(tmp_path)}
    asked["images"] = images_of(None, needed=True)
    recipe = build_recipe({**EVERY_PRESET, **PRESETS[Preset.TINY], **asked})
    row, _ = measure(jobs_of(recipe)[0], recipe, ALONE)
    assert row.bound == 0.25 and row.verdict == "cannot be trained away"
    assert row.bound <= row.certificate < 0.252  # the output layer finds the best subspace
    assert row.excess < 0.03  # issue 7; .020 to .022 measured for seeds 0 to 2


@pytest.mark.parametrize(
    ("floor", "loss", "verdict"),
    [(0.25, 0.27, "cannot be trained away"), (0.25, 0.4, "not converged yet"), (0.0, 0.03, "converged")],
)
def test_the_verdict_tells_a_floor_from_a_lack_of_training(floor, loss, verdict):
    assert verdict_of(floor, loss) == verdict


def test_the_head_decides_not_the_backbone(tmp_path):
    rescued = small_recipe(tmp_path, widths=(8,), head=(24, 2))
    starved = small_recipe(tmp_path, widths=(24,), head=(8, 2))
    good, bad = (measure(jobs_of(recipe)[0], recipe, ALONE)[0] for recipe in (rescued, starved))
    assert (good.bound, bad.bound) == (0, 0.5)
    assert good.loss < 0.4 < 0.5 <= bad.certificate <= bad.loss + 4 * bad.standard_error
    check_theorem([dataclasses.asdict(row) for row in (good, bad)])


def test_one_job_gives_the_same_row_twice_and_another_seed_another_latent(tmp_path):
    recipe = small_recipe(tmp_path, widths=(8,), steps=10, evaluation_draws=64)
    job = jobs_of(recipe)[0]
    first, second = (dataclasses.replace(measure(job, recipe, ALONE)[0], seconds=0.0) for _ in range(2))
    assert first == second


@pytest.mark.parametrize("images", [(), images_of(None, needed=True)])
def test_a_latents_tokens_are_normalised_and_another_seed_has_others(tmp_path, images):
    recipe = small_recipe(tmp_path, seeds=(0, 1), widths=(8,), images=images)
    first, second = (tokens_of(make_latents(job, recipe)) for job in jobs_of(recipe))
    torch.testing.assert_close(first.mean(dim=-1), torch.zeros(1, 4), atol=1e-6, rtol=0)
    torch.testing.assert_close(first.var(dim=-1, correction=0), torch.ones(1, 4), atol=1e-3, rtol=0)
    assert not torch.allclose(first, second)


def test_the_latent_is_the_images_by_the_encoder(tmp_path, images):
    """Two images of 16 pixels by the embedded encoder: four tokens of 32 channels, the same for all seeds."""
    paths = sorted(str(path) for path in images.rglob("*.png"))[:2]
    spec = with_tokens(resolved_encoder("digits-mae"), 4)
    assert (spec.input_size, spec.width) == (16, 32)
    recipe = small_recipe(tmp_path, images=tuple(paths), encoder=spec, channels=(32,), seeds=(0, 1), widths=(8,))
    found = [make_latents(job, recipe) for job in jobs_of(recipe)]
    assert [tuple(latents.shape) for latents in found] == [(1, 32, 2, 2)] * 4
    assert torch.equal(found[0], found[1]) and torch.equal(found[2], found[3])
    assert not torch.allclose(found[0], found[2])


def test_an_autoencoders_own_latents_are_overfitted_and_samples_are_decoded(tmp_path, cache, images, rae):
    data = (f"images={images}", f"cache={cache}", "output=decoder", "duration=2 steps")
    rae("train-decoder", "digits/decoder", *data, "loss.perceptual=none", "loss.perceptual_weights=null", *TINY_DECODER)
    told = latents_of_autoencoder(str(tmp_path / "decoder"))
    assert (told["channels"], told["tokens"], told["image_size"]) == ((32,), 16, 32)
    image = str(next(iter(sorted(images.rglob("*.png")))))
    recipe = small_recipe(tmp_path, **told, images=(image,), widths=(16,), steps=3, evaluation_draws=64)
    row, made = measure(jobs_of(recipe)[0], recipe, ALONE)
    autoencoder = raecli.load_autoencoder(tmp_path / "decoder")
    latents = autoencoder.encode(stage.read_image(image, 32))
    torch.testing.assert_close(made.target, tokens_of(latents)[0])
    assert made.images.shape == (4, 3, 32, 32)
    torch.testing.assert_close(made.images[:1], autoencoder.decode(latents))
    assert row.bound == 0.5
    assert "the autoencoder" in stage.latent_in_words(recipe)


def test_seeds_and_depths_are_averaged_and_drawn(tmp_path, capsys):
    small = {"widths": (8,), "depths": (1, 2), "seeds": (0, 1), "steps": 4, "evaluation_draws": 64}
    run(small_recipe(tmp_path / "toy", images=images_of(None, needed=True), **small), ALONE)
    shown = capsys.readouterr().out
    report = json.loads((tmp_path / "toy" / "report.json").read_text())
    losses = [row["loss"] for row in report["rows"] if row["depth"] == 2]
    assert report["means"][1]["loss"] == pytest.approx(sum(losses) / 2, rel=1e-12)
    assert f"width 8, depth 2, n = 16: mean loss {sum(losses) / 2:.4f} of 2 runs" in shown
    for name in ("figure.png", "samples.png", "depth.png"):
        assert (tmp_path / "toy" / name).read_bytes().startswith(b"\x89PNG")


def test_the_grid_marks_what_cannot_converge():
    rows = [
        row_of(width=d, channels=n, bound=max(0, n - d) / n, loss=0.5 * n / d) for n in (384, 768) for d in (384, 768)
    ]
    lines = [line.split() for line in grid_lines(rows)]
    assert lines[1] == ["DiT-S", "d=384", "DiT-B", "d=768"]
    assert lines[2] == ["DINOv2-S", "n=384", "5.0e-01", "v", "2.5e-01", "v"]
    assert lines[3] == ["DINOv2-B", "n=768", "1.0e+00", "x", "5.0e-01", "v"]
    assert mean_lines(rows) == []  # one run a cell


def test_losses_are_told_by_time():
    losses, times = torch.tensor([1.0, 3.0, 5.0, 7.0]).double(), torch.tensor([0.05, 0.2, 0.25, 0.95]).double()
    assert by_time(losses, times) == [1.0, 4.0, None, None, None, 7.0]


def test_a_picture_of_tokens_shows_the_first_map_in_its_own_colours():
    tokens = torch.randn(2, 4, 16, generator=torch.Generator().manual_seed(0))
    colours = principal_colours(tokens)
    assert colours.shape == (2, 4, 3)
    assert float(colours[0].amin()) >= 0.1 - 1e-6 and float(colours[0].amax()) <= 0.9 + 1e-6
    torch.testing.assert_close(colours[0].mean(dim=0), torch.full((3,), 0.5))  # centred on the target's mean


@pytest.mark.parametrize(("width", "heads"), [(12, 1), (16, 2), (400, 5), (768, 12), (896, 14)])
def test_heads_leave_each_a_multiple_of_four_channels(tmp_path, width, heads):
    recipe = small_recipe(tmp_path, widths=(width,), depths=(1,), heads=2 if width < 64 else None)
    assert build_model(jobs_of(recipe)[0], recipe).blocks[0].attention.heads == heads


def row_of(**changed) -> Row:
    row = Row(8, 2, 16, None, 0, 8, 0.5, 0.5, 0.501, 0.52, 0.001, 0.02, [], 0.55, 0.51, "", 1, 1.0, [])
    return dataclasses.replace(row, **changed)


def test_a_row_above_its_bound_passes():
    near = [row_of(), row_of(loss=0.4961), row_of(certificate=0.4999995)]  # 3.9 s.e. below; half the rounding allowed
    assert check(near) is None


@pytest.mark.parametrize(
    ("changed", "evidence"),
    [
        ({"loss": 0.4959}, "loss 0.495900"),
        ({"certificate": 0.49}, "certificate 0.49"),
        ({"loss": float("nan")}, "loss nan"),
    ],
)
def test_a_breach_of_the_theorem_is_a_bug_with_its_evidence(changed, evidence):
    with pytest.raises(RaeError, match=evidence) as caught:
        check([row_of(), row_of(**changed)])
    assert caught.value.exit_code == ExitCode.BUG


@pytest.mark.parametrize("name", ["width_bound", "tail_bound", "certificate"])
def test_a_wrong_formula_ends_the_verb_with_one(name, tmp_path, monkeypatch, capsys):
    """Mutation: a bound too high by .4, or a certificate too low, is found out by the run itself."""
    right, by = getattr(stage, name), -0.4 if name == "certificate" else 0.4
    monkeypatch.setattr(stage, name, lambda *arguments: right(*arguments) + by)
    recipe = small_recipe(tmp_path, widths=(8,), steps=120)
    assert ended(lambda: run(recipe, ALONE)) == ExitCode.BUG == 1
    assert "Theorem 1 is contradicted" in capsys.readouterr().err
    evidence = json.loads((tmp_path / "report.json").read_text())["breaches"]
    assert evidence and "below the bound" in evidence[0]


def test_a_loss_that_is_no_number_ends_the_run(tmp_path):
    recipe = small_recipe(tmp_path, widths=(8,), learning_rate=1e30, final_learning_rate=None)
    with pytest.raises(NonFiniteError, match="width 8, depth 2, seed 0"):
        measure(jobs_of(recipe)[0], recipe, ALONE)


def test_without_matplotlib_the_report_is_there_and_one_line_says_why_no_figure(tmp_path, capsys, monkeypatch):
    for name in ("matplotlib", "matplotlib.figure"):
        monkeypatch.setitem(sys.modules, name, None)
    run(small_recipe(tmp_path, widths=(8,), steps=2, evaluation_draws=8), ALONE)
    assert "no figures: matplotlib is missing" in capsys.readouterr().out
    assert {path.name for path in tmp_path.iterdir()} == {"report.json"}


@pytest.mark.parametrize(
    ("text", "numbers"),
    [
        ("384..896", (384, 512, 640, 768, 896)),
        ("32..96..16", (32, 48, 64, 80, 96)),
        ("96,32, 32", (32, 96)),
        ("768", (768,)),
    ],
)
def test_widths_are_numbers_ranges_and_lists(text, numbers):
    assert parse_numbers("--width", text, range_step=128) == numbers


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("abc", "expected a number"),
        ("", "expected a number"),
        ("-8", "expected a number"),
        ("8..", "expected a number"),
        ("5..3", "did you mean 3..5"),
        ("0", "at least 1"),
        ("8..16..0", "at least 1"),
        ("384..900", "384..896..128"),
        ("4..40000..4", "at most 64"),
    ],
)
def test_widths_that_are_none_are_refused_with_what_was_expected(text, expected):
    with pytest.raises(UsageError, match=expected):
        parse_numbers("--width", text, range_step=128)


@pytest.mark.parametrize(
    ("widths", "preset"),
    [(None, "tiny"), ((8, 128), "tiny"), ((132,), "small"), ((320,), "small"), ((384, 896), "paper-cpu")],
)
def test_the_preset_follows_the_widths_without_a_gpu_and_is_the_papers_with_one(widths, preset, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert choose_preset(widths)[0].value == preset
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    assert choose_preset(widths)[0].value == "paper"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--width", "30"), "no multiple of 4"),
        (("--width", "5..3"), "did you mean 3..5"),
        (("--head", "96"), "WIDTHxDEPTH"),
        (("--preset", "huge"), "huge"),
        (("--encoder", "digits-mae", "--channels", "64"), "exclude one another"),
        (("--grid", "--width", "64"), "exclude one another"),
        (("--encoder", "digits-may"), "digits-mae"),
    ],
)
def test_bad_options_end_with_two_and_start_nothing(options, message, rae, tmp_path):
    refused = rae("overfit-toy", "--preset", "tiny", *options, code=2)
    assert message in refused.stderr
    assert list(tmp_path.iterdir()) == []


def test_an_image_that_is_none_is_refused(tmp_path):
    with pytest.raises(InputError, match="no such file"):
        images_of([str(tmp_path / "x.png")], needed=False)
    (tmp_path / "x.png").write_text("no image")
    with pytest.raises(InputError, match=r"x\.png: not a readable image"):
        images_of([str(tmp_path / "x.png")], needed=False)


def test_without_scikit_learn_the_default_is_random_tokens_and_an_encoder_wants_an_image(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert images_of(None, needed=False) == ()
    with pytest.raises(UsageError, match="--image FILE"):
        images_of(None, needed=True)


def test_a_presets_widths_follow_the_token_dimension():
    assert scaled((32, 48, 56, 64, 72, 96), 32, 64) == (16, 24, 28, 32, 36, 48)
    assert scaled((384, 512, 640, 768, 896), 384, 768) == (192, 256, 320, 384, 448)


def test_help_shows_examples(rae):
    shown = rae("overfit-toy", "--help").stdout
    assert "rae overfit-toy --width 384..896" in shown
    assert "--head 96x2" in shown
