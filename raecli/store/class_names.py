"""Classes by number or by name: those that a model's cache had, and ImageNet's own. No torch."""

import difflib
import importlib.util
from collections.abc import Sequence
from pathlib import Path

from raecli.errors import UsageError

IMAGENET = 1000  # a model of so many classes, without other names, is taken for ImageNet-1k's


def class_numbers(wanted: Sequence[int | str], names: Sequence[str], num_classes: int) -> tuple[int, ...]:
    """The labels of numbers and names, in the order given; a word of digits is a number.

    names: of the model's classes, by label; () where it has none. Those of 1000 classes may also be named as ImageNet
    does: n01443537, goldfish. UsageError tells every one that is unknown, with the nearest name.
    """
    known = {name.casefold(): label for label, name in reversed(list(enumerate(names)))}
    if num_classes == IMAGENET:
        known = imagenet_names(names) | known
    numbers, problems = [], []
    for word in wanted:
        text = str(word).strip()
        number = int(text) if text.isdecimal() and text.isascii() else known.get(text.casefold().replace("_", " "))
        number = known.get(text.casefold()) if number is None else number
        if number is None:
            problems.append(unknown_name(text, known, num_classes))
        elif number >= num_classes:
            problems.append(f"{text}: the model has classes 0 to {num_classes - 1}")
        else:
            numbers.append(number)
    if problems:
        raise UsageError(f"--classes {'; '.join(problems)}")
    return tuple(numbers)


def unknown_name(text: str, known: dict[str, int], num_classes: int) -> str:
    """What to say about a name that is none."""
    near = difflib.get_close_matches(text[:64].casefold(), known, n=1, cutoff=0.6)
    if near:
        return f"{text!r}: no such class; did you mean {near[0]} ({known[near[0]]})?"
    if known:
        return f"{text!r}: no such class; there are {', '.join(list(known)[:5])}{', ...' if len(known) > 5 else ''}"
    return f"{text!r}: the model knows its classes by number alone, 0 to {num_classes - 1}"


def imagenet_names(names: Sequence[str]) -> dict[str, int]:
    """ImageNet-1k's names to labels: WordNet ids, and their lemmas out of timm's lists.

    Of the lemmas that two classes share (crane, maillot) the lower label holds. {} where a model's own names are not
    ImageNet's folders, or timm is not there.
    """
    spec = importlib.util.find_spec("timm")
    if spec is None or not spec.submodule_search_locations:
        return {}
    folder = Path(spec.submodule_search_locations[0]) / "data" / "_info"
    try:
        ids = (folder / "imagenet_synsets.txt").read_text(encoding="utf-8").split()
        lines = (folder / "imagenet_synset_to_lemma.txt").read_text(encoding="utf-8").splitlines()
    except OSError:
        return {}
    if names and list(names) != ids:
        return {}
    lemmas = dict(line.split("\t", 1) for line in lines if "\t" in line)
    known = {identifier: label for label, identifier in enumerate(ids)}
    for label, identifier in enumerate(ids):
        for lemma in lemmas.get(identifier, "").split(","):
            known.setdefault(lemma.strip().casefold(), label)
    known.pop("", None)
    return known
