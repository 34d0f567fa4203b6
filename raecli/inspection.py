"""What lies at a path, what made it, and whether it is whole: the work of `rae inspect`."""

import math
import os
import zipfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from raecli.errors import CheckpointError, InputError, RaeError, counted
from raecli.store.atomic import sha256_of
from raecli.store.foreign import ARRAYS
from raecli.store.json_file import read_json
from raecli.store.manifest import MANIFEST, read_manifest
from raecli.store.room import bytes_told
from raecli.store.run_folder import read_metrics

PICTURES = {"grid.png", "sheet.png", "trajectory.png", "sweep.png"}  # of many samples, beside them


@dataclass
class Finding:
    """kind: what it is; facts: name to value, in the order to be shown; problems: why it is not whole."""

    kind: str
    facts: dict[str, Any] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)

    @property
    def is_whole(self) -> bool:
        """Nothing is missing or changed."""
        return not self.problems


def inspect(path: Path, *, fast: bool = False) -> Finding:
    """Look at a file or folder. fast: sizes only, no digests. Raises InputError if it is nothing of rae's."""
    if path.is_file():
        return inspect_file(path)
    if not path.is_dir():
        raise InputError(f"{path}: no such file or folder")
    if look := look_of(path):
        return look(path, fast)
    return folder(path, fast)


def look_of(path: Path) -> Callable[[Path, bool], Finding] | None:
    """Who looks at a folder of this kind; None if it is nothing of rae's."""
    kinds: dict[str, Callable[[Path, bool], Finding]] = {
        MANIFEST: cache,
        "plan.json": unfinished_cache,
        "sweep.json": sweep,
        "samples.json": samples,
        "unfinished.json": samples,
        "reconstructions.json": samples,
        "state.json": model,
        "recipe.yaml": run,
        "config.json": model,
    }
    return next((look for name, look in kinds.items() if (path / name).is_file()), None)


def folder(path: Path, fast: bool) -> Finding:
    """A folder of such folders, each looked at. Raises InputError if there are none."""
    with os.scandir(path) as entries:
        within = sorted(entry.name for entry in entries if entry.is_dir())
    finding, held = Finding("folder"), {}
    for name in within:
        if not (look := look_of(path / name)):
            continue
        try:
            found = look(path / name, fast)
        except RaeError as error:
            found = Finding("cannot be read", {}, [str(error)])
        held[name] = f"{found.kind}, {'whole' if found.is_whole else 'NOT whole'}"
        finding.problems += [f"{name}: {problem}" for problem in found.problems]
    if not held:
        raise InputError(
            f"{path}: no cache ({MANIFEST}), run (recipe.yaml), model (config.json) or samples (samples.json) "
            "of rae's, nor a folder of them"
        )
    finding.facts["holds"] = held
    return finding


def cache(path: Path, fast: bool) -> Finding:
    """A latent cache by its manifest, shards held against it."""
    manifest = read_manifest(path)
    encoder = manifest.encoder
    finding = Finding(
        "latent cache",
        {
            "samples": manifest.samples,
            "latents": f"{list(manifest.latent_shape)} {manifest.dtype}, views {manifest.views}",
            "classes": len(manifest.classes),
            **({"class_names": first_of(manifest.classes)} if manifest.classes else {}),
            "encoder": f"{encoder.name}, layers {encoder.layers}, sha256 {str(encoder.weights_sha256)[:12]}",
            "images": f"{manifest.image_size} px, {manifest.preprocess}, {len(manifest.skipped)} skipped",
            "shards": f"{len(manifest.shards)}, {bytes_told(sum(shard.bytes for shard in manifest.shards))}",
        },
    )
    for shard in manifest.shards:
        finding.problems += file_problems(path / shard.name, shard.bytes, None if fast else shard.sha256)
    tables = {"index.safetensors": manifest.index_sha256, "statistics.safetensors": manifest.statistics_sha256}
    for name, digest in tables.items():
        finding.problems += file_problems(path / name, None, digest)
    return finding


def first_of(names: Sequence[str], most: int = 12) -> str:
    """Names, or the first of many."""
    return ", ".join(names[:most]) + (", ..." if len(names) > most else "")


