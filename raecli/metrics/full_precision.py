"""float32 that is float32: what a feature network has to compute in, whatever is set around it."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def full_float32(device: torch.device) -> Iterator[None]:
    """No TF32 in convolutions, no autocast: bf16 moves pooled features by 13 %, float32's rounding by 4e-5."""
    cudnn = torch.backends.cudnn
    flags = cudnn.flags(
        enabled=cudnn.enabled, benchmark=cudnn.benchmark, deterministic=cudnn.deterministic, allow_tf32=False
    )
    with flags, torch.autocast(device.type, enabled=False):
        yield
