"""Commands in processes of their own without their imports' seconds: forked from a process that has torch already.

What a test of small models spends most of its time on is importing torch, twice: in the door and in the worker. A
server (this file, started once by each of pytest's workers) imports everything, then forks a child for each command.
The child runs `raecli.__main__.main()`, the whole command line; it joins as the one rank that it is (RANK 0 of
WORLD_SIZE 1), so no launcher starts. Tests of launching, signals, kills and start-up use real processes.
"""

import json
import os
import select
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NoReturn

JOINED = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "localhost", "MASTER_PORT": "29500"}
PRELOADED = (
    "torch._dynamo",  # every optimiser imports it
    "timm",
    "lpips",
    "torch_fidelity",
    "scipy.linalg",
    "raecli.cli.app",
    "raecli.models.encoder_folder",
    "raecli.stages.encode_cache",
    "raecli.stages.evaluate",
    "raecli.stages.evaluate_reconstruction",
    "raecli.stages.overfit_toy",
    "raecli.stages.reconstruct",
    "raecli.stages.sample",
    "raecli.stages.train_decoder",
    "raecli.stages.train_diffusion",
)


class Server:
    """A process that forks commands, one at a time."""

    def __init__(self, environment: Mapping[str, str]) -> None:
        command = [sys.executable, "-m", "tests.forked"]
        self.process = subprocess.Popen(
            command, env=dict(environment), stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def run(self, arguments: Sequence[str], cwd: Path, timeout: float) -> subprocess.CompletedProcess[str]:
        """`rae ARGUMENTS` in a folder; a command that takes longer than `timeout` seconds is killed."""
        assert self.process.stdin and self.process.stdout
        with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err:
            files = [f"/proc/{os.getpid()}/fd/{file.fileno()}" for file in (out, err)]
            request = {"arguments": list(arguments), "cwd": str(cwd), "files": files, "timeout": timeout}
            print(json.dumps(request), file=self.process.stdin, flush=True)
            answer = self.process.stdout.readline()
            assert answer, f"the server of forked commands died on {arguments}"
            for file in (out, err):
                file.seek(0)
            return subprocess.CompletedProcess(list(arguments), json.loads(answer), out.read(), err.read())

    def rae(self, *arguments: str | Path, cwd: Path) -> None:
        """`rae ARGUMENTS`, which has to work: for fixtures."""
        result = self.run([str(argument) for argument in arguments], cwd, timeout=240)
        assert result.returncode == 0, f"{result.args}\n{result.stdout}\n{result.stderr}"

    def close(self) -> None:
        """End the server."""
        assert self.process.stdin
        self.process.stdin.close()
        self.process.wait(timeout=30)


def serve() -> None:
    """Answer each line of stdin, a command, with a line on stdout, its exit code; the end of stdin is the end."""
    import importlib

    for name in PRELOADED:
        importlib.import_module(name)
    for line in sys.stdin:
        request = json.loads(line)
        child = os.fork()
        if child == 0:
            run_child(**{name: request[name] for name in ("arguments", "cwd", "files")})
        print(exit_code(child, request["timeout"]), flush=True)


def run_child(arguments: list[str], cwd: str, files: list[str]) -> NoReturn:
    """The command, in the forked child; ends the process."""
    from raecli.__main__ import main

    null = os.open(os.devnull, os.O_RDONLY)
    for target, source in enumerate([null, *(os.open(file, os.O_WRONLY) for file in files)]):
        os.dup2(source, target)
    os.setsid()
    os.chdir(cwd)
    os.environ.update(JOINED)
    sys.argv = ["rae", *arguments]
    code = 1
    try:
        main()
        code = 0
    except SystemExit as ended:
        code = ended.code if isinstance(ended.code, int) else 0 if ended.code is None else 1
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def exit_code(child: int, timeout: float) -> int:
    """Wait for a child, kill it and its group when it takes too long; minus the signal's number if one ended it."""
    ended = os.pidfd_open(child)
    deadline = time.monotonic() + timeout
    if not select.select([ended], [], [], max(0.0, deadline - time.monotonic()))[0]:
        os.killpg(child, signal.SIGKILL)
    os.close(ended)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


if __name__ == "__main__":
    serve()
