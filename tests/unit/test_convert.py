"""Converting released weights: every kind, sizes from shapes, and what is refused."""

import json
import os
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import raecli
from raecli.convert.conversion import convert
from raecli.convert.encoder_names import published_from_timm
from raecli.convert.official import decoder_to_official, diffusion_to_official
from raecli.convert.settings import Request, parse_settings
from raecli.convert.sizes import decoder_sizes, diffusion_sizes
from raecli.convert.tables import decoder_tables, diffusion_tables
from raecli.errors import CheckpointError, InputError, UsageError
from raecli.models.build import diffusion_of
from raecli.models.decoder import Decoder
from raecli.models.encoder_folder import build_folder_backbone
from raecli.recipe.blocks import DiffusionModelSpec
from tests.conftest import tree

VECTORS = Path(__file__).parents[1] / "parity" / "vectors"
WHERE = Path("model.pt")
HEAD = {"head_width": 2048, "head_depth": 2, "head_heads": 16}
# Width, depth, heads of Table 13; XL's head width and the others' are the same.
DIFFUSION = {
    "dith-s": {"kind": "dit_dh", "width": 384, "depth": 12, "heads": 6, **HEAD},
    "dith-b": {"kind": "dit_dh", "width": 768, "depth": 12, "heads": 12, **HEAD},
    "dith-l": {"kind": "dit_dh", "width": 1024, "depth": 24, "heads": 16, **HEAD},
    "dith-xl": {"kind": "dit_dh", "width": 1152, "depth": 28, "heads": 16, **HEAD},
    "dit-s": {"kind": "dit", "width": 384, "depth": 12, "heads": 6},
    "dit-xl": {"kind": "dit", "width": 1152, "depth": 28, "heads": 16},
}
SHARED = {"patch_size": 1, "in_channels": 768, "input_size": 16, "num_classes": 1000, "mlp_ratio": 4.0}
DECODERS = {"b": (768, 12, 12, 3072), "l": (1024, 24, 16, 4096), "xl": (1152, 28, 16, 4096)}


def released_diffusion(spec):
    """A released state dict without storage, its tables too."""
    with torch.device("meta"):
        weights = diffusion_of(spec).state_dict()
    depth = spec.depth if spec.kind == "dit_dh" else None
    return diffusion_to_official(
        weights, backbone_depth=depth, patch_size=spec.patch_size, tables=diffusion_tables(spec)
    )


@pytest.mark.parametrize("name", list(DIFFUSION))
@pytest.mark.parametrize("changes", [{}, {"input_size": 32}, {"patch_size": 2, "input_size": 32, "in_channels": 4}])
def test_sizes_of_every_released_diffusion_model_come_from_its_shapes(name, changes):
    told = DIFFUSION[name] | SHARED | changes
    assert diffusion_sizes(released_diffusion(DiffusionModelSpec(**told)), {}, WHERE) == told


def test_a_head_as_wide_as_the_backbone_is_told_by_its_depth():
    told = DIFFUSION["dith-s"] | SHARED | {"head_width": 384, "head_heads": 8, "head_depth": 3}
    weights = released_diffusion(DiffusionModelSpec(**told))
    assert diffusion_sizes(weights, {"head_depth": 3}, WHERE) == told
    assert diffusion_sizes(weights, {}, WHERE)["head_depth"] == 2  # the release's default


@pytest.mark.parametrize("name", list(DECODERS))
def test_sizes_of_every_released_decoder(name):
    width, depth, heads, mlp_width = DECODERS[name]
    sizes = {"width": width, "depth": depth, "heads": heads, "mlp_width": mlp_width, "patch_size": 16}
    with torch.device("meta"):
        weights = Decoder(in_channels=768, tokens_side=16, **sizes).state_dict()
    released = decoder_to_official(weights, decoder_tables(16, width))
    assert decoder_sizes(released, {}, WHERE) == {**sizes, "in_channels": 768, "tokens_side": 16}


@pytest.mark.parametrize("name", ["dit", "dit_dh", "dit_dh_guide"])
def test_official_to_ours_and_back_changes_no_bit(name, tmp_path):
    report = convert(Request(VECTORS / f"{name}.pt", tmp_path / "ours"))
    told = json.loads((VECTORS / "models.json").read_text())[name]
    width = told["hidden_size"]
    assert report["sizes"]["width"] == (width if name == "dit" else width[0])
    convert(Request(tmp_path / "ours", tmp_path / "back.pt", to="official"))
    before, after = (torch.load(path, weights_only=True) for path in (VECTORS / f"{name}.pt", tmp_path / "back.pt"))
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) for key in before)


