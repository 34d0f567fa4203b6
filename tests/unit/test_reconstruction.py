"""Figures of reconstructions: formulae, any batch, order and ranks, pairs that do not match, a decoder's average."""

import io
import json
import math
import tarfile
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn
from torchvision.models.vgg import cfgs, make_layers

from raecli.cli.evaluate_reconstruction import chosen_metrics, find_weights
from raecli.data.images import open_images
from raecli.errors import InputError, NonFiniteError, UsageError
from raecli.evaluation.networks import POOL, FeatureNetwork
from raecli.evaluation.reconstruction import Judges, PairFigures, PairShape, load_judges, reconstructed, whole_groups
from raecli.evaluation.reconstruction_online import Validation, usable_metrics
from raecli.evaluation.reconstruction_pairs import open_pairs, pair_size
from raecli.metrics.frechet import frechet_distance
from raecli.metrics.lpips_file import find_lpips
from raecli.models.baseline_autoencoder import baseline_autoencoder
from raecli.models.build import encoder_of
from raecli.models.decoder import Decoder
from raecli.recipe.blocks import ValidationSpec
from raecli.recipe.load import load_recipe
from raecli.recipe.recipes import TrainDecoderRecipe
from raecli.store.encoders import resolve_encoder
from raecli.store.reconstructions import begin_reconstructions, finish_reconstructions, write_sheet
from raecli.store.statistics import LatentStatistics
from raecli.training.distributed import Ranks
from tests.conftest import make_images

CPU = torch.device("cpu")
ALONE = Ranks(0, 1, CPU)
COUNT = 23


class ThreadRanks:
    """One of several ranks that are threads of this process."""

    def __init__(self, rank: int, world: int, board: list, meeting: threading.Barrier) -> None:
        self.rank, self.world, self.device, self.is_main = rank, world, CPU, rank == 0
        self.board, self.meeting = board, meeting

    def gather(self, value):
        self.board[self.rank] = value
        self.meeting.wait(60)
        values = list(self.board)
        self.meeting.wait(60)
        return values

    def sum(self, values):
        return torch.stack(self.gather(values)).sum(0)

    def main_first(self, work):
        return self.gather(work() if self.is_main else None)[0]


def on_ranks(world: int, work) -> list:
    """work(ranks) on each of `world` threads; what each gave."""
    board, meeting, results = [None] * world, threading.Barrier(world), [None] * world

    def run(rank: int) -> None:
        results[rank] = work(ThreadRanks(rank, world, board, meeting))

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(world)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return results


