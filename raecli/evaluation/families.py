"""Figures that share a feature network: which of them two sides allow, and one pass over each side for all of them."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from raecli.errors import InputError, RaeError, UsageError
from raecli.evaluation.figures import PrChoice, coverage_figures, frechet_figures, kernel_figures, score_figures
from raecli.evaluation.measuring import Measured, Wanted, measure
from raecli.evaluation.networks import DINOV2, LOGITS, POOL, SPATIAL, FeatureNetwork
from raecli.evaluation.sides import Side, is_of, same_network, told_network
from raecli.metrics.statistics import Moments
from raecli.training.distributed import Ranks

LAYER = {"fid": POOL, "sfid": SPATIAL, "is": LOGITS, "precision-recall": POOL, "kid": POOL, "fdd": DINOV2}
GAUSSIAN = ("fid", "sfid", "fdd")  # compare means and covariances, so stored statistics are enough
ROWS = ("precision-recall", "kid")  # compare single features
POOLED = ("fid", "sfid", "is", "precision-recall", "kid")  # one network, one pass


@dataclass(frozen=True)
class Family:
    """Metrics of one network. layers: what the network gives of images; open: load it, or raise a RaeError."""

    metrics: tuple[str, ...]
    layers: tuple[str, ...]
    open: Callable[[tuple[str, ...]], FeatureNetwork]
    identity: dict[str, Any] | None  # of a network that is told by name; None: whichever the features are of


@dataclass
class Findings:
    """Figures of a family, and why others could not be had. network: what they are measured in."""

    figures: dict[str, Any]
    unavailable: dict[str, RaeError]
    network: dict[str, Any]
    samples: "Taken"
    reference: "Taken | None"


@dataclass(frozen=True)
class Taken:
    """What was taken of a side: its measurement, the Gaussians that a file had stored, and how many samples."""

    measured: Measured
    stored: dict[str, Moments]
    count: int | None

    def moments(self, layer: str) -> Moments:
        """A layer's Gaussian: the stored one is preferred."""
        return self.stored[layer] if layer in self.stored else self.measured.moments[layer]


def family_findings(
    family: Family, samples: Side, reference: Side | None, choice: PrChoice, batch_size: int, ranks: Ranks
) -> Findings:
    """Measure what the two sides allow; say why of the rest."""
    unavailable = hindrances(family, samples, reference)
    possible = [metric for metric in family.metrics if metric not in unavailable]
    network, missing = opened(family, possible, samples, reference)
    unavailable |= missing
    possible = [metric for metric in possible if metric not in missing]
    identity = identity_of(family, network, samples)
    ours = taken(samples, possible, network, identity, batch_size, ranks, "samples")
    theirs = None
    if reference is not None and any(metric != "is" for metric in possible):
        compared = [metric for metric in possible if metric != "is"]
        theirs = taken(reference, compared, network, identity, batch_size, ranks, "reference")
    figures = figures_of(possible, ours, theirs, choice, ranks)
    return Findings(figures, unavailable, identity, ours, theirs)


def hindrances(family: Family, samples: Side, reference: Side | None) -> dict[str, RaeError]:
    """Why metrics cannot be had of what two sides hold, by metric."""
    found: dict[str, RaeError] = {}
    for metric in family.metrics:
        sides = [samples] if metric == "is" or reference is None else [samples, reference]
        reason = next(filter(None, (lack(metric, side, family) for side in sides)), None)
        if reason is not None:
            found[metric] = InputError(reason)
    return found


def lack(metric: str, side: Side, family: Family) -> str | None:
    """Why a side does not allow a metric; None if it does."""
    layer = LAYER[metric]
    if metric in GAUSSIAN and layer in side.stored:
        return None
    if side.features is not None:
        return None if layer in side.features.streams else f"{side.source}: a feature file without {layer}"
    if metric == "sfid" and POOL in side.stored:
        return f"{side.source}: stores mu and sigma but not mu_s and sigma_s, which sFID compares"
    if side.images is None:
        return f"{side.source}: holds statistics alone; {metric} needs the images, or a feature file with {layer}"
    if layer not in family.layers:
        return f"{metric} needs Inception's {layer} features, and --features names another network"
    return None