def test_a_converted_model_gives_the_released_velocities(tmp_path):
    convert(Request(VECTORS / "dit_dh.pt", tmp_path / "ours"))
    model = raecli.load_diffusion(tmp_path / "ours")
    io = load_file(VECTORS / "dit_dh_io.safetensors")
    torch.testing.assert_close(model(io["x"], io["t"], io["y"]), io["v"], atol=1e-5, rtol=0)
    assert model.time_shift == pytest.approx((8 * 4 * 4 / 4096) ** 0.5)
    assert model.latent_shape == (8, 4, 4) and len(model.classes) == model.num_classes == 10
    assert model.config["recipe"]["flow"]["time_max"] == 0.999


def test_time_shift_dimension_can_be_told(tmp_path):
    convert(Request(VECTORS / "dit_dh.pt", tmp_path / "ours", settings={"time_shift_dim": 196608}))
    assert raecli.load_diffusion(tmp_path / "ours").time_shift == pytest.approx(48**0.5)


def weights_of(name):
    return torch.load(VECTORS / f"{name}.pt", weights_only=True)


def decoder_request(tmp_path, source, **more):
    """A decoder with all that it needs."""
    if not (tmp_path / "stat.pt").exists():
        torch.save({"mean": None, "var": torch.rand(64, 16, 16) + 0.5}, tmp_path / "stat.pt")
    asked = {"encoder": str(VECTORS / "encoder_dinov2"), "statistics": str(tmp_path / "stat.pt"), **more}
    return Request(source, tmp_path / "ours", settings={"heads": 4}, **asked)


@pytest.mark.parametrize("name", ["dit_dh", "decoder_dinov2"])
def test_every_key_that_does_not_fit_is_told_at_once(name, tmp_path):
    weights = weights_of(name)
    gone = [key for key in weights if key.endswith(("1.mlp.w12.bias", "1.attention.attention.key.weight"))]
    bent = [key for key in weights if key.endswith(("0.attn.proj.bias", "0.output.dense.bias"))]
    assert len(gone) == len(bent) == 1
    for key in gone:
        del weights[key]
    for key in bent:
        weights[key] = torch.zeros(7)
    weights |= {"blocks.0.attn.q_norm.weight": torch.zeros(3), "decoder_surprise": torch.zeros(3)}
    torch.save(weights, tmp_path / "model.pt")
    with pytest.raises(CheckpointError) as caught:
        settings = {"heads": 4} if name == "decoder_dinov2" else {}
        convert(replace(decoder_request(tmp_path, tmp_path / "model.pt"), settings=settings))
    told = str(caught.value)
    assert all(f"missing {key}" in told for key in gone)
    assert "unknown blocks.0.attn.q_norm.weight" in told and "unknown decoder_surprise" in told
    assert all(f"{key}: (7,), expected (" in told for key in bent)
    assert not (tmp_path / "ours").exists() and not list(tmp_path.glob(".partial*"))


def test_weights_without_what_sizes_are_read_from_are_refused(tmp_path):
    weights = weights_of("dit_dh")
    del weights["pos_embed"], weights["y_embedder.embedding_table.weight"]
    torch.save(weights, tmp_path / "model.pt")
    with pytest.raises(CheckpointError, match=r"2 keys are missing: pos_embed, y_embedder\.embedding_table\.weight"):
        convert(Request(tmp_path / "model.pt", tmp_path / "ours"))


def test_heads_are_asked_for_where_nothing_tells_them(tmp_path):
    weights = {key: value for key, value in weights_of("dit_dh").items() if "feat_rope" not in key}
    torch.save(weights, tmp_path / "model.pt")
    with pytest.raises(UsageError, match="--set heads=N"):
        convert(Request(tmp_path / "model.pt", tmp_path / "ours"))
    convert(Request(tmp_path / "model.pt", tmp_path / "ours", settings={"heads": 2, "head_heads": 2}))
    convert(Request(VECTORS / "dit_dh.pt", tmp_path / "same"))
    assert (tmp_path / "ours" / "model.safetensors").read_bytes() == (
        tmp_path / "same" / "model.safetensors"
    ).read_bytes()
    with pytest.raises(UsageError, match=r"--set heads=3: the table enc_feat_rope\.freqs_cos tells 2"):
        convert(Request(VECTORS / "dit_dh.pt", tmp_path / "other", settings={"heads": 3}))
    with pytest.raises(UsageError, match=r"none of the released.*--set heads=N"):
        decoder_sizes(weights_of("decoder_dinov2"), {}, WHERE)


