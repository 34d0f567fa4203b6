"""Writing safetensors files, a full disk told as what it is."""

from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from raecli.errors import StorageError


def save_tensors(tensors: dict[str, Tensor], path: Path) -> None:
    """Write tensors to a file. Raises StorageError with the path and the bytes needed if the disk refuses."""
    try:
        save_file(tensors, path)
    except SafetensorError as error:
        needed = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
        raise StorageError(f"{path}: {needed} bytes could not be written ({error}); free space and run again") from None
