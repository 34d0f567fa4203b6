"""Others' layouts into our artifacts: released flat files, training checkpoints, diffusers folders."""

from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError
from torch import Tensor

from raecli.convert import diffusers
from raecli.convert.encoder import FOLDER, copy_inside, relative, resolved_encoder, write_folder
from raecli.convert.encoder_names import published_name
from raecli.convert.official import decoder_from_official, decoder_to_official, diffusion_from_official
from raecli.convert.official import diffusion_to_official as to_official
from raecli.convert.output import Conversion, Report, finish_artifact, provenance
from raecli.convert.settings import Request
from raecli.convert.sizes import decoder_sizes, diffusion_sizes
from raecli.convert.source import Source
from raecli.convert.statistics import identity_statistics, statistics_at
from raecli.convert.tables import check_tables, decoder_tables, diffusion_tables
from raecli.errors import CheckpointError, UsageError
from raecli.models.build import diffusion_of
from raecli.models.decoder import Decoder
from raecli.models.load import check_layout
from raecli.recipe.blocks import DecoderSpec, DiffusionModelSpec, EncoderSpec, FlowSpec
from raecli.store.checkpoint import contiguous
from raecli.store.encoders import encoder_input_size, resolve_encoder
from raecli.store.manifest import PREPROCESS
from raecli.store.statistics import LatentStatistics
from raecli.store.tensors import save_tensors

PIXELS_A_TOKEN = 16  # of the image, whatever the encoder's patch: a patch of 14 sees an image that was made smaller


def diffusion_into_rae(request: Request, source: Source) -> Conversion:
    """A released DiT or DiT-DH to a diffusion artifact."""
    sizes = diffusion_sizes(source.weights, request.settings, source.path)
    try:
        spec = DiffusionModelSpec.model_validate(sizes)
    except ValidationError as error:
        raise CheckpointError(f"{source.path}: {error.errors()[0]['msg']}") from None
    backbone_depth = spec.depth if spec.kind == "dit_dh" else None
    tables = checked_tables(spec, source, backbone_depth)
    channels, side = sizes["in_channels"], sizes["input_size"]
    flow = FlowSpec(
        time_max=request.settings.get("time_max", 0.999),  # the release's
        time_shift_dim=request.settings.get("time_shift_dim", channels * side**2),
    )
    config = {
        "format": "rae-diffusion",
        "version": 1,
        "step": source.step,
        "recipe": {"model": spec.to_dict(), "flow": flow.to_dict()},
        "latents": latents_of_diffusion(request, (channels, side, side), sizes["num_classes"]),
        "converted": provenance(request, source.path, source.entry, "official"),
    }
    weights = diffusion_from_official(source.weights, backbone_depth=backbone_depth)
    parameters = sum(tensor.numel() for tensor in weights.values()) + tables["pos_embed"].numel()
    card = (
        f"# {request.output.name}\n\nA {spec.kind} with {parameters:,} parameters, converted by rae from "
        f"{source.path.name} ({source.entry}).\n\n    rae sample {request.output} samples/ --autoencoder AUTOENCODER\n"
    )
    statistics = statistics_at(Path(request.statistics)) if request.statistics else None
    encoder = config["latents"]["encoder"]
    report = {
        "kind": "diffusion",
        "output": str(request.output),
        "parameters": parameters,
        "sizes": sizes,
        "latents": [channels, side, side],
        "time_shift": flow.time_shift,
        "encoder": encoder["name"] if encoder else None,
        "weights": source.entry,
        "notes": [*source.notes, *([] if encoder else [UNKNOWN_ENCODER])],
    }
    made = {"weights": weights, "statistics": statistics, "config": config, "card": card}
    return Conversion(report, lambda scratch: finish_artifact(scratch, **made))


def checked_tables(spec: DiffusionModelSpec, source: Source, backbone_depth: int | None) -> dict[str, Tensor]:
    """The fixed tables of the released layout, the source held against them and against all of that layout."""
    with torch.device("meta"):
        model = diffusion_of(spec)
    tables = diffusion_tables(spec)
    expected = to_official(model.state_dict(), backbone_depth=backbone_depth, patch_size=spec.patch_size, tables=tables)
    needed = {name: value for name, value in expected.items() if name in source.weights or name not in tables}
    check_layout(source.weights, needed, source.path)
    check_tables(source.weights, tables, source.path)
    return tables


UNKNOWN_ENCODER = "no --encoder is told, so rae sample can only compare shapes with the autoencoder's latents"


def latents_of_diffusion(request: Request, shape: tuple[int, int, int], num_classes: int) -> dict[str, Any]:
    """What the model learned from, as far as it is known. Class names are their numbers."""
    image_size = request.settings.get("image_size", shape[1] * PIXELS_A_TOKEN)
    encoder = None
    if request.encoder:
        encoder = checked_encoder(request, image_size, shape[0], shape[1])
    return {
        "shape": list(shape),
        "encoder": encoder.to_dict() if encoder else None,
        "image_size": image_size,
        "preprocess": PREPROCESS,
        "classes": [str(label) for label in range(num_classes)],
    }


