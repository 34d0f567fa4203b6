"""t-SNE of a latent cache's pooled tokens, classes in colours. App. O, Fig. 17."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from raecli.errors import InputError, UsageError
from raecli.evaluation.latent_features import features_of, open_labelled
from raecli.store.atomic import atomic_file
from raecli.store.latent_cache import LatentCache

COMPONENTS = 50  # principal ones that t-SNE is given, as is usual
LEGEND = 20  # classes at most that are named


def tsne(path: str, out: str, per_class: int, classes: int, perplexity: float, seed: int) -> dict[str, Any]:
    """Draw `per_class` samples of each of `classes` classes, both by the seed. The paper: 50 of 100."""
    try:
        import matplotlib.figure  # noqa: F401
        from sklearn.manifold import TSNE
    except ImportError as error:
        raise UsageError(f"eval tsne needs scikit-learn and matplotlib ({error}); pip install 'raecli[demo]'") from None
    cache = open_labelled(path)
    chosen, samples = choose(cache, per_class, classes, seed)
    if not 0 < perplexity < len(samples):
        raise InputError(f"--perplexity is {perplexity:g}; it is above 0 and below the {len(samples)} samples drawn")
    points = principal(features_of(cache, samples, "pooled"))
    places = TSNE(perplexity=perplexity, init="pca", random_state=seed, n_jobs=1).fit_transform(points.numpy())
    draw(places, cache.labels[samples], [cache.manifest.classes[label] for label in chosen], chosen, cache, Path(out))
    told = {"latents": str(cache.folder), "encoder": cache.manifest.encoder.name, "features": "pooled tokens"}
    return {**told, "samples": len(samples), "classes": len(chosen), "perplexity": perplexity, "seed": seed, "out": out}


def choose(cache: LatentCache, per_class: int, classes: int, seed: int) -> tuple[list[int], list[int]]:
    """Classes, and indices of samples, class by class; a class of fewer samples gives all of them."""
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(cache.manifest.classes), generator=generator).tolist()
    chosen, samples = sorted(order[:classes]), []
    for label in chosen:
        ours = (cache.labels == label).nonzero()[:, 0]
        samples += ours[torch.randperm(len(ours), generator=generator)[:per_class]].tolist()
    if len(samples) < 3:
        raise InputError(f"{cache.folder}: {len(samples)} samples of these classes are too few for t-SNE")
    return chosen, samples


def principal(features: Tensor) -> Tensor:
    """[B, D] on the first principal components, float32; the sign that makes each one's largest entry positive."""
    centred = features.double() - features.double().mean(dim=0)
    axes = torch.linalg.svd(centred, full_matrices=False).Vh[:COMPONENTS]
    signs = axes.gather(1, axes.abs().argmax(dim=1, keepdim=True)).sign()
    return (centred @ (axes * signs).T).float()


def draw(places: Any, labels: Tensor, names: list[str], chosen: list[int], cache: LatentCache, path: Path) -> None:
    """The scatter plot, a colour a class."""
    import matplotlib
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 6.5), layout="constrained")
    axis = figure.subplots()
    colours = matplotlib.colormaps["tab10" if len(chosen) <= 10 else "tab20" if len(chosen) <= 20 else "hsv"]
    points = []
    for number, label in enumerate(chosen):
        ours = (labels == label).numpy()
        colour = colours(number if len(chosen) <= LEGEND else number / len(chosen))
        points.append(axis.scatter(places[ours, 0], places[ours, 1], s=12, color=colour, linewidths=0))
    axis.set(xticks=[], yticks=[], title=f"t-SNE of {cache.manifest.encoder.name}: {len(labels)} pooled latents")
    if len(chosen) <= LEGEND:
        shown = [name.replace("$", r"\$") for name in names]  # a folder's name, not mathematics
        axis.legend(points, shown, loc="center left", bbox_to_anchor=(1, 0.5), fontsize="small", markerscale=2)
    with atomic_file(path) as scratch:
        figure.savefig(scratch, dpi=120, format="png")
