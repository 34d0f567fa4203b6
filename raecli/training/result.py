"""What a stage says on stdout when it is done: a line for a person, or with --json its facts for a program."""

import json
import os
from typing import Any

PRINT_JSON = "RAE_PRINT_JSON"  # variable by which the launcher tells its workers of --json


def tell_result(line: str, facts: dict[str, Any], *, as_json: bool = False) -> None:
    """Print the line, or the facts where JSON is asked for: here, or of the launcher. By one rank."""
    print(json.dumps(facts, indent=2) if as_json or os.environ.get(PRINT_JSON) else line, flush=True)
