"""DTensor heads on two ranks give what one process gives. gloo, on the CPU."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from esr_kernels import linear_divergence
from tests.kernels import cases, sharded_runs
from tests.kernels.sharded_runs import GATHERED, OWN, POLICIES, VOCABULARY

pytestmark = pytest.mark.skipif(not dist.is_gloo_available(), reason="gloo is not built in")


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[Any, Any]]:
    """The results of both ranks."""
    directory = tmp_path_factory.mktemp("ranks")
    mp.spawn(sharded_runs.all_runs, (str(directory),), nprocs=2)
    return [torch.load(directory / f"{rank}.pt") for rank in range(2)]


def assert_equal(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    for name, value in expected.items():
        assert value.norm() > 0, name
        assert cases.relative_error(found[name], value) < 1e-5, name


@pytest.mark.parametrize("name", GATHERED)
def test_an_fsdp_sharded_head_has_the_mean_gradient_over_the_ranks(name, ranks):
    divergence, how = GATHERED[name]
    x = sharded_runs.operands()
    own = [sharded_runs.run(sharded_runs.own_tokens(x, rank), divergence, **how) for rank in (0, 1)]
    for gradient in ("d weight", "d bias"):
        mean = (own[0][gradient] + own[1][gradient]) / 2
        own = [alone | {gradient: mean} for alone in own]
    for found, alone in zip(ranks, own, strict=True):
        assert_equal(found["gathered", name], alone)


@pytest.mark.parametrize("name", VOCABULARY)
def test_a_head_sharded_over_the_vocabulary_gives_what_one_process_gives(name, ranks):
    divergence, how = VOCABULARY[name]
    how = {k: v for k, v in how.items() if k not in ("teacher", "group")}
    x = sharded_runs.operands(longer=VOCABULARY[name][1].get("teacher") == "longer")
    expected = sharded_runs.run(x, divergence, **how)
    for found in ranks:
        assert_equal(found["vocabulary", name], expected)


@pytest.mark.parametrize("tied", [False, True], ids=["", "tied"])
@pytest.mark.parametrize("policy", POLICIES)
def test_the_loss_outside_of_the_wrapped_forward_trains_as_inside(policy, tied, ranks):
    """FSDP2's own gradients are the yardstick, of the head and of all below it."""
    for found in ranks:
        outside, inside = (found["fsdp2", policy, tied, place] for place in (False, True))
        for name, expected in inside.items():
            assert expected.norm() > 0 and outside[name].dtype == torch.float32
            # A tied head's gradient is rounded once with the embedding's, or each for itself.
            allowed = 1e-6 if policy == "fp32" else 4e-3
            assert cases.relative_error(outside[name], expected) < allowed, name


def test_a_gradient_check_fails_for_plain_full_tensor_and_passes_for_ours(ranks):
    """Central differences of the mean of the ranks' losses, which is what FSDP2 minimises."""
    x = {k: v.double() if v.is_floating_point() else v for k, v in sharded_runs.operands().items()}

    def objective(weight: torch.Tensor) -> float:
        teacher = x["teacher_hidden"], x["teacher_weight"]
        losses = [
            linear_divergence(x["hidden"][own], weight, teacher[0][own], teacher[1], "jsd").loss
            for own in OWN
        ]
        return float(sum(losses)) / len(losses)

    generator = torch.Generator().manual_seed(2)
    errors: dict[str, list[float]] = {"plain": [], "ours": []}
    for _ in range(4):
        direction = torch.randn(x["weight"].shape, generator=generator, dtype=torch.float64) * 1e-5
        difference = objective(x["weight"] + direction) - objective(x["weight"] - direction)
        for form, found in errors.items():
            for rank in ranks:
                slope = 2 * float((rank[form] * direction).sum())
                found.append(abs(slope - difference) / abs(difference))
    assert max(errors["ours"]) < 1e-5
    assert min(errors["plain"]) > 0.05


def test_the_ops_with_one_head_gather_it_too(ranks):
    x = sharded_runs.operands()
    own = [sharded_runs.one_head(sharded_runs.own_tokens(x, rank)) for rank in (0, 1)]
    for name in [name for name in own[0] if " d " in name]:
        mean = (own[0][name] + own[1][name]) / 2
        own = [alone | {name: mean} for alone in own]
    for found, alone in zip(ranks, own, strict=True):
        assert_equal(found["one head"], alone)
        assert_equal(found["one head, same tokens"], sharded_runs.one_head(x))


REFUSED = {
    "columns": r"student_weight must be sharded by Shard\(0\) .*got \[Shard\(dim=1\)\]",
    "partial": "student_weight must have placements Shard or Replicate to get a gradient",
    "scattered tokens": r"student_hidden must be the same on all ranks .*pass to_local\(\)",
    "group of a plain student": "teacher_weight must be a plain tensor, this rank's shard",
    "trained plain bias": "student_bias must be a DTensor as student_weight is if it is trained",
    "mapped": "student_ids do not go with a head that is sharded over the vocabulary",
    "classes": "student_weight has no row of the 300 classes on the last of 2 ranks",
    "stash": "does not shard the vocabulary",
    "plain weight_grad": "weight_grad must be a DTensor of torch.float32",
    "uneven": "student_weight must be sharded in equal parts",
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_cannot_be_exact_is_refused(what, ranks):
    for found in ranks:
        assert found["refused"].keys() == REFUSED.keys()
        with pytest.raises(ValueError, match=REFUSED[what]):
            raise ValueError(found["refused"][what])
