"""What all verbs share: streams that go away, signals at any time, and the two verbs that look at what is there."""

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from raecli.models.classifier import Classifier, save_classifier
from tests.conftest import TINY_DIFFUSION, environment
from tests.e2e.faults import start, wait_for

TRAIN = ("train-diffusion", "digits/diffusion", "output=run", "duration=6 steps", *TINY_DIFFUSION)


@pytest.mark.parametrize("redirection", [">&-", "| true", ">&- 2>&-"])
def test_a_run_does_not_end_with_who_listens_to_it(tmp_path, cache, redirection):
    words = " ".join(f"'{word}'" for word in (sys.executable, "-m", "raecli", *TRAIN, f"cache={cache}"))
    command = f"{words} {redirection}; exit ${{PIPESTATUS[0]}}"
    result = subprocess.run(
        ["bash", "-c", command], cwd=tmp_path, env=environment(LC_ALL="C"), capture_output=True, text=True, timeout=120
    )
    assert result.returncode == 0, result.stderr
    assert "Traceback" not in result.stderr and "BrokenPipe" not in result.stderr
    assert (tmp_path / "run" / "final" / "model.safetensors").is_file()


def imports_torch(process):
    """Whether a process has begun to load PyTorch."""
    maps = Path(f"/proc/{process.pid}/maps")
    return maps.exists() and "libtorch" in maps.read_text()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGINT])
def test_a_signal_before_there_is_anything_to_save_ends_in_order(tmp_path, cache, number):
    process = start(*TRAIN, f"cache={cache}", cwd=tmp_path)
    wait_for(process, lambda: imports_torch(process))
    process.send_signal(number)
    _, err = process.communicate(timeout=60)
    assert process.returncode == (130 if number == signal.SIGINT else 75), err
    assert "Traceback" not in err
    assert not list(tmp_path.glob("run/checkpoints/*"))


def test_a_device_or_pipe_is_not_replaced_by_a_file(tmp_path, rae):
    os.mkfifo(tmp_path / "pipe")
    result = rae("recipes", "cp", "dith_s", tmp_path / "pipe", "--force", code=6)
    assert "is no regular file" in result.stderr
    assert (tmp_path / "pipe").is_fifo()


def test_names_that_the_terminal_cannot_show_are_written_escaped(tmp_path, rae):
    result = rae("inspect", "Zürich", code=3, LC_ALL="C", PYTHONUTF8="0", PYTHONCOERCECLOCALE="0")
    assert "no such file or folder" in result.stderr and "rich" in result.stderr


def test_inspect_tells_a_cache_and_what_is_wrong_with_it(tmp_path, rae, cache):
    told = json.loads(rae("inspect", cache, "--json").stdout)
    assert told["kind"] == "latent cache" and told["whole"] and told["samples"] == 24
    broken = Path(shutil.copytree(cache, tmp_path / "broken"))
    shard = broken / "shard-000001.tar"
    data = bytearray(shard.read_bytes())
    data[700] ^= 1
    shard.write_bytes(data)
    (broken / "shard-000002.tar").unlink()
    result = rae("inspect", "broken", code=3)
    assert "NOT whole" in result.stdout
    assert "shard-000001.tar: its bytes changed" in result.stderr and "shard-000002.tar: missing" in result.stderr
    assert "shard-000001" not in rae("inspect", "broken", "--fast", code=3).stderr  # of the right size


def test_inspect_tells_a_run_its_checkpoint_and_its_model(tmp_path, rae, cache):
    rae(*TRAIN, f"cache={cache}")
    told = json.loads(rae("inspect", "run", "--json").stdout)
    assert told["kind"] == "run of train-diffusion" and told["whole"] and told["step"] == 6
    assert "diffusion model, whole" in rae("inspect", "run/final").stdout
    (checkpoint,) = (tmp_path / "run" / "checkpoints").iterdir()
    with (checkpoint / "ema.safetensors").open("r+b") as file:
        file.truncate(1000)
    assert "ema.safetensors: its bytes changed" in rae("inspect", checkpoint, code=4).stderr
    assert f"{checkpoint.name}: ema.safetensors" in rae("inspect", "run", code=4).stderr


def test_inspect_tells_what_a_folder_of_folders_holds(tmp_path, rae, cache):
    shutil.copytree(cache, tmp_path / "made" / "a_cache")
    (tmp_path / "made" / "a_cut_one").mkdir()
    (tmp_path / "made" / "a_cut_one" / "manifest.json").write_text("{")
    (tmp_path / "made" / "others").mkdir()
    result = rae("inspect", "made", code=3)
    assert "a_cache    latent cache, whole" in result.stdout and "others" not in result.stdout
    assert "a_cut_one  cannot be read, NOT whole" in result.stdout and "1 problem\n  a_cut_one: " in result.stderr
    shutil.rmtree(tmp_path / "made" / "a_cut_one")
    assert json.loads(rae("inspect", "made", "--json").stdout)["holds"] == {"a_cache": "latent cache, whole"}


def test_inspect_shows_blocks_and_digests_as_one_reads_them(tmp_path, rae):
    (tmp_path / "samples.json").write_text(json.dumps({"num": 0, "model": {"sha256": "ab" * 32, "step": 7}}))
    assert "model   sha256 abababababab, step 7\n" in rae("inspect", ".").stdout


@pytest.mark.parametrize(
    "name, content",
    [("samples.json", "[" * 100_000), ("manifest.json", "{}"), ("config.json", "nothing"), ("samples.json", "[]")],
)
def test_inspect_refuses_what_is_none_of_ours_in_words(tmp_path, rae, name, content):
    (tmp_path / "thing").mkdir()
    (tmp_path / "thing" / name).write_text(content)
    result = rae("inspect", "thing", code=4 if name == "config.json" else 3)
    assert name in result.stderr and "Traceback" not in result.stderr


def test_inspect_reads_headers_of_files(tmp_path, rae, cache):
    assert "tensors" in rae("inspect", cache / "statistics.safetensors").stdout
    cut = tmp_path / "cut.safetensors"
    cut.write_bytes((cache / "statistics.safetensors").read_bytes()[:-5])
    assert "cut short" in rae("inspect", cut, code=3).stderr


def test_doctor_tells_the_machine(rae):
    findings = {row["name"]: row for row in json.loads(rae("doctor", "--json").stdout)}
    assert findings["torch"]["value"] and findings["gloo"]["value"] == "there"
    assert "digits-mae" in findings["encoders here"]["value"]
    assert "open files" in rae("doctor").stdout


def test_a_plan_in_json_is_json_of_every_kind_of_stage(tmp_path, rae, images):
    save_classifier(tmp_path / "judge.safetensors", Classifier(image_size=32, classes=3, feature_width=8))
    judged = ("eval", "fid", images, "--ref", images, "--features", "judge.safetensors")
    shown = ("eval", "reconstruction", images, images, "--metrics", "psnr")
    toy = ("overfit-toy", "--preset", "tiny", "--width", "32")
    for command, stage in ((judged, "eval"), (shown, "evaluate-reconstruction"), (toy, "overfit-toy")):
        plan = json.loads(rae(*command, "--dry-run", "--json").stdout)
        assert plan["recipe"]["stage"] == stage and plan["plan"], command
