"""What a user can cause, and the exit code each cause ends with."""

import enum


class ExitCode(enum.IntEnum):
    """Exit codes of every verb."""

    DONE = 0
    BUG = 1
    USAGE = 2
    BAD_INPUT = 3
    CHECKPOINT = 4
    NON_FINITE = 5
    STORAGE = 6
    WORKER = 7
    PREEMPTED = 75
    INTERRUPTED = 130


class RaeError(Exception):
    """A failure a user can cause and mend. The message says what, where, what was found and what to do."""

    exit_code = ExitCode.USAGE


class UsageError(RaeError):
    """A wrong option, argument or recipe; or a file the user has to bring."""


class InputError(RaeError):
    """Bad input data, a manifest or a fingerprint that does not match."""

    exit_code = ExitCode.BAD_INPUT


class CheckpointError(RaeError):
    """A checkpoint or model artifact that cannot be used."""

    exit_code = ExitCode.CHECKPOINT


class NonFiniteError(RaeError):
    """NaN or infinity in a loss, a gradient or a latent."""

    exit_code = ExitCode.NON_FINITE


class StorageError(RaeError):
    """A disk that is full or a folder that cannot be written."""

    exit_code = ExitCode.STORAGE


class WorkerError(RaeError):
    """A worker process that was lost, or that stalled past its timeout."""

    exit_code = ExitCode.WORKER


class Preempted(RaeError):
    """Asked to stop by TERM or USR1; the state is saved."""

    exit_code = ExitCode.PREEMPTED


class Interrupted(RaeError):
    """Asked to stop by INT; the state is saved."""

    exit_code = ExitCode.INTERRUPTED


def counted(count: int, noun: str) -> str:
    """How many there are, as a message says it: 1 image, 2 images."""
    return f"{count} {noun}{'' if count == 1 else 's'}"
