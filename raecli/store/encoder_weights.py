"""An encoder's weights file: where it lies, and whether it is one. No torch."""

import ssl
import threading
import urllib.error
import urllib.request
from email.message import Message
from http.client import HTTPException
from pathlib import Path
from typing import IO

from raecli.errors import InputError, UsageError

WEIGHTS_FILE = "model.safetensors"
PROBE_SECONDS = 4.0  # huggingface_hub itself retries for over 20 s where nobody answers


class WeightsAbsent(UsageError):
    """Published weights that are not on this machine, and were not to be downloaded or could not be."""


def check_safetensors(path: Path) -> None:
    """Refuse what is missing, is another format, or is cut short."""
    from safetensors import SafetensorError, safe_open

    if not path.is_file():
        raise UsageError(f"weights {path}: no such file")
    if path.suffix != ".safetensors":
        raise UsageError(
            f"weights {path}: only .safetensors is read, because other formats can run code; save its tensors again "
            "with safetensors.torch.save_file(torch.load(FILE, weights_only=True), ...)"
        )
    try:
        with safe_open(path, framework="numpy") as tensors:
            if not list(tensors.keys()):
                raise InputError(f"weights {path}: holds no tensors")
    except OSError as error:
        raise InputError(f"weights {path}: cannot be read ({error})") from error
    except SafetensorError as error:
        hint = "; it is a Git LFS pointer: bring the file itself" if _starts_with(path, b"version https") else ""
        raise InputError(f"weights {path}: not a complete safetensors file ({error}){hint}") from error


def weights_in_folder(folder: Path) -> Path:
    """The one model.safetensors of a Hugging Face folder."""
    path = folder / WEIGHTS_FILE
    if path.is_file():
        return path
    if (folder / f"{WEIGHTS_FILE}.index.json").is_file():
        raise UsageError(f"encoder folder {folder}: its weights are in several shards; save them as one {WEIGHTS_FILE}")
    if (folder / "pytorch_model.bin").is_file():
        raise UsageError(
            f"encoder folder {folder}: has pytorch_model.bin, a pickle, which is not read; save {WEIGHTS_FILE}"
        )
    raise UsageError(f"encoder folder {folder}: no {WEIGHTS_FILE}; bring it, or give another file with --weights FILE")


def weights_from_hub(name: str, repository: str, *, offline: bool) -> Path:
    """The cached model.safetensors of a Hugging Face repository, downloaded first where the network allows.

    Without weights and without network it fails in under 10 s, naming the file to bring. offline: ask no network,
    as in a dry run.
    """
    from huggingface_hub import constants, hf_hub_download, hf_hub_url, try_to_load_from_cache

    cached = try_to_load_from_cache(repository, WEIGHTS_FILE)
    if isinstance(cached, str):
        return Path(cached)
    if constants.HF_HUB_OFFLINE:
        raise WeightsAbsent(_bring(name, repository, "and this run is offline (HF_HUB_OFFLINE)"))
    if offline:
        raise WeightsAbsent(_bring(name, repository, "and a dry run downloads nothing"))
    if problem := probe_hub(hf_hub_url(repository, WEIGHTS_FILE)):
        raise WeightsAbsent(_bring(name, repository, f"and the Hugging Face hub does not give them ({problem})"))
    try:
        return Path(hf_hub_download(repository, WEIGHTS_FILE, etag_timeout=3))
    # The hub's client raises its own errors, its HTTP library's and OSError, by version.
    except Exception as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise WeightsAbsent(_bring(name, repository, f"and the download failed: {reason}")) from error


def probe_hub(url: str) -> str | None:
    """What keeps the hub from giving a file, told within PROBE_SECONDS; None if nothing does."""
    answers: list[str | None] = []
    # In a thread, because looking up a host's name knows no timeout.
    thread = threading.Thread(target=lambda: answers.append(problem_with(url)), daemon=True)
    thread.start()
    thread.join(PROBE_SECONDS)
    return answers[0] if answers else f"no answer in {PROBE_SECONDS:.0f} s"


class _StayHere(urllib.request.HTTPRedirectHandler):
    """A redirect to the file store is answer enough."""

    def redirect_request(
        self, req: urllib.request.Request, fp: IO[bytes], code: int, msg: str, headers: Message, newurl: str
    ) -> None:
        return None


def problem_with(url: str) -> str | None:
    """Ask for a file's header, through a proxy where one is set.

    A lacking token or certificate is no problem yet: the hub's own client may know the user's.
    """
    try:
        request = urllib.request.Request(url, method="HEAD")
        urllib.request.build_opener(_StayHere).open(request, timeout=PROBE_SECONDS).close()
    except urllib.error.HTTPError as error:
        return f"HTTP status {error.code}" if error.code in (404, 407) or error.code >= 500 else None
    except (OSError, HTTPException, ValueError) as error:  # ValueError: HF_ENDPOINT is no address
        reason = getattr(error, "reason", error)
        return None if isinstance(reason, ssl.SSLCertVerificationError) else str(reason)
    return None


def _bring(name: str, repository: str, why: str) -> str:
    """What to do when weights cannot be had."""
    return (
        f"encoder {name}: its weights are not on this machine, {why}. "
        f"Bring {WEIGHTS_FILE} of the Hugging Face repository {repository} and give it with --weights FILE"
    )


def _starts_with(path: Path, start: bytes) -> bool:
    """Whether a file begins with these bytes."""
    with path.open("rb") as file:
        return file.read(len(start)) == start
