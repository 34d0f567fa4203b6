"""Learning rates, averages, clipping, launching: the arithmetic of a run."""

import math
import signal

import pytest
import torch
from torch import nn

from raecli.errors import ExitCode, UsageError
from raecli.launch import LaunchOptions, check_options, error_of_signal, error_of_workers, joined_environment
from raecli.plan import ASSUMED
from raecli.recipe.load import load_recipe
from raecli.recipe.recipes import TrainDiffusionRecipe
from raecli.recipe.shipped import find_recipe
from raecli.recipe.spec import duration_in_steps
from raecli.stages.train_diffusion import positions_of
from raecli.training.distributed import Ranks, check_batch, join_ranks
from raecli.training.ema import Ema
from raecli.training.optimizer import clip_gradients, learning_rate


def rates(total: int, **settings) -> list[float]:
    return [learning_rate(step, maximum=1.0, total_steps=total, **settings) for step in range(total)]


def test_linear_decay_after_a_hold_reaches_its_end_at_the_last_step():
    told = rates(10, kind="linear", warmup_steps=0, hold_steps=5, final=0.1)
    assert told[:6] == [1.0] * 6
    assert told[-1] == pytest.approx(0.1)
    assert torch.tensor(told[5:]).diff().std() < 1e-6


def test_cosine_after_a_warm_up_reaches_its_end_and_passes_the_middle():
    told = rates(12, kind="cosine", warmup_steps=3, hold_steps=0, final=0.1)
    assert told[:4] == pytest.approx([1 / 3, 2 / 3, 1.0, 1.0])
    assert told[-1] == pytest.approx(0.1) and told[7] == pytest.approx(0.55)


def test_constant_stays():
    assert set(rates(5, kind="constant", warmup_steps=0, hold_steps=0, final=None)) == {1.0}


def test_durations_in_steps():
    assert duration_in_steps("1500 steps", 10, 3) == 1500
    assert duration_in_steps("80 epochs", 1_281_167, 1024) == math.ceil(80 * 1_281_167 / 1024)
    assert duration_in_steps("0 steps", 10, 3) == 0


@pytest.mark.parametrize("ramp", [False, True])
def test_the_average_is_the_weighted_sum_of_all_weights(ramp):
    model = nn.Linear(3, 2).double()
    ema = Ema(model, 0.9, ramp=ramp)
    expected = model.weight.detach().clone()
    for step in range(20):
        nn.init.normal_(model.weight)
        ema.update(step)
        decay = min(0.9, (1 + step) / (10 + step)) if ramp else 0.9
        expected = decay * expected + (1 - decay) * model.weight.detach()
    torch.testing.assert_close(ema.weights()["weight"], expected)
    assert model.weight.data_ptr() != ema.averages["weight"].data_ptr()


def test_clipping_bounds_the_norm_and_reports_the_one_before():
    parameters = [nn.Parameter(torch.zeros(3)), nn.Parameter(torch.zeros(4))]
    for parameter in parameters:
        parameter.grad = torch.full_like(parameter, 2.0)
    before = math.sqrt(7 * 4)
    assert clip_gradients(parameters, None).item() == pytest.approx(before)
    assert clip_gradients(parameters, 1.0).item() == pytest.approx(before)
    assert clip_gradients(parameters, 1.0).item() == pytest.approx(1.0, rel=1e-5)
    assert clip_gradients(parameters, 5.0).item() == pytest.approx(1.0, rel=1e-5)  # below the limit: untouched


def test_a_batch_that_ranks_cannot_share_is_refused():
    check_batch(12, 4)
    with pytest.raises(UsageError, match="12 cannot be shared by 5"):
        check_batch(12, 5)


