"""The train step: its analytic gradients, its choices (compile, recompute, shard) and what it does with a NaN."""

import copy
import os
import socket
from pathlib import Path

import pytest
import torch
import torch.multiprocessing
import torch.nn.functional as F
from torch import nn

from raecli.errors import NonFiniteError
from raecli.models.dit import DiTDH
from raecli.models.fused import gated_hidden, gated_sum, modulated_norm, rotate, rotated_heads
from raecli.models.layers import Block, RMSNorm
from raecli.models.products import HAS_ONEDNN, Linear, by_onednn
from raecli.store.tensors import is_sharded, whole
from raecli.training.distributed import Ranks, data_parallel, fully_sharded, gradients_held, join_ranks, leave_ranks
from raecli.training.ema import Ema
from raecli.training.optimizer import clip_gradients, make_optimizer, take_step
from raecli.training.verdict import Verdict

SIZES = {
    "in_channels": 8, "input_size": 4, "width": 24, "depth": 2, "heads": 2, "num_classes": 5, "head_width": 32,
    "head_depth": 1, "head_heads": 2,
}  # fmt: skip


def small_model() -> DiTDH:
    """A DiT-DH none of whose weights is 0."""
    torch.manual_seed(0)
    model = DiTDH(**SIZES)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.1)
    return model


def loss_of(model: nn.Module, rows: slice = slice(0, 8), seed: int = 1) -> torch.Tensor:
    """A loss, the sum over some rows of one batch of eight."""
    generator = torch.Generator().manual_seed(seed)
    noisy, t = torch.randn(8, 8, 4, 4, generator=generator), torch.rand(8, generator=generator)
    labels = torch.randint(5, (8,), generator=generator)
    return model(noisy[rows], t[rows], labels[rows]).square().mean(dim=(1, 2, 3)).sum()


def gradients(model: nn.Module) -> list[torch.Tensor]:
    loss_of(model).backward()
    return [parameter.grad for parameter in model.parameters()]


def drawn(*shape: int) -> torch.Tensor:
    """Float64 draws whose derivative is wanted."""
    return torch.randn(shape, dtype=torch.float64, requires_grad=True)


@pytest.mark.parametrize("tokens", [1, 5])
def test_the_norms_and_the_gates_gradients_are_the_derivatives(tokens):
    torch.manual_seed(0)
    per_image = [drawn(2, tokens, 6) for _ in range(2)]
    assert torch.autograd.gradcheck(modulated_norm, (drawn(2, 5, 6), drawn(6), *per_image))
    assert torch.autograd.gradcheck(gated_sum, (drawn(2, 5, 6), per_image[0], drawn(2, 5, 6)))


def test_the_hidden_layers_and_the_heads_gradients_are_the_derivatives():
    torch.manual_seed(0)
    assert torch.autograd.gradcheck(gated_hidden, (drawn(2, 5, 6),))
    angles = torch.rand(5, 2, dtype=torch.float64)
    projected = drawn(2, 5, 3, 2, 4)
    assert torch.autograd.gradcheck(lambda x: rotated_heads(x, angles.cos(), angles.sin()), (projected,))


def test_gradients_are_those_of_the_plain_forms(monkeypatch):
    ours = gradients(small_model())
    with monkeypatch.context() as patch:
        patch.setattr(torch.compiler, "is_compiling", lambda: True)  # a compiler is given the plain forms
        patch.setattr("raecli.models.products.by_onednn", lambda *_: False)
        plain = gradients(small_model())
    for one, other in zip(ours, plain, strict=True):
        torch.testing.assert_close(one, other, atol=2e-5, rtol=2e-5)  # float32, sums in another order


@pytest.mark.parametrize("bias", [True, False])
def test_onednns_products_are_the_layers(bias):
    torch.manual_seed(0)
    layer, x, row = Linear(6, 4, bias=bias), torch.randn(2, 3, 6, requires_grad=True), torch.randn(2, 3, 4)
    assert by_onednn(x, layer.weight) == HAS_ONEDNN
    wanted = [x, *layer.parameters()]
    ours = torch.autograd.grad((layer(x) * row).sum(), wanted)
    plain = torch.autograd.grad((F.linear(x, layer.weight, layer.bias) * row).sum(), wanted)
    for one, other in zip(ours, plain, strict=True):
        torch.testing.assert_close(one, other, atol=1e-6, rtol=1e-6)


