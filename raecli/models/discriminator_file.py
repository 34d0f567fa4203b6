"""Where the weights of the discriminator's frozen network lie on this machine. No torch, no download."""

from pathlib import Path

from raecli.errors import UsageError

REPOSITORY, WEIGHTS_FILE = "timm/vit_small_patch8_224.dino", "model.safetensors"


def find_backbone(path: str | None) -> Path:
    """The weights of the frozen network: a given file, or DINO ViT-S/8 in the Hugging Face cache. Asks no network."""
    from huggingface_hub import try_to_load_from_cache

    if path is None:
        cached = try_to_load_from_cache(REPOSITORY, WEIGHTS_FILE)
        if isinstance(cached, str):
            return Path(cached)
    elif Path(path).is_file():
        return Path(path)
    found = "is not in the Hugging Face cache" if path is None else f"is not at {path}"
    raise UsageError(
        f"the discriminator's frozen DINO ViT-S/8 {found}: run `rae fetch disc-dino-s8` where there is network, or "
        f"bring {WEIGHTS_FILE} of {REPOSITORY}, and name the file in adversarial.backbone; adversarial=null trains "
        "without a discriminator"
    )
