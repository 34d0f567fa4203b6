"""The share of samples that a classifier takes for the class that was asked for."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from raecli.errors import InputError, NonFiniteError
from raecli.evaluation.moments import rank_batches
from raecli.evaluation.networks import applied, rgb_classifier
from raecli.evaluation.sides import Side
from raecli.metrics.reference import ImageSet, rank_slice
from raecli.models.classifier import Classifier
from raecli.store.atomic import sha256_of
from raecli.training.distributed import Ranks


def accuracy_report(samples: Side, classifier_file: str, batch_size: int, ranks: Ranks) -> dict[str, Any]:
    """The share of samples that a classifier takes for the class that was asked for; also class by class."""
    if samples.images is None:
        raise InputError(f"{samples.source}: holds no images; accuracy needs the images")
    path = Path(classifier_file)
    classifier = rgb_classifier(path).to(ranks.device)
    classes = classifier.config["classes"]
    labels = torch.tensor(labels_of(samples.images, samples.card, classes))
    right, total = ranks.sum(class_counts(classifier, samples.images, labels, batch_size, ranks)).tolist()
    return {
        "accuracy": sum(right) / sum(total),
        "per_class": {str(label): right[label] / total[label] for label in range(classes) if total[label]},
        "per_class_samples": {str(label): total[label] for label in range(classes) if total[label]},
        "samples": sum(total),
        "classifier": {"file": str(path), "sha256": sha256_of(path), "classes": classes},
    }


def class_counts(classifier: Classifier, images: ImageSet, labels: Tensor, batch_size: int, ranks: Ranks) -> Tensor:
    """Of this rank's share: samples of each class judged right, and all of them. int64 [2, classes]."""
    counts = torch.zeros(2, classifier.config["classes"], dtype=torch.int64, device=ranks.device)
    position = rank_slice(len(images), ranks.rank, ranks.world)[0]
    for names, batch in rank_batches(images, batch_size, ranks, "accuracy"):
        wanted = labels[position : position + len(names)].to(ranks.device)
        scores = applied(classifier, batch)
        if not bool(scores.isfinite().all()):
            raise NonFiniteError(f"{names[0]}, or another image of its batch: class scores hold NaN or infinity")
        counts[0] += torch.bincount(wanted[scores.argmax(1) == wanted], minlength=counts.shape[1])
        counts[1] += torch.bincount(wanted, minlength=counts.shape[1])
        position += len(names)
    return counts


def labels_of(images: ImageSet, card: dict[str, Any], classes: int) -> list[int]:
    """The class asked for, of every image: from samples.json, else from the names of class folders."""
    labels = card.get("labels")
    if labels is None:
        labels = labels_of_folders(images, classes)
    if not isinstance(labels, list) or len(labels) != len(images):
        count = len(labels) if isinstance(labels, list) else "no list of"
        raise InputError(f"{images.path}: {len(images)} images, but samples.json has {count} labels; sample again")
    wrong = next((label for label in labels if type(label) is not int or not 0 <= label < classes), None)
    if wrong is not None:
        raise InputError(f"{images.path}: label {wrong!r}; the classifier knows classes 0 to {classes - 1}")
    return labels


def labels_of_folders(images: ImageSet, classes: int) -> list[int]:
    """Class folders numbered in the order of their names, as encode-cache does; or by number, where some are absent."""
    folders = images.folder_classes()
    if folders is None:
        raise InputError(f"{images.path}: no labels: neither in a samples.json, nor by class folders")
    names = sorted(set(folders))
    if len(names) == classes:
        return [names.index(name) for name in folders]
    if all(name.isdecimal() for name in names):
        return [int(name) for name in folders]
    raise InputError(f"{images.path}: {len(names)} class folders, but the classifier knows {classes} classes")