def checked_encoder(request: Request, image_size: int, channels: int, side: int | None) -> EncoderSpec:
    """The encoder that was named, refused if its latents are of another shape than the weights'."""
    assert request.encoder is not None, "asked for where an encoder is named"
    spec = resolved_encoder(
        request.encoder,
        image_size=image_size,
        weights=request.encoder_weights,
        input_size=request.settings.get("input_size"),
        offline=request.dry_run,
    )
    if spec.width != channels or side not in (None, spec.tokens_side):
        found = f"{spec.width} channels and {spec.tokens_side} tokens a side"
        raise UsageError(
            f"--encoder {request.encoder}: gives {found}, {request.source} is for {channels} and {side or 'any'}; "
            "name another encoder, or give --set image_size=N or --set input_size=N"
        )
    return spec


def decoder_into_rae(request: Request, source: Source) -> Conversion:
    """A released decoder, with its encoder's identity and its statistics, to an autoencoder artifact.

    kind autoencoder: the encoder's weights are kept inside the artifact.
    """
    if request.encoder is None:
        raise UsageError(
            f"{source.path} is a decoder: its encoder is told with --encoder NAME (as encode-cache takes it)"
        )
    if request.statistics is None:
        raise UsageError(
            f"{source.path} is a decoder: its latents' statistics are told with --statistics stat.pt, or none"
        )
    sizes = decoder_sizes(source.weights, request.settings, source.path)
    statistics = None if request.statistics == "none" else statistics_at(Path(request.statistics))
    side = sizes["tokens_side"] or (statistics.variance.shape[1] if statistics else None)
    image_size = request.settings.get("image_size", (side or 16) * PIXELS_A_TOKEN)
    encoder = checked_encoder(request, image_size, sizes["in_channels"], side)
    shape = (encoder.width, encoder.tokens_side, encoder.tokens_side)
    statistics = statistics or identity_statistics(shape)
    if tuple(statistics.variance.shape) != shape:
        found = tuple(statistics.variance.shape)
        raise UsageError(f"--statistics {request.statistics}: are of latents {found}, the decoder's are {shape}")
    spec = DecoderSpec(**{name: sizes[name] for name in DecoderSpec.model_fields if name in sizes})
    weights = checked_decoder(source.weights, spec, shape, source.path)
    is_whole = request.kind == "autoencoder"
    kept = relative(encoder) if is_whole else encoder
    converted = provenance(request, source.path, source.entry, "official")
    config = autoencoder_config(spec, kept, image_size, noise_tau=None, step=source.step, converted=converted)
    card = autoencoder_card(request, weights, kept.name, source.path)

    def write(scratch: Path) -> None:
        if is_whole:
            copy_inside(encoder, scratch)
        finish_artifact(scratch, weights=weights, statistics=statistics, config=config, card=card)

    kind = "autoencoder" if is_whole else "decoder"
    report = autoencoder_report(request, kind, weights, spec, kept.name, statistics, shape, source.entry, source.notes)
    return Conversion(report, write)


def checked_decoder(
    released: dict[str, Tensor], spec: DecoderSpec, shape: tuple[int, int, int], where: Path
) -> dict[str, Tensor]:
    """Our weights of a decoder under released names, every key accounted for."""
    with torch.device("meta"):
        sizes = {name: getattr(spec, name) for name in ("width", "depth", "heads", "mlp_width", "patch_size")}
        decoder = Decoder(in_channels=shape[0], tokens_side=shape[1], **sizes)
    tables = decoder_tables(shape[1], spec.width)
    expected = decoder_to_official(decoder.state_dict(), {n: v for n, v in tables.items() if n in released})
    check_layout(released, expected, where)
    check_tables(released, tables, where)
    return decoder_from_official(released)


def autoencoder_config(
    spec: DecoderSpec,
    encoder: EncoderSpec,
    image_size: int,
    *,
    noise_tau: float | None,
    step: int | None,
    converted: dict[str, Any],
) -> dict[str, Any]:
    """What an autoencoder says of itself."""
    side = encoder.tokens_side
    return {
        "format": "rae-decoder",
        "version": 1,
        "step": step,
        "recipe": {"decoder": spec.to_dict(), "noise_tau": noise_tau},
        "latents": {
            "shape": [encoder.width, side, side],
            "encoder": encoder.to_dict(),
            "image_size": image_size,
            "preprocess": PREPROCESS,
            "classes": [],
        },
        "converted": converted,
    }


def autoencoder_card(request: Request, weights: dict[str, Tensor], encoder: str, source: Path) -> str:
    """The model card."""
    count = sum(tensor.numel() for tensor in weights.values())
    return (
        f"# {request.output.name}\n\nA ViT decoder with {count:,} parameters for latents of {encoder}, "
        f"converted by rae from {source.name}.\n\n    autoencoder = raecli.load_autoencoder({str(request.output)!r})\n"
    )