@pytest.mark.parametrize("table", ["pos_embed", "enc_feat_rope.freqs_cos", "dec_feat_rope.freqs_sin"])
def test_positions_that_are_not_the_released_ones_are_refused(table, tmp_path):
    weights = weights_of("dit_dh")
    weights[table] = weights[table] + 0.01
    torch.save(weights, tmp_path / "model.pt")
    with pytest.raises(CheckpointError, match=f"{table} is not the released table: it differs by up to 0.01"):
        convert(Request(tmp_path / "model.pt", tmp_path / "ours"))


def test_averaged_weights_of_a_training_checkpoint_are_preferred(tmp_path):
    ema = weights_of("dit")
    raw = {key: value + 1 for key, value in ema.items()}
    wrapped = {f"module.{key}": value for key, value in ema.items()}
    torch.save({"model": raw, "ema": wrapped, "step": 300, "optimizer": {"state": {}, "lr": 1e-4}}, tmp_path / "a.pt")
    report = convert(Request(tmp_path / "a.pt", tmp_path / "ours"))
    assert report["weights"] == "ema" and "averaged weights (ema)" in report["notes"][0]
    convert(Request(VECTORS / "dit.pt", tmp_path / "flat"))
    assert (tmp_path / "ours" / "model.safetensors").read_bytes() == (
        tmp_path / "flat" / "model.safetensors"
    ).read_bytes()
    config = json.loads((tmp_path / "ours" / "config.json").read_text())
    assert config["step"] == 300 and config["converted"]["weights"] == "ema"
    torch.save({"model": ema, "epoch": 3}, tmp_path / "b.pt")
    assert convert(Request(tmp_path / "b.pt", tmp_path / "raw"))["weights"] == "model"


def test_the_decoder_of_a_whole_autoencoder_is_taken(tmp_path):
    inner = {f"decoder.{key}": value for key, value in weights_of("decoder_dinov2").items()}
    torch.save({"ema": inner | {"encoder.layer.weight": torch.zeros(3)}, "model": inner}, tmp_path / "stage1.pt")
    report = convert(decoder_request(tmp_path, tmp_path / "stage1.pt"))
    assert report["kind"] == "decoder" and "1 tensors of its frozen encoder are left out" in report["notes"][1]
    assert raecli.load_autoencoder(tmp_path / "ours").decode(torch.randn(1, 64, 16, 16)).shape == (1, 3, 256, 256)


class Hostile:
    """What a pickle can do when it is read."""

    def __init__(self, mark):
        self.mark = str(mark)

    def __reduce__(self):
        return (os.mkdir, (self.mark,))


def test_a_hostile_file_is_refused_and_runs_nothing(tmp_path):
    torch.save({"x_embedder.proj.weight": torch.zeros(1), "evil": Hostile(tmp_path / "ran")}, tmp_path / "model.pt")
    with pytest.raises(CheckpointError, match=r"refused, because it holds more than tensors \(posix\.mkdir\)"):
        convert(Request(tmp_path / "model.pt", tmp_path / "ours"))
    assert not (tmp_path / "ran").exists() and not (tmp_path / "ours").exists()


@pytest.mark.parametrize(
    ("content", "told"),
    [
        ([torch.zeros(1)], "holds a list, not tensors by name"),
        ({"lr": 1e-4, "a": torch.zeros(1)}, "not tensors: lr"),
        ({"conv.weight": torch.zeros(1)}, "not a released decoder, DiT"),
    ],
)
def test_files_of_other_things_are_refused(content, told, tmp_path):
    torch.save(content, tmp_path / "model.pt")
    with pytest.raises(CheckpointError, match=told):
        convert(Request(tmp_path / "model.pt", tmp_path / "ours"))