def passes_images(metric: str, side: Side, family: Family) -> bool:
    """Whether a metric needs a side's images passed through the network."""
    if side.images is None:
        return False
    stored = side.stored.get(LAYER[metric]) if metric in GAUSSIAN else None
    if stored is None:
        return True
    told = told_network(stored.provenance, LAYER[metric])
    return family.identity is not None and not same_network(told, family.identity)


def opened(
    family: Family, metrics: list[str], samples: Side, reference: Side | None
) -> tuple[FeatureNetwork | None, dict[str, RaeError]]:
    """The network, where an image has to pass through it; and the metrics that go without because it is not there."""
    needing = [
        metric
        for metric in metrics
        if passes_images(metric, samples, family)
        or (reference is not None and metric != "is" and passes_images(metric, reference, family))
    ]
    if not needing:
        return None, {}
    try:
        return family.open(tuple(dict.fromkeys(LAYER[metric] for metric in needing))), {}
    except UsageError as error:
        return None, dict.fromkeys(needing, error)


def identity_of(family: Family, network: FeatureNetwork | None, samples: Side) -> dict[str, Any]:
    """The network that figures are measured in: the one that was loaded, or that the samples' features tell of."""
    if network is not None:
        return network.description
    return family.identity or told_network(samples.provenance, LAYER[family.metrics[0]])


def taken(
    side: Side,
    metrics: list[str],
    network: FeatureNetwork | None,
    identity: dict[str, Any],
    batch_size: int,
    ranks: Ranks,
    label: str,
) -> Taken:
    """Stored Gaussians where they are of the same network, and one pass for everything else."""
    layers = [LAYER[metric] for metric in metrics if metric in GAUSSIAN]
    stored = usable_stored(side, layers, network, identity)
    if side.features is not None and metrics:
        check_features(side, LAYER[metrics[0]], identity)
    wanted = Wanted(
        tuple(layer for layer in layers if layer not in stored),
        next((LAYER[metric] for metric in metrics if metric in ROWS), None),
        "is" in metrics,
    )
    measured = Measured() if side.data is None else measure(side.data, network, wanted, batch_size, ranks, label)
    counts = [found.samples for found in stored.values()] or [len(side.data) if side.data is not None else None]
    return Taken(measured, stored, counts[0])


def usable_stored(
    side: Side, layers: list[str], network: FeatureNetwork | None, identity: dict[str, Any]
) -> dict[str, Moments]:
    """Stored Gaussians of the network; those of another are passed over where there are images to measure instead."""
    stored = {layer: side.stored[layer] for layer in layers if layer in side.stored}
    other = [layer for layer, found in stored.items() if not is_of(found, layer, identity)]
    if other and (side.images is None or network is None):
        found = stored[other[0]]
        raise InputError(
            f"{side.source}: holds statistics of another feature network "
            f"({told_network(found.provenance, other[0])['name']}, {len(found.mean)} features) "
            "and no images; measure with that network, or give images"
        )
    return {layer: found for layer, found in stored.items() if layer not in other}


def check_features(side: Side, layer: str, identity: dict[str, Any]) -> None:
    """Refuse a feature file of another network."""
    told = told_network(side.provenance, layer)
    if not same_network(told, identity):
        raise InputError(
            f"{side.source}: features of {told['name']}, sha256 {str(told.get('sha256'))[:8]}; the other side's are of "
            f"{identity['name']}, sha256 {str(identity.get('sha256'))[:8]}; extract both with one network"
        )


def figures_of(metrics: list[str], ours: Taken, theirs: Taken | None, choice: PrChoice, ranks: Ranks) -> dict[str, Any]:
    """All figures of one network. Precision and recall share their work over ranks, so every rank comes here."""
    figures: dict[str, Any] = {}
    for metric in metrics:
        if metric == "is":
            figures |= score_figures(ours.measured.scores)
        elif theirs is None:
            raise UsageError(f"{metric} needs a reference: --ref REF")
        elif metric in GAUSSIAN:
            if ranks.is_main:
                figures |= frechet_figures(metric, ours.moments(LAYER[metric]), theirs.moments(LAYER[metric]), ranks)
        else:
            assert ours.measured.rows is not None and theirs.measured.rows is not None, "a pass kept its rows"
            if metric == "precision-recall":
                figures |= coverage_figures(ours.measured.rows, theirs.measured.rows, choice, ranks)
            elif ranks.is_main:
                figures |= kernel_figures(ours.measured.rows, theirs.measured.rows)
    return figures
