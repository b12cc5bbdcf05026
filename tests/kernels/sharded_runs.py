"""What each of two ranks runs for test_sharded.py, and the same in one process.

Rank r has the tokens `OWN[r]`, and a part of every head. A run returns plain tensors by name; a
gradient of a sharded parameter is returned whole.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor

from esr_kernels import linear_divergence, linear_topk_divergence, token_logprob
from tests.kernels import cases

OWN = slice(0, 12), slice(12, 19)
DIVERGENCES = (
    "forward_kl reverse_kl jeffreys jsd skew_forward_kl skew_reverse_kl total_variation".split()
)
# name: (divergence, how it is called)
GATHERED: dict[str, tuple[str, dict[str, Any]]] = {
    **{f"{name}, stash": (name, {"plan": "stash"}) for name in DIVERGENCES},
    **{f"{name}, recompute": (name, {"plan": "recompute"}) for name in DIVERGENCES},
    "mean": ("reverse_kl", {"reduction": "mean"}),
    "each token": ("forward_kl", {"reduction": "none"}),
    "reference": ("reverse_kl", {"impl": "reference"}),
    "adds to weight_grad, stash": ("reverse_kl", {"plan": "stash", "weight_grad": True}),
    "adds to weight_grad, recompute": ("jsd", {"plan": "recompute", "weight_grad": True}),
}
VOCABULARY: dict[str, tuple[str, dict[str, Any]]] = {
    **{name: (name, {}) for name in DIVERGENCES},
    "each token": ("forward_kl", {"reduction": "none"}),
    "adds to weight_grad": ("jsd", {"weight_grad": True}),
    "teacher of other rows": ("reverse_kl", {"teacher": "longer"}),
    "teacher as a plain tensor": ("reverse_kl", {"teacher": "plain"}),
    "teacher on another mesh": ("jsd", {"teacher": "other mesh"}),
    "plain hidden states and group": ("reverse_kl", {"group": True}),
}


def operands(longer: bool = False) -> dict[str, Tensor]:
    """All tokens and whole heads, fp32; `longer`: the teacher's head is padded."""
    case = cases._pair(19, 1003, (24, 40), (3.0, 3.0), torch.float32)
    generator = torch.Generator().manual_seed(1)
    found = dict(
        zip("hidden weight teacher_hidden teacher_weight".split(), case.tensors, strict=True)
    )
    found = {name: tensor.cpu() for name, tensor in found.items()}
    if longer:
        rows = torch.randn(9, 40, generator=torch.Generator().manual_seed(2))
        found["teacher_weight"] = torch.cat([found["teacher_weight"], rows])
    found["bias"] = torch.randn(1003, generator=generator)
    found["labels"] = torch.randint(1003, (19,), generator=generator)
    found["labels"][::4] = -100
    found["token_weights"] = torch.rand(19, generator=generator)
    found["token_weights"][3] = 0
    return found


def run(
    x: dict[str, Tensor], divergence: str, weight_grad: bool = False, **how: Any
) -> dict[str, Tensor]:
    """Loss, per token, and gradients, that of the head from wherever it went."""
    hidden, weight, bias = (
        x[name].detach().requires_grad_() for name in ("hidden", "weight", "bias")
    )
    grad = torch.zeros_like(weight).detach() if weight_grad else None
    out = linear_divergence(
        hidden,
        weight,
        x["teacher_hidden"],
        x["teacher_weight"],
        divergence,
        student_bias=bias,
        labels=x["labels"],
        label_weight=0.3,
        token_weights=x["token_weights"],
        weight_grad=grad,
        **how,
    )
    (out.loss * torch.arange(1.0, out.loss.numel() + 1)).sum().backward()
    assert (weight.grad is None) == weight_grad
    d_weight = weight.grad if grad is None else grad
    found = {"loss": out.loss.detach(), "per_token": out.per_token, "entropy": out.student_entropy}
    gradients = {"d hidden": hidden.grad, "d weight": d_weight, "d bias": bias.grad}
    return found | {name: whole(gradient) for name, gradient in gradients.items()}