def test_what_is_not_trained_in_float32_takes_pytorchs_products():
    layer, x = Linear(6, 4), torch.randn(2, 6)
    assert not by_onednn(x.double(), layer.weight.double())
    with torch.autocast("cpu", torch.bfloat16):
        assert not by_onednn(x, layer.weight) and layer(x).dtype == torch.bfloat16
    with torch.no_grad():
        assert not by_onednn(x, layer.weight)


def test_norm_then_modulation_is_what_it_says():
    norm, x, shift, scale = RMSNorm(6).double(), *torch.randn(3, 2, 5, 6, dtype=torch.float64)
    nn.init.normal_(norm.weight)
    normed = x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt() * norm.weight
    torch.testing.assert_close(norm(x, shift, scale), normed * (1 + scale) + shift)


def test_a_complex_product_turns_pairs_like_a_rotation_matrix():
    x, angles = torch.randn(3, 8, dtype=torch.float64), torch.rand(3, 4, dtype=torch.float64)
    turned = rotate(x, angles.cos(), angles.sin())
    torch.testing.assert_close(turned[:, 0::2], x[:, 0::2] * angles.cos() - x[:, 1::2] * angles.sin())
    torch.testing.assert_close(turned[:, 1::2], x[:, 1::2] * angles.cos() + x[:, 0::2] * angles.sin())


