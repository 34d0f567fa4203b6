"""Trained artifacts to modules: a run folder, its final/, or one of its checkpoints. Nothing else is needed."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from raecli.errors import CheckpointError, InputError
from raecli.models.autoencoder import Autoencoder
from raecli.models.build import decoder_of, diffusion_of, encoder_of
from raecli.recipe.blocks import DecoderSpec, DiffusionModelSpec, EncoderSpec, FlowSpec
from raecli.recipe.spec import Spec
from raecli.store.artifact import CONFIG, artifact_folder, read_config
from raecli.store.atomic import sha256_of
from raecli.store.checkpoint import EMA, MODEL, STATE
from raecli.store.encoders import resolve_encoder
from raecli.store.json_file import read_json
from raecli.store.manifest import differing_fields, encoder_identity, tuples
from raecli.store.model_cards import side_of
from raecli.store.statistics import STATISTICS, LatentStatistics, load_statistics


def read_artifact(path: str | Path, kind: str) -> tuple[Path, dict[str, Any], dict[str, Tensor]]:
    """Folder, configuration and (averaged) weights of an artifact, held against its digests.

    Raises CheckpointError if it is none, of another kind, or damaged.
    """
    folder = artifact_folder(path)
    try:
        config = read_config(folder, kind)
        is_checkpoint = (folder / STATE).is_file()
        name = EMA if is_checkpoint else MODEL
        digests = (read_json(folder / STATE, CheckpointError) if is_checkpoint else config)["sha256"]
        for file in {name, *({STATISTICS} & digests.keys())}:
            if sha256_of(folder / file) != digests[file]:
                raise CheckpointError(f"{folder / file}: its bytes changed since it was written; copy it again")
        return folder, config, load_file(folder / name)
    except (OSError, ValueError, KeyError, AttributeError, TypeError, SafetensorError) as error:
        raise CheckpointError(f"{folder}: not a whole artifact: {error}") from None


def load_weights(model: nn.Module, weights: dict[str, Tensor], where: Path) -> None:
    """Load exactly these weights. Errors are those of check_layout."""
    check_layout(weights, model.state_dict(), where)
    model.load_state_dict(weights)


def built(build: Callable[[], nn.Module], sizes: Spec, weights: dict[str, Tensor], where: Path) -> nn.Module:
    """A module whose sizes were held against its weights before it takes memory: a config.json may claim anything.

    Raises CheckpointError if they do not fit, or make no module.
    """
    most = sum(value.numel() for value in weights.values())
    for name, size in sizes.to_dict().items():
        if isinstance(size, int) and size > most:
            raise CheckpointError(f"{where / CONFIG}: {name} is {str(size)[:20]}, but its weights are {most} numbers")
    try:
        with torch.device("meta"):
            expected = build().state_dict()
    except RuntimeError as error:  # here it is a size; with real memory it may be the lack of that
        raise CheckpointError(f"{where / CONFIG}: its sizes make no model: {error}") from None
    check_layout(weights, expected, where)
    return build()


def check_layout(found: Mapping[str, Tensor], expected: Mapping[str, Tensor], where: Path | str) -> None:
    """Raise CheckpointError with every key that is missing, unknown or of another shape."""
    problems = [f"missing {name}" for name in sorted(expected.keys() - found.keys())]
    problems += [f"unknown {name}" for name in sorted(found.keys() - expected.keys())]
    problems += [
        f"{name}: {tuple(found[name].shape)}, expected {tuple(expected[name].shape)}"
        for name in sorted(expected.keys() & found.keys())
        if expected[name].shape != found[name].shape
    ]
    if problems:
        raise CheckpointError(f"{where}: {len(problems)} keys do not fit: {'; '.join(problems)}")


def load_diffusion(path: str | Path, device: torch.device | str = "cpu") -> nn.Module:
    """A trained DiT or DiT-DH, averaged weights: (noisy [B, C, H, W], t [B], labels [B]) -> velocity [B, C, H, W].

    The module also has `time_shift`, `null_label`, `latent_shape` (C, H, W), `num_classes`, `classes` (names) and
    `config` (all that the artifact says). Noisy latents are normalised ones.
    """
    folder, config, weights = read_artifact(path, "rae-diffusion")
    try:
        spec = DiffusionModelSpec.model_validate(tuples(config["recipe"]["model"]))
        model = built(lambda: diffusion_of(spec), spec, weights, folder)
        flow = FlowSpec.model_validate(tuples(config["recipe"]["flow"]))
        latents = config["latents"]
        model.latent_shape, model.classes = tuple(latents["shape"]), tuple(latents["classes"])
    except (KeyError, TypeError, ValidationError, ValueError, OverflowError) as error:
        raise CheckpointError(f"{folder / CONFIG}: not a diffusion model's: {error}") from None
    load_weights(model, weights, folder)
    model.time_shift, model.config, model.folder = flow.time_shift, config, folder
    return model.to(device).eval().requires_grad_(False)


def load_autoencoder(path: str | Path, device: torch.device | str = "cpu", *, encoder: bool = True) -> Autoencoder:
    """A trained autoencoder: `.encode(images [B, 3, H, W] in [0, 1]) -> normalised latents`, and `.decode(latents)`.

    encoder=False leaves the encoder out: enough to decode. The encoder's weights are looked for where they were when
    the decoder was trained, then by name; other weights than those are refused (InputError).
    """
    folder, config, weights = read_artifact(path, "rae-decoder")
    try:
        spec = EncoderSpec.model_validate(tuples(config["latents"]["encoder"]))
        sizes = DecoderSpec.model_validate(tuples(config["recipe"]["decoder"]))
        decoder = built(lambda: decoder_of(sizes, spec), sizes, weights, folder)
        image_size = side_of(config["latents"])
    except (KeyError, TypeError, ValidationError, ValueError, OverflowError) as error:
        raise CheckpointError(f"{folder / CONFIG}: not a decoder's: {error}") from None
    load_weights(decoder, weights, folder)
    module = encoder_of(located(spec, image_size, folder)) if encoder else None
    statistics = statistics_of(folder)
    pixels = (torch.tensor(spec.mean), torch.tensor(spec.std))
    model = Autoencoder(module, decoder, statistics.mean, statistics.variance, pixels)
    model.config, model.folder, model.image_size = config, folder, image_size
    return model.to(device).eval().requires_grad_(False)


def statistics_of(folder: Path) -> LatentStatistics:
    """The latent statistics beside a model's weights."""
    return load_statistics(folder / STATISTICS)


def located(spec: EncoderSpec, image_size: int, folder: Path | None = None, *, offline: bool = False) -> EncoderSpec:
    """The same encoder where its files are on this machine. folder: an artifact's, which may have them inside.

    offline: what is not here is not asked of the hub.
    """
    if folder and spec.weights and not Path(spec.weights).is_absolute():
        path = None if spec.path is None else str((folder / spec.path).absolute())
        weights = (folder / spec.weights).absolute()
        if not weights.is_file():
            raise CheckpointError(f"{weights}: the encoder inside this artifact is gone; copy the whole folder again")
        found = spec.model_copy(update={"path": path, "weights": str(weights), "weights_sha256": sha256_of(weights)})
    elif spec.weights and Path(spec.weights).is_file():
        found = spec.model_copy(update={"weights_sha256": sha256_of(Path(spec.weights))})
    else:
        found = resolve_encoder(
            spec.name, image_size=image_size, input_size=spec.input_size, layers=spec.layers, offline=offline
        )
    fields = differing_fields(encoder_identity(found), encoder_identity(spec))
    if fields:
        lines = "".join(f"\n  {field}" for field in fields)
        raise InputError(f"encoder {spec.name}: not the one that this was made with{lines}")
    return found
