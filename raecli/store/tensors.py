"""safetensors files: written with a full disk told as what it is, and read to where their tensors belong."""

import hashlib
import json
import math
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from raecli.errors import StorageError
from raecli.store.checksum import Checksum
from raecli.store.memory import fresh_memory, is_plain

DTYPES = {  # safetensors' names, in its order: in a file the last come first
    torch.bool: "BOOL", torch.uint8: "U8", torch.int8: "I8", torch.int16: "I16", torch.float16: "F16",
    torch.bfloat16: "BF16", torch.int32: "I32", torch.float32: "F32", torch.float64: "F64", torch.int64: "I64",
}  # fmt: skip
NAMES = {name: dtype for dtype, name in DTYPES.items()}
LARGEST_HEADER = 100_000_000  # bytes: safetensors' own limit
ALIGNMENT = 64  # bytes: where a tensor begins that is read to fresh memory
PIECE = 1 << 24  # bytes written and hashed at a time, while they are in the cache


def whole(tensor: Tensor) -> Tensor:
    """A tensor all of which is here. FSDP's shards are gathered: a call that all ranks make together."""
    return tensor.full_tensor() if is_sharded(tensor) else tensor


def is_sharded(tensor: Tensor) -> bool:
    """Whether this rank holds a part alone (a DTensor, whose import takes a while)."""
    return hasattr(tensor, "full_tensor")


def as_sharded(value: Tensor, like: Tensor) -> Tensor:
    """This rank's part of a whole tensor, on the device of `like` and split as it is; all of it if that is whole."""
    if not is_sharded(like) or value.shape != like.shape:
        return value.to(like.device)
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(value.to(like.device), like.device_mesh, like.placements, src_data_rank=None)


def save_tensors(tensors: dict[str, Tensor], path: Path, metadata: dict[str, str] | None = None) -> None:
    """Write tensors to a file. Raises StorageError with the path and the bytes needed if the disk refuses."""
    try:
        save_file(tensors, path, metadata)
    except SafetensorError as error:
        raise refused(tensors, path, error) from None


def write_tensors(tensors: dict[str, Tensor], path: Path) -> tuple[str, str]:
    """Write tensors of the host to a safetensors file as they lie in memory; returns its sha256 and its checksum.

    For a background thread: the lock of Python is not held while bytes are written and hashed, nothing is copied.
    Raises StorageError with the path and the bytes needed if the disk refuses.
    """
    ranks = {dtype: rank for rank, dtype in enumerate(DTYPES)}
    ordered = sorted(tensors.items(), key=lambda item: (-ranks[item[1].dtype], item[0]))
    digest, checksum = hashlib.sha256(), Checksum()
    try:
        with path.open("wb", buffering=0) as file:
            for part in (header_of(ordered), *(bytes_of(tensor) for _, tensor in ordered)):
                for start in range(0, len(part), PIECE):
                    piece = part[start : start + PIECE]
                    file.write(piece)
                    digest.update(piece)
                    checksum.update(piece)
    except OSError as error:
        raise refused(tensors, path, error) from None
    return digest.hexdigest(), checksum.hexdigest()


def header_of(ordered: list[tuple[str, Tensor]]) -> memoryview:
    """safetensors' header: its length, then JSON padded to eight bytes."""
    entries, start = {}, 0
    for name, tensor in ordered:
        end = start + tensor.nbytes
        entries[name] = {"dtype": DTYPES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [start, end]}
        start = end
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return memoryview(len(text).to_bytes(8, "little") + text)


def read_header(path: Path) -> dict[str, tuple[torch.dtype, tuple[int, ...], int, int]]:
    """Of each tensor of a file, in the file's order: dtype, shape, and where its bytes begin and end.

    Raises ValueError where they do not fill the file one after the other, or a part has not the size of its tensor.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if length > min(LARGEST_HEADER, size - 8):
            raise ValueError(f"{path}: cut short, or no safetensors file")
        entries = json.loads(file.read(length))
    entries.pop("__metadata__", None)
    told = [
        (*(8 + length + offset for offset in entry["data_offsets"]), name, NAMES[entry["dtype"]], tuple(entry["shape"]))
        for name, entry in entries.items()
    ]
    told.sort()
    before = 8 + length
    for begin, end, name, dtype, shape in told:
        if any(type(extent) is not int or extent < 0 for extent in (begin, end, *shape)):
            raise ValueError(f"{path}: {name} has a shape or a place of no whole numbers")
        if math.prod(max(extent, 1) for extent in shape) >= 1 << 60:  # torch counts so even where one of them is 0
            raise ValueError(f"{path}: {name} has a shape that no tensor can have")
        if begin != before or end - begin != math.prod(shape) * dtype.itemsize:
            raise ValueError(f"{path}: {name} does not lie where it should")
        before = end
    if before != size:
        raise ValueError(f"{path}: {size} bytes, of which header and tensors take {before}")
    return {name: (dtype, shape, begin, end) for begin, end, name, dtype, shape in told}


def places_for(path: Path, into: Mapping[str, Tensor], *, mapped: bool = False) -> tuple[dict[str, Tensor], np.ndarray]:
    """Tensors that a file's are to be read to, and the places for `checksum.checksums`, which fills them.

    into: what is filled itself, where it is dense, on the host, and of the file's dtype and shape. For the others
    there is fresh memory; or, mapped, none: they stay in the file, whose memory all ranks of a machine share, and are
    good as long as it is. Raises ValueError if the header makes no sense.
    """
    header = read_header(path)
    tensors = {name: into[name] for name, (dtype, shape, *_) in header.items() if fits(into.get(name), dtype, shape)}
    places = [(begin, end, tensors[name].data_ptr()) for name, (_, _, begin, end) in header.items() if name in tensors]
    others = {name: entry for name, entry in header.items() if name not in tensors}
    if mapped and others:
        whole_file = load_file(path)
        return tensors | {name: whole_file[name] for name in others}, sorted_places(places)
    rooms = [-(-(end - begin) // ALIGNMENT) * ALIGNMENT for _, _, begin, end in others.values()]
    parts = torch.from_numpy(fresh_memory(sum(rooms))).split(rooms) if rooms else ()
    for (name, (dtype, shape, begin, end)), part in zip(others.items(), parts, strict=True):
        tensors[name] = part[: end - begin].view(dtype).view(shape)
        places.append((begin, end, tensors[name].data_ptr()))
    return tensors, sorted_places(places)


def sorted_places(places: list[tuple[int, int, int]]) -> np.ndarray:
    """As `checksums` wants them: by where they begin, none that is empty."""
    return np.array(sorted(place for place in places if place[0] < place[1]), np.int64).reshape(-1, 3)


def fits(tensor: Tensor | None, dtype: torch.dtype, shape: tuple[int, ...]) -> bool:
    """Whether a file's tensor can be read to this one's memory."""
    return tensor is not None and is_plain(tensor) and tensor.dtype == dtype and tensor.shape == shape


def bytes_of(tensor: Tensor) -> memoryview:
    """A dense host tensor's memory."""
    return memoryview(tensor.detach().reshape(-1).view(torch.uint8).numpy())


def refused(tensors: dict[str, Tensor], path: Path, error: Exception) -> StorageError:
    """What to say when a disk does not take a file."""
    needed = sum(tensor.nbytes for tensor in tensors.values())
    return StorageError(f"{path}: {needed} bytes could not be written ({error}); free space and run again")
