"""Representation Autoencoders and the diffusion transformers trained on them. Sec. 3 to 5 of the paper.

The Python API, imported on first use so that `import raecli` costs nothing:

    load_autoencoder(path)  -> .encode(images) -> normalised latents, .decode(latents) -> images
    load_diffusion(path)    -> module: (noisy, t, labels) -> velocity
    sample(model, noise, labels, *, steps, solver, time_grid, guidance_scale, guidance_interval, guide) -> latents
    open_cache(path)        -> len(cache), cache[i] -> (latent, label, key)
"""

from importlib import import_module
from typing import Any

__version__ = "0.1.0"
__all__ = ["__version__", "load_autoencoder", "load_diffusion", "open_cache", "sample"]

_HOMES = {
    "load_autoencoder": "raecli.models.load",
    "load_diffusion": "raecli.models.load",
    "open_cache": "raecli.store.latent_cache",
    "sample": "raecli.flow.sampler",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'raecli' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)
