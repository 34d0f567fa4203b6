"""Where LPIPS's VGG16 weights lie on this machine, and whether they are the published ones. No torch, no download."""

from dataclasses import dataclass
from pathlib import Path

from raecli.errors import UsageError
from raecli.metrics.inception_file import hub_folder
from raecli.store.atomic import sha256_of

VGG_NAME = "vgg16-397923af.pth"
PUBLISHED_SHA256_PREFIX = "397923af"  # torch hub's convention: a file's digest starts with the end of its name


@dataclass(frozen=True)
class LpipsFile:
    """A weight file, and whether its digest is that of the published one."""

    path: Path
    sha256: str
    published: bool


def find_lpips(path: str | None = None) -> LpipsFile:
    """The file that figures are measured with, with its digest. Errors are those of locate_vgg."""
    found = locate_vgg(path, "--lpips-weights FILE (in a recipe: validation.lpips_weights)")
    digest = sha256_of(found)
    return LpipsFile(found, digest, digest.startswith(PUBLISHED_SHA256_PREFIX))


def locate_vgg(path: str | None, told_by: str) -> Path:
    """The weight file: `path`, else torch hub's cache. Never downloads. Raises UsageError naming the file to bring.

    told_by: the option or key that names the file.
    """
    found = Path(path) if path is not None else hub_folder() / VGG_NAME
    if not found.is_file():
        raise UsageError(
            f"LPIPS needs torchvision's VGG16 weights, and {found} does not exist: bring {VGG_NAME} (528 MB) there, or "
            f"name it with {told_by}"
        )
    return found
