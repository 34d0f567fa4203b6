"""`--set key=value` of `rae convert`: what a file of weights does not tell of itself. No torch."""

import difflib
import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from raecli.errors import UsageError

KNOWN: dict[str, type] = {
    "heads": int,  # attention heads of a decoder, or of a DiT's backbone
    "head_heads": int,  # of the DDT head
    "head_depth": int,  # blocks of the DDT head, where its width is the backbone's
    "mlp_ratio": float,
    "image_size": int,  # pixels a side of the images that the latents are of
    "input_size": int,  # pixels a side that the encoder sees
    "time_shift_dim": int,  # m of alpha = sqrt(m / 4096)
    "time_max": float,  # the release trains on t in [0, 0.999]
    "transformers": str,  # the version that a diffusers folder is written for
}
Settings = dict[str, Any]


def parse_settings(texts: Iterable[str]) -> Settings:
    """Typed values by key. Raises UsageError telling every one that is unknown or of another type."""
    settings: Settings = {}
    problems = []
    for text in texts:
        key, equals, value = text.partition("=")
        key = key.strip()
        if not equals or key not in KNOWN:
            near = difflib.get_close_matches(key, KNOWN, n=1)
            hint = f"did you mean {near[0]}?" if near else f"known are {', '.join(KNOWN)}"
            problems.append(f"--set {text}: no such key=value; {hint}")
            continue
        try:
            settings[key] = parse_value(value.strip(), KNOWN[key])
        except ValueError as error:
            problems.append(f"--set {text}: {error}")
    if problems:
        raise UsageError("\n  ".join(problems))
    return settings


def parse_value(text: str, kind: type) -> int | float | str:
    """A positive number, or a word."""
    if kind is str:
        return text
    try:
        number: int | float = kind(text)
    except ValueError:
        raise ValueError(f"{'a whole number' if kind is int else 'a number'} is asked for, found {text!r}") from None
    if not 0 < number < math.inf:
        raise ValueError(f"a number above 0 is asked for, found {text}")
    return number


@dataclass(frozen=True)
class Request:
    """What `rae convert` is asked for."""

    source: Path
    output: Path
    kind: str | None = None
    to: str = "rae"
    settings: Settings = field(default_factory=dict)
    encoder: str | None = None  # a preset, timm:NAME, a Hugging Face folder, or an autoencoder artifact
    encoder_weights: str | None = None
    statistics: str | None = None  # stat.pt, statistics.safetensors, a folder with one, or "none"
    repository: str | None = None  # of the Hugging Face hub, where the source came from
    force: bool = False
    dry_run: bool = False  # check everything; write and download nothing
