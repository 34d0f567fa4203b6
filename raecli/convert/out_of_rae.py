"""Our artifacts into the released layout, and into a folder that diffusers' AutoencoderRAE loads."""

import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError
from safetensors.torch import load_file
from torch import Tensor

from raecli.convert import diffusers
from raecli.convert.encoder import copy_inside, relative
from raecli.convert.encoder_layout import REGISTERS, encoder_shapes, is_unused
from raecli.convert.encoder_names import PUBLISHED, name_for, published_from_timm, published_name, version_numbers
from raecli.convert.official import decoder_to_official, diffusion_to_official
from raecli.convert.output import Conversion, finish_artifact, provenance
from raecli.convert.settings import Request
from raecli.convert.statistics import statistics_at
from raecli.convert.tables import decoder_tables, diffusion_tables
from raecli.errors import CheckpointError, StorageError, UsageError
from raecli.models.load import check_layout, located, read_artifact, statistics_of
from raecli.recipe.blocks import DecoderSpec, DiffusionModelSpec, EncoderSpec
from raecli.store.checkpoint import EMA, MODEL, contiguous
from raecli.store.encoder_config import read_folder_config
from raecli.store.manifest import tuples
from raecli.store.tensors import save_tensors

# Before the vision tower's names where a larger model was saved; what an autoencoder does not have.
TOWER = re.compile(r"^(dinov2_with_registers|dinov2|vit)\.")
DROPPED = re.compile(
    r"(vision_model\.)?(layernorm|post_layernorm|classifier|decoder|text_model)\..+|.*position_ids|logit_(scale|bias)"
)


def spec_of(config: dict[str, Any], *keys: str, model: Any, where: Path) -> Any:
    """A block of an artifact's configuration."""
    try:
        value: Any = config
        for key in keys:
            value = value[key]
        return model.model_validate(tuples(value))
    except (KeyError, TypeError, ValidationError) as error:
        raise CheckpointError(f"{where}: no {'.'.join(keys)} of this version: {error}") from None


def diffusion_to_release(request: Request) -> Conversion:
    """A diffusion artifact to a flat state dict."""
    folder, config, weights = read_artifact(request.source, "rae-diffusion")
    spec: DiffusionModelSpec = spec_of(config, "recipe", "model", model=DiffusionModelSpec, where=folder)
    released = diffusion_to_official(
        weights,
        backbone_depth=spec.depth if spec.kind == "dit_dh" else None,
        patch_size=spec.patch_size,
        tables=diffusion_tables(spec),
    )
    return release_of(request, "diffusion", released, spec.to_dict())


def decoder_to_release(request: Request) -> Conversion:
    """The decoder of an autoencoder artifact to a flat state dict. Its statistics are another file: kind statistics."""
    folder, config, weights = read_artifact(request.source, "rae-decoder")
    spec: DecoderSpec = spec_of(config, "recipe", "decoder", model=DecoderSpec, where=folder)
    released = decoder_to_official(weights, decoder_tables(int(config["latents"]["shape"][1]), spec.width))
    return release_of(request, "decoder", released, spec.to_dict())


def statistics_to_release(request: Request) -> Conversion:
    """Statistics to {mean, var}; mean is None where there is none."""
    statistics = statistics_at(request.source)
    return release_of(request, "statistics", {"mean": statistics.mean, "var": statistics.variance}, {})


def release_of(request: Request, kind: str, tensors: dict[str, Tensor | None], sizes: dict[str, Any]) -> Conversion:
    """Tensors by name, to be written with torch.save, as the release has them."""
    whole = {
        name: None if value is None else value.clone(memory_format=torch.contiguous_format)
        for name, value in tensors.items()
    }

    def write(scratch: Path) -> None:
        try:
            torch.save(whole, scratch)
        except RuntimeError as error:  # the archive's writer has no OSError of its own
            raise StorageError(f"{request.output}: could not be written: {str(error).splitlines()[0]}") from None

    report = {
        "kind": kind,
        "output": str(request.output),
        "to": "official",
        "numbers": sum(value.numel() for value in whole.values() if value is not None),
        "sizes": sizes,
        "notes": [],
    }
    return Conversion(report, write, is_folder=False)