def whole(tensor: Any) -> Tensor:
    """A copy on this rank of a tensor that may be a DTensor."""
    full = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
    return full.detach().clone()


class Student(nn.Module):
    """A body, a head that may be the embedding, and the loss inside of forward or outside."""

    def __init__(self, tied: bool) -> None:
        super().__init__()
        torch.manual_seed(4)
        self.embed = nn.Embedding(1003, 24)
        self.body = nn.Linear(24, 24)
        self.head = nn.Linear(24, 1003, bias=False)
        if tied:
            self.head.weight = self.embed.weight

    def forward(self, ids: Tensor, *teacher: Tensor) -> Tensor:
        hidden = torch.tanh(self.body(self.embed(ids)))
        if not teacher:
            return hidden
        teacher = tuple(x.to(hidden.dtype) for x in teacher)
        return linear_divergence(hidden, self.head.weight, *teacher, plan="recompute").loss


def trained(inside: bool, tied: bool, policy: Any, rank: int, mesh: Any) -> dict[str, Tensor]:
    """Gradients of FSDP2's parameters with the loss inside or outside of the wrapped forward."""
    x, student = operands(), Student(tied)
    ids = x["labels"].clamp(min=0)[OWN[rank]]
    teacher = x["teacher_hidden"][OWN[rank]], x["teacher_weight"]
    fully_shard(student.body, mesh=mesh, mp_policy=policy)
    fully_shard(student, mesh=mesh, mp_policy=policy)
    for _ in range(2):  # accumulated, as over two micro-batches
        if inside:
            loss = student(ids, *teacher)
        else:
            hidden = student(ids)
            teacher = tuple(t.to(hidden.dtype) for t in teacher)
            student.reshard()
            assert isinstance(student.head.weight, DTensor)
            loss = linear_divergence(hidden, student.head.weight, *teacher, plan="recompute").loss
        loss.backward()
    return {name: whole(p.grad) for name, p in student.named_parameters()}


POLICIES = {
    "fp32": MixedPrecisionPolicy(),
    "bf16": MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32),
}


def checked(ours: bool, rank: int, mesh: Any) -> Tensor:
    """The head's gradient in fp64, by `linear_divergence` or by the plain `full_tensor()`."""
    x = {k: v.double() if v.is_floating_point() else v for k, v in operands().items()}
    weight = distribute_tensor(x["weight"], mesh, [Shard(0)]).requires_grad_()
    head = weight if ours else weight.full_tensor()
    hidden = x["hidden"][OWN[rank]]
    teacher = x["teacher_hidden"][OWN[rank]], x["teacher_weight"]
    linear_divergence(hidden, head, *teacher, "jsd").loss.backward()
    return whole(weight.grad)


def one_head(x: dict[str, Tensor]) -> dict[str, Tensor]:
    """The two ops with one head: their outputs and the gradients of the head and its bias."""
    found = {}
    top = (x["teacher_hidden"] @ operands()["teacher_weight"].T).log_softmax(-1).topk(5)
    for name in ("token_logprob", "linear_topk_divergence"):
        weight, bias = (x[k].detach().requires_grad_() for k in ("weight", "bias"))
        if name == "token_logprob":
            value = token_logprob(x["hidden"], weight, x["labels"], bias=bias).logprob
        else:
            value = linear_topk_divergence(
                x["hidden"], weight, top.indices, top.values, bias=bias, reduction="none"
            ).loss
        value.sum().backward()
        found[name] = value.detach()
        found |= {f"{name} d weight": whole(weight.grad), f"{name} d bias": whole(bias.grad)}
    return found


def own_tokens(x: dict[str, Tensor], rank: int) -> dict[str, Tensor]:
    heads = ("weight", "teacher_weight", "bias")
    return {name: t if name in heads else t[OWN[rank]] for name, t in x.items()}


