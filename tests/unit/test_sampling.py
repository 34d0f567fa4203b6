"""The sampling stage in this process, on tiny models with random weights."""

import json
import threading
from collections import Counter
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from raecli.errors import InputError, NonFiniteError, StorageError, UsageError
from raecli.recipe.recipes import SampleRecipe, SweepSpec
from raecli.sampling import images as images_module
from raecli.sampling.images import make_images, solve
from raecli.sampling.models import load_models
from raecli.sampling.protocol import balanced_labels
from raecli.sampling.trajectory import shown_steps, trajectory_rows
from raecli.stages import sample as stage
from raecli.store.samples import check_space, is_whole_png, read_protocol, write_png
from raecli.training.distributed import Ranks
from tests.conftest import tree
from tests.unit.tiny_models import NAMES, save_decoder, save_diffusion

ALONE = Ranks(0, 1, torch.device("cpu"))


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """Paths of a model, a guide and a decoder; not to be changed."""
    folder = tmp_path_factory.mktemp("tiny")
    return {
        "model": save_diffusion(folder / "model"),
        "guide": save_diffusion(folder / "guide", seed=1, depth=1),
        "autoencoder": save_decoder(folder / "decoder"),
    }


def recipe_of(tiny, output, **changes):
    told = {"num": 10, "steps": 4, "batch_size": 4, "grid": 0} | changes
    return SampleRecipe(
        stage="sample", model=tiny["model"], autoencoder=tiny["autoencoder"], output=str(output), **told
    )


def pixels_of(folder):
    return np.stack([np.asarray(Image.open(path)) for path in sorted(Path(folder).glob("0*.png"))]).astype(int)


def made(tiny, output, **changes):
    stage.run(recipe_of(tiny, output, **changes), ALONE)
    return Path(output)


def test_the_guide_and_the_model_see_every_image_as_often_as_they_must_and_no_more(tiny, tmp_path):
    changes = {"guidance_scale": 2.0, "guidance_interval": (0.5, 0.9), "solver": "heun", "guide": tiny["guide"]}
    recipe = recipe_of(tiny, tmp_path / "out", **changes)
    models, seen = load_models(recipe, ALONE), Counter()
    for name in ("model", "guide"):
        getattr(models, name).register_forward_pre_hook(
            lambda module, inputs, name=name: seen.update({name: len(inputs[0])})
        )
    stage.make_samples(recipe, models, ALONE)
    # Times of 4 steps with shift 2: 1, .857, .667, .4, 0; Heun asks at each but the last, and ahead but at 0.
    assert seen == {"model": 10 * 7, "guide": 10 * 4}
    stage.make_samples(recipe, models, ALONE)
    assert seen["model"] == 10 * 7  # made already