@pytest.mark.parametrize("world", [1, 2, 3, 12])
def test_ranks_together_take_the_recipes_batch_whatever_their_number(world):
    told = [*(f"model.{key}={value}" for key, value in ASSUMED.items()), "batch_size=12", "flow.time_shift_dim=196608"]
    recipe = load_recipe(TrainDiffusionRecipe, find_recipe("dith_s"), told)
    ranks = [Ranks(rank, world, torch.device("cpu")) for rank in range(world)]
    for step in (0, 7):
        shares = [positions_of(step, recipe, one) for one in ranks]
        assert {len(share) for share in shares} == {12 // world}
        assert [position for share in shares for position in share] == list(range(step * 12, step * 12 + 12))


def test_workers_ends_become_exit_codes():
    assert error_of_workers({1: 3}).exit_code == ExitCode.BAD_INPUT
    assert error_of_workers({0: -6, 1: 5}).exit_code == ExitCode.NON_FINITE  # rank 0 died of rank 1's end
    assert error_of_workers({0: 75, 1: 75}).exit_code == ExitCode.PREEMPTED
    killed = error_of_workers({1: -9})
    assert killed.exit_code == ExitCode.WORKER and "rank 1" in str(killed) and "SIGKILL" in str(killed)
    assert error_of_workers({0: 1}).exit_code == ExitCode.BUG
    assert error_of_workers({0: 1, 1: -9}).exit_code == ExitCode.WORKER  # what a kill did to rank 0
    assert "rank 1 was lost or stalled" in str(error_of_workers({0: 7, 1: -9}))
    stalled = error_of_workers({0: 7})
    assert stalled.exit_code == ExitCode.WORKER and "stalled" in str(stalled)


def test_signals_become_exit_codes():
    saved = {0: 75, 1: 75}
    assert error_of_signal(signal.SIGINT, {0: 130}).exit_code == ExitCode.INTERRUPTED
    assert error_of_signal(signal.SIGTERM, saved).exit_code == ExitCode.PREEMPTED
    assert error_of_signal(signal.SIGUSR1, {}).exit_code == ExitCode.PREEMPTED
    assert error_of_signal(signal.SIGTERM, {0: 75, 1: 6}).exit_code == ExitCode.STORAGE  # that save failed: say so


def test_a_torchrun_or_srun_around_us_is_joined():
    assert joined_environment({}) is None
    torchrun = {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1", "MASTER_ADDR": "a", "MASTER_PORT": "1"}
    assert joined_environment(torchrun) == {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1"}
    srun = {"SLURM_PROCID": "3", "SLURM_STEP_NUM_TASKS": "4", "SLURM_LOCALID": "1", "SLURM_JOB_ID": "77"}
    joined = joined_environment(srun | {"SLURM_STEP_NODELIST": "gpu[03-05,9],login1"})
    assert joined["RANK"] == "3" and joined["WORLD_SIZE"] == "4" and joined["MASTER_ADDR"] == "gpu03"
    other_step = joined_environment(srun | {"SLURM_STEP_NODELIST": "n1,n2", "SLURM_STEP_ID": "1"})
    assert other_step["MASTER_ADDR"] == "n1" and other_step["MASTER_PORT"] != joined["MASTER_PORT"]
    assert joined_environment(srun | {"SLURM_STEP_NUM_TASKS": "1"}) is None  # a shell inside a job


@pytest.mark.parametrize(
    "junk",
    [
        {"RANK": "0"},
        {"RANK": "x", "WORLD_SIZE": "2", "MASTER_ADDR": "a", "MASTER_PORT": "1"},
        {"RANK": "2", "WORLD_SIZE": "2", "MASTER_ADDR": "a", "MASTER_PORT": "1"},
        {"SLURM_PROCID": "x", "SLURM_STEP_NUM_TASKS": "2", "SLURM_STEP_NODELIST": "n"},
        {"SLURM_PROCID": "0", "SLURM_STEP_NUM_TASKS": "2"},
    ],
)
def test_junk_around_us_is_refused(junk):
    with pytest.raises(UsageError):
        joined_environment(junk)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        (LaunchOptions(devices=0), "--devices"),
        (LaunchOptions(nnodes=2), "--rdzv"),
        (LaunchOptions(nnodes=2, node_rank=2, rdzv="a:1"), "--node-rank"),
        (LaunchOptions(nnodes=2, rdzv="nowhere"), "HOST:PORT"),
    ],
)
def test_launch_options_that_cannot_be_are_refused(options, match):
    with pytest.raises(UsageError, match=match):
        check_options(options)


def test_float32_is_float32_in_every_stage_whatever_the_container_sets():
    before = torch.backends.cudnn.allow_tf32, torch.get_float32_matmul_precision()
    torch.backends.cudnn.allow_tf32 = True
    torch.set_float32_matmul_precision("high")  # as TORCH_ALLOW_TF32_CUBLAS_OVERRIDE=1 of NVIDIA's containers does
    try:
        join_ranks(10)
        assert (torch.backends.cudnn.allow_tf32, torch.get_float32_matmul_precision()) == (False, "highest")
    finally:
        torch.backends.cudnn.allow_tf32 = before[0]
        torch.set_float32_matmul_precision(before[1])