@pytest.mark.parametrize("name", ["model.pt", "model.safetensors"])
@pytest.mark.parametrize("length", [0, 10, 3000])
def test_a_cut_file_is_refused(name, length, tmp_path):
    whole = tmp_path / f"whole-{name}"
    weights = {key: value.contiguous() for key, value in weights_of("dit").items()}
    (save_file if name.endswith("safetensors") else torch.save)(weights, whole)
    (tmp_path / name).write_bytes(whole.read_bytes()[:length])
    with pytest.raises(CheckpointError, match="not a whole file of weights"):
        convert(Request(tmp_path / name, tmp_path / "ours"))


def test_another_kind_than_was_told_is_refused(tmp_path):
    with pytest.raises(CheckpointError, match="its keys are those of a diffusion, not of a decoder"):
        convert(Request(VECTORS / "dit.pt", tmp_path / "ours", kind="decoder"))
    convert(Request(VECTORS / "dit.pt", tmp_path / "ours"))
    with pytest.raises(UsageError, match="diffusers has autoencoders alone"):
        convert(Request(tmp_path / "ours", tmp_path / "theirs", to="diffusers"))
    with pytest.raises(CheckpointError, match="not of a decoder"):
        convert(Request(tmp_path / "ours", tmp_path / "theirs.pt", to="official", kind="decoder"))
    with pytest.raises(CheckpointError, match="no artifact of rae"):
        convert(Request(VECTORS / "dit.pt", tmp_path / "theirs.pt", to="official"))
    with pytest.raises(CheckpointError, match="no diffusers AutoencoderRAE"):
        convert(Request(VECTORS, tmp_path / "theirs"))


@pytest.mark.parametrize("with_mean", [False, True])
def test_statistics_survive_both_ways(with_mean, tmp_path):
    mean = torch.randn(3, 2, 2) if with_mean else None
    variance = torch.rand(3, 2, 2)
    torch.save({"mean": mean, "var": variance}, tmp_path / "stat.pt")
    report = convert(Request(tmp_path / "stat.pt", tmp_path / "statistics.safetensors"))
    assert report["statistics"] == ("mean and variance" if with_mean else "variance alone")
    convert(Request(tmp_path / "statistics.safetensors", tmp_path / "back.pt", to="official"))
    back = torch.load(tmp_path / "back.pt", weights_only=True)
    assert torch.equal(back["var"], variance)
    assert back["mean"] is None if mean is None else torch.equal(back["mean"], mean)


def test_statistics_of_another_shape_are_refused(tmp_path):
    torch.save({"mean": None, "var": torch.rand(64, 8, 8)}, tmp_path / "stat.pt")
    with pytest.raises(UsageError, match=r"are of latents \(64, 8, 8\), the decoder's are \(64, 16, 16\)"):
        convert(decoder_request(tmp_path, VECTORS / "decoder_dinov2.pt"))
    torch.save({"mean": torch.zeros(64), "var": torch.rand(64, 8, 8)}, tmp_path / "stat.pt")
    with pytest.raises(InputError, match="one of channels, rows, columns"):
        convert(decoder_request(tmp_path, VECTORS / "decoder_dinov2.pt"))


def test_a_decoder_without_encoder_or_statistics_is_asked_for_them(tmp_path):
    source = VECTORS / "decoder_dinov2.pt"
    with pytest.raises(UsageError, match="--encoder NAME"):
        convert(Request(source, tmp_path / "ours"))
    with pytest.raises(UsageError, match=r"--statistics stat\.pt, or none"):
        convert(Request(source, tmp_path / "ours", encoder="dinov2-b"))
    with pytest.raises(UsageError, match=r"gives 32 channels and 32 tokens a side"):
        convert(decoder_request(tmp_path, source, encoder=str(VECTORS / "vit_mae")))


def test_statistics_none_leave_latents_alone(tmp_path):
    convert(decoder_request(tmp_path, VECTORS / "decoder_dinov2.pt", statistics="none"))
    autoencoder = raecli.load_autoencoder(tmp_path / "ours")
    latents = torch.randn(2, 64, 16, 16)
    assert torch.equal(autoencoder.statistics.denormalise(latents), latents) and autoencoder.mean is None


