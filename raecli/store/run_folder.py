"""A run's folder: its recipe, its environment, its log of figures."""

import json
import platform
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

from raecli.errors import InputError
from raecli.recipe.load import dump_recipe, load_recipe
from raecli.recipe.spec import Spec
from raecli.store.atomic import write_json, write_text

# May change when a run goes on. A run at a constant rate may also be made longer.
OPERATIONAL = {"log_every", "save_every", "keep_checkpoints", "micro_batch_size", "compile", "output", "validation"} | {
    "parallel",
    "checkpoint_activations",
}


def prepare_run(run: Path, recipe: Spec, world: int) -> None:
    """Write recipe.yaml and environment.json, or check that the run in this folder is of the same recipe.

    Raises InputError listing the values that differ, if the folder holds another run.
    """
    path = run / "recipe.yaml"
    begun = any((run / "checkpoints").glob("step-*")) or (run / "final").exists()
    if begun and path.exists():
        before, now = load_recipe(type(recipe), str(path)).to_dict(), recipe.to_dict()
        free = OPERATIONAL | ({"duration"} if now["schedule"]["kind"] == "constant" else set())
        differing = [
            f"{key}: {before[key]!r} before, {now[key]!r} now"
            for key in now
            if key not in free and before.get(key) != now[key]
        ]
        if differing:
            lines = "".join(f"\n  {line}" for line in differing)
            raise InputError(f"{run}: holds a run of another recipe; give output=ANOTHER_FOLDER, or delete it{lines}")
    write_text(path, dump_recipe(recipe))
    write_json(run / "environment.json", environment() | {"world": world})


def environment() -> dict[str, Any]:
    """What this run is made with."""
    packages = ("raecli", "torch", "timm", "numpy", "pillow", "safetensors")
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "command": sys.argv,
        "packages": {name: metadata.version(name) for name in packages},
    }


class MetricsLog:
    """metrics.jsonl: one JSON object a line, by step. On resume, lines after the resumed step are dropped."""

    def __init__(self, run: Path, first_step: int) -> None:
        self.path = run / "metrics.jsonl"
        lines = self.path.read_text(encoding="utf-8").splitlines() if self.path.exists() else []
        kept = [line for line in lines if is_before(line, first_step)]
        write_text(self.path, "".join(f"{line}\n" for line in kept))

    def write(self, figures: dict[str, float | int]) -> None:
        """Append one line; figures hold `step`."""
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(figures) + "\n")


def is_before(line: str, step: int) -> bool:
    """Whether a line is whole and of a step at or before `step`."""
    try:
        return int(json.loads(line)["step"]) <= step
    except (ValueError, KeyError, TypeError):
        return False
