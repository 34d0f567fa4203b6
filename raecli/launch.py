"""Start a stage on its processes with torchrun's own engine, in this process; or join a torchrun already there."""

import json
import math
import os
import re
import shlex
import signal
import sys
import types
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from raecli.console import end_if_caught
from raecli.errors import ExitCode, InputError, Interrupted, Preempted, RaeError, UsageError, WorkerError
from raecli.launch_folder import launch_folder
from raecli.recipe.spec import Spec
from raecli.store.room import check_output
from raecli.training.result import PRINT_JSON

SHUTDOWN_SECONDS = 120  # for workers to save after TERM, before they are killed


@dataclass(frozen=True)
class LaunchOptions:
    """How many processes, and where. `rdzv` is HOST:PORT of node 0, needed from two nodes up."""

    devices: int | None = None  # a node; None: every GPU, or one process on a CPU
    nnodes: int = 1
    node_rank: int = 0
    rdzv: str | None = None
    timeout_seconds: float = 600.0  # of every collective


def start(stage: str, recipe: Spec, launch: LaunchOptions, *, dry_run: bool = False, as_json: bool = False) -> None:
    """Run a stage by its resolved recipe; returns when all ranks are done. as_json: its result, or plan, on stdout.

    Raises the RaeError whose exit code the first failed worker ended with. The worker has said why on stderr.
    """
    check_options(launch)
    joined = joined_environment(os.environ)
    first = launch.node_rank == 0 and (joined is None or joined["RANK"] == "0")  # others may write nothing
    if first and (output := getattr(recipe, "output", None)):
        check_output(output)
    os.environ[PRINT_JSON] = "1" if as_json else ""
    if dry_run:
        print_plan(stage, recipe, launch, as_json)
        return
    if joined is not None:
        from raecli.stages.worker import ended, run_stage

        os.environ.update(joined)
        if code := ended(lambda: run_stage(recipe, launch.timeout_seconds)):
            sys.stdout.flush()
            os._exit(code)  # threads of a broken collective must not hold the process
        return
    with launch_folder() as folder:
        from raecli.recipe.load import dump_recipe

        file = folder / "recipe.yaml"
        file.write_text(dump_recipe(recipe), encoding="utf-8")
        command = [sys.executable, "-m", "raecli.stages", str(file), str(launch.timeout_seconds)]
        run_elastic(command, launch, folder, cache=recipe.to_dict().get("cache"))


def check_options(launch: LaunchOptions) -> None:
    """Refuse what no launcher can do."""
    if launch.devices is not None and launch.devices < 1:
        raise UsageError(f"--devices is {launch.devices}; it is at least 1")
    if not 0 <= launch.node_rank < launch.nnodes:
        raise UsageError(f"--node-rank is {launch.node_rank}, --nnodes is {launch.nnodes}; ranks are 0 to nnodes - 1")
    if launch.nnodes > 1 and not launch.rdzv:
        raise UsageError("--nnodes above 1 needs --rdzv HOST:PORT, the address of node 0")
    if not (math.isfinite(launch.timeout_seconds) and 0 < launch.timeout_seconds <= 1e7):
        raise UsageError(f"--timeout is {launch.timeout_seconds}; it is a number of seconds, at most 1e7")
    if launch.rdzv and not re.fullmatch(r"[^:]+:[0-9]{1,5}", launch.rdzv):
        raise UsageError(f"--rdzv is {launch.rdzv!r}; it reads HOST:PORT")


