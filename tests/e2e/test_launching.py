"""A stage on several launchers, under a torchrun, and with junk around it."""

import json
import socket
import subprocess
import sys

import pytest
from safetensors.torch import load_file

from tests.conftest import TINY_DIFFUSION, environment
from tests.e2e.faults import start


def diffusion(cache, output):
    return (
        "train-diffusion",
        "digits/diffusion",
        f"cache={cache}",
        f"output={output}",
        "duration=10 steps",
        *TINY_DIFFUSION,
    )


@pytest.fixture(scope="module")
def alone(cache, tmp_path_factory):
    """The figures and weights of one process."""
    folder = tmp_path_factory.mktemp("alone")
    process = start(*diffusion(cache, "run"), cwd=folder)
    _, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    return folder / "run"


def assert_same_run(ours, alone):
    """Same loss and weights: the ranks did share one job instead of doing it twice."""
    last = [json.loads((run / "metrics.jsonl").read_text().splitlines()[-1]) for run in (ours, alone)]
    assert last[0]["step"] == last[1]["step"] == 10
    assert last[0]["loss"] == pytest.approx(last[1]["loss"], abs=1e-5)
    weights = [load_file(run / "final" / "model.safetensors") for run in (ours, alone)]
    assert max((weights[0][name] - weights[1][name]).abs().max() for name in weights[0]) < 1e-5
    assert json.loads((ours / "environment.json").read_text())["world"] == 2


def test_two_launchers_make_one_job(tmp_path, cache, alone):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{probe.getsockname()[1]}"
    nodes = [
        start(
            *diffusion(cache, "run"),
            "--nnodes",
            "2",
            "--node-rank",
            str(rank),
            "--rdzv",
            address,
            cwd=tmp_path,
            GLOO_SOCKET_IFNAME="lo",
        )
        for rank in (0, 1)
    ]
    ends = [node.communicate(timeout=120) for node in nodes]
    assert [node.returncode for node in nodes] == [0, 0], ends
    assert_same_run(tmp_path / "run", alone)


def test_a_torchrun_around_us_is_joined_and_not_nested(tmp_path, cache, alone):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "raecli"]
    result = subprocess.run(
        [*command, *diffusion(cache, "run")], cwd=tmp_path, env=environment(GLOO_SOCKET_IFNAME="lo"),
        capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    assert_same_run(tmp_path / "run", alone)


def test_two_jobs_on_one_machine_do_not_clash(tmp_path, cache):
    jobs = [start(*diffusion(cache, name), "--devices", "2", cwd=tmp_path) for name in ("a", "b")]
    ends = [job.communicate(timeout=180) for job in jobs]
    assert [job.returncode for job in jobs] == [0, 0], ends
    files = [(tmp_path / name / "final" / "model.safetensors").read_bytes() for name in ("a", "b")]
    assert files[0] == files[1]


def test_junk_around_us_is_refused(tmp_path, rae, cache):
    result = rae(*diffusion(cache, "run"), code=2, RANK="zero", WORLD_SIZE="2", MASTER_ADDR="x", MASTER_PORT="1")
    assert "RANK='zero'" in result.stderr
    assert not (tmp_path / "run").exists()


def test_output_into_a_closed_pipe_leaves_no_traceback(tmp_path):
    command = f"{sys.executable} -m raecli recipes show dith_xl | head -1"
    env = environment(LC_ALL="C", TERM="dumb")
    result = subprocess.run(["bash", "-c", command], cwd=tmp_path, env=env, capture_output=True, text=True, timeout=60)
    assert "Traceback" not in result.stderr and result.stdout.startswith("#")
