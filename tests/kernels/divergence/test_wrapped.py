"""`linear_divergence` where trainers put it: checkpoints, autocast, FSDP2."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.utils.checkpoint import checkpoint

from esr_kernels import linear_divergence
from tests.kernels import cases
from tests.kernels.cases import DEVICE, TOKENS

PLANS = ["stash", "recompute"]


class _Student(nn.Module):
    """A body, a head, and the loss inside of forward."""

    def __init__(self, plan, checkpoints=None):
        super().__init__()
        torch.manual_seed(4)
        self.body = nn.Linear(24, 24, device=DEVICE)
        self.head = nn.Linear(24, 1003, device=DEVICE)
        self.plan, self.checkpoints = plan, checkpoints

    def _loss(self, x, teacher_hidden, teacher_weight, token_weights):
        return linear_divergence(
            torch.tanh(self.body(x)),
            self.head.weight,
            teacher_hidden,
            teacher_weight,
            student_bias=self.head.bias,
            token_weights=token_weights,
            plan=self.plan,
        ).loss

    def forward(self, *arguments):
        if self.checkpoints is None:
            return self._loss(*arguments)
        return checkpoint(self._loss, *arguments, use_reentrant=self.checkpoints == "reentrant")


def _arguments():
    case = cases.random_pair(torch.float32)
    weights = torch.rand(TOKENS, generator=torch.Generator().manual_seed(6)).to(DEVICE)
    weights[::4] = 0
    return case.student_hidden.requires_grad_(), case.teacher_hidden, case.teacher_weight, weights


def _gradients(student, *arguments):
    student(*arguments).backward()
    return {name: parameter.grad for name, parameter in student.named_parameters()}


@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("autocasts", [False, True], ids=["fp32", "autocast"])
@pytest.mark.parametrize("kind", ["reentrant", "saved tensors"])
def test_activation_checkpointing_changes_nothing(kind, autocasts, plan):
    students = _Student(plan), _Student(plan, kind)
    with torch.autocast(DEVICE, dtype=torch.bfloat16, enabled=autocasts):
        losses = [student(*_arguments()) for student in students]
    for loss in losses:
        loss.backward()
    for expected, found in zip(*(student.parameters() for student in students), strict=True):
        assert found.grad.dtype == torch.float32 and found.grad.norm() > 0
        assert torch.equal(found.grad, expected.grad)


@pytest.mark.parametrize("plan", PLANS)
def test_checkpointing_adds_to_weight_grad_once(plan):
    """The forward runs twice, and a stash computes its gradient twice."""
    case = cases.random_pair(torch.float32)
    hidden = case.student_hidden.requires_grad_()

    def loss(hidden, weight_grad):
        return linear_divergence(hidden, *case.tensors[1:], weight_grad=weight_grad, plan=plan).loss

    once, twice = (torch.zeros_like(case.student_weight) for _ in range(2))
    loss(hidden, once).backward()
    checkpoint(loss, hidden, twice, use_reentrant=False).backward()
    assert once.norm() > 0 and torch.equal(once, twice)


@pytest.fixture
def _one_rank(tmp_path: Path):
    if not dist.is_gloo_available():
        pytest.skip("gloo is not built in")
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.parametrize("plan", PLANS)
def test_fsdp2_with_the_loss_inside_of_the_wrapped_forward(plan, _one_rank):
    from torch.distributed.fsdp import fully_shard

    expected = _gradients(_Student(plan), *_arguments())
    student = _Student(plan)
    mesh = dist.device_mesh.init_device_mesh(DEVICE, (1,))
    fully_shard(student.body, mesh=mesh)
    fully_shard(student, mesh=mesh)
    found = _gradients(student, *_arguments())
    for name, gradient in expected.items():
        assert torch.equal(found[name].full_tensor(), gradient), name


def test_a_compiled_graph_shards_the_vocabulary(_one_rank):
    case = cases.random_pair(torch.float32)
    hidden = case.student_hidden.requires_grad_()

    def loss(hidden):
        return linear_divergence(hidden * 1.5, *case.tensors[1:], group=dist.group.WORLD).loss

    torch._dynamo.reset()
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    (found,) = torch.autograd.grad(compiled(hidden), hidden)
    (expected,) = torch.autograd.grad(loss(hidden), hidden)
    assert cases.relative_error(found, expected) < 1e-5