@pytest.fixture(scope="module")
def judges(tmp_path_factory) -> Judges:
    """All four metrics: LPIPS on random VGG16 weights, rFID in eight sums of an image's pixels."""
    torch.manual_seed(0)
    vgg = nn.Module()
    vgg.features = make_layers(cfgs["D"])
    path = tmp_path_factory.mktemp("vgg") / "vgg16.pth"
    torch.save(vgg.state_dict(), path)
    lpips = load_judges(("psnr", "ssim", "lpips"), PairShape(path, (16, 16)), CPU, lpips_weights=str(path))
    assert lpips.descriptions["lpips"]["network"]["published_weights"] is False
    weights = torch.randn(8, 3 * 16 * 16, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    network = FeatureNetwork(lambda images: {POOL: images.double().flatten(1) @ weights.T / 255}, 8, {"name": "sums"})
    return Judges(("rfid", "psnr", "ssim", "lpips"), lpips.lpips, network)


@pytest.fixture(scope="module")
def pairs():
    """Random images and noisy copies, uint8 [COUNT, 3, 16, 16]; some pairs are equal."""
    generator = torch.Generator().manual_seed(1)
    images = torch.randint(0, 256, (COUNT, 3, 16, 16), generator=generator, dtype=torch.uint8)
    noise = torch.randint(-20, 21, images.shape, generator=generator)
    noise[5] = 0
    return images, (images.int() + noise).clamp(0, 255).to(torch.uint8)


def measured(judges, pairs, batches, ranks) -> dict:
    """The figures of a rank's batches of positions."""
    figures = PairFigures(judges, CPU)
    for batch in batches:
        chosen = list(batch)
        figures.update(chosen, pairs[0][chosen], pairs[1][chosen], [f"pair {index}" for index in chosen])
    return figures.means(COUNT, ranks)


def in_batches(size: int, order=None) -> list[list[int]]:
    order = list(range(COUNT)) if order is None else order
    return [order[start : start + size] for start in range(0, COUNT, size)]


def test_a_sets_figure_is_the_mean_of_its_images_figures(judges, pairs):
    report = measured(judges, pairs, in_batches(COUNT), ALONE)
    images, reconstructions = (side.double().numpy() / 255 for side in pairs)
    mse = np.square(images - reconstructions).mean(axis=(1, 2, 3))
    expected = [10 * math.log10(1 / max(value, 1e-10)) for value in mse]
    assert expected[5] == 100  # equal images
    assert report["psnr"] == pytest.approx(sum(expected) / COUNT, rel=1e-12)
    assert report["psnr"] != pytest.approx(10 * math.log10(1 / mse.mean()), rel=1e-3)  # not that of the mean error
    features = [judges.network.extract(side)[POOL].double() for side in pairs]
    fitted = [part for side in features for part in (side.mean(0), torch.cov(side.T))]
    assert report["rfid"] == pytest.approx(frechet_distance(*fitted).value, rel=1e-6)
    assert report["lpips"] > 0 and 0 < report["ssim"] < 1 and report["pairs"] == COUNT
    same = measured(judges, (pairs[0], pairs[0]), in_batches(4), ALONE)
    assert (same["psnr"], same["ssim"], same["lpips"]) == (100, 1, 0) and abs(same["rfid"]) < 1e-6
    assert same["pixels_sha256"]["images"] == same["pixels_sha256"]["reconstructions"]


@pytest.mark.parametrize("size", [1, 4, 10])
def test_figures_depend_on_neither_batch_nor_order(judges, pairs, size):
    expected = measured(judges, pairs, in_batches(COUNT), ALONE)
    order = np.random.default_rng(size).permutation(COUNT).tolist()
    found = measured(judges, pairs, in_batches(size, order), ALONE)
    for name in ("psnr", "ssim", "lpips", "pairs", "pixels_sha256"):
        assert found[name] == expected[name], name  # to the bit
    assert found["rfid"] == pytest.approx(expected["rfid"], rel=1e-9)


def test_a_float32_network_sees_the_same_groups_whatever_the_batch_size(pairs):
    sizes = []

    def extract(images):  # as a real network: another batch, another rounding
        sizes.append(len(images))
        return {POOL: images[:, :, ::4, ::4].float().flatten(1)[:, :6] * (1 + 1e-3 * len(images))}

    judges = Judges(("rfid",), None, FeatureNetwork(extract, 6, {"name": "moody"}))
    reports = [measured(judges, pairs, in_batches(whole_groups(size)), ALONE) for size in (1, 16, 17, 64)]
    assert {report["rfid"] for report in reports} == {reports[0]["rfid"]}
    assert set(sizes) == {16, COUNT - 16}


def test_two_ranks_and_more_ranks_than_batches_equal_one(judges, pairs):
    expected = measured(judges, pairs, in_batches(5), ALONE)
    for world in (2, 6):  # six ranks, five batches: one sees nothing
        reports = on_ranks(world, lambda r: measured(judges, pairs, in_batches(5)[r.rank :: r.world], r))
        for report in reports:
            for name in ("psnr", "ssim", "lpips", "pairs", "pixels_sha256"):
                assert report[name] == expected[name], name
            assert report["rfid"] == pytest.approx(expected["rfid"], rel=1e-9)


def test_a_pair_lost_or_seen_twice_is_noticed(judges, pairs):
    cheap = Judges(("psnr",))
    with pytest.raises(AssertionError, match="exactly once"):
        measured(cheap, pairs, [range(COUNT - 1)], ALONE)
    with pytest.raises(AssertionError, match="exactly once"):
        measured(cheap, pairs, [range(COUNT), [0]], ALONE)
    with pytest.raises(InputError, match="no pair"):
        PairFigures(cheap, CPU).means(0, ALONE)
    broken = Judges(("lpips",), lambda images, references: images.sum() * float("nan"))
    with pytest.raises(NonFiniteError, match="pair 0"):
        measured(broken, pairs, [range(COUNT)], ALONE)


def test_loading_networks_leaves_the_random_numbers_alone(judges, tmp_path):
    torch.manual_seed(3)
    state = torch.get_rng_state()
    vgg = nn.Module()
    vgg.features = make_layers(cfgs["D"])
    torch.save(vgg.state_dict(), tmp_path / "vgg.pth")
    torch.set_rng_state(state)
    load_judges(("lpips",), PairShape(tmp_path, (16, 16)), CPU, lpips_weights=str(tmp_path / "vgg.pth"))
    assert torch.equal(torch.get_rng_state(), state)


def test_reconstructions_are_rounded_as_told_and_numbers_that_are_none_are_named():
    autoencoder = baseline_autoencoder("pixels", {"image_size": 16}, LatentStatistics(None, torch.ones(1)))
    crops = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16).expand(2, 3, 16, 16).contiguous()
    told = {"precision": "fp32", "names": ["a", "b"]}
    assert torch.equal(reconstructed(autoencoder, crops, pixel_rounding="round", **told), crops)
    autoencoder.decoder = Halfway()  # half a grey level above each
    assert torch.equal(reconstructed(autoencoder, crops, pixel_rounding="floor", **told), crops)
    autoencoder.decoder = BrokenFor(1)
    with pytest.raises(NonFiniteError, match=r"infinity for b;"):
        reconstructed(autoencoder, crops, pixel_rounding="round", **told)


