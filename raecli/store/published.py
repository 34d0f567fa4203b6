"""The published artefacts by short names, and their way from the Hugging Face hub. No torch. FACTS section 8."""

import difflib
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from raecli.errors import InputError, UsageError
from raecli.store.atomic import sha256_of
from raecli.store.encoder_weights import probe_hub

COLLECTION = "nyu-visionx/RAE-collections"
DIFFUSERS_FILES = ("config.json", "diffusion_pytorch_model.safetensors")


@dataclass(frozen=True)
class Published:
    """What `rae fetch NAME` brings. The first file is converted; a decoder's second is its statistics."""

    kind: Literal["decoder", "autoencoder", "diffusion", "statistics", "discriminator"]
    repository: str
    files: tuple[str, ...]
    about: str
    encoder: str | None = None  # of a decoder: a preset
    settings: tuple[str, ...] = ()

    def convert_line(self, output: str) -> str:
        """The command that converts these files where they lie in the folder DIR."""
        parts = ["rae convert", f"DIR/{self.files[0]}" if self.kind != "autoencoder" else "DIR", output]
        if self.kind == "decoder":
            parts += [f"--encoder {self.encoder}", f"--statistics DIR/{self.files[1]}"]
        return " ".join([*parts, *(f"--set {setting}" for setting in self.settings)])


def _decoder(folder: str, statistics: str, encoder: str, about: str, *settings: str) -> Published:
    """A flat decoder with the statistics of its encoder on ImageNet."""
    files = (f"decoders/{folder}/model.pt", f"stats/{statistics}/stat.pt")
    return Published("decoder", COLLECTION, files, about, encoder, settings)


def _diffusion(folder: str, about: str) -> Published:
    """A DiT-DH: averaged weights."""
    return Published("diffusion", COLLECTION, (f"DiTs/Dinov2/wReg_base/{folder}/stage2_model.pt",), about)


def _diffusers(name: str, about: str, *settings: str) -> Published:
    """A whole autoencoder, its encoder with it."""
    return Published("autoencoder", f"nyu-visionx/RAE-{name}-ViTXL-n08", DIFFUSERS_FILES, about, None, settings)


def _statistics(folder: str, about: str) -> Published:
    """Mean and variance of latents on ImageNet."""
    return Published("statistics", COLLECTION, (f"stats/{folder}/stat.pt",), about)


PUBLISHED: dict[str, Published] = {
    "rae-dinov2-s": _diffusers("dinov2-wReg-small", "autoencoder, DINOv2-S, 256 px"),
    "rae-dinov2-b": _diffusers("dinov2-wReg-base", "autoencoder, DINOv2-B, 256 px"),
    "rae-dinov2-l": _diffusers("dinov2-wReg-large", "autoencoder, DINOv2-L, 256 px"),
    "rae-dinov2-b-512": Published(
        "autoencoder",
        "nyu-visionx/RAE-dinov2-wReg-base-ViTXL-n08-i512",
        DIFFUSERS_FILES,
        "autoencoder, DINOv2-B, 512 px",
    ),
    "rae-siglip2-b": _diffusers("siglip2-base-p16-i256", "autoencoder, SigLIP2-B, 256 px"),
    "rae-mae-b": _diffusers("mae-base-p16", "autoencoder, MAE-B, 256 px"),
    "decoder-xl-dinov2b": _decoder(
        "dinov2/wReg_base/ViTXL_n08", "dinov2/wReg_base/imagenet1k", "dinov2-b", "decoder ViT-XL, DINOv2-B, 256 px"
    ),
    "decoder-xl-dinov2b-512": _decoder(
        "dinov2/wReg_base/ViTXL_n08_i512",
        "dinov2/wReg_base/imagenet1k_512",
        "dinov2-b",
        "decoder ViT-XL, DINOv2-B, 512 px",
        "image_size=512",
    ),
    "decoder-xl-mae-b": _decoder(
        "mae/base_p16/ViTXL_n08", "mae/base_p16/ImageNet1k", "mae-b", "decoder ViT-XL, MAE-B, 256 px"
    ),
    "decoder-xl-siglip2-b": _decoder(
        "siglip2/base_p16_i256/ViTXL_n08",
        "siglip2/base_p16_i256/ImageNet1k",
        "siglip2-b",
        "decoder ViT-XL, SigLIP2-B, 256 px",
    ),
    "stat-dinov2b": _statistics("dinov2/wReg_base/imagenet1k", "latent statistics, DINOv2-B, 256 px"),
    "stat-dinov2b-512": _statistics("dinov2/wReg_base/imagenet1k_512", "latent statistics, DINOv2-B, 512 px"),
    "stat-mae-b": _statistics("mae/base_p16/ImageNet1k", "latent statistics, MAE-B, 256 px"),
    "stat-siglip2-b": _statistics("siglip2/base_p16_i256/ImageNet1k", "latent statistics, SigLIP2-B, 256 px"),
    "dith-xl-256": _diffusion("ImageNet256/DiTDH-XL", "DiT-DH-XL, ImageNet 256"),
    "dith-s-256-guide": _diffusion("ImageNet256/DiTDH-S_ep14", "DiT-DH-S after 14 epochs: guide of dith-xl-256"),
    "dith-xl-512": _diffusion("ImageNet512/DiTDH-XL_ep400", "DiT-DH-XL after 400 epochs, ImageNet 512"),
    "dith-s-512-guide": _diffusion("ImageNet512/DiTDH-S_ep20", "DiT-DH-S after 20 epochs: guide of dith-xl-512"),
    "disc-dino-s8": Published(
        "discriminator", COLLECTION, ("discs/dino_vit_small_patch8_224.pth",), "frozen DINO ViT-S/8 of the GAN term"
    ),
}