def test_a_damaged_image_is_made_again_and_no_other_touched(tiny, tmp_path):
    out = made(tiny, tmp_path / "out")
    whole, victim = tree(out), out / "000005.png"
    data = bytearray(victim.read_bytes())
    data[len(data) // 2] ^= 1  # in the middle: its end is whole
    victim.write_bytes(data)
    (out / "000009.png").unlink()
    times = {path.name: path.stat().st_mtime_ns for path in out.glob("0*.png")}
    made(tiny, out)
    assert tree(out) == whole
    after = {path.name: path.stat().st_mtime_ns for path in out.glob("0*.png")}
    assert {name for name in after if after[name] != times.get(name)} == {"000005.png", "000009.png"}


def test_a_png_is_whole_from_its_first_byte_to_its_last(tmp_path):
    path = tmp_path / "000000.png"
    write_png(path, np.arange(3 * 32 * 32, dtype=np.uint8).reshape(32, 32, 3))
    good = path.read_bytes()
    assert is_whole_png(path) and not is_whole_png(tmp_path / "none.png")
    for place in range(8, len(good)):
        path.write_bytes(good[:place] + bytes([good[place] ^ 1]) + good[place + 1 :])
        assert not is_whole_png(path), place
    for bad in (b"", good[:8], good[:-1], good + b"x", good[:-12], b"x" + good):
        path.write_bytes(bad)
        assert not is_whole_png(path)


def test_another_batch_size_moves_no_pixel_by_more_than_one_level(tiny, tmp_path):
    ways = {size: pixels_of(made(tiny, tmp_path / str(size), batch_size=size)) for size in (1, 3, 4, 10)}
    assert ways[4].std() > 10  # pictures of something
    for found in ways.values():
        assert np.abs(found - ways[4]).max() <= 1


@pytest.mark.parametrize("solver", ["euler", "sde"])
def test_more_images_leave_the_noise_of_the_first_as_it_was(tiny, tmp_path, solver):
    few = pixels_of(made(tiny, tmp_path / "few", num=4, classes=(1,), solver=solver))
    many = pixels_of(made(tiny, tmp_path / "many", num=10, classes=(1,), solver=solver))
    np.testing.assert_array_equal(few, many[:4])  # labels are of one class, as they depend on num


def test_the_sdes_images_depend_on_seed_and_index_and_without_diffusion_are_eulers(tiny, tmp_path):
    ode = tree(made(tiny, tmp_path / "ode"))
    sde = made(tiny, tmp_path / "sde", solver="sde", sde_diffusion=1.0)
    whole = tree(sde)
    zero = tree(made(tiny, tmp_path / "zero", solver="sde", sde_diffusion=0.0))
    image = "000003.png"
    assert whole[image] != ode[image] and zero[image] == ode[image]
    (sde / image).unlink()
    made(tiny, sde, solver="sde", sde_diffusion=1.0)
    assert tree(sde) == whole
    other = np.abs(pixels_of(made(tiny, tmp_path / "other", solver="sde", batch_size=3)) - pixels_of(sde))
    assert other.max() <= 1


def test_labels_are_balanced_and_without_a_class_where_asked(tiny, tmp_path):
    labels = balanced_labels(recipe_of(tiny, tmp_path, num=301), num_classes=3)
    counts = Counter(labels)
    assert set(counts) == {0, 1, 2} and max(counts.values()) - min(counts.values()) == 1 and labels != sorted(labels)
    assert set(balanced_labels(recipe_of(tiny, tmp_path, num=9, classes=(2, 0)), num_classes=3)) == {0, 2}
    assert balanced_labels(recipe_of(tiny, tmp_path, num=3, unconditional=True), num_classes=3) == [3, 3, 3]


def test_labels_lie_in_an_order_of_the_seed_so_that_splits_of_the_inception_score_are_alike(tiny, tmp_path):
    """EVALUATION section 3: a set that is sorted by class scores 41 where it scores 157 in any order."""
    first, again, other = (
        balanced_labels(recipe_of(tiny, tmp_path, num=3000, seed=seed), num_classes=3) for seed in (0, 0, 1)
    )
    assert first == again != other
    followers = Counter(pairwise(first))  # each class follows each as often, by chance
    assert len(followers) == 9 and max(followers.values()) < 1.25 * min(followers.values())


def test_unconditional_samples_of_a_model_with_classes_take_the_null_label(tiny, tmp_path):
    free = made(tiny, tmp_path / "free", unconditional=True)
    card = json.loads((free / "samples.json").read_text())
    assert set(card["labels"]) == {len(NAMES)} and card["label_order"] == "unconditional"
    assert tree(free)["000000.png"] != tree(made(tiny, tmp_path / "out"))["000000.png"]
    with pytest.raises(ValueError, match="no label to guide by"):
        recipe_of(tiny, tmp_path, unconditional=True, guidance_scale=1.5)
    with pytest.raises(ValueError, match="one of unconditional and classes"):
        recipe_of(tiny, tmp_path, unconditional=True, classes=(1,))


def test_bf16_blocks_give_the_bits_of_autocast_over_float32(tiny, tmp_path, monkeypatch):
    recipe = recipe_of(tiny, tmp_path, precision="bf16", guidance_scale=1.5, guide=tiny["guide"])
    halved = load_models(recipe, ALONE)
    weights = [p for p in halved.model.parameters() if p.dtype == torch.bfloat16]
    assert len(weights) == 2 * 10  # five matrices and their biases in each of two blocks
    monkeypatch.setattr("raecli.sampling.models.halve_trunks", lambda models: None)
    whole = load_models(recipe, ALONE)
    ends = [solve(recipe, models, [0, 1, 2, 0], range(4), ALONE) for models in (halved, whole)]
    assert ends[0].dtype == torch.float32 and torch.equal(*ends)
    in_float32 = solve(
        recipe_of(tiny, tmp_path, guidance_scale=1.5, guide=tiny["guide"]), whole, [0] * 4, range(4), ALONE
    )
    assert not torch.equal(ends[0], in_float32)


def test_a_batch_is_decoded_while_the_next_is_solved(tiny, tmp_path, monkeypatch):
    recipe = recipe_of(tiny, tmp_path, num=8)
    models, second_solve = load_models(recipe, ALONE), threading.Event()
    really_solve, really_decode, decoded = images_module.solve, images_module.decode, []

    def watched_solve(recipe, models, labels, batch, ranks):
        if batch.start == 4:
            second_solve.set()
        return really_solve(recipe, models, labels, batch, ranks)

    def waiting_decode(recipe, models, latents, batch):
        if batch.start == 0:  # done one after the other, the second solve would wait for this, for ever
            assert second_solve.wait(60), "the next batch was not begun"
        decoded.append(batch.start)
        return really_decode(recipe, models, latents, batch)

    monkeypatch.setattr(images_module, "solve", watched_solve)
    monkeypatch.setattr(images_module, "decode", waiting_decode)
    batches = {range(4): [0, 1, 2, 3], range(4, 8): [4, 5, 6, 7]}
    make_images(recipe, models, [0] * 8, batches, tmp_path, ALONE)
    assert decoded == [0, 4] and len(list(tmp_path.glob("0*.png"))) == 8


def test_what_fails_in_the_background_ends_the_stage(tiny, tmp_path, monkeypatch):
    recipe = recipe_of(tiny, tmp_path / "out")
    models = load_models(recipe, ALONE)
    with torch.no_grad():
        models.autoencoder.decoder.norm.weight.fill_(float("nan"))
    with pytest.raises(NonFiniteError, match="images 0 to 3"):
        stage.make_samples(recipe, models, ALONE)
    assert not list((tmp_path / "out").glob("*.png"))

    def no_memory(*_, **__):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9 GiB")

    monkeypatch.setattr(images_module, "sample", no_memory)
    with pytest.raises(UsageError, match="--batch-size 4 is more than"):
        solve(recipe, models, [0] * 4, range(4), ALONE)


def test_compiled_blocks_give_the_same_images(tiny, tmp_path, monkeypatch):
    """Traced, but not built: the C++ of a real build took minutes here, and moved no pixel by more than one level."""
    compiled, really_compile = [], torch.nn.Module.compile

    def traced(module):
        compiled.append(module)
        really_compile(module, backend="eager")

    monkeypatch.setattr(torch.nn.Module, "compile", traced)
    guided = {"num": 5, "guidance_scale": 1.5, "guidance_interval": (0.5, 1.0)}  # batches of 4, 8 and 1, 2
    fast = pixels_of(made(tiny, tmp_path / "fast", compile=True, **guided))
    plain = pixels_of(made(tiny, tmp_path / "plain", **guided))
    assert len(compiled) == 3  # two blocks of the model, one of the decoder
    # Compiled, rotary positions are products of reals instead of complex numbers: the last bit may round otherwise.
    assert len(fast) == 5 and np.abs(fast - plain).max() <= 1
    assert np.abs(plain[0] - plain[1]).max() > 1  # or it would show nothing


def test_a_trajectory_begins_in_noise_and_ends_in_the_image(tiny, tmp_path):
    recipe = recipe_of(tiny, tmp_path / "out", trajectory=2, steps=12)
    models = load_models(recipe, ALONE)
    labels = balanced_labels(recipe, num_classes=models.model.num_classes)
    rows, titles = trajectory_rows(recipe, models, labels, ALONE)
    assert len(rows) == 4 and {len(row) for row in rows} == {9} and len(titles) == 9
    assert titles[0] == "t = 1.000" and titles[-1] == "end"
    stage.make_samples(recipe, models, ALONE)
    ends = pixels_of(tmp_path / "out")[:2]
    for index in (0, 1):
        for row in rows[2 * index : 2 * index + 2]:
            assert np.abs(row[-1].astype(int) - ends[index]).max() <= 1
        assert not np.array_equal(rows[2 * index][0], rows[2 * index + 1][0])  # noise, and what it will become
    picture = Image.open(tmp_path / "out" / "trajectory.png")
    assert picture.size == (2 * (9 * 34 + 2), 2 * (4 * 34 + 2) + 16)  # 32 pixels, gaps of 2, magnified twice; titles


def test_steps_of_a_trajectory_are_spread_over_the_way():
    assert shown_steps(50) == [0, 7, 14, 21, 28, 35, 42, 49]
    assert shown_steps(3) == [0, 1, 2] and shown_steps(1) == [0]


@pytest.mark.parametrize("text", ["[" * 100_000, "{", "[]", '"x"', "\x00"])
def test_a_damaged_protocol_is_bad_input(tmp_path, text, tiny):
    out = tmp_path / "out"
    out.mkdir()
    for name in ("samples.json", "unfinished.json"):
        (out / name).write_text(text)
        with pytest.raises(InputError, match=name):
            read_protocol(out / name)
        (out / name).unlink()


def test_images_without_room_are_refused(tmp_path, monkeypatch):
    folder = tmp_path / "not" / "there" / "yet"
    check_space(folder, images=1, side=32, format="both")
    monkeypatch.setattr("shutil.disk_usage", lambda path: type("Usage", (), {"free": 1_000_000})())
    check_space(folder, images=200, side=32, format="png")
    with pytest.raises(StorageError, match=r"1228800 bytes are needed for 300 images at least, 1000000 are free"):
        check_space(folder, images=300, side=32, format="png")
    with pytest.raises(StorageError, match="needed for 200 images"):
        check_space(folder, images=200, side=32, format="npz")


def test_more_than_a_million_images_would_not_sort_by_name(tiny, tmp_path):
    with pytest.raises(ValueError, match="less than or equal to 1000000"):
        recipe_of(tiny, tmp_path, num=1_000_001)


class FirstPixels:
    """A feature network for tests: averages of the image's quarters."""

    def __init__(self) -> None:
        self.seen = 0

    def __call__(self, images):
        self.seen += len(images)
        return {"pool": images.double().mean(1).unfold(1, 16, 16).unfold(2, 16, 16).mean((3, 4)).flatten(1)}


@pytest.fixture
def judged(tiny, tmp_path, monkeypatch):
    """A sweep's recipe, its feature network, and a reference folder."""
    from raecli.evaluation.networks import FeatureNetwork
    from raecli.sampling import sweep

    reference, generator = tmp_path / "reference", np.random.default_rng(0)
    reference.mkdir()
    for index in range(8):
        write_png(reference / f"{index}.png", generator.integers(0, 256, (32, 32, 3), dtype=np.uint8))
    extract = FirstPixels()
    network = FeatureNetwork(extract, 4, {"name": "quarters", "sha256": "0", "file": "-", "width": 4})
    monkeypatch.setattr(sweep, "chosen_network", lambda features, inception, images, device: network)
    told = SweepSpec(scales=(1.0, 1.5, 3.0), intervals=((0.0, 1.0), (0.5, 0.9)), reference=str(reference))
    return recipe_of(tiny, tmp_path / "sweep", sweep=told), extract


def test_a_sweep_samples_and_measures_each_guidance_once(judged, tmp_path, capsys):
    from raecli.evaluation.moments import measured_moments
    from raecli.evaluation.networks import FeatureNetwork
    from raecli.metrics.frechet import frechet_distance
    from raecli.metrics.reference import open_images

    recipe, extract = judged
    stage.run(recipe, ALONE)
    rows = json.loads((tmp_path / "sweep" / "sweep.json").read_text())["rows"]
    found = [(row["scale"], row["low"], row["high"], row["evaluations"], row["second_evaluations"]) for row in rows]
    assert found == [  # times 1, .857, .667, .4: two of them in [.5, .9]; scale 1 is one set, whatever the interval
        (1.0, 0.0, 1.0, 4, 0),
        (1.5, 0.0, 1.0, 4, 4),
        (3.0, 0.0, 1.0, 4, 4),
        (1.5, 0.5, 0.9, 4, 2),
        (3.0, 0.5, 0.9, 4, 2),
    ]
    assert extract.seen == 8 + 5 * 10
    table = capsys.readouterr().out.splitlines()
    assert len(table) == 6 and sum("best" in line for line in table) == 1
    network = FeatureNetwork(FirstPixels(), 4, {"name": "quarters"})
    for row in rows:
        sides = [
            measured_moments(open_images(path), network, 3, ALONE, "test")
            for path in (tmp_path / "sweep" / row["folder"], tmp_path / "reference")
        ]
        by_hand = frechet_distance(*[part for side in sides for part in (side.mean, side.covariance)]).value
        assert row["fid"] == pytest.approx(by_hand, rel=1e-9)
    assert len({row["fid"] for row in rows}) == 5
    assert Image.open(tmp_path / "sweep" / "sweep.png").size[0] > 500


def test_a_sweep_goes_on_where_it_was_stopped(judged, tmp_path):
    recipe, extract = judged
    stage.run(recipe, ALONE)
    sweep = tmp_path / "sweep"
    whole = json.loads((sweep / "sweep.json").read_text())
    stage.run(recipe, ALONE)
    assert extract.seen == 2 * 8 + 5 * 10  # the reference again, no samples
    cut = {**whole, "rows": whole["rows"][:2]}
    (sweep / "sweep.json").write_text(json.dumps(cut))
    stage.run(recipe, ALONE)
    assert json.loads((sweep / "sweep.json").read_text()) == whole
    assert extract.seen == 3 * 8 + (5 + 3) * 10
    (sweep / "sweep.json").write_text("{")
    stage.run(recipe, ALONE)
    assert json.loads((sweep / "sweep.json").read_text()) == whole