class Halfway(nn.Module):
    """Pixels of [-1, 1], 0.6 of a grey level brighter."""

    def forward(self, latents):
        return latents + 0.6 / 127.5


class BrokenFor(nn.Module):
    """NaN in one pixel of one image of the batch."""

    def __init__(self, row: int) -> None:
        super().__init__()
        self.row = row

    def forward(self, latents):
        latents = latents.clone()
        latents[self.row, 0, 3, 3] = float("nan")
        return latents


def folder_of(root: Path, names: dict[str, np.ndarray]) -> Path:
    """PNGs by name."""
    for name, pixels in names.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(root / name)
    return root


def pictures(seed: int, count: int = 4, side: int = 20) -> dict[str, np.ndarray]:
    generator = np.random.default_rng(seed)
    return {f"c{i % 2}/{i}.png": generator.integers(0, 256, (side, side, 3), dtype=np.uint8) for i in range(count)}


def test_pairs_are_matched_by_name_and_what_has_no_partner_is_listed(tmp_path):
    images = folder_of(tmp_path / "images", pictures(0))
    made = folder_of(tmp_path / "made", pictures(1))
    pairs = open_pairs(str(images), str(made))
    assert pairs.keys == ["c0/0", "c0/2", "c1/1", "c1/3"] and pairs.protocol == {}
    assert pair_size(pairs, 1) == (20, 20)
    seen = [list(positions) for rank in (0, 1) for positions, _, _ in pairs.batches(1, rank, 2, 1)]
    assert sorted(seen) == [[0], [1], [2], [3]]
    _, ours, theirs = next(pairs.batches(4, 0, 1, 1))
    np.testing.assert_array_equal(ours[1].permute(1, 2, 0), pictures(0)["c0/2.png"])
    np.testing.assert_array_equal(theirs[1].permute(1, 2, 0), pictures(1)["c0/2.png"])
    (made / "c0" / "2.png").rename(made / "c0" / "other.png")
    with pytest.raises(InputError) as told:
        open_pairs(str(images), str(made))
    assert told.value.exit_code == 3
    assert "4 images, 4 reconstructions, 2 without a partner" in str(told.value)
    assert f"c0/2: not in {made}" in str(told.value) and f"c0/other: not in {images}" in str(told.value)


def test_sizes_that_differ_are_listed(tmp_path):
    images = folder_of(tmp_path / "images", pictures(0))
    made = folder_of(tmp_path / "made", pictures(0) | {"c1/1.png": np.zeros((20, 22, 3), np.uint8)})
    with pytest.raises(InputError, match=r"2 sizes differ\n  c1/1.png: 22 x 20, expected 20 x 20\n  c1/1.png: 20 x 20"):
        pair_size(open_pairs(str(images), str(made)), 1)
    smaller = folder_of(tmp_path / "smaller", pictures(0, side=16))
    with pytest.raises(InputError, match="4 sizes differ"):
        pair_size(open_pairs(str(images), str(smaller)), 1)


def test_a_protocol_tells_how_images_are_cropped(tmp_path):
    images = folder_of(tmp_path / "images", {"a.png": np.arange(30 * 16 * 3, dtype=np.uint8).reshape(16, 30, 3)})
    out = tmp_path / "out"
    folder_of(out / "reconstructions", {"a.png": np.zeros((16, 16, 3), np.uint8)})
    protocol = {"format": "rae-reconstructions", "output_size": 16}
    (out / "unfinished.json").write_text(json.dumps(protocol))
    with pytest.raises(InputError, match="not all of its images are made"):
        open_pairs(str(images), str(out))
    finish_reconstructions(out, protocol)
    for path in (out, out / "reconstructions"):
        pairs = open_pairs(str(images), str(path))
        assert pair_size(pairs, 1) == (16, 16)
        _, ours, _ = next(pairs.batches(1, 0, 1, 1))
        np.testing.assert_array_equal(ours[0].permute(1, 2, 0), np.asarray(Image.open(images / "a.png"))[:, 7:23])
    folder_of(out / "reconstructions", {"a.png": np.zeros((8, 8, 3), np.uint8)})
    with pytest.raises(InputError, match=r"a.png: 8 x 8, expected 16 x 16"):
        pair_size(open_pairs(str(images), str(out)), 1)
    with pytest.raises(InputError, match="the first argument is the images"):
        open_pairs(str(out), str(out))


