"""Trained artifacts from outside: where a run's model lies and what its config.json says. No torch."""

from pathlib import Path
from typing import Any

from raecli.errors import CheckpointError
from raecli.store.json_file import read_json

CONFIG = "config.json"


def checkpoint_folders(run: Path) -> list[Path]:
    """A run's checkpoints, the newest first."""
    folders = [folder for folder in (run / "checkpoints").glob("step-*") if folder.name[5:].isdigit()]
    return sorted(folders, key=lambda folder: int(folder.name[5:]), reverse=True)


def artifact_folder(path: str | Path) -> Path:
    """The folder with config.json and weights: final/ of a run, else its newest checkpoint, else the folder itself."""
    folder = Path(path)
    if (folder / "final" / CONFIG).is_file():
        return folder / "final"
    candidates = [folder, *checkpoint_folders(folder)]
    for candidate in candidates:
        if (candidate / CONFIG).is_file():
            return candidate
    if not folder.exists():
        raise CheckpointError(f"{folder}: no such folder; give the output of rae train-diffusion or train-decoder")
    raise CheckpointError(f"{folder}: no trained model here (no final/, no checkpoints/, no {CONFIG})")


def read_config(path: str | Path, kind: str) -> dict[str, Any]:
    """What an artifact says of itself. kind: "rae-diffusion" or "rae-decoder"; another one is refused."""
    folder = artifact_folder(path)
    config = read_json(folder / CONFIG, CheckpointError)
    if config.get("format") != kind:
        raise CheckpointError(f"{folder}: is a {config.get('format')!r}, expected {kind!r}")
    return config
