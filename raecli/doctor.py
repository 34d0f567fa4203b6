"""What this machine has for `rae doctor`: processors, memory, disks, limits, packages, weights. Changes nothing."""

import importlib.util
import os
import platform
import resource
import shutil
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from typing import NamedTuple

from raecli import __version__

GIB = 2**30
LEAST_DISK_GIB = 20.0  # a checkpoint of DiT-DH-XL is 13 GiB
LEAST_SHM_GIB = 1.0  # nccl's rings among the GPUs of a machine
LEAST_FILES = 1024  # open at once: one a shard
EXTRAS = {
    "matplotlib": "figures: plot, report, sweeps (raecli[plots])",
    "tensorboard": "tracking.tensorboard (raecli[tensorboard])",
    "simplejpeg": "faster JPEG decoding (raecli[jpeg])",
    "sklearn": "the demo, eval tsne (raecli[demo])",
    "diffusers": "SD-VAE baselines (raecli[diffusers])",
    "wandb": "tracking.wandb_project: your own install",
}


class Finding(NamedTuple):
    """A line of the report. remark: what to do about it, empty where all is well."""

    name: str
    value: str
    remark: str = ""


def examine() -> Iterator[Finding]:
    """Everything, from the interpreter to cached weights."""
    yield Finding("rae", f"{__version__}, Python {platform.python_version()}, {platform.platform(terse=True)}")
    yield from machine()
    yield from limits()
    yield from torch_and_devices()
    yield from packages()
    yield from weights()


def machine() -> Iterator[Finding]:
    """Cores and memory."""
    cores = len(os.sched_getaffinity(0))
    threads = os.environ.get("OMP_NUM_THREADS", "not set: rae takes the cores of a process")
    yield Finding("cores", f"{cores} usable, OMP_NUM_THREADS {threads}")
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / GIB
    yield Finding("memory", f"{memory:.1f} GiB")


def limits() -> Iterator[Finding]:
    """Disks, shared memory, open files."""
    for name, folder in (("disk here", Path.cwd()), ("disk for scratch", Path(os.environ.get("TMPDIR", "/tmp")))):
        yield disk(name, folder)
    shared = Path("/dev/shm")
    if shared.is_dir():
        free = shutil.disk_usage(shared).free / GIB
        remark = "" if free >= LEAST_SHM_GIB else "small: in a container give --shm-size=8g, or --ipc=host"
        yield Finding("shared memory", f"{free:.1f} GiB free at {shared}", remark)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    remark = "" if soft >= LEAST_FILES else f"low: ulimit -n {hard}"
    yield Finding("open files", f"{soft}, at most {hard}", remark)


def disk(name: str, folder: Path) -> Finding:
    """Room in a folder, and whether this user may write there."""
    advice = "give outputs another folder" if name == "disk here" else "set TMPDIR to another folder"
    try:
        free = shutil.disk_usage(folder).free / GIB
    except OSError as error:
        return Finding(name, f"none at {folder}", f"{error.strerror}: {advice}")
    remark = ""
    if not os.access(folder, os.W_OK | os.X_OK):
        remark = f"you may not write there: {advice}"
    elif name == "disk here" and free < LEAST_DISK_GIB:
        remark = f"under {LEAST_DISK_GIB:.0f} GiB: little for checkpoints and caches"
    return Finding(name, f"{free:.1f} GiB free at {folder}", remark)


def torch_and_devices() -> Iterator[Finding]:
    """PyTorch, its GPUs, and what ranks talk over."""
    try:
        import torch
        import torch.distributed as dist
    except (ImportError, OSError) as error:  # OSError: a shared library that is not there
        yield Finding("torch", "cannot be imported", f"{error}; install it again: pip install torch torchvision")
        return
    yield Finding("torch", f"{torch.__version__}, CUDA {torch.version.cuda or 'not built in'}")
    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            told = torch.cuda.get_device_properties(index)
            yield Finding(
                f"GPU {index}", f"{told.name}, {told.total_memory / GIB:.0f} GiB, sm_{told.major}{told.minor}"
            )
        version = ".".join(map(str, torch.cuda.nccl.version()))
        yield Finding(
            "nccl",
            version if dist.is_nccl_available() else "absent",
            "" if dist.is_nccl_available() else "no job on several GPUs",
        )
    else:
        yield Finding("GPU", "none", "training the paper's models takes one; the demo and the toy run on a CPU")
    remark = "" if dist.is_gloo_available() else "no job on several processes of a CPU"
    yield Finding("gloo", "there" if dist.is_gloo_available() else "absent", remark)


def packages() -> Iterator[Finding]:
    """What the extras bring. An absent one is no fault."""
    for name, use in EXTRAS.items():
        distribution = {"sklearn": "scikit-learn"}.get(name, name)
        there = importlib.util.find_spec(name) is not None
        yield Finding(distribution, metadata.version(distribution) if there else f"absent; wanted for {use}")


def weights() -> Iterator[Finding]:
    """Published weights that lie on this machine already. None is fetched."""
    from huggingface_hub import try_to_load_from_cache

    from raecli.metrics.inception_file import WEIGHTS_NAME, hub_folder
    from raecli.store.encoder_weights import WEIGHTS_FILE
    from raecli.store.encoders import EMBEDDED, PRESETS

    cached = {
        name: try_to_load_from_cache(f"timm/{preset.architecture}", WEIGHTS_FILE) for name, preset in PRESETS.items()
    }
    there = [name for name, path in cached.items() if isinstance(path, str)]
    absent = [name for name in PRESETS if name not in there]
    yield Finding("encoders here", ", ".join([EMBEDDED, *there]))
    if absent:
        yield Finding("encoders to fetch", f"{', '.join(absent)}: on first use, or bring a file with --weights FILE")
    for title, file in (("Inception (eval)", WEIGHTS_NAME), ("VGG16 (LPIPS)", "vgg16-397923af.pth")):
        path = hub_folder() / file
        yield Finding(title, str(path) if path.is_file() else f"absent; bring {file} to {hub_folder()}")
