"""One worker process: read the resolved recipe, join the ranks, run the stage, end with the right exit code."""

import contextlib
import ctypes
import os
import re
import signal
import sys
import traceback
from collections.abc import Callable
from pathlib import Path

from raecli.console import finish_output
from raecli.errors import ExitCode, RaeError
from raecli.recipe.spec import Spec

PR_SET_PDEATHSIG = 1
# What gloo and nccl say when a peer is gone or silent.
LOST = re.compile(r"gloo|NCCL|Connection (closed|reset|refused)|[Tt]imed out|Broken pipe|DistBackendError")
LAUNCHER, EXIT_CODES = "RAE_LAUNCHER", "RAE_EXIT_CODES"  # variables: its process; the folder for our exit codes


def die_with_parent() -> None:
    """Ask Linux for KILL when the launcher dies, so that no rank outlives it."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.environ.get(LAUNCHER) not in (None, str(os.getppid())):  # it died before the request
            os._exit(int(ExitCode.WORKER))


def run_stage(recipe: Spec, timeout_seconds: float) -> None:
    """Run the recipe's stage on this rank."""
    import importlib

    from raecli.training.distributed import join_ranks, leave_ranks

    name = {"eval": "evaluate"}.get(recipe.stage, recipe.stage.replace("-", "_"))  # type: ignore[attr-defined]
    stage = importlib.import_module(f"raecli.stages.{name}")
    ranks = join_ranks(timeout_seconds)
    stage.run(recipe, ranks)
    finish_output()
    leave_ranks()


def work(recipe_file: str, timeout_seconds: float) -> int:
    """Run a stage from a recipe file; returns the exit code, the reason is on stderr."""
    from raecli.recipe.load import load_recipe

    code = ended(lambda: run_stage(load_recipe(None, recipe_file), timeout_seconds))
    if folder := os.environ.get(EXIT_CODES):
        with contextlib.suppress(OSError):  # it may have vanished from /tmp: this process still ends with its code
            Path(folder, os.environ.get("RANK", "0")).write_text(str(code))
    return code


def ended(stage: Callable[[], None]) -> int:
    """Run something; its exit code, after saying on stderr what went wrong."""
    from raecli.store.atomic import told_error
    from raecli.training.distributed import ToldElsewhere

    try:
        stage()
    except ToldElsewhere as error:
        return int(error.exit_code)
    except RaeError as error:
        return tell(f"error: {error}", error.exit_code)
    except OSError as error:
        told = told_error(error)
        return tell(f"error: {told}", told.exit_code)
    except KeyboardInterrupt:
        return tell("error: interrupted; run the same command to go on", ExitCode.INTERRUPTED)
    except Exception as error:
        if os.environ.get("WORLD_SIZE", "1") != "1" and LOST.search(str(error)):
            if LAUNCHER in os.environ:
                return int(ExitCode.WORKER)  # the launcher names the rank that was lost
            return tell(f"error: another rank is lost or stalled ({first_line(error)}); resume", ExitCode.WORKER)
        return tell(traceback.format_exc(), ExitCode.BUG)
    return int(ExitCode.DONE)


def first_line(error: Exception) -> str:
    """Its message, without the trace of C++ that follows it."""
    return str(error).strip().partition("\n")[0]


def tell(text: str, code: ExitCode) -> int:
    """Say something on stderr, with the rank where there are several."""
    rank = os.environ.get("RANK", "0")
    print(text if rank == "0" else f"[rank {rank}] {text}", file=sys.stderr, flush=True)
    return int(code)
