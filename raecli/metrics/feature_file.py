"""Feature files: what a network made of a set of images, stored once so that extraction is paid once."""

import json
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from raecli.errors import InputError
from raecli.metrics.array_stream import ArrayStream, members_of
from raecli.store.atomic import SCRATCH, atomic_file
from raecli.store.foreign import ARRAYS
from raecli.store.json_file import parse_json

LAYERS = ("pool", "spatial", "logits", "dinov2")  # arrays that a feature file may hold
EXPECTED = "expected an .npz with pool [N, 2048], and spatial [N, 2023] and logits [N, 1008] where they are wanted"


def holds_features(source: Path) -> bool:
    """Whether a file is a feature file: an .npz with an array of a layer's name."""
    return "pool" in members_of(source)


class FeatureFile:
    """Layers of N images: float arrays [N, D] by name, read by ranges. provenance: {} where the file does not tell."""

    def __init__(self, path: Path) -> None:
        """Reads headers and provenance only."""
        self.path = path
        names = members_of(path)
        self.streams = {name: ArrayStream(path, name, EXPECTED) for name in LAYERS if name in names}
        for name, stream in self.streams.items():
            if len(stream.shape) != 2 or stream.dtype.kind != "f" or 0 in stream.shape:
                raise InputError(f"{path}: {name} is {stream.dtype} of shape {list(stream.shape)}; {EXPECTED}")
        counts = {name: stream.shape[0] for name, stream in self.streams.items()}
        if len(set(counts.values())) != 1:
            raise InputError(f"{path}: its arrays are of unequal numbers of images, {counts}; extract them again")
        self.count = counts["pool"]
        self.provenance = read_provenance(path) if "provenance" in names else {}

    def __len__(self) -> int:
        """Number of images."""
        return self.count

    @property
    def widths(self) -> dict[str, int]:
        """Features of each layer."""
        return {name: stream.shape[1] for name, stream in self.streams.items()}

    def rows(self, layer: str, device: torch.device) -> "Tensor | FileRows":
        """All rows of a layer, [N, D]: on a device, or, where any place of the file is near, left in it."""
        if device.type == "cpu" and self.streams[layer].is_stored:
            return FileRows(self, layer)
        return self.read(layer, 0, len(self)).to(device)

    def names(self, start: int, stop: int) -> list[str]:
        """What to call rows start to stop in a message."""
        return [f"{self.path}, row {index}" for index in range(start, stop)]

    def read(self, layer: str, start: int, stop: int) -> Tensor:
        """Rows start to stop of a layer: [B, D], float32."""
        return torch.from_numpy(self.streams[layer].read(start, stop).astype(np.float32))


class FileRows:
    """A layer's rows [N, D], float32, left in their file and read where they are asked for: by a slice, or by indices.

    So that 50,000 x 2048 features take no memory. Stands for a tensor on the CPU in `metrics/manifold.py` and `kid.py`.
    """

    device = torch.device("cpu")

    def __init__(self, file: FeatureFile, layer: str) -> None:
        self.file, self.layer = file, layer
        self.shape = torch.Size((len(file), file.widths[layer]))

    def __len__(self) -> int:
        """Number of rows."""
        return len(self.file)

    def __getitem__(self, rows: slice | Tensor) -> Tensor:
        """Rows of a slice of step 1, or at indices [M]."""
        if isinstance(rows, slice):
            start, stop, _ = rows.indices(len(self))
            return self.file.read(self.layer, start, stop)
        return torch.cat([self.file.read(self.layer, index, index + 1) for index in rows.tolist()])


def read_provenance(path: Path) -> dict[str, Any]:
    """The JSON text that our own npz files carry."""
    try:
        with np.load(path, allow_pickle=False) as file:
            text = str(file["provenance"])
    except ARRAYS as error:
        raise InputError(f"{path}: its provenance cannot be read ({error}); extract it again") from error
    return parse_json(text, f"{path}: its provenance")


Rows = Tensor | FileRows


class FeatureWriter:
    """Rows of several ranks into one feature file: each layer a scratch array that ranks fill, then an .npz."""

    def __init__(self, path: Path, widths: dict[str, int], count: int) -> None:
        """widths: features of each layer. count: images. The scratch lies beside `path`, which all ranks see."""
        self.path, self.widths, self.count = path, widths, count

    def scratch(self, layer: str) -> Path:
        """Where a layer grows: one name for all ranks."""
        return self.path.with_name(f"{SCRATCH}{self.path.name}-{layer}.npy")

    def begin(self) -> None:
        """Make the scratch arrays; on one rank."""
        for layer, width in self.widths.items():
            np.lib.format.open_memmap(self.scratch(layer), "w+", np.float32, (self.count, width)).flush()

    def write(self, layer: str, start: int, rows: Tensor) -> None:
        """Rows [B, D] from `start` on."""
        array = np.lib.format.open_memmap(self.scratch(layer), "r+")
        array[start : start + len(rows)] = rows.float().cpu().numpy()
        array.flush()

    def finish(self, provenance: dict[str, Any]) -> None:
        """Gather the arrays in the file, complete or absent; on one rank."""
        with atomic_file(self.path) as scratch, zipfile.ZipFile(scratch, "w", zipfile.ZIP_STORED) as archive:
            for layer in self.widths:
                archive.write(self.scratch(layer), f"{layer}.npy")
            with archive.open("provenance.npy", "w") as file:
                np.lib.format.write_array(file, np.array(json.dumps(provenance)), allow_pickle=False)

    def remove_scratch(self) -> None:
        """Leave nothing behind."""
        for layer in self.widths:
            self.scratch(layer).unlink(missing_ok=True)