def joined_environment(environment: Mapping[str, str]) -> dict[str, str] | None:
    """torchrun's variables if this process was started by torchrun or srun already; None if it was not."""
    told = [name for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT") if environment.get(name)]
    if len(told) == 4:
        check_port(environment["MASTER_PORT"])
        joined = {"RANK": environment["RANK"], "WORLD_SIZE": environment["WORLD_SIZE"]}
        joined["LOCAL_RANK"] = environment.get("LOCAL_RANK", "0")
        return checked_ranks(joined)
    if "RANK" in told or "WORLD_SIZE" in told:
        raise UsageError(
            f"the environment has {', '.join(told)} but not all of RANK, WORLD_SIZE, MASTER_ADDR, MASTER_PORT; "
            "unset them, or start with torchrun"
        )
    if environment.get("SLURM_STEP_NUM_TASKS", "1") == "1" or "SLURM_PROCID" not in environment:
        return None
    return slurm_environment(environment)


def slurm_environment(environment: Mapping[str, str]) -> dict[str, str]:
    """torchrun's variables out of srun's: one task is one rank."""
    address = environment.get("MASTER_ADDR") or first_host(environment.get("SLURM_STEP_NODELIST", ""))
    if not address:
        raise UsageError("started by srun, but MASTER_ADDR is not set: set it to the first node's name")
    if environment.get("MASTER_PORT"):
        check_port(environment["MASTER_PORT"])
    ranks = checked_ranks(
        {
            "RANK": environment["SLURM_PROCID"],
            "WORLD_SIZE": environment["SLURM_STEP_NUM_TASKS"],
            "LOCAL_RANK": environment.get("SLURM_LOCALID", "0"),
        }
    )
    return ranks | {"MASTER_ADDR": address, "MASTER_PORT": environment.get("MASTER_PORT") or slurm_port(environment)}


def slurm_port(environment: Mapping[str, str]) -> str:
    """A port that all tasks of a job step agree on, and two jobs on one node hardly share."""
    job, step = environment.get("SLURM_JOB_ID", "0"), environment.get("SLURM_STEP_ID", "0")
    if not all(number.isdecimal() and number.isascii() for number in (job, step)):
        raise UsageError(
            f"the environment has SLURM_JOB_ID={job!r}, SLURM_STEP_ID={step!r}: no numbers; set MASTER_PORT"
        )
    return str(20000 + (7 * int(job) + int(step)) % 20000)


def first_host(nodes: str) -> str:
    """The first name of Slurm's list: gpu[03-05,9],login1 -> gpu03."""
    head = re.match(r"([^,\[]+)(?:\[([0-9]+))?", nodes)
    return head[1] + (head[2] or "") if head else ""


def check_port(port: str) -> None:
    """Refuse what is no port."""
    if not (port.isdecimal() and port.isascii() and 0 < int(port) < 65536):
        raise UsageError(f"the environment has MASTER_PORT={port!r}, which is no port: 1 to 65535")


def checked_ranks(joined: dict[str, str]) -> dict[str, str]:
    """Refuse junk in the variables that say who we are."""
    for name, value in joined.items():
        if not (value.isdecimal() and value.isascii() and len(value) <= 7):
            raise UsageError(
                f"the environment has {name}={value[:40]!r}, which is no number; unset it, or start with torchrun"
            )
    if int(joined["RANK"]) >= int(joined["WORLD_SIZE"]):
        raise UsageError(f"the environment has RANK={joined['RANK']} in a world of {joined['WORLD_SIZE']}")
    return joined


def run_elastic(command: list[str], launch: LaunchOptions, folder: Path, *, cache: str | None) -> None:
    """Start the workers under torch.distributed's elastic agent and map how they end to our errors.

    folder: where they tell it. cache: the latents that they map, if they do.
    """
    import logging

    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import elastic_launch

    for name in list(logging.root.manager.loggerDict):  # each has a level of its own
        if name.startswith(("torch.distributed.elastic", "torch.distributed.launcher")):
            logging.getLogger(name).setLevel(logging.CRITICAL)  # the worker says what failed
    config = elastic_config(launch)
    end_if_caught()
    ends = folder / "ends"
    ends.mkdir()
    user = json.dumps(["rae", *sys.argv[1:]])
    os.environ |= {"RAE_LAUNCHER": str(os.getpid()), "RAE_EXIT_CODES": str(ends), "RAE_COMMAND": user}
    try:
        stop_at_once_on_a_second_interrupt()
        elastic_launch(config, command[0])(*command[1:])
    except ChildFailedError as error:
        codes = {rank: failure.exitcode for rank, failure in error.failures.items()}
        raise error_of_workers(codes | exit_codes(ends), cache) from None
    except SignalException as error:
        raise error_of_signal(error.sigval, exit_codes(ends)) from None
    except (RuntimeError, OSError, TimeoutError) as error:
        raise WorkerError(f"the processes could not meet: {error}; look at --rdzv, or at the network") from None


def stop_at_once_on_a_second_interrupt() -> None:
    """The first INT is passed on to the workers, who save; the second one kills them, whatever they wait for."""
    from torch.distributed.elastic.multiprocessing.api import SignalException

    def interrupt(number: int, frame: types.FrameType | None) -> None:
        signal.signal(signal.SIGINT, kill)
        raise SignalException("interrupted", sigval=signal.SIGINT)

    def kill(number: int, frame: types.FrameType | None) -> None:
        for worker in children():
            os.kill(worker, signal.SIGKILL)

    signal.signal(signal.SIGINT, interrupt)


def children() -> list[int]:
    """Processes that this one's main thread started, where Linux tells."""
    listed = Path(f"/proc/self/task/{os.getpid()}/children")
    return [int(child) for child in listed.read_text().split()] if listed.exists() else []


def exit_codes(folder: Path) -> dict[int, int]:
    """What the workers of this machine said they end with, by rank; a killed one said nothing.

    Nor did any whose folder has vanished from /tmp: then what their processes ended with is all that is known.
    """
    try:
        return {int(path.name): int(path.read_text() or "1") for path in folder.iterdir()}
    except OSError:
        return {}


def elastic_config(launch: LaunchOptions) -> Any:
    """The agent's configuration: a free port on one node, node 0's address on many."""
    from dataclasses import fields

    import torch
    from torch.distributed.elastic.multiprocessing.api import DefaultLogsSpecs
    from torch.distributed.launcher.api import LaunchConfig

    gpus = torch.cuda.device_count()
    if gpus and launch.devices and launch.devices > gpus:
        raise UsageError(f"--devices is {launch.devices}, this machine has {gpus} GPUs")
    devices = launch.devices or max(gpus, 1)
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, len(os.sched_getaffinity(0)) // devices)))
    options: dict[str, Any] = {
        "min_nodes": launch.nnodes,
        "max_nodes": launch.nnodes,
        "nproc_per_node": devices,
        "run_id": "rae",
        "max_restarts": 0,
        "monitor_interval": 0.1,
        "logs_specs": DefaultLogsSpecs(log_dir=os.devnull),
        "signals_to_handle": "SIGTERM,SIGHUP,SIGUSR1",  # INT is ours: a second one does not wait
        "shutdown_timeout": SHUTDOWN_SECONDS,
    }
    if launch.nnodes == 1:
        if Path("/sys/class/net/lo").exists():
            os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")  # hosts without a resolvable name
        options |= {"rdzv_backend": "c10d", "rdzv_endpoint": "localhost:0", "local_addr": "localhost"}
    else:
        options |= {"rdzv_backend": "static", "rdzv_endpoint": launch.rdzv, "rdzv_configs": {"rank": launch.node_rank}}
    known = {field.name for field in fields(LaunchConfig)}  # older torch lacks the last two options
    return LaunchConfig(**{name: value for name, value in options.items() if name in known})


def error_of_workers(ends: Mapping[int, int], cache: str | None = None) -> RaeError:
    """The error to end with. What a rank said itself outweighs a kill, and both outweigh what that did to others.

    cache: the latents that ranks have mapped, to be named where one died of reading what is no longer there.
    """
    verdicts = set(ExitCode) - {ExitCode.DONE, ExitCode.BUG, ExitCode.WORKER}
    told = {code: rank for rank, code in ends.items() if code in verdicts}
    killed = {rank: code for rank, code in ends.items() if code < 0}
    bugs = [rank for rank, code in ends.items() if code == ExitCode.BUG]
    if told:
        code, rank = min(told.items())
        error = RaeError(f"rank {rank} ended with exit code {code} ({ExitCode(code).name.lower()}); it said why above")
        error.exit_code = ExitCode(code)
        return error
    if -signal.SIGBUS in killed.values():
        rank = next(rank for rank, code in killed.items() if code == -signal.SIGBUS)
        return cut_file(rank, cache)
    if killed:
        rank, code = next(iter(killed.items()))
        name = signal.Signals(-code).name
        if ExitCode.WORKER in ends.values():  # the others waited for it: it may have stalled, and been ended for that
            return WorkerError(f"rank {rank} was lost or stalled, and ended by {name}; run the same command to resume")
        return WorkerError(f"rank {rank} was killed by {name}; run the same command to resume")
    if bugs:
        error = RaeError(f"rank {bugs[0]} failed; its traceback is above: please report it as a bug")
        error.exit_code = ExitCode.BUG
        return error
    ranks = ", ".join(str(rank) for rank in ends)
    return WorkerError(
        f"rank {ranks} waited in vain for another rank, which is lost or stalled; run the same command to resume, or "
        "give --timeout more seconds"
    )


def cut_file(rank: int, cache: str | None) -> RaeError:
    """What SIGBUS means: a page of a mapped file could not be had. A cache whose files have changed is to blame."""
    from raecli.store.latent_cache import check_cache
    from raecli.store.remote import is_url

    told = f"rank {rank} died of SIGBUS: a page of a mapped file could not be had"
    try:
        if cache and not is_url(cache):
            check_cache(cache)
    except InputError as error:
        return InputError(
            f"{told}; {error}\n  rae verify {cache} reads every byte; then run the same command to resume"
        )
    except OSError as error:
        told = f"{told} ({error})"
    shard = f"a shard of {cache} (their sizes are right), " if cache else ""
    return WorkerError(
        f"{told}: {shard}a checkpoint, or shared memory; see whether /dev/shm is full (df /dev/shm) or a disk fails "
        "(dmesg), then run the same command to resume"
    )


def error_of_signal(number: signal.Signals, ends: Mapping[int, int]) -> RaeError:
    """The error to end with after TERM, INT, HUP or USR1 to this process; `ends` are its workers' own exit codes."""
    saved = {ExitCode.DONE, ExitCode.PREEMPTED, ExitCode.INTERRUPTED}
    if not set(ends.values()) <= saved:
        return error_of_workers(ends)
    if number == signal.SIGINT:
        return Interrupted("interrupted; run the same command to resume")
    return Preempted(f"stopped by {number.name}; run the same command to resume")


def print_plan(stage: str, recipe: Spec, launch: LaunchOptions, as_json: bool) -> None:
    """What would run: the resolved recipe on stdout; sizes, steps and the command on stderr, or beside it."""
    from raecli.recipe.load import dump_recipe

    lines = plan_of(stage, recipe, launch)
    if as_json:
        print(json.dumps({"recipe": recipe.to_dict(), "plan": lines}, indent=2))
        return
    print(dump_recipe(recipe), end="")
    tell_plan(lines)


def plan_of(stage: str, recipe: Spec, launch: LaunchOptions) -> list[str]:
    """Processes, sizes, steps and the command."""
    from raecli.plan import plan_lines

    devices = launch.devices or "every GPU, or one process on a CPU"
    return [f"stage {stage}; nodes {launch.nnodes}; processes a node: {devices}", *plan_lines(recipe), how_to_run()]


def how_to_run() -> str:
    """The last line of a plan: the command that was typed, to do what it says."""
    return f"to run it: rae {shlex.join(argument for argument in sys.argv[1:] if argument != '--dry-run')}"


def tell_plan(lines: Iterable[str]) -> None:
    """Lines of a plan, on stderr."""
    for line in lines:
        print(f"plan: {line}", file=sys.stderr)
