"""The two training verbs from outside: exact resume, any ranks, signals, faults."""

import json
import os
import shutil
import signal
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import raecli
from tests.conftest import TINY_DECODER, TINY_DIFFUSION, tree
from tests.e2e.faults import children_of, is_alive, kill_group_at, rank_of, start, wait_for


def diffusion(cache, output, steps, *more):
    return (
        "train-diffusion",
        "digits/diffusion",
        f"cache={cache}",
        f"output={output}",
        f"duration={steps} steps",
        *TINY_DIFFUSION,
        *more,
    )


def weights(run):
    """All that is exact about a run: its last checkpoint and its final model."""
    files = {**tree(run / "checkpoints"), **tree(run / "final")}
    return {name: data for name, data in files.items() if name.endswith(".safetensors")}


def checkpoints(run):
    return sorted(path.name for path in (run / "checkpoints").glob("step-*"))


def test_killed_and_resumed_equals_unbroken_to_the_byte(tmp_path, rae, cache):
    rae(*diffusion(cache, "whole", 300, "horizontal_flip=true"))
    broken = tmp_path / "broken"
    process = start(*diffusion(cache, "broken", 300, "horizontal_flip=true"), cwd=tmp_path)
    kill_group_at(process, lambda: (broken / "checkpoints" / "step-0000050").exists())
    assert not (broken / "final").exists()
    result = rae(*diffusion(cache, "broken", 300, "horizontal_flip=true"))
    assert "resuming" in result.stderr
    assert weights(broken) == weights(tmp_path / "whole")
    assert len(weights(broken)) == 2 * 4 + 2
    assert not list(broken.rglob(".partial-*"))
    losses = {
        line["step"]: line["loss"] for line in map(json.loads, (broken / "metrics.jsonl").read_text().splitlines())
    }
    assert sorted(losses) == list(range(5, 301, 5)) and losses[300] < losses[5]


def test_two_processes_equal_one_with_or_without_accumulation(tmp_path, rae, cache):
    demo = ("train-diffusion", "digits/diffusion", f"cache={cache}", "duration=20 steps")  # its own sizes and rate
    rae(*demo, "output=one")
    rae(*demo, "output=two", "micro_batch_size=20", "--devices", "2")  # 32 a rank: 20 and 12
    one, two = (load_file(tmp_path / name / "final" / "model.safetensors") for name in ("one", "two"))
    assert one.keys() == two.keys()
    for name in one:  # sums in another order, 20 steps of AdamW; 1e-5 is promised
        torch.testing.assert_close(one[name], two[name], atol=1e-5, rtol=0)
    moved = raecli.load_diffusion(tmp_path / "one")
    assert any(parameter.abs().max() > 1e-3 for parameter in moved.final.parameters())  # it did train


def test_killed_while_it_writes_a_checkpoint_two_ranks_go_on_with_the_same_order(tmp_path, rae, cache):
    broken = tmp_path / "broken"
    often = ("save_every=1 steps", "log_every=7")
    process = start(*diffusion(cache, "broken", 60, *often), cwd=tmp_path)
    kill_group_at(process, lambda: len(checkpoints(broken)) == 2 and list(broken.rglob(".partial-*")))
    rae(*diffusion(cache, "broken", 60, *often), "--devices", "2")
    rae(*diffusion(cache, "whole", 60, *often))
    assert not list(broken.rglob(".partial-*"))
    ours, theirs = (load_file(run / "final" / "model.safetensors") for run in (broken, tmp_path / "whole"))
    for name in ours:  # one rank, then two: the order of samples and draws is the same, sums are in another order
        torch.testing.assert_close(ours[name], theirs[name], atol=1e-4, rtol=0)


def test_a_cache_that_changed_under_a_run_is_refused(tmp_path, rae, images, cache):
    shutil.copytree(cache, tmp_path / "cache")
    rae(*diffusion("cache", "run", 5))
    shutil.rmtree(tmp_path / "cache")
    encoder = Path(__file__).parents[1] / "parity" / "vectors" / "vit_mae"
    rae("encode-cache", "--encoder", encoder, "--image-size", "32", "--dtype", "fp32", images, "cache")
    result = rae(*diffusion("cache", "run", 5), code=3)
    assert "run" in result.stderr and ("weights_sha256" in result.stderr or "in_channels" in result.stderr)


