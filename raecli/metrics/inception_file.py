"""Where Inception's weights lie on this machine, and whether they are the published ones. No torch, no download."""

import os
from dataclasses import dataclass
from pathlib import Path

from raecli.errors import UsageError
from raecli.store.atomic import sha256_of

WEIGHTS_NAME = "weights-inception-2015-12-05-6726825d.pth"
PUBLISHED_SHA256_PREFIX = "6726825d"  # torch hub's convention: a file's digest starts with the end of its name
ENVIRONMENT_VARIABLE = "RAE_INCEPTION"
LAYER_WIDTHS = {"pool": 2048, "spatial": 2023, "logits": 1008}


@dataclass(frozen=True)
class InceptionFile:
    """A weight file, and whether its digest is that of the published one."""

    path: Path
    sha256: str
    published: bool


def find_inception(path: str | None = None) -> InceptionFile:
    """The weight file: `path`, else $RAE_INCEPTION, else torch hub's cache. Never downloads.

    Another digest than the published one is accepted for an explicit `path` only.
    """
    if path is not None:
        return checked_file(Path(path), "--inception", explicit=True)
    told = os.environ.get(ENVIRONMENT_VARIABLE)
    if told:
        return checked_file(Path(told), f"${ENVIRONMENT_VARIABLE}", explicit=False)
    cached = hub_folder() / WEIGHTS_NAME
    if cached.is_file():
        return checked_file(cached, "torch hub's cache", explicit=False)
    raise UsageError(
        f"FID needs Inception's weights, and {cached} does not exist: bring {WEIGHTS_NAME} (91 MB, published with "
        f"release v0.2.0 of toshas/torch-fidelity on GitHub) and say --inception PATH or set ${ENVIRONMENT_VARIABLE}; "
        "or measure in a feature network of yours with --features FILE"
    )


def hub_folder() -> Path:
    """Where torch hub keeps downloaded weights: $TORCH_HOME, else $XDG_CACHE_HOME/torch, else ~/.cache/torch."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache")
    home = Path(os.environ.get("TORCH_HOME") or cache / "torch")
    return home.expanduser() / "hub" / "checkpoints"


def checked_file(path: Path, told_by: str, *, explicit: bool) -> InceptionFile:
    """The file with its digest; a UsageError if it is absent, or is not the published one and was not asked for."""
    if not path.is_file():
        raise UsageError(f"{path}: no such file ({told_by}); bring {WEIGHTS_NAME} of torch-fidelity's release v0.2.0")
    digest = sha256_of(path)
    published = digest.startswith(PUBLISHED_SHA256_PREFIX)
    if not published and not explicit:
        raise UsageError(
            f"{path} ({told_by}): its sha256 starts with {digest[:8]}, that of the published weights with "
            f"{PUBLISHED_SHA256_PREFIX}; bring {WEIGHTS_NAME}, or say --inception {path} to use this file nevertheless"
        )
    return InceptionFile(path, digest, published)