def test_kind_autoencoder_keeps_the_encoder_inside(tmp_path):
    report = convert(decoder_request(tmp_path, VECTORS / "decoder_dinov2.pt", kind="autoencoder"))
    assert report["encoder_inside"]
    (tmp_path / "ours").rename(tmp_path / "moved")
    config = json.loads((tmp_path / "moved" / "config.json").read_text())
    assert config["latents"]["encoder"]["weights"] == "encoder/model.safetensors"
    images = torch.rand(1, 3, 256, 256)
    convert(decoder_request(tmp_path, VECTORS / "decoder_dinov2.pt"))
    inside, outside = raecli.load_autoencoder(tmp_path / "moved"), raecli.load_autoencoder(tmp_path / "ours")
    assert torch.equal(inside.encode(images), outside.encode(images))


def test_an_encoder_inside_that_changed_is_refused(tmp_path):
    convert(decoder_request(tmp_path, VECTORS / "decoder_dinov2.pt", kind="autoencoder"))
    file = tmp_path / "ours" / "encoder" / "model.safetensors"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    with pytest.raises(InputError, match="weights_sha256"):
        raecli.load_autoencoder(tmp_path / "ours")


def test_what_lies_at_the_output_is_replaced_only_if_asked(tmp_path):
    convert(Request(VECTORS / "dit.pt", tmp_path / "ours"))
    before = tree(tmp_path / "ours")
    with pytest.raises(UsageError, match="--force to replace it"):
        convert(Request(VECTORS / "dit_dh.pt", tmp_path / "ours"))
    (tmp_path / "bad.pt").write_bytes(b"no")
    with pytest.raises(CheckpointError):
        convert(Request(tmp_path / "bad.pt", tmp_path / "ours", force=True))
    assert tree(tmp_path / "ours") == before
    convert(Request(VECTORS / "dit_dh.pt", tmp_path / "ours", force=True))
    assert tree(tmp_path / "ours").keys() == before.keys() and tree(tmp_path / "ours") != before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bad.pt", "ours"]


def test_scratch_of_a_killed_conversion_goes_and_that_of_others_stays(tmp_path):
    dead, other = tmp_path / ".partial-99999999-ours", tmp_path / ".partial-99999999-another"
    alive = tmp_path / f".partial-{os.getppid()}-ours"
    for folder in (dead, other, alive):
        folder.mkdir()
    convert(Request(VECTORS / "dit.pt", tmp_path / "ours"))
    assert not dead.exists() and other.exists() and alive.exists()


def dino(depth=2, width=8):
    """A plain ViT's weights in timm's names."""
    shapes = {"cls_token": (1, 1, width), "pos_embed": (1, 5, width), "norm.weight": (width,), "norm.bias": (width,)}
    shapes |= {"patch_embed.proj.weight": (width, 3, 8, 8), "patch_embed.proj.bias": (width,)}
    for index in range(depth):
        for name, outputs, inputs in (("attn.qkv", 3, 1), ("attn.proj", 1, 1), ("mlp.fc1", 4, 1), ("mlp.fc2", 1, 4)):
            shapes[f"blocks.{index}.{name}.weight"] = (outputs * width, inputs * width)
            shapes[f"blocks.{index}.{name}.bias"] = (outputs * width,)
        for norm in ("norm1", "norm2"):
            shapes |= {f"blocks.{index}.{norm}.weight": (width,), f"blocks.{index}.{norm}.bias": (width,)}
    return {name: torch.rand(shape) for name, shape in shapes.items()}


def test_the_discriminators_backbone(tmp_path):
    weights = dino()
    torch.save(weights, tmp_path / "dino.pth")
    report = convert(Request(tmp_path / "dino.pth", tmp_path / "dino.safetensors"))
    assert report["kind"] == "discriminator" and report["sizes"] == {"width": 8, "depth": 2}
    found = load_file(tmp_path / "dino.safetensors")
    assert found.keys() == weights.keys() and all(torch.equal(found[name], weights[name]) for name in found)
    del weights["blocks.1.mlp.fc2.bias"], weights["pos_embed"]
    torch.save(weights | {"blocks.0.ls1.gamma": torch.zeros(8)}, tmp_path / "dino.pth")
    with pytest.raises(
        CheckpointError, match=r"missing blocks\.1\.mlp\.fc2\.bias; missing pos_embed; unknown blocks\.0\.ls1"
    ):
        convert(Request(tmp_path / "dino.pth", tmp_path / "other.safetensors"))


