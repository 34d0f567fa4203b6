"""A run may change between whole and sharded state, and between numbers of ranks, at any checkpoint."""

import torch
from safetensors.torch import load_file

from tests.conftest import TINY_DIFFUSION, tree

CONSTANT = ("schedule.kind=constant", "schedule.final_learning_rate=null")


def test_a_run_sharded_on_two_ranks_goes_on_whole_on_one(tmp_path, rae, cache):
    shared = ("train-diffusion", "digits/diffusion_dh", f"cache={cache}", *TINY_DIFFUSION, *CONSTANT)
    shared = (*shared, "model.head_width=16", "model.head_heads=2", "model.head_depth=1")
    rae(*shared, "output=whole", "duration=20 steps")
    rae(*shared, "output=moved", "duration=10 steps", "parallel=fsdp", "checkpoint_activations=true", "--devices", "2")
    first = tree(tmp_path / "moved" / "checkpoints")
    assert first.keys() == {
        name for name in tree(tmp_path / "whole" / "checkpoints") if name.startswith("step-0000010")
    }  # ordinary files, of the same names
    result = rae(*shared, "output=moved", "duration=20 steps")
    assert "resuming moved at step 10" in result.stderr
    for part in ("final/model", "checkpoints/step-0000020/model", "checkpoints/step-0000020/optimizer"):
        ours, theirs = (load_file(tmp_path / run / f"{part}.safetensors") for run in ("moved", "whole"))
        assert ours.keys() == theirs.keys()
        for name in ours:  # gradients summed in another order for ten steps of AdamW; 1e-5 is promised
            torch.testing.assert_close(ours[name], theirs[name], atol=1e-5, rtol=1e-4)
