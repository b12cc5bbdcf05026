"""The same loss by everybody a user would pick instead: forward + backward from hidden states.

A contender is a function of the operands that leaves gradients in `student_hidden.grad` and
`student_weight.grad` (where the head is trained) and returns the loss. Peers that are not installed
are reported as such, never left out in silence.
"""

from __future__ import annotations

import importlib.metadata
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from esr_kernels import JSD, Divergence, linear_divergence

Contender = Callable[["Operands"], Tensor]


@dataclass
class Operands:
    """One problem; `beta` is 0 for forward KL, 1 for reverse KL, else JSD, as GKD has it."""

    student_hidden: Tensor
    student_weight: Tensor
    teacher_hidden: Tensor
    teacher_weight: Tensor
    beta: float

    @property
    def divergence(self) -> Divergence | str:
        return {0.0: "forward_kl", 1.0: "reverse_kl"}.get(self.beta) or JSD(self.beta)

    def clear(self) -> None:
        self.student_hidden.grad = self.student_weight.grad = None


def make_operands(
    tokens: int,
    student_dim: int,
    teacher_dim: int,
    classes: int,
    *,
    beta: float = 1.0,
    train_head: bool = True,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
    seed: int = 0,
) -> Operands:
    """Random operands whose logits have a standard deviation of about 3, as trained heads do."""
    generator = torch.Generator(device=device).manual_seed(seed)

    def normal(rows: int, columns: int, std: float) -> Tensor:
        return torch.randn(rows, columns, generator=generator, device=device).mul_(std).to(dtype)

    return Operands(
        normal(tokens, student_dim, 1.0).requires_grad_(),
        normal(classes, student_dim, 3.0 / student_dim**0.5).requires_grad_(train_head),
        normal(tokens, teacher_dim, 1.0),
        normal(classes, teacher_dim, 3.0 / teacher_dim**0.5),
        beta,
    )


def ours(plan: str, memory_budget: int | None = None) -> Contender:
    def run(x: Operands) -> Tensor:
        out = linear_divergence(
            x.student_hidden,
            x.student_weight,
            x.teacher_hidden,
            x.teacher_weight,
            x.divergence,
            plan=plan,
            memory_budget=memory_budget,
        )
        out.loss.backward()
        return out.loss.detach()

    return run


def _plain_loss(x: Operands) -> Tensor:
    log_p = F.log_softmax(F.linear(x.student_hidden, x.student_weight).float(), dim=-1)
    with torch.no_grad():
        log_q = F.log_softmax(F.linear(x.teacher_hidden, x.teacher_weight).float(), dim=-1)
    if x.beta == 0:
        return F.kl_div(log_p, log_q, reduction="sum", log_target=True)
    if x.beta == 1:
        return F.kl_div(log_q, log_p, reduction="sum", log_target=True)
    weights = torch.tensor([1 - x.beta, x.beta], device=log_p.device).log()
    log_m = torch.logsumexp(torch.stack([log_p + weights[0], log_q + weights[1]]), dim=0)
    return x.beta * F.kl_div(log_m, log_q, reduction="sum", log_target=True) + (
        1 - x.beta
    ) * F.kl_div(log_m, log_p, reduction="sum", log_target=True)


def plain_pytorch(x: Operands) -> Tensor:
    loss = _plain_loss(x)
    loss.backward()
    return loss.detach()


def compiled_pytorch() -> Contender:
    compiled = torch.compile(_plain_loss)

    def run(x: Operands) -> Tensor:
        loss = compiled(x)
        loss.backward()
        return loss.detach()

    return run


def trl_chunked() -> Contender:
    """TRL's `ChunkedDivergenceFunction`, as its distillation trainer calls it."""
    from trl.kernels.chunked_divergence import ChunkedDivergenceFunction

    def run(x: Operands) -> Tensor:
        per_token, _ = ChunkedDivergenceFunction.apply(
            x.student_hidden,
            x.student_weight,
            None,
            x.teacher_hidden,
            x.teacher_weight,
            None,
            x.beta,
            1.0,
            1.0,
            None,
            1.0,
            None,
        )
        loss = per_token.sum()
        loss.backward()
        return loss.detach()

    return run


def liger_chunked(compiled: bool = False) -> Contender:
    """Liger's `LigerFusedLinearJSDLoss`; it divides by the number of tokens, we multiply back."""
    from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss

    # Liger's own code for beta 0 and 1 is the two KLs.
    def run(x: Operands) -> Tensor:
        loss_fn = LigerFusedLinearJSDLoss(
            weight_hard_loss=0.0, weight_soft_loss=1.0, beta=x.beta, compiled=compiled
        )
        tokens = x.student_hidden.shape[0]
        labels = torch.zeros(tokens, dtype=torch.long, device=x.student_hidden.device)
        loss = tokens * loss_fn(
            x.student_hidden, x.student_weight, x.teacher_hidden, x.teacher_weight, labels
        )
        loss.backward()
        return loss.detach()

    return run


def fla_kl() -> Contender:
    """fla-core's `FusedKLDivLoss`: forward KL, all rows, logits rounded to the operands' dtype."""
    from fla.modules.fused_kl_div import FusedKLDivLoss

    loss_fn = FusedKLDivLoss()

    def run(x: Operands) -> Tensor:
        if x.beta != 0:
            raise ImportError("FusedKLDivLoss has forward KL only")
        # It divides by the number of rows; we multiply back.
        loss = x.student_hidden.shape[0] * loss_fn(
            x.student_hidden, x.teacher_hidden, x.student_weight, x.teacher_weight
        )
        loss.backward()
        return loss.detach()

    return run


def torch_cross_entropy() -> Contender:
    """PyTorch's own fused linear cross-entropy, chunked: one model, so not a peer but an anchor."""
    if not hasattr(F, "linear_cross_entropy"):
        raise ImportError("torch has linear_cross_entropy from 2.13 on")
    from torch.nn import LinearCrossEntropyOptions

    def run(x: Operands) -> Tensor:
        tokens = x.student_hidden.shape[0]
        labels = torch.arange(tokens, device=x.student_hidden.device) % x.student_weight.shape[0]
        loss = F.linear_cross_entropy(
            x.student_hidden,
            x.student_weight,
            labels,
            reduction="sum",
            options=LinearCrossEntropyOptions(),
        )
        loss.backward()
        return loss.detach()

    return run


def peers(gpu: bool = False) -> dict[str, Callable[[], Contender]]:
    """Names with versions, and what makes each contender; a missing package raises ImportError.

    On a GPU, fla comes in, whose kernels run nowhere else, and Liger's compiled form, its default,
    is left out: the suite there has minutes.
    """
    liger = f"Liger {_version('liger-kernel')}"
    found: dict[str, Callable[[], Contender]] = {
        "plain PyTorch": lambda: plain_pytorch,
        "torch.compile": compiled_pytorch,
        f"TRL {_version('trl')}": trl_chunked,
        liger: liger_chunked,
    }
    if gpu:
        return {**found, f"fla {_version('fla-core')}": fla_kl}
    return {**found, f"{liger}, compiled": lambda: liger_chunked(compiled=True)}


def anchors() -> dict[str, Callable[[], Contender]]:
    """Losses of one model, for what a fused head costs without a teacher: another loss."""
    return {"PyTorch linear_cross_entropy, one model": torch_cross_entropy}


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "(not installed)"
