"""Reading JSON that somebody else may have written: bounded, and every fault told as what it is. No torch."""

import json
from pathlib import Path
from typing import Any

from raecli.errors import InputError, RaeError

MAX_BYTES = 2**30  # a manifest of ImageNet's shards has 1 MB, the labels of a million samples 10 MB
MAX_DIGITS = 20  # a seed of 64 bits


def read_json(path: Path, error_class: type[RaeError] = InputError) -> dict[str, Any]:
    """The object in a JSON file. Raises error_class saying what is wrong: absent, too large, not UTF-8, no object."""
    try:
        if path.exists() and not path.is_file():  # a pipe would be waited for
            raise error_class(f"{path}: no regular file")
        if path.stat().st_size > MAX_BYTES:
            raise error_class(f"{path}: {path.stat().st_size} bytes; no file of rae's is as large")
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise error_class(f"{path}: cannot be read ({error.strerror})") from None
    except UnicodeDecodeError as error:
        raise error_class(f"{path}: not JSON ({error}); it is damaged, or no file of rae's") from None
    return parse_json(text, str(path), error_class)


def parse_json(text: str, where: str, error_class: type[RaeError] = InputError) -> dict[str, Any]:
    """The object that a text holds. where: what to call the text in error_class's message."""
    try:
        value = json.loads(text, parse_int=whole_number)
    except RecursionError:
        raise error_class(f"{where}: nested too deeply to be of rae's making") from None
    except ValueError as error:
        raise error_class(f"{where}: not JSON ({error}); it is damaged, or not of rae's making") from None
    if not isinstance(value, dict):
        raise error_class(f"{where}: not a JSON object; it is damaged, or not of rae's making")
    return value


def whole_number(text: str) -> int:
    """An integer as a file of rae's may hold one: a thousand digits fit no float, and end in a bug elsewhere."""
    if len(text) > MAX_DIGITS:
        raise ValueError(f"a number of {len(text)} digits")
    return int(text)
