"""`group=`: the vocabulary sharded over ranks gives what one rank gives. gloo, on the CPU."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from esr_kernels import JSD, linear_divergence
from tests.kernels import cases

SHARDS = 500, 3, 500
CASES = [("reverse_kl", "none"), ("reverse_kl", "mean"), (JSD(0.4), "mean")]


def _operands():
    case = cases._pair(19, 1003, (24, 40), (3.0, 3.0), torch.float32)
    generator = torch.Generator().manual_seed(1)
    labels = torch.randint(1003, (19,), generator=generator)
    labels[::4] = -100
    weights = torch.rand(19, generator=generator)
    weights[3] = 0
    bias = torch.randn(1003, generator=generator)
    bias[600:700] = -torch.inf
    return [x.cpu() for x in case.tensors], bias, labels, weights


def _run(divergence, tensors, bias, labels, weights, group=None, reduction="mean"):
    hidden = tensors[0].clone().requires_grad_()
    weight = tensors[1].clone().requires_grad_()
    bias = bias.clone().requires_grad_()
    out = linear_divergence(
        hidden,
        weight,
        *tensors[2:],
        divergence,
        student_bias=bias,
        labels=labels,
        label_weight=0.3,
        token_weights=weights,
        reduction=reduction,
        plan="recompute",
        memory_budget=12_820_000,  # tiles of 128 classes
        group=group,
        impl="torch",
    )
    (out.loss * torch.arange(1.0, out.loss.numel() + 1)).sum().backward()
    return out, hidden.grad, weight.grad, bias.grad


def _rank(rank: int, directory: str) -> None:
    """Run every case on one shard and save the results."""
    torch.set_num_threads(1)
    store = f"file://{directory}/store"
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=len(SHARDS))
    tensors, bias, labels, weights = _operands()
    start = sum(SHARDS[:rank])
    mine = slice(start, start + SHARDS[rank])
    local = torch.where(labels == -100, -100, -1)
    owned = (labels >= mine.start) & (labels < mine.stop)
    local = torch.where(owned, labels - mine.start, local)
    shards = [tensors[0], tensors[1][mine], tensors[2], tensors[3][mine]]
    results = []
    for divergence, reduction in CASES:
        out, *gradients = _run(
            divergence, shards, bias[mine], local, weights, dist.group.WORLD, reduction
        )
        results.append(({k: v.detach() for k, v in out._asdict().items()}, gradients))
    torch.save((results, mine.start, mine.stop), f"{directory}/{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory):
    """(results of `CASES`, first class, end of the classes) of each rank."""
    directory = tmp_path_factory.mktemp("ranks")
    mp.spawn(_rank, (str(directory),), nprocs=len(SHARDS))
    return [torch.load(directory / f"{rank}.pt") for rank in range(len(SHARDS))]


@pytest.mark.parametrize("case", range(len(CASES)), ids=[str(case) for case in CASES])
def test_uneven_shards_equal_one_rank(case, ranks):
    divergence, reduction = CASES[case]
    whole, hidden, weight, bias = _run(divergence, *_operands(), reduction=reduction)
    for rank, (results, start, stop) in enumerate(ranks):
        out, (d_hidden, d_weight, d_bias) = results[case]
        for name, expected in whole._asdict().items():
            torch.testing.assert_close(
                out[name], expected.detach(), rtol=1e-5, atol=1e-6, msg=f"{name} on rank {rank}"
            )
        assert cases.relative_error(d_hidden, hidden) < 1e-5
        assert cases.relative_error(d_weight, weight[start:stop]) < 1e-5
        assert cases.relative_error(d_bias, bias[start:stop]) < 1e-5


def test_stash_and_reference_refuse_a_group():
    tensors, *_ = _operands()
    tensors[0].requires_grad_()
    for arguments, message in (
        ({"plan": "stash"}, "does not shard the vocabulary"),
        ({"impl": "reference"}, "group must be None"),
    ):
        with pytest.raises(ValueError, match=message):
            linear_divergence(*tensors, group=SimpleNamespace(size=lambda: 2), **arguments)