def autoencoder_with_encoder(request: Request) -> Conversion:
    """An autoencoder artifact of ours with its encoder's weights inside: it then needs no other file."""
    folder, config, weights = read_artifact(request.source, "rae-decoder")
    told: EncoderSpec = spec_of(config, "latents", "encoder", model=EncoderSpec, where=folder)
    encoder = located(told, int(config["latents"]["image_size"]), folder, offline=request.dry_run)
    source = folder / (EMA if (folder / EMA).is_file() else MODEL)
    kept, statistics = relative(encoder), statistics_of(folder)
    config = config | {"converted": provenance(request, source, "flat", "rae")}
    config["latents"] = config["latents"] | {"encoder": kept.to_dict()}
    card = f"# {request.output.name}\n\nThe autoencoder of {folder.name} with its encoder, {kept.name}, inside.\n"

    def write(scratch: Path) -> None:
        copy_inside(encoder, scratch)
        finish_artifact(scratch, weights=weights, statistics=statistics, config=config, card=card)

    report = {
        "kind": "autoencoder",
        "output": str(request.output),
        "encoder": kept.name,
        "encoder_inside": True,
        "notes": [],
    }
    return Conversion(report, write)


def autoencoder_to_diffusers(request: Request) -> Conversion:
    """An autoencoder artifact to a diffusers folder. UsageError if diffusers cannot build its encoder."""
    folder, config, weights = read_artifact(request.source, "rae-decoder")
    spec: DecoderSpec = spec_of(config, "recipe", "decoder", model=DecoderSpec, where=folder)
    told: EncoderSpec = spec_of(config, "latents", "encoder", model=EncoderSpec, where=folder)
    encoder = located(told, int(config["latents"]["image_size"]), folder, offline=request.dry_run)
    version = request.settings.get("transformers") or installed_transformers() or PUBLISHED
    published = encoder_for_diffusers(encoder)
    numbers = version_numbers(version)
    tensors = {f"encoder.{name_for(name, encoder.family, numbers)}": value for name, value in published.items()}
    tensors |= diffusers.decoder_names_to(decoder_to_official(weights, {}))
    buffers = diffusers.statistics_to(statistics_of(folder))
    tensors |= buffers | {
        f"encoder_{name}": torch.tensor(getattr(encoder, name)).view(1, 3, 1, 1) for name in ("mean", "std")
    }
    told_config = diffusers_config(
        spec, encoder, depth_of(published), buffers, config["recipe"].get("noise_tau") or 0.0
    )

    def write(scratch: Path) -> None:
        save_tensors(contiguous(tensors), scratch / diffusers.WEIGHTS, metadata={"format": "pt"})
        (scratch / diffusers.CONFIG).write_text(json.dumps(told_config, indent=2) + "\n", encoding="utf-8")

    note = f"the encoder's tensors have the names of transformers {version}; other versions: --set transformers=VERSION"
    different = diffusers.OTHER_POSITIONS.format(side=encoder.tokens_side)
    report = {
        "kind": "autoencoder",
        "to": "diffusers",
        "output": str(request.output),
        "sizes": spec.to_dict(),
        "encoder": encoder.name,
        "transformers": version,
        "notes": [note, *([] if encoder.tokens_side == diffusers.POSITION_BASE else [different])],
    }
    return Conversion(report, write)


def installed_transformers() -> str | None:
    """The version of transformers on this machine, which is not imported."""
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version("transformers")
    except PackageNotFoundError:
        return None


def encoder_for_diffusers(spec: EncoderSpec) -> dict[str, Tensor]:
    """An encoder's tensors under the published names, held against what diffusers builds of its sizes."""
    problems = refusals(spec)
    if problems:
        raise UsageError(f"encoder {spec.name}: diffusers cannot build it: {'; '.join(problems)}")
    raw = load_file(str(spec.weights))
    if spec.loader == "timm":
        found = published_from_timm(raw, spec.family)
    else:
        found = {published_name(TOWER.sub("", name), spec.family): value for name, value in raw.items()}
        found = {name: value for name, value in found.items() if not DROPPED.fullmatch(name)}
    shapes = encoder_shapes(spec.family, width=spec.width, depth=depth_of(found), patch_size=spec.patch_size)
    missing = {name: torch.zeros(shape) for name, shape in shapes.items() if is_unused(name) and name not in found}
    expected = {name: torch.empty(shape, device="meta") for name, shape in shapes.items()}
    check_layout(found | missing, expected, f"encoder {spec.name} for diffusers")
    return found | missing


