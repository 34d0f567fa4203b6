"""Files of weights as others wrote them: flat state dicts, checkpoints of the release's training. Never unpickled."""

import re
from dataclasses import dataclass
from pathlib import Path
from pickle import UnpicklingError
from typing import Any, Literal

import torch
from safetensors.torch import load_file
from torch import Tensor

from raecli.errors import CheckpointError, UsageError
from raecli.store.foreign import PICKLES

Kind = Literal["decoder", "autoencoder", "diffusion", "statistics", "discriminator"]
WRAPPERS = ("module.", "_orig_mod.")  # DistributedDataParallel's and torch.compile's
STARTS: dict[Kind, tuple[str, ...]] = {
    "diffusion": ("x_embedder.", "s_embedder.", "t_embedder.", "y_embedder.", "final_layer."),
    "decoder": ("decoder_", "trainable_cls_token"),
    "discriminator": ("patch_embed.",),
}


@dataclass(frozen=True)
class Source:
    """The tensors of a file under the names that they have there."""

    path: Path
    weights: dict[str, Tensor]
    entry: Literal["flat", "ema", "model"]  # where in the file they were
    step: int | None
    notes: tuple[str, ...] = ()


def read_source(path: Path) -> Source:
    """Read a .pt, .pth or .safetensors file. The averaged weights of a training checkpoint are preferred."""
    loaded = read_tensors(path)
    for entry in ("ema", "model"):
        inner = loaded.get(entry)
        if isinstance(inner, dict) and inner:
            step = loaded.get("step", loaded.get("train_steps"))
            weights, notes = decoder_alone(unwrapped(only_tensors(inner, path)))
            told = f"a training checkpoint: its {'averaged' if entry == 'ema' else 'raw'} weights ({entry}) are taken"
            return Source(path, weights, entry, step if isinstance(step, int) else None, (told, *notes))
    weights, notes = decoder_alone(unwrapped(only_tensors(loaded, path)))
    return Source(path, weights, "flat", None, notes)


def read_tensors(path: Path) -> dict[str, Any]:
    """What a file holds: tensors by name, maybe nested. Raises CheckpointError; nothing in the file is ever run."""
    if not path.is_file():
        raise UsageError(f"{path}: no such file")
    try:
        if path.suffix == ".safetensors":
            return dict(load_file(path))
        loaded = torch.load(path, map_location="cpu", weights_only=True)
    except UnpicklingError as error:
        named = re.search(r"GLOBAL (\S+)", str(error))
        if named is None:
            raise CheckpointError(f"{path}: not a whole file of weights") from None
        raise CheckpointError(
            f"{path}: refused, because it holds more than tensors ({named[1]}), and reading such a file can run "
            "code. If you trust its maker, save its tensors again: torch.save({name: tensor, ...}, FILE)"
        ) from None
    except PICKLES as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise CheckpointError(f"{path}: not a whole file of weights: {reason}") from None
    if not isinstance(loaded, dict):
        raise CheckpointError(f"{path}: holds a {type(loaded).__name__}, not tensors by name")
    return loaded


def only_tensors(loaded: dict[str, Any], path: Path) -> dict[str, Tensor]:
    """The same, refused if anything in it is no tensor. `mean: None` of statistics is left out."""
    wrong = sorted(str(key) for key, value in loaded.items() if not isinstance(value, Tensor) and value is not None)
    if wrong:
        raise CheckpointError(
            f"{path}: neither a flat state dict nor a checkpoint with model or ema; not tensors: {', '.join(wrong)}"
        )
    return {str(key): value for key, value in loaded.items() if value is not None}


def unwrapped(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Names without the prefixes that wrappers of a module put before all of them."""
    for prefix in WRAPPERS * 2:
        if weights and all(name.startswith(prefix) for name in weights):
            weights = {name.removeprefix(prefix): value for name, value in weights.items()}
    return weights


def decoder_alone(weights: dict[str, Tensor]) -> tuple[dict[str, Tensor], tuple[str, ...]]:
    """Of a whole autoencoder's weights the decoder's, under its own names; and a note of what was left out."""
    if not any(name.startswith("decoder.decoder_") for name in weights):
        return weights, ()
    frozen = [name for name in weights if name.startswith("encoder.")]
    kept = {name.removeprefix("decoder."): value for name, value in weights.items() if name not in frozen}
    return kept, (f"a whole autoencoder: {len(frozen)} tensors of its frozen encoder are left out",)


def kind_of(weights: dict[str, Tensor], path: Path) -> Kind:
    """What weights are of, told by their names."""
    if "var" in weights and weights.keys() <= {"mean", "var"}:
        return "statistics"
    for kind, starts in STARTS.items():
        if any(name.startswith(starts) for name in weights):
            return kind
    names = ", ".join(sorted(weights)[:5])
    raise CheckpointError(f"{path}: not a released decoder, DiT, DiT-DH, discriminator or statistics; has {names} ...")
