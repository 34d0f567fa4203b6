"""A run's folder: its recipe, its environment, its log of figures."""

import json
import os
import platform
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

from raecli.errors import InputError, StorageError
from raecli.recipe.blocks import TrackingSpec
from raecli.recipe.load import dump_recipe, load_recipe
from raecli.recipe.spec import Spec
from raecli.store.atomic import write_json, write_text
from raecli.store.tracking import open_sinks

# May change when a run goes on. A run at a constant rate may also be made longer.
OPERATIONAL = {
    "log_every",
    "tracking",
    "peak_tflops",
    "evaluation",
    "validation",
    "save_every",
    "keep_checkpoints",
    "micro_batch_size",
    "compile",
    "parallel",
    "checkpoint_activations",
    "remote_cache_gb",
    "output",
}
METRICS = "metrics.jsonl"
COMMAND = "RAE_COMMAND"  # variable: what the user typed, as the launcher tells its workers


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
            if "duration" not in free and before.get("duration") != now["duration"]:
                lines += "\n  the learning rate falls towards the end of a duration: a longer run starts anew"
            raise InputError(f"{run}: holds a run of another recipe; give output=ANOTHER_FOLDER, or delete it{lines}")
    write_text(path, dump_recipe(recipe))
    write_json(run / "environment.json", environment() | {"world": world})


def environment() -> dict[str, Any]:
    """What this run is made with."""
    packages = ("raecli", "torch", "timm", "numpy", "pillow", "safetensors")
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "command": json.loads(os.environ[COMMAND]) if COMMAND in os.environ else sys.argv,
        "packages": {name: metadata.version(name) for name in packages},
    }


class MetricsLog:
    """metrics.jsonl: one JSON object a line, by step. On resume, lines after the resumed step are dropped.

    What the recipe's `tracking` asks for is told the same.
    """

    def __init__(
        self,
        run: Path,
        first_step: int,
        tracking: TrackingSpec | None = None,
        config: dict[str, Any] | None = None,
    ) -> None:
        self.path = run / METRICS
        kept = [figures for figures in read_metrics(run) if figures["step"] <= first_step]
        write_text(self.path, "".join(f"{json.dumps(figures)}\n" for figures in kept))
        self.sinks = open_sinks(tracking or TrackingSpec(), run, first_step, config or {})

    def write(self, figures: dict[str, float | int]) -> None:
        """Append one line; figures hold `step`."""
        line = json.dumps(figures) + "\n"
        try:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(line)
        except OSError as error:  # a full disk does not know the file's name
            raise StorageError(f"{self.path}: {len(line)} bytes could not be written ({error}); free space") from None
        others = {name: value for name, value in figures.items() if name != "step"}
        for sink in self.sinks:
            sink.write(int(figures["step"]), others)

    def picture(self, step: int, name: str, png: Path) -> None:
        """Show a picture where pictures are shown; it lies in the run's folder already."""
        for sink in self.sinks:
            sink.picture(step, name, png)

    def has(self, step: int, key: str) -> bool:
        """Whether a line of this step holds this key."""
        return any(line["step"] == step and key in line for line in read_metrics(self.path.parent))

    def close(self) -> None:
        """Nothing comes after this."""
        for sink in self.sinks:
            sink.close()


def figures_in(line: str) -> dict[str, Any] | None:
    """The figures of a line, with a whole number as their `step`; None for a line that is cut, or is none of ours."""
    try:
        figures = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return figures if isinstance(figures, dict) and type(figures.get("step")) is int else None


def read_metrics(run: Path) -> list[dict[str, Any]]:
    """The lines of a run's metrics.jsonl; what is no line of ours is left out. [] if there is no such file."""
    path = run / METRICS
    if not path.is_file():
        return []
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    return [figures for line in lines if (figures := figures_in(line)) is not None]