def test_a_tar_and_its_reconstructions_match(tmp_path):
    with tarfile.open(tmp_path / "shard-0.tar", "w") as archive:
        for name, pixels in pictures(0).items():
            data = io.BytesIO()
            Image.fromarray(pixels).save(data, format="PNG")
            member = tarfile.TarInfo(name.replace("/", "_"))
            member.size = data.getbuffer().nbytes
            data.seek(0)
            archive.addfile(member, data)
    made = {f"shard-0/{name.replace('/', '_')}": pixels for name, pixels in pictures(1).items()}
    pairs = open_pairs(str(tmp_path / "shard-0.tar"), str(folder_of(tmp_path / "made", made)))
    assert len(pairs) == 4 and pair_size(pairs, 1) == (20, 20)


def test_generated_samples_are_no_reconstructions(tmp_path):
    images = folder_of(tmp_path / "images", pictures(0))
    made = folder_of(tmp_path / "made", pictures(0))
    (made / "samples.json").write_text("{}")
    with pytest.raises(InputError, match="rae eval fid"):
        open_pairs(str(images), str(made))


def test_a_folder_of_other_reconstructions_is_refused_and_debris_is_swept(tmp_path):
    protocol = {"format": "rae-reconstructions", "count": 3, "precision": "fp32"}
    out = tmp_path / "out"
    (out / "reconstructions" / "c").mkdir(parents=True)
    with pytest.raises(InputError, match="nothing that says what made it"):
        begin_reconstructions(out, protocol)
    (out / "unfinished.json").write_text(json.dumps(protocol))
    (out / "reconstructions" / "c" / ".partial-1-a.png").write_bytes(b"half")
    begin_reconstructions(out, protocol)
    assert not list(out.rglob(".partial-*"))
    with pytest.raises(InputError, match="precision: found 'fp32', expected 'bf16'"):
        begin_reconstructions(out, protocol | {"precision": "bf16"})
    finish_reconstructions(out, protocol)
    assert sorted(path.name for path in out.glob("*.json")) == ["reconstructions.json"]
    with pytest.raises(InputError, match="count: found 3, expected 4"):
        begin_reconstructions(out, protocol | {"count": 4})


