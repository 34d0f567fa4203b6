"""Checkpoints: a folder of safetensors and JSON that is complete or absent. No pickle."""

import hashlib
import json
import sys
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from raecli.errors import CheckpointError, InputError, NonFiniteError, StorageError
from raecli.store.artifact import CONFIG, checkpoint_folders
from raecli.store.atomic import atomic_folder, remove_folder, sha256_of, write_json
from raecli.store.checksum import checksums, nowhere
from raecli.store.json_file import read_json
from raecli.store.room import check_free
from raecli.store.statistics import STATISTICS, LatentStatistics
from raecli.store.tensors import as_sharded, places_for, save_tensors, write_tensors

MODEL, EMA, OPTIMIZER, STATE = "model.safetensors", "ema.safetensors", "optimizer.safetensors", "state.json"
TENSORS = (MODEL, EMA, OPTIMIZER)
FILES = (*TENSORS, STATISTICS, CONFIG)  # all but the state, which tells the digests of these


@dataclass(frozen=True)
class Checkpoint:
    """A training state as read back."""

    path: Path
    step: int
    state: dict[str, Any]
    config: dict[str, Any]
    model: dict[str, Tensor]
    ema: dict[str, Tensor]
    optimizer: dict[str, Tensor]


def contiguous(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Tensors as safetensors stores them: on the CPU, dense, no two sharing memory."""
    return {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}


def check_finite(tensors: dict[str, Tensor], run: Path) -> None:
    """Refuse to save weights that are no numbers: a finite gradient and too high a rate can make them."""
    bad = [name for name, tensor in tensors.items() if tensor.is_floating_point() and not tensor.isfinite().all()]
    if bad:
        raise NonFiniteError(
            f"{run}: {len(bad)} weights are NaN or infinite after this step ({', '.join(bad[:3])}, ...), so they are "
            "not saved; lower the learning rate and run again"
        )


def optimizer_tensors(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """The optimiser's state by `parameter.name:entry`."""
    names = {parameter: name for name, parameter in model.named_parameters()}
    return {
        f"{names[parameter]}:{entry}": value
        for parameter, entries in optimizer.state.items()
        for entry, value in entries.items()
    }


def load_weights(model: nn.Module, weights: Mapping[str, Tensor]) -> None:
    """Fill a model with whole weights, which are split as its own are. CheckpointError if they are not its own kind."""
    own = model.state_dict(keep_vars=True)
    split = {name: as_sharded(value, own[name]) if name in own else value for name, value in weights.items()}
    try:
        model.load_state_dict(split)
    except RuntimeError as error:
        raise CheckpointError(f"weights of another model than the recipe's: {error}") from None


def load_optimizer(model: nn.Module, optimizer: torch.optim.Optimizer, tensors: dict[str, Tensor]) -> None:
    """Give the optimiser its saved state back, on the parameters' devices, sharded as they are."""
    parameters = dict(model.named_parameters())
    for key, value in tensors.items():
        name, _, entry = key.rpartition(":")
        parameter = parameters.get(name)
        if parameter is None:
            raise CheckpointError(f"{OPTIMIZER}: {key} is of no parameter of the recipe's model")
        optimizer.state[parameter][entry] = as_sharded(value, parameter)


def save_checkpoint(
    run: Path,
    step: int,
    *,
    model: dict[str, Tensor],
    ema: dict[str, Tensor],
    optimizer: dict[str, Tensor],
    statistics: LatentStatistics,
    state: dict[str, Any],
    config: dict[str, Any],
    keep: int,
) -> Path:
    """Write `checkpoints/step-0000100/` of a run, read it back, then drop all but the newest `keep`.

    Raises NonFiniteError for weights that are no numbers, StorageError if the disk refuses or returns other bytes.
    """
    folder = run / "checkpoints" / f"step-{step:07d}"
    folder.parent.mkdir(parents=True, exist_ok=True)
    check_finite(model, run)
    check_finite(ema, run)
    with atomic_folder(folder) as scratch:  # one that is there was found bad: it is replaced
        parts = {MODEL: model, EMA: ema, OPTIMIZER: optimizer}
        written = {name: write_tensors(contiguous(tensors), scratch / name) for name, tensors in parts.items()}
        statistics.save(scratch / STATISTICS)
        write_json(scratch / CONFIG, config)
        small = checksums(scratch, (STATISTICS, CONFIG))
        written |= {name: (sha256_of(scratch / name), checksum) for name, checksum in small.items()}
        digests, sums = ({name: pair[kind] for name, pair in written.items()} for kind in (0, 1))
        told = {"step": step, **state, "checksums": sums, "sha256": digests}
        write_json(scratch / STATE, told | {"seal": seal_of(told)})
    for name in damaged_files(folder, told):
        raise StorageError(f"{folder / name}: reads back other bytes than were written; the disk is failing")
    for old in outdated(checkpoint_folders(run), folder, keep):
        remove_folder(old)
    return folder


def outdated(folders: list[Path], newest: Path, keep: int) -> list[Path]:
    """What may go once `newest` was read back: all but it and the `keep` - 1 before it; folders are the newest first.

    One of a later step was found bad when the run went on; counted as one to keep, it would push a good one out.
    """
    position = folders.index(newest)
    return folders[:position] + folders[position + keep :]


def check_space(run: Path, tensors: list[Tensor], keep: int) -> None:
    """Refuse to begin where the disk plainly lacks room for this run's checkpoints: the newest `keep` and one more.

    tensors: the parameters. A checkpoint holds them four times (with average and two moments), final/ once.
    Raises StorageError with the bytes needed.
    """
    size = sum(tensor.numel() * tensor.element_size() for tensor in tensors)
    here = sum(file.stat().st_size for file in run.glob("*/**/*.safetensors"))
    needed = max(0, size * (4 * (keep + 1) + 1) - here)
    advice = "keep fewer (keep_checkpoints), or choose another output"
    check_free(run, needed, f"{keep + 1} checkpoints and final/", advice)


def seal_of(state: dict[str, Any]) -> str:
    """A digest of a state as JSON tells it, whatever its layout."""
    told = json.loads(json.dumps(state))  # as it will be read: every key a string
    return hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()


def damaged_files(folder: Path, state: dict[str, Any], places: Callable[[str], np.ndarray] = nowhere) -> list[str]:
    """Files that are not as their checkpoint's state tells: by checksums, or by sha256 in states that have no other.

    places: where to put their tensors on the way (by checksums alone). Raises CheckpointError if the state leaves a
    file out, OSError if one cannot be read.
    """
    told = state["checksums"] if "checksums" in state else state["sha256"]
    if untold := [name for name in FILES if name not in told]:
        raise CheckpointError(f"{folder / STATE}: has no digest of {', '.join(untold)}, so nobody knows if it is whole")
    if strange := [name for name in told if name not in FILES]:
        raise CheckpointError(f"{folder / STATE}: tells of files that no checkpoint has: {', '.join(strange)}")
    if absent := [name for name in FILES if not (folder / name).is_file()]:  # a pipe would never end
        raise CheckpointError(f"{folder}: {', '.join(absent)} missing, or no regular file")
    if "checksums" in state:
        found = checksums(folder, told, places)
    else:
        with ThreadPoolExecutor(len(told)) as pool:
            found = dict(zip(told, pool.map(lambda name: sha256_of(folder / name), told), strict=True))
    return [name for name in told if found[name] != told[name]]


def read_checkpoint(
    folder: Path, into: Mapping[str, Mapping[str, Tensor]] | None = None, *, mapped: bool = False
) -> Checkpoint:
    """Read a checkpoint, every file held against what its state tells. Raises CheckpointError saying what is wrong.

    into: of MODEL, EMA and OPTIMIZER the tensors that are to hold what is read, by name, for speed: they become the
    checkpoint's own where they can. If this fails, nobody knows what is in them. mapped: the others stay in the files,
    for what goes on to a GPU. Both as places_for has it.
    """
    try:
        state = read_json(folder / STATE, CheckpointError)
        if state.pop("seal", None) not in (None, seal_of(state)):
            raise CheckpointError(f"{folder / STATE}: its bytes changed since it was written")
        tensors: dict[str, dict[str, Tensor]] = {}

        def places(name: str) -> np.ndarray:
            if name not in TENSORS:
                return nowhere(name)
            tensors[name], found = places_for(folder / name, (into or {}).get(name, {}), mapped=mapped)
            return found

        for name in damaged_files(folder, state, places):
            raise CheckpointError(f"{folder / name}: its bytes changed since it was written")
        if "checksums" not in state:  # of an older version: nothing was read on the way
            tensors = {name: load_file(folder / name) for name in TENSORS}
        config = read_json(folder / CONFIG, CheckpointError)
        return Checkpoint(folder, int(state["step"]), state, config, *(tensors[name] for name in TENSORS))
    except (OSError, ValueError, KeyError, TypeError, AttributeError, SafetensorError, RecursionError) as error:
        raise CheckpointError(f"{folder}: not a whole checkpoint: {error}") from None


def newest_checkpoint(
    run: Path, into: Mapping[str, Mapping[str, Tensor]] | None = None, *, mapped: bool = False
) -> Checkpoint | None:
    """The newest checkpoint that is whole; bad ones are named on stderr. None if the run has none at all.

    into, mapped: as read_checkpoint has them.

    Raises CheckpointError if there are some and none can be used: never silently from step 0.
    """
    folders = checkpoint_folders(run)
    for folder in folders:
        try:
            return read_checkpoint(folder, into, mapped=mapped)
        except CheckpointError as error:
            print(f"warning: {error}; trying the one before", file=sys.stderr)
    if folders:
        raise CheckpointError(f"{run}: none of its {len(folders)} checkpoints can be used; delete them to start anew")
    return None


def save_final(
    run: Path, *, weights: dict[str, Tensor], statistics: LatentStatistics, config: dict[str, Any], card: str
) -> Path:
    """Write `final/`: the averaged weights and all that inference needs. One of another step is replaced."""
    folder = run / "final"
    if is_final_of(folder, config):
        return folder
    check_finite(weights, run)
    with atomic_folder(folder) as scratch:
        save_tensors(contiguous(weights), scratch / MODEL)
        statistics.save(scratch / STATISTICS)
        (scratch / "README.md").write_text(card, encoding="utf-8")
        digests = {name: sha256_of(scratch / name) for name in (MODEL, STATISTICS)}
        write_json(scratch / CONFIG, config | {"sha256": digests})
    return folder


def is_final_of(folder: Path, config: dict[str, Any]) -> bool:
    """Whether a whole final model with this configuration lies there already."""
    try:
        found = read_json(folder / CONFIG)
        whole = all(sha256_of(folder / name) == digest for name, digest in found.pop("sha256").items())
        return whole and found == json.loads(json.dumps(config))
    except (OSError, InputError, KeyError, AttributeError):
        return False
