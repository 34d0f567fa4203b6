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
        value = json.loads(path.read_text(encoding="utf-8"), parse_int=whole_number)
    except OSError as error:
        raise error_class(f"{path}: cannot be read ({error.strerror})") from None
    except RecursionError:
        raise error_class(f"{path}: nested too deeply to be a file of rae's") from None
    except ValueError as error:  # no JSON, or no UTF-8
        raise error_class(f"{path}: not JSON ({error}); it is damaged, or no file of rae's") from None
    if not isinstance(value, dict):
        raise error_class(f"{path}: not a JSON object; it is damaged, or no file of rae's")
    return value


def whole_number(text: str) -> int:
    """An integer as a file of rae's may hold one: a thousand digits fit no float, and end in a bug elsewhere."""
    if len(text) > MAX_DIGITS:
        raise ValueError(f"a number of {len(text)} digits")
    return int(text)