def test_the_sheet_has_each_image_left_of_its_reconstruction(tmp_path):
    dark, light = np.full((8, 8, 3), 10, np.uint8), np.full((8, 8, 3), 200, np.uint8)
    write_sheet(tmp_path / "sheet.png", [dark, dark], [light, light])
    sheet = np.asarray(Image.open(tmp_path / "sheet.png"))
    row = sheet[sheet.shape[0] // 2, :, 0]
    assert [value for value in row if value != 255] == ([10] * 64 + [200] * 64) * 2  # magnified eight times


def test_a_missing_network_is_told_by_the_file_to_bring(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.delenv("RAE_INCEPTION", raising=False)
    with pytest.raises(UsageError) as told:
        find_weights(("rfid", "psnr", "lpips"), None, None, None)
    for part in ("vgg16-397923af.pth", "--lpips-weights", "weights-inception-2015", "--metrics psnr,ssim"):
        assert part in str(told.value)
    find_weights(("psnr", "ssim"), None, None, None)
    with pytest.raises(UsageError, match=r"judge\.safetensors: no such file"):
        find_weights(("rfid",), None, None, "judge.safetensors")
    hub = tmp_path / "hub" / "checkpoints"
    hub.mkdir(parents=True)
    (hub / "vgg16-397923af.pth").write_bytes(b"others")
    assert find_lpips().published is False and find_lpips().path == hub / "vgg16-397923af.pth"


def test_metrics_are_chosen_by_name():
    assert chosen_metrics(" ssim, psnr,psnr") == ("psnr", "ssim")
    for text in ("", "psnr;ssim", "fid"):
        with pytest.raises(UsageError, match="rfid, psnr, ssim, lpips"):
            chosen_metrics(text)


def test_a_validation_measures_what_it_has_the_weights_for(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.delenv("RAE_INCEPTION", raising=False)
    images = str(folder_of(tmp_path / "images", pictures(0)))
    assert usable_metrics(ValidationSpec(images=images)) == ("psnr", "ssim")
    assert usable_metrics(ValidationSpec(images=images, features="digits-mae")) == ("psnr", "ssim", "rfid")
    assert usable_metrics(ValidationSpec(images=images, metrics=("lpips",))) == ("lpips",)  # then its absence is told
    with pytest.raises(InputError):
        usable_metrics(ValidationSpec(images=str(tmp_path / "nowhere")))
    with pytest.raises(ValueError, match="above 0"):
        ValidationSpec(images=images, every="0 steps")


def test_a_recipes_validation_is_told_in_full_or_by_overrides():
    override = ["validation.images=val", "validation.every=5 steps"]
    recipe = load_recipe(TrainDecoderRecipe, "digits/decoder", override)
    assert (recipe.validation.images, recipe.validation.every, recipe.validation.metrics) == ("val", "5 steps", None)
    with pytest.raises(UsageError, match=r"validation\.imags=val: unknown key; did you mean images"):
        load_recipe(TrainDecoderRecipe, "digits/decoder", [*override, "validation.imags=val"])


@pytest.fixture(scope="module")
def validation(tmp_path_factory) -> Validation:
    """Twenty-one images through the digits encoder; psnr, ssim, and rFID in the encoder's own features."""
    root = tmp_path_factory.mktemp("validation")
    images = make_images(root / "val", each=7)
    encoder = resolve_encoder("digits-mae", image_size=32)
    generator = torch.Generator().manual_seed(0)
    mean, variance = (torch.rand(encoder.latent_shape, generator=generator) for _ in range(2))
    shape = PairShape(images, (32, 32))
    judges = load_judges(("psnr", "ssim", "rfid"), shape, CPU, features="digits-mae")
    items = list(open_images(images).items)
    spec = ValidationSpec(images=str(images), batch_size=5, pictures=3)
    statistics = LatentStatistics(mean, variance)
    return Validation(spec, items, judges, 10, encoder, statistics, 32, 32, "fp32", root / "samples", ALONE)


def decoder_of(seed: int) -> Decoder:
    torch.manual_seed(seed)
    return Decoder(in_channels=32, tokens_side=4, width=16, depth=2, heads=2, mlp_width=32, patch_size=8)


def test_the_average_is_measured_though_the_decoder_is_compiled_and_nothing_is_touched(validation):
    encoder = encoder_of(validation.encoder)
    raw, average = decoder_of(0), decoder_of(1)
    expected = validation.measure(10, average, average.state_dict(), encoder)
    assert expected != validation.measure(10, raw, raw.state_dict(), encoder)
    for block in raw.blocks:
        block.compile(backend="eager")
    raw(torch.zeros(1, 32, 4, 4))  # now the compiled forward has seen the raw weights
    before = {name: value.clone() for name, value in raw.state_dict().items()}
    raw.train()
    state = torch.get_rng_state()
    assert validation.measure(10, raw, average.state_dict(), encoder) == expected
    assert torch.equal(torch.get_rng_state(), state) and raw.training
    assert all(torch.equal(value, before[name]) for name, value in raw.state_dict().items())
    assert all(parameter.requires_grad for parameter in raw.parameters())
    figures, picture = expected
    assert list(figures) == ["validation_images", "validation_rfid", "validation_psnr", "validation_ssim"]
    assert figures["validation_images"] == 21 and picture == validation.pictures / "step-0000010.png"
    sheet = Image.open(picture)
    assert sheet.size == (2 * (128 + 4) + 4, 2 * (64 + 4) + 4)  # three pairs, magnified twice


def test_a_validation_is_the_same_on_any_number_of_ranks(validation, tmp_path):
    encoder, decoder = encoder_of(validation.encoder), decoder_of(0)
    expected, _ = validation.measure(10, decoder, decoder.state_dict(), encoder)

    def on(ranks):
        fields = {**validation.__dict__, "ranks": ranks, "pictures": tmp_path}
        return Validation(**fields).measure(10, decoder, decoder.state_dict(), encoder)

    results = on_ranks(2, on)
    for found, _ in results:
        assert found == pytest.approx(expected, rel=1e-9)
        assert found["validation_psnr"] == expected["validation_psnr"]
    assert [picture for _, picture in results] == [tmp_path / "step-0000010.png", None]


def test_a_validation_is_due_every_so_often_and_at_the_end(validation):
    assert [step for step in range(1, 26) if validation.is_due(step, 25)] == [10, 20, 25]