def unfinished_cache(path: Path, fast: bool) -> Finding:
    """A cache in the making: what its plan says, and how many shards are done."""
    plan = read_json(path / "plan.json")
    done = len(list(path.glob("shard-*.json")))
    facts = {key: plan.get(key) for key in ("image_size", "dtype", "views", "samples_per_shard")}
    problem = f"not finished, shards done: {done}; run the same rae encode-cache again"
    encoder = plan.get("encoder.architecture") or plan.get("encoder.family")
    return Finding("latent cache in the making", {"encoder": encoder, **facts}, [problem])


def run(path: Path, fast: bool) -> Finding:
    """A run folder: its recipe, how far it came, its checkpoints."""
    from raecli.recipe.load import load_recipe

    told = load_recipe(None, str(path / "recipe.yaml")).to_dict()
    figures = last_figures(path)
    finding = Finding(
        f"run of {told['stage']}",
        {
            "paper": told.get("paper"),
            "cache": told.get("cache"),
            "duration": told.get("duration"),
            "step": figures.get("step", 0),
            "last figures": ", ".join(f"{key} {value:.4g}" for key, value in figures.items() if key != "step"),
        },
    )
    checkpoints = sorted((path / "checkpoints").glob("step-*"))
    parts = {folder.name: model(folder, fast) for folder in checkpoints}
    final = path / "final"
    finding.facts["checkpoints"] = ", ".join(parts) or "none"
    finding.facts["final model"] = "yes" if final.is_dir() else "not yet"
    if final.is_dir():
        parts["final"] = model(final, fast)
    finding.problems = [f"{name}: {problem}" for name, part in parts.items() for problem in part.problems]
    return finding


def last_figures(path: Path) -> dict[str, float]:
    """The numbers of the last whole line of metrics.jsonl; {} if there is none."""
    lines = read_metrics(path)
    figures = lines[-1] if lines else {}
    return {key: value for key, value in figures.items() if isinstance(value, float) or is_count(value)}


def is_count(value: object) -> bool:
    """A whole number that a step or a size can be: JSON may hold one of a thousand digits, which no float holds."""
    return type(value) is int and abs(value) < 2**63


def model(path: Path, fast: bool) -> Finding:
    """A checkpoint or a final or converted model, by its configuration and digests."""
    is_checkpoint = (path / "state.json").is_file()
    problems: list[str] = []
    try:
        config = read_json(path / "config.json")
        digests = read_json(path / "state.json").get("sha256") if is_checkpoint else config.get("sha256")
    except InputError as error:
        return Finding("checkpoint" if is_checkpoint else "model", {}, [str(error)])
    latents = config.get("latents") if isinstance(config.get("latents"), dict) else {}
    encoder = latents.get("encoder") if isinstance(latents.get("encoder"), dict) else {}
    classes = latents.get("classes")
    if not isinstance(digests, dict) or not digests:
        problems.append("tells no digests of its files")
    for name, digest in (digests if isinstance(digests, dict) else {}).items():
        problems += file_problems(path / Path(name).name, None, None if fast else str(digest))
    kind = {"rae-decoder": "decoder (an autoencoder)", "rae-diffusion": "diffusion model"}.get(
        str(config.get("format")), "model"
    )
    weights = path / "model.safetensors"
    facts = {
        "step": config.get("step"),
        "latents": f"{latents.get('shape')} of {encoder.get('name')}",
        "classes": len(classes) if isinstance(classes, list) else 0,
        "weights": weights_told(weights),
    }
    return Finding(f"checkpoint of a {kind}" if is_checkpoint else kind, facts, problems)


def weights_told(path: Path) -> str:
    """Tensors and parameters of a model's file; what is wrong with one is told by its digest."""
    if not path.is_file():
        return "absent"
    return tensors_told(path) if os.access(path, os.R_OK) else "cannot be read"


def samples(path: Path, fast: bool) -> Finding:
    """A folder of samples or reconstructions by its protocol."""
    names = ("samples.json", "reconstructions.json", "unfinished.json")
    name = next(name for name in names if (path / name).is_file())
    told = read_json(path / name)
    within = path / "reconstructions" if name == "reconstructions.json" else path
    pictures = [file for file in within.rglob("*.png") if file.name not in PICTURES]
    keys = ("rae", "num", "seed", "steps", "solver", "time_grid", "guidance", "guidance_scale", "guidance_interval")
    facts = {key: told[key] for key in (*keys, "pixel_rounding", "model", "autoencoder") if key in told}
    problems = ["not finished: run the same command again"] if name == "unfinished.json" else []
    expected = told.get("num")
    if isinstance(expected, int) and name == "samples.json" and not (path / "samples.npz").is_file():
        missing = expected - len(pictures)
        problems += [f"{missing} of {expected} images are missing"] if missing > 0 else []
    return Finding(
        name.removesuffix(".json").replace("unfinished", "samples"), facts | {"images": len(pictures)}, problems
    )


