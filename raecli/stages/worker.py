"""One worker process: read the resolved recipe, join the ranks, run the stage, end with the right exit code."""

import ctypes
import os
import signal
import sys
import traceback

from raecli.errors import ExitCode, RaeError
from raecli.recipe.spec import Spec

PR_SET_PDEATHSIG = 1


def die_with_parent() -> None:
    """Ask Linux for KILL when the launcher dies, so that no rank outlives it."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() == 1:  # it died before the request
            os._exit(int(ExitCode.WORKER))


def run_stage(recipe: Spec, timeout_seconds: float) -> None:
    """Run the recipe's stage on this rank."""
    import importlib

    from raecli.training.distributed import join_ranks, leave_ranks

    name = {"eval": "evaluate"}.get(recipe.stage, recipe.stage.replace("-", "_"))  # type: ignore[attr-defined]
    stage = importlib.import_module(f"raecli.stages.{name}")
    ranks = join_ranks(timeout_seconds)
    stage.run(recipe, ranks)
    leave_ranks()


def work(recipe_file: str, timeout_seconds: float) -> int:
    """Run a stage from a recipe file; returns the exit code, the reason is on stderr."""
    from raecli.recipe.load import load_recipe
    from raecli.store.atomic import storage_error

    rank = os.environ.get("RANK", "0")
    who = "" if rank == "0" else f"[rank {rank}] "
    try:
        run_stage(load_recipe(None, recipe_file), timeout_seconds)
    except RaeError as error:
        print(f"{who}error: {error}", file=sys.stderr, flush=True)
        return int(error.exit_code)
    except OSError as error:
        print(f"{who}error: {storage_error(error)}", file=sys.stderr, flush=True)
        return int(ExitCode.STORAGE)
    except Exception:
        print(f"{who}{traceback.format_exc()}", file=sys.stderr, flush=True)
        return int(ExitCode.BUG)
    return int(ExitCode.DONE)