def autoencoder_report(
    request: Request,
    kind: str,
    weights: dict[str, Tensor],
    spec: DecoderSpec,
    encoder: str,
    statistics: LatentStatistics,
    shape: tuple[int, int, int],
    entry: str,
    notes: tuple[str, ...],
) -> Report:
    """What was found and made."""
    return {
        "kind": kind,
        "output": str(request.output),
        "parameters": sum(tensor.numel() for tensor in weights.values()),
        "sizes": spec.to_dict(),
        "latents": list(shape),
        "encoder": encoder,
        "encoder_inside": kind == "autoencoder",
        "statistics": "variance alone" if statistics.mean is None else "mean and variance",
        "weights": entry,
        "notes": list(notes),
    }


def autoencoder_into_rae(request: Request) -> Conversion:
    """A diffusers AutoencoderRAE folder to an autoencoder artifact that has its encoder inside."""
    config, weights = diffusers.read_folder(request.source)
    required = ("_latents_mean", "_latents_std", "encoder_mean", "encoder_std")
    missing = [name for name in required if name not in weights]
    if missing:
        raise CheckpointError(f"{request.source}: {len(missing)} keys are missing: {', '.join(missing)}")
    unknown = [name for name in weights if name not in required and not name.startswith(("encoder.", "decoder."))]
    if unknown:
        raise CheckpointError(f"{request.source}: {len(unknown)} keys are unknown: {', '.join(sorted(unknown))}")
    side = config["encoder_input_size"] // config["encoder_patch_size"]
    shape = (config["encoder_hidden_size"], side, side)
    spec = DecoderSpec(
        width=config["decoder_hidden_size"],
        depth=config["decoder_num_hidden_layers"],
        heads=config["decoder_num_attention_heads"],
        mlp_width=config["decoder_intermediate_size"],
        patch_size=config["patch_size"],
    )
    ours = checked_decoder(diffusers.decoder_names_from(weights), spec, shape, request.source)
    statistics = diffusers.statistics_from(weights, config, shape)
    image_size = request.settings.get("image_size", side * PIXELS_A_TOKEN)
    converted = provenance(request, request.source / diffusers.WEIGHTS, "flat", "diffusers")
    name = f"{config['encoder_type']} of width {shape[0]}, in the artifact"
    encoder_input_size(name, image_size, config["encoder_patch_size"], config["encoder_input_size"])
    frozen, pixels = published_encoder(config, weights), diffusers.image_statistics_from(weights, config)
    card = autoencoder_card(request, ours, name, request.source)

    def write(scratch: Path) -> None:
        folder = scratch / FOLDER
        write_folder(
            folder, diffusers.encoder_config(config), dict(zip(("image_mean", "image_std"), pixels, strict=True))
        )
        save_tensors(contiguous(frozen), folder / "model.safetensors", metadata={"format": "pt"})
        encoder = resolve_encoder(str(folder), image_size=image_size, input_size=config["encoder_input_size"])
        encoder = relative(encoder.model_copy(update={"name": name}))
        told = autoencoder_config(
            spec, encoder, image_size, noise_tau=float(config["noise_tau"]), step=None, converted=converted
        )
        finish_artifact(scratch, weights=ours, statistics=statistics, config=told, card=card)

    notes = () if side == diffusers.POSITION_BASE else (diffusers.OTHER_POSITIONS.format(side=side),)
    report = autoencoder_report(request, "autoencoder", ours, spec, name, statistics, shape, "flat", notes)
    return Conversion(report, write)


def published_encoder(config: dict[str, Any], weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """The encoder of a diffusers folder under its published names, as a Hugging Face folder has them."""
    family = diffusers.FAMILIES[config["encoder_type"]]
    return {
        published_name(name.removeprefix("encoder."), family): value
        for name, value in weights.items()
        if name.startswith("encoder.")
    }


def statistics_into_rae(request: Request, source: Source) -> Conversion:
    """Released statistics {mean, var} to statistics.safetensors."""
    statistics = statistics_at(source.path)
    report = {
        "kind": "statistics",
        "output": str(request.output),
        "latents": list(statistics.variance.shape),
        "statistics": "variance alone" if statistics.mean is None else "mean and variance",
        "notes": list(source.notes),
    }
    return Conversion(report, statistics.save, is_folder=False)


def discriminator_into_rae(request: Request, source: Source) -> Conversion:
    """The discriminator's frozen DINO backbone as safetensors, its names unchanged: they are timm's already."""
    from raecli.convert.discriminator import check_dino

    depth, width = check_dino(source.weights, source.path)
    report = {
        "kind": "discriminator",
        "output": str(request.output),
        "parameters": sum(tensor.numel() for tensor in source.weights.values()),
        "sizes": {"width": width, "depth": depth},
        "notes": list(source.notes),
    }
    return Conversion(report, lambda scratch: save_tensors(contiguous(source.weights), scratch), is_folder=False)