def test_a_finished_model_is_not_trained_anew_because_its_checkpoints_were_deleted(tmp_path, rae, cache):
    rae(*diffusion(cache, "run", 5))
    before = weights(tmp_path / "run")
    rae(*diffusion(cache, "run", 5))  # a finished run may be run again
    assert weights(tmp_path / "run") == before
    shutil.rmtree(tmp_path / "run" / "checkpoints")
    assert "delete final/" in rae(*diffusion(cache, "run", 5), code=4).stderr
    assert (tmp_path / "run" / "final" / "model.safetensors").exists()


def test_a_stalled_rank_ends_the_job_inside_the_timeout(tmp_path, cache):
    process = start(*diffusion(cache, "run", 100000), "--devices", "2", "--timeout", "5", cwd=tmp_path)
    wait_for(process, lambda: (tmp_path / "run" / "metrics.jsonl").exists())
    os.kill(rank_of(process.pid, 1), signal.SIGSTOP)
    _, err = process.communicate(timeout=100)
    assert process.returncode == 7, err
    assert "stalled" in err and "Traceback" not in err


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 75), (signal.SIGINT, 130), (signal.SIGHUP, 75)])
def test_a_signal_saves_and_the_same_command_goes_on(tmp_path, rae, cache, number, code):
    more = ("save_every=100000 steps", "schedule.kind=constant", "schedule.final_learning_rate=null")
    process = start(*diffusion(cache, "run", 100000, *more), cwd=tmp_path)
    wait_for(
        process,
        lambda: (tmp_path / "run" / "metrics.jsonl").exists() and (tmp_path / "run" / "metrics.jsonl").stat().st_size,
    )
    process.send_signal(number)
    _, err = process.communicate(timeout=60)
    assert process.returncode == code, err
    assert "Traceback" not in err
    saved = checkpoints(tmp_path / "run")
    assert len(saved) == 1
    step = int(saved[0].removeprefix("step-"))
    assert 0 < step < 100000
    if number == signal.SIGTERM:  # a constant rate: the run may be made shorter to see it end
        result = rae(*diffusion(cache, "run", step + 3, *more))
        assert f"resuming run at step {step}" in result.stderr
        rae(*diffusion(cache, "whole", step + 3, *more))
        ours, theirs = weights(tmp_path / "run"), weights(tmp_path / "whole")
        assert ours["model.safetensors"] == theirs["model.safetensors"]


def test_workers_end_with_their_launcher(tmp_path, cache):
    process = start(*diffusion(cache, "run", 100000), cwd=tmp_path)
    wait_for(process, lambda: (tmp_path / "run" / "metrics.jsonl").exists())
    children = children_of(process.pid)
    assert children
    os.kill(process.pid, signal.SIGKILL)
    process.communicate()
    until = time.monotonic() + 10
    while time.monotonic() < until and any(is_alive(pid) for pid in children):
        time.sleep(0.05)
    assert not any(is_alive(pid) for pid in children)


def test_a_killed_rank_ends_the_job_and_is_named(tmp_path, cache):
    process = start(*diffusion(cache, "run", 100000), "--devices", "2", cwd=tmp_path)
    wait_for(process, lambda: (tmp_path / "run" / "metrics.jsonl").exists())
    os.kill(rank_of(process.pid, 1), signal.SIGKILL)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 7, err
    assert "rank 1" in err and "SIGKILL" in err