def depth_of(names: Iterable[str]) -> int:
    """Blocks of an encoder, told by its tensors' published names."""
    matches = (re.search(r"encoder\.layers?\.(\d+)\.", name) for name in names)
    return max((int(match[1]) for match in matches if match), default=-1) + 1


def refusals(spec: EncoderSpec) -> list[str]:
    """Why diffusers, which tells its encoders by type, width, depth and patch alone, cannot have this one."""
    if spec.family not in diffusers.MODEL_TYPES or spec.loader not in ("timm", "folder"):
        return [f"its family is {spec.family}; known are {', '.join(diffusers.MODEL_TYPES)}"]
    problems = []
    if spec.norm_eps != diffusers.NORM_EPS[spec.family]:
        problems.append(f"norm_eps is {spec.norm_eps}, diffusers' {diffusers.NORM_EPS[spec.family]}")
    if spec.layers != "last":
        problems.append(f"layers is {spec.layers}, diffusers' last")
    if spec.family == "dinov2" and spec.prefix_tokens != 1 + REGISTERS:
        problems.append(f"{spec.prefix_tokens - 1} registers, diffusers has {REGISTERS}")
    heads = heads_of(spec)
    if spec.width != heads * diffusers.HEAD_CHANNELS:
        problems.append(f"{heads} heads of {spec.width // heads} channels, diffusers has {diffusers.HEAD_CHANNELS}")
    if spec.loader == "folder":
        config = read_folder_config(Path(str(spec.path)))
        if config.activation != diffusers.ACTIVATION[spec.family] or config.swiglu:
            problems.append(f"activation {config.activation}, diffusers' {diffusers.ACTIVATION[spec.family]}")
    return problems


def heads_of(spec: EncoderSpec) -> int:
    """Attention heads, of a folder's configuration or of timm's model."""
    if spec.loader == "folder":
        return read_folder_config(Path(str(spec.path))).heads
    import timm

    with torch.device("meta"):
        model: Any = timm.create_model(spec.architecture, pretrained=False, num_classes=0)
    return int(model.blocks[0].attn.num_heads)


def diffusers_config(
    spec: DecoderSpec, encoder: EncoderSpec, depth: int, buffers: dict[str, Tensor], noise_tau: float
) -> dict[str, Any]:
    """config.json of AutoencoderRAE. Statistics are in it too: diffusers shapes its buffers by them."""
    types = {family: kind for kind, family in diffusers.FAMILIES.items()}
    mean = buffers["_latents_mean"]
    return {
        "_class_name": diffusers.CLASS,
        "_diffusers_version": "0.42.1",
        "encoder_type": types[encoder.family],
        "encoder_hidden_size": encoder.width,
        "encoder_patch_size": encoder.patch_size,
        "encoder_num_hidden_layers": depth,
        "decoder_hidden_size": spec.width,
        "decoder_num_hidden_layers": spec.depth,
        "decoder_num_attention_heads": spec.heads,
        "decoder_intermediate_size": spec.mlp_width,
        "patch_size": spec.patch_size,
        "encoder_input_size": encoder.input_size,
        "image_size": spec.patch_size * encoder.tokens_side,
        "num_channels": 3,
        "encoder_norm_mean": list(encoder.mean),
        "encoder_norm_std": list(encoder.std),
        "latents_mean": None if mean.shape == (1,) else mean.tolist(),
        "latents_std": buffers["_latents_std"].tolist(),
        "noise_tau": noise_tau,
        "reshape_to_2d": True,
        "use_encoder_loss": False,
        "scaling_factor": 1.0,
    }