def all_runs(rank: int, directory: str) -> None:
    """Run everything on one of two ranks and save the results."""
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{directory}/store", rank=rank, world_size=2
    )
    mesh = init_device_mesh("cpu", (2,), mesh_dim_names=("tp",))
    other = init_device_mesh("cpu", (1, 2))
    x = operands()

    def sharded(tensor: Tensor) -> Tensor:
        return distribute_tensor(tensor, mesh, [Shard(0)])

    def same(tensor: Tensor) -> Tensor:
        return DTensor.from_local(tensor, mesh, [Replicate()])

    heads = {name: sharded(x[name]) for name in ("weight", "teacher_weight", "bias")}
    results: dict[str, Any] = {"rank": rank}
    own = own_tokens(x, rank) | heads
    for name, (divergence, how) in GATHERED.items():
        results["gathered", name] = run(own, divergence, **how)
    for name, (divergence, how) in VOCABULARY.items():
        y, how = x | heads, dict(how)
        if not how.pop("group", False):
            y |= {k: same(x[k]) for k in ("hidden", "teacher_hidden", "token_weights", "labels")}
        else:
            how["group"] = mesh.get_group()
        kind = how.pop("teacher", "")
        if kind == "longer":
            y["teacher_weight"] = sharded(operands(longer=True)["teacher_weight"])
        elif kind == "plain":
            y["teacher_weight"] = x["teacher_weight"]
        elif kind:
            y["teacher_weight"] = distribute_tensor(
                x["teacher_weight"], other, [Replicate(), Shard(1)]
            )
        results["vocabulary", name] = run(y, divergence, **how)
    for name, policy in POLICIES.items():
        for tied in (False, True):
            for inside in (False, True):
                results["fsdp2", name, tied, inside] = trained(inside, tied, policy, rank, mesh)
    results["plain"], results["ours"] = (checked(ours, rank, mesh) for ours in (False, True))
    results["one head"] = one_head(own)
    results["one head, same tokens"] = one_head(x | heads | {"hidden": same(x["hidden"])})
    results["refused"] = {what: refusal(call) for what, call in refused(x, heads, mesh).items()}
    torch.save(results, f"{directory}/{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


def refusal(call: Any) -> str:
    try:
        call()
    except (TypeError, ValueError) as error:
        return str(error)
    return "not refused"


def refused(x: dict[str, Tensor], heads: dict[str, Tensor], mesh: Any) -> dict[str, Any]:
    """Calls that must raise, the same on both ranks."""
    group = mesh.get_group()
    hidden = DTensor.from_local(x["hidden"], mesh, [Replicate()])
    teacher = x["teacher_hidden"], heads["teacher_weight"]
    weight = heads["weight"].detach().requires_grad_()
    by_columns = distribute_tensor(x["weight"], mesh, [Shard(1)]).requires_grad_()
    partial = DTensor.from_local(x["weight"], mesh, [Partial()]).requires_grad_()
    scattered = distribute_tensor(x["hidden"], mesh, [Shard(0)])
    short = torch.zeros(500, 24)
    bias = x["bias"].clone().requires_grad_()
    ids = torch.arange(1003)
    of_all_ranks = torch.zeros(1003, 24)
    parts = DTensor.from_local(
        x["weight"][: 600 if dist.get_rank() else 403],
        mesh,
        [Shard(0)],
        shape=x["weight"].shape,
        stride=(24, 1),
        run_check=False,
    )
    run = linear_divergence
    return {
        "columns": lambda: run(hidden, by_columns, *teacher),
        "partial": lambda: run(x["hidden"], partial, *teacher),
        "scattered tokens": lambda: run(scattered, weight, *teacher),
        "group of a plain student": lambda: run(x["hidden"], short, *teacher, group=group),
        "trained plain bias": lambda: run(hidden, weight, *teacher, student_bias=bias),
        "mapped": lambda: run(hidden, weight, *teacher, student_ids=ids, teacher_ids=ids),
        "classes": lambda: run(hidden, weight, *teacher, num_classes=300),
        "stash": lambda: run(hidden, weight, *teacher, plan="stash"),
        "plain weight_grad": lambda: run(x["hidden"], weight, *teacher, weight_grad=of_all_ranks),
        "uneven": lambda: run(hidden, parts, *teacher),
    }