def test_a_loss_that_explodes_stops_before_the_weights_are_touched(tmp_path, rae, cache):
    rae(*diffusion(cache, "run", 20))
    result = rae(
        *diffusion(
            cache, "run2", 20, "optimizer.learning_rate=1e30", "schedule.final_learning_rate=1e29", "save_every=1 steps"
        ),
        code=5,
    )
    assert "step" in result.stderr and "class" in result.stderr  # the step and the samples' keys
    for name, value in load_file(
        tmp_path / "run2" / "checkpoints" / checkpoints(tmp_path / "run2")[-1] / "model.safetensors"
    ).items():
        assert value.isfinite().all(), name


def test_a_second_run_and_another_recipe_in_one_folder_are_refused(tmp_path, rae, cache):
    process = start(*diffusion(cache, "run", 100000), cwd=tmp_path)
    wait_for(process, lambda: list((tmp_path / "run" / "checkpoints").glob("step-*")))
    result = rae(*diffusion(cache, "run", 100000), code=2)
    process.kill()
    process.communicate()
    assert "another rae is writing here" in result.stderr
    time.sleep(1)  # for the worker to follow its launcher
    result = rae(*diffusion(cache, "run", 100000, "seed=1"), code=3)
    assert "seed: 0 before, 1 now" in result.stderr


def test_what_a_user_gets_wrong_is_told_without_a_traceback(tmp_path, rae, cache):
    cases = [
        (("train-diffusion", "digits/diffusion", "cache=nowhere"), 3, "nowhere"),
        (("train-diffusion", "digits/difusion"), 2, "digits/diffusion"),
        (("train-diffusion", "digits/diffusion", "model.widht=16"), 2, "did you mean width?"),
        (diffusion(cache, "run", 5, "model.in_channels=768"), 3, "768"),
        ((*diffusion(cache, "run", 5, "batch_size=7"), "--devices", "2"), 2, "7 cannot be shared by 2"),
    ]
    for arguments, code, told in cases:
        result = rae(*arguments, code=code)
        assert told in result.stderr and "Traceback" not in result.stderr, result.stderr
    assert result.stderr.count("7 cannot be shared by 2") == 1  # the last of them: by one rank alone
    assert not (tmp_path / "run" / "checkpoints").exists()


def test_a_dry_run_shows_the_resolved_recipe_and_starts_nothing(tmp_path, rae, cache):
    result = rae(*diffusion(cache, "run", 20), "--dry-run")
    assert "in_channels: 32" in result.stdout and "time_shift_dim: 512" in result.stdout
    assert "plan:" in result.stderr
    assert not (tmp_path / "run").exists()
    result = rae("train-diffusion", "recipes/dith_xl.yaml", "--dry-run")
    assert "head_width: 2048" in result.stdout


def test_a_decoder_learns_resumes_exactly_and_loads_alone(tmp_path, rae, cache, images):
    def decoder(output, *more):
        shared = (
            f"images={images}",
            f"cache={cache}",
            "loss.perceptual=none",
            "loss.perceptual_weights=null",
            "save_every=10 steps",
        )
        return ("train-decoder", "digits/decoder", f"output={output}", *shared, *TINY_DECODER, *more)

    rae(*decoder("whole", "duration=60 steps", "augmentation.crop=random", "augmentation.resize=36"))
    process = start(
        *decoder("broken", "duration=60 steps", "augmentation.crop=random", "augmentation.resize=36"), cwd=tmp_path
    )
    kill_group_at(process, lambda: (tmp_path / "broken" / "checkpoints" / "step-0000020").exists())
    rae(*decoder("broken", "duration=60 steps", "augmentation.crop=random", "augmentation.resize=36"))
    assert weights(tmp_path / "broken") == weights(tmp_path / "whole")
    (tmp_path / "whole" / "final").rename(tmp_path / "elsewhere")
    autoencoder = raecli.load_autoencoder(tmp_path / "elsewhere")
    pictures = torch.rand(2, 3, 32, 32)
    latents = autoencoder.encode(pictures)
    assert latents.shape == (2, 32, 4, 4) and autoencoder.decode(latents).shape == (2, 3, 32, 32)
    lines = [json.loads(line) for line in (tmp_path / "whole" / "metrics.jsonl").read_text().splitlines()]
    assert lines[-1]["l1"] < lines[0]["l1"]