def test_settings_tell_all_that_is_wrong():
    assert parse_settings(["heads=4", "mlp_ratio=2.5", "transformers=5.3.0"]) == {
        "heads": 4,
        "mlp_ratio": 2.5,
        "transformers": "5.3.0",
    }
    with pytest.raises(UsageError) as caught:
        parse_settings(["haeds=4", "heads=four", "heads=0", "image_size"])
    told = str(caught.value)
    assert "did you mean heads?" in told and "a whole number is asked for, found 'four'" in told
    assert "above 0" in told and "image_size: no such key=value" in told


@pytest.mark.parametrize(("name", "family"), [("dinov2", "dinov2"), ("siglip", "siglip"), ("vit_mae", "mae")])
def test_timm_weights_under_published_names_make_the_same_encoder(name, family, tmp_path):
    folder = VECTORS / name
    patch = json.loads((folder / "config.json").read_text())
    patch = patch.get("vision_config", patch)["patch_size"]
    options = {"input_size": 4 * patch, "position_antialias": True}
    backbone = build_folder_backbone(folder, folder / "model.safetensors", **options)
    renamed = published_from_timm(backbone.state_dict(), family)
    save_file({key: value.contiguous() for key, value in renamed.items()}, tmp_path / "model.safetensors")
    again = build_folder_backbone(folder, tmp_path / "model.safetensors", **options)
    assert all(torch.equal(again.state_dict()[key], value) for key, value in backbone.state_dict().items())


def test_the_encoder_of_an_autoencoder_can_be_a_models(tmp_path):
    """The diffusion model's identity is then that autoencoder's, wherever its files lie."""
    convert(decoder_request(tmp_path, VECTORS / "decoder_dinov2.pt", kind="autoencoder"))
    told = DIFFUSION["dit-s"] | SHARED | {"width": 16, "depth": 1, "heads": 2, "in_channels": 64, "num_classes": 3}
    spec = DiffusionModelSpec(**told)
    weights = diffusion_to_official(
        diffusion_of(spec).state_dict(), backbone_depth=None, patch_size=1, tables=diffusion_tables(spec)
    )
    torch.save(weights, tmp_path / "dit.pt")
    convert(Request(tmp_path / "dit.pt", tmp_path / "model", encoder=str(tmp_path / "ours")))
    mine, theirs = (json.loads((tmp_path / name / "config.json").read_text()) for name in ("model", "ours"))
    digest = mine["latents"]["encoder"]["weights_sha256"]
    assert digest == theirs["latents"]["encoder"]["weights_sha256"] and len(digest) == 64


def test_an_artifact_of_ours_takes_its_encoder_inside(tmp_path):
    convert(decoder_request(tmp_path, VECTORS / "decoder_dinov2.pt"))
    with pytest.raises(UsageError, match="is an artifact of rae already"):
        convert(Request(tmp_path / "ours", tmp_path / "whole"))
    convert(Request(tmp_path / "ours", tmp_path / "whole", kind="autoencoder"))
    convert(decoder_request(tmp_path, VECTORS / "decoder_dinov2.pt", kind="autoencoder", force=True))
    whole, kept = tree(tmp_path / "whole"), tree(tmp_path / "ours")
    assert whole.keys() == kept.keys() and "encoder/model.safetensors" in whole
    assert sorted(name for name in whole if whole[name] != kept[name]) == ["README.md", "config.json"]
    images = torch.rand(1, 3, 256, 256)
    one, two = (raecli.load_autoencoder(tmp_path / name).encode(images) for name in ("ours", "whole"))
    assert torch.equal(one, two)


@pytest.mark.parametrize("output", ["folder/model.pt", "folder", ".", "folder/../folder"])
def test_what_is_converted_is_never_replaced_even_by_force(tmp_path, output):
    (tmp_path / "folder").mkdir()
    source = tmp_path / "folder" / "model.pt"
    source.write_bytes((VECTORS / "dit_dh.pt").read_bytes())
    for dry_run in (True, False):
        with pytest.raises(UsageError, match="is what is converted, or holds it"):
            convert(Request(source, tmp_path / output, force=True, dry_run=dry_run))
    assert source.read_bytes() == (VECTORS / "dit_dh.pt").read_bytes()
    convert(Request(source, tmp_path / "folder" / "ours", force=True))  # beside it is no harm
