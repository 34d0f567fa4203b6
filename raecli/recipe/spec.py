"""The base of every recipe block: frozen, strict, no unknown keys."""

import math
import re
from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, field_validator

DURATION = re.compile(r"([1-9][0-9]{0,11}|0|[0-9]{0,9}\.[0-9]{1,9}) (epochs?|steps?)")


class Spec(BaseModel):
    """A typed block of a recipe. Values are never coerced: "3" is not 3, 1 is not true."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, validate_default=True)

    @field_validator("*")
    @classmethod
    def check_text(cls, value: Any) -> Any:
        """Refuse text that neither a file of ours nor the system can hold: half a character, or a NUL."""
        texts = value if isinstance(value, tuple) else (value,)
        if any(isinstance(text, str) and ("\0" in text or not is_text(text)) for text in texts):
            raise ValueError("must be text in UTF-8, without NUL; rename the file, or unset PYTHONUTF8=0")
        return value

    def to_dict(self) -> dict[str, Any]:
        """Plain values, ready for YAML or JSON, tuples as lists."""
        return self.model_dump(mode="json")


def is_text(text: str) -> bool:
    """Whether UTF-8 can hold it: a file's name in another encoding, or in a wrong locale, comes with surrogates."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def check_duration(value: Any) -> Any:
    """Refuse anything but "40 epochs" or "1500 steps"; a bare number is told what it lacks, not that it is no text."""
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if is_number or (isinstance(value, str) and not DURATION.fullmatch(value)):
        raise ValueError('a duration reads like "40 epochs" or "1500 steps"')
    return value


Duration = Annotated[str, BeforeValidator(check_duration)]
Probability = Annotated[float, Field(ge=0.0, le=1.0, allow_inf_nan=False)]
Positive = Annotated[float, Field(gt=0.0, allow_inf_nan=False)]
NonNegative = Annotated[float, Field(ge=0.0, allow_inf_nan=False)]
Count = Annotated[int, Field(ge=1)]


def duration_in_steps(duration: str, samples: int, batch_size: int) -> int:
    """Optimiser steps in a duration; an epoch is one pass over `samples`, rounded up to whole steps."""
    number, unit = duration.split()
    if unit.startswith("step"):
        return math.ceil(float(number))
    return math.ceil(float(number) * samples / batch_size)
