"""Writing safetensors files, a full disk told as what it is."""

import hashlib
import json
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from raecli.errors import StorageError
from raecli.store.checksum import Checksum

DTYPES = {  # safetensors' names, in its order: in a file the last come first
    torch.bool: "BOOL", torch.uint8: "U8", torch.int8: "I8", torch.int16: "I16", torch.float16: "F16",
    torch.bfloat16: "BF16", torch.int32: "I32", torch.float32: "F32", torch.float64: "F64", torch.int64: "I64",
}  # fmt: skip
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


def save_tensors(tensors: dict[str, Tensor], path: Path) -> None:
    """Write tensors to a file. Raises StorageError with the path and the bytes needed if the disk refuses."""
    try:
        save_file(tensors, path)
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


def bytes_of(tensor: Tensor) -> memoryview:
    """A dense host tensor's memory."""
    return memoryview(tensor.detach().reshape(-1).view(torch.uint8).numpy())


def refused(tensors: dict[str, Tensor], path: Path, error: Exception) -> StorageError:
    """What to say when a disk does not take a file."""
    needed = sum(tensor.nbytes for tensor in tensors.values())
    return StorageError(f"{path}: {needed} bytes could not be written ({error}); free space and run again")