def sweep(path: Path, fast: bool) -> Finding:
    """A sweep of guidance: what was tried, and the best of it."""
    told_rows = read_json(path / "sweep.json").get("rows")
    rows = [row for row in told_rows if isinstance(row, dict)] if isinstance(told_rows, list) else []
    measured = [row for row in rows if isinstance(row.get("fid"), float)]
    best = min(measured, key=lambda row: row["fid"], default={})
    told = ", ".join(f"{key} {best[key]}" for key in ("guidance_scale", "guidance_interval", "fid") if key in best)
    return Finding("sweep of guidance", {"trials": len(rows), "measured": len(measured), "best": told or "none yet"})


def inspect_file(path: Path) -> Finding:
    """A single file by its suffix."""
    if path.suffix == ".safetensors":
        return Finding("safetensors file", {"tensors": tensors_told(path), "sha256": sha256_of(path)})
    if path.suffix == ".npz":
        return Finding("npz file", arrays_told(path))
    if path.suffix in (".yaml", ".yml"):
        from raecli.recipe.load import load_recipe

        told = load_recipe(None, str(path)).to_dict()
        return Finding(f"recipe of {told['stage']}", {"paper": told.get("paper")})
    if path.suffix == ".json":
        told = read_json(path)
        plain = {key: value for key, value in told.items() if isinstance(value, str | int | float)}
        return Finding(f"JSON file ({told.get('format') or told.get('stage') or 'of no known kind'})", plain)
    raise InputError(f"{path}: a file of no kind that rae writes (.safetensors, .npz, .yaml, .json)")


def tensors_told(path: Path) -> str:
    """Tensors and parameters of a safetensors file, out of its header alone."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="numpy") as file:
            shapes = [file.get_slice(name).get_shape() for name in file.keys()]  # noqa: SIM118 - no mapping
    except (OSError, SafetensorError) as error:
        raise InputError(f"{path}: cut short, or not a safetensors file ({error})") from None
    return f"{len(shapes)} tensors, {sum(math.prod(shape) for shape in shapes):,} numbers"


def arrays_told(path: Path) -> dict[str, Any]:
    """Name to dtype and shape of an npz's arrays, none of them read."""
    import numpy as np

    told: dict[str, Any] = {}
    try:
        with zipfile.ZipFile(path) as archive:
            for name in archive.namelist():
                with archive.open(name) as member:
                    version = np.lib.format.read_magic(member)
                    read = (
                        np.lib.format.read_array_header_1_0
                        if version == (1, 0)
                        else np.lib.format.read_array_header_2_0
                    )
                    shape, _, dtype = read(member)
                told[name.removesuffix(".npy")] = f"{dtype} {list(shape)}"
    except ARRAYS as error:
        raise InputError(f"{path}: not an npz of plain arrays ({error})") from None
    return told


def file_problems(path: Path, size: int | None, digest: str | None) -> list[str]:
    """What is wrong with a file, at most one thing: missing, another size, other bytes."""
    try:
        if not path.is_file():
            return [f"{path.name}: missing"]
        found = path.stat().st_size
        if size is not None and found != size:
            return [f"{path.name}: {found} bytes, {size} expected"]
        if digest is not None and sha256_of(path) != digest:
            return [f"{path.name}: its bytes changed since it was written (sha256 differs)"]
    except OSError as error:
        return [f"{path.name}: cannot be read: {error.strerror}"]
    return []


def error_of(path: str, finding: Finding) -> RaeError:
    """The error that a broken thing ends with: a model's has another exit code than data's."""
    lines = "".join(f"\n  {problem}" for problem in finding.problems)
    is_model = any(word in finding.kind for word in ("model", "decoder", "run"))
    return (CheckpointError if is_model else InputError)(f"{path}: {counted(len(finding.problems), 'problem')}{lines}")