def test_recomputed_activations_give_the_same_gradients_to_the_bit():
    model = small_model()
    kept = gradients(copy.deepcopy(model))
    for block in model.modules():
        if isinstance(block, Block):
            block.recomputes = True
    for ours, theirs in zip(gradients(model), kept, strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("recomputes", [False, True])
def test_compiled_blocks_compute_what_eager_ones_do_and_share_the_models_weights(recomputes):
    model = small_model()
    eager = gradients(copy.deepcopy(model))
    for block in model.modules():
        if isinstance(block, Block):
            block.recomputes = recomputes
            # the graph without its code: seconds instead of a minute. In one piece: a break would cost what it gains
            block.compile(backend="aot_eager", fullgraph=True)
    for ours, theirs in zip(gradients(model), eager, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)
    before = loss_of(model)
    with torch.no_grad():
        model.head[0].mlp.out.weight.mul_(2)  # as an optimiser or an average would, in place
    assert loss_of(model) != before


def test_bf16_autocast_keeps_norms_and_masters_in_float32():
    model = small_model()
    seen: dict[str, torch.dtype] = {}
    for name, module in model.named_modules():
        if isinstance(module, RMSNorm) or name == "time_embed":
            module.register_forward_hook(lambda _, __, out, name=name: seen.update({name: out.dtype}))
    with torch.autocast("cpu", torch.bfloat16):
        velocity_loss = loss_of(model)
    velocity_loss.backward()
    assert len(seen) == 8 and set(seen.values()) == {torch.float32}
    assert {parameter.grad.dtype for parameter in model.parameters()} == {torch.float32}
    assert abs(velocity_loss - loss_of(model)) < 0.02 * velocity_loss  # bf16 has 8 bits


def test_a_step_that_is_no_number_changes_nothing_and_is_told():
    model = small_model()
    ema, optimizer = Ema(model, 0.9), make_optimizer(model, learning_rate=0.1, betas=(0.9, 0.95), weight_decay=0.1)
    before = copy.deepcopy([model.state_dict(), ema.weights()])
    loss_of(model).backward()
    model.final.linear.bias.grad[0] = float("nan")
    norm, finite = take_step(model, optimizer, 1.0)
    ema.update(0, finite)
    for state, now in zip(before, [model.state_dict(), ema.weights()], strict=True):
        assert all(torch.equal(state[name], now[name]) for name in state)
    with pytest.raises(NonFiniteError, match="step 7"):
        Verdict().note(norm, lambda: NonFiniteError("step 7"))
    loss_of(model).backward()
    norm, finite = take_step(model, optimizer, 1.0)
    Verdict().note(norm, lambda: NonFiniteError("step 8"))
    assert finite == 1 and not torch.equal(before[0]["final.linear.bias"], model.final.linear.bias)
    assert {int(entry["step"]) for entry in optimizer.state.values()} == {1}  # the bad step is not counted


@pytest.mark.parametrize("limit", [None, 1e-3, 1e6])
def test_clipping_inside_the_optimiser_is_clipping_before_it(limit):
    one, other = small_model(), small_model()
    for model in (one, other):
        loss_of(model).backward()
    optimizers = [make_optimizer(m, learning_rate=0.1, betas=(0.9, 0.95), weight_decay=0.1) for m in (one, other)]
    norm, _ = take_step(one, optimizers[0], limit)
    assert norm == clip_gradients(other.parameters(), limit)
    optimizers[1].step()
    for ours, theirs in zip(one.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=1e-5)


def test_the_average_moves_weights_into_one_buffer_and_keeps_their_values():
    model, twin = small_model(), small_model()
    ema = Ema(model, 0.9)
    assert len(ema.sources) == 1 and torch.equal(loss_of(model), loss_of(twin))
    with torch.no_grad():
        model.patch_embed.linear.weight.add_(1)
    ema.update(0)
    torch.testing.assert_close(
        ema.weights()["patch_embed.linear.weight"], twin.patch_embed.linear.weight + 0.1, atol=1e-6, rtol=0
    )


def steps_of_a_rank(rank: int, world: int, folder: str) -> None:
    """Train this rank's half of the batches, under DDP and sharded; rank 0 leaves what came out in files."""
    address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": Path(folder, "port").read_text()}
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(world), **address)
    ranks = join_ranks(60)
    for kind in ("ddp", "fsdp"):
        model = small_model()
        blocks = [module for module in model.modules() if isinstance(module, Block)]
        forward = fully_sharded(model, blocks, ranks, bf16=False) if kind == "fsdp" else data_parallel(model, ranks)
        assert is_sharded(model.head[0].mlp.out.weight) == (kind == "fsdp")
        figures = trained(model, forward, ranks)
        if rank == 0:
            torch.save(figures, f"{folder}/{kind}.pt")
    leave_ranks()


def trained(model: nn.Module, forward: nn.Module, ranks: Ranks) -> list[dict[str, torch.Tensor]]:
    """Weights, averages and the optimiser's first moments after three steps, whole."""
    ema, optimizer = Ema(model, 0.9), make_optimizer(model, learning_rate=1e-3, betas=(0.9, 0.95), weight_decay=0.01)
    share = 8 // ranks.world
    for step in range(3):
        for start in range(0, share, 2):
            rows = slice(ranks.rank * share + start, ranks.rank * share + start + 2)
            with gradients_held(forward, hold=start + 2 < share):
                (loss_of(forward, rows, step) / share).backward()
        _, finite = take_step(model, optimizer, 0.05)
        ema.update(step, finite)
    moments = {name: optimizer.state[value]["exp_avg"] for name, value in model.named_parameters()}
    return [{name: whole(value) for name, value in part.items()} for part in (model.state_dict(), ema.state(), moments)]


def test_two_ranks_whole_or_sharded_train_like_one(tmp_path):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        (tmp_path / "port").write_text(str(probe.getsockname()[1]))
    torch.multiprocessing.spawn(steps_of_a_rank, (2, str(tmp_path)), nprocs=2)
    model = small_model()
    alone = trained(model, model, Ranks(0, 1, torch.device("cpu")))
    for kind in ("ddp", "fsdp"):
        for ours, theirs in zip(torch.load(tmp_path / f"{kind}.pt", weights_only=True), alone, strict=True):
            assert ours.keys() == theirs.keys()
            for name in ours:
                torch.testing.assert_close(ours[name], theirs[name], atol=1e-6, rtol=0)