def find_published(name: str) -> Published:
    """The entry of a name. UsageError with the nearest names."""
    if name in PUBLISHED:
        return PUBLISHED[name]
    near = difflib.get_close_matches(name.lower(), PUBLISHED, n=3, cutoff=0.4)
    hint = f"did you mean {', '.join(near)}?" if near else "rae fetch --list tells what there is"
    raise UsageError(f"{name}: nothing of that name is published; {hint}")


def download(name: str, entry: Published, output: str) -> list[Path]:
    """Every file of an entry: from the Hugging Face cache, else from the hub, where a cut download is resumed.

    Without network and cache it fails in under 10 s, saying what to bring.
    """
    return [downloaded(name, entry, file, output) for file in entry.files]


def downloaded(name: str, entry: Published, file: str, output: str) -> Path:
    """One file, held against the hub's digest."""
    from huggingface_hub import hf_hub_download

    if cached := cached_file(entry, file):
        return cached
    refuse_unavailable(name, entry, file, output)
    try:
        return checked(Path(hf_hub_download(entry.repository, file, etag_timeout=3)))
    except InputError:
        raise
    # The hub's client raises its own errors, its HTTP library's and OSError, by version.
    except Exception as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UsageError(bring(name, entry, file, output, f"the download failed: {reason}")) from error


def cached_file(entry: Published, file: str) -> Path | None:
    """A file that is in the Hugging Face cache, held against the hub's digest."""
    from huggingface_hub import try_to_load_from_cache

    cached = try_to_load_from_cache(entry.repository, file)
    return checked(Path(cached)) if isinstance(cached, str) else None


def refuse_unavailable(name: str, entry: Published, file: str, output: str) -> None:
    """UsageError if this run is offline, or the hub does not give a file. Downloads nothing."""
    from huggingface_hub import constants, hf_hub_url

    if constants.HF_HUB_OFFLINE:
        raise UsageError(bring(name, entry, file, output, "this run is offline (HF_HUB_OFFLINE)"))
    if problem := probe_hub(hf_hub_url(entry.repository, file)):
        raise UsageError(bring(name, entry, file, output, f"the Hugging Face hub does not give it ({problem})"))


def download_plan(name: str, entry: Published, output: str) -> tuple[list[Path], list[str]]:
    """Of an entry's files those that are here already, and a line on each. Errors are those of download."""
    here, lines = [], []
    for file in entry.files:
        if cached := cached_file(entry, file):
            here.append(cached)
            lines.append(f"{file} is in the Hugging Face cache, {cached}")
        else:
            refuse_unavailable(name, entry, file, output)
            lines.append(f"{file} would be downloaded from {entry.repository}")
    return here, lines


def checked(path: Path) -> Path:
    """The file, if it has the digest that the hub told: the cache names a large file's blob by its sha256."""
    told = path.resolve().name
    if re.fullmatch(r"[0-9a-f]{64}", told) and sha256_of(path) != told:
        raise InputError(
            f"{path}: its bytes are not the hub's (sha256 {told}); delete {path.resolve()} and fetch again"
        )
    return path


def bring(name: str, entry: Published, file: str, output: str, why: str) -> str:
    """What to do when a file cannot be had."""
    files = ", ".join(entry.files)
    return (
        f"{name}: {file} is not on this machine, and {why}. Bring {files} of the Hugging Face repository "
        f"{entry.repository} into a folder DIR, then: {entry.convert_line(output)}"
    )
