"""What no implementation can beat: the bare GEMMs, with buffers ready and no softmax."""

from __future__ import annotations

from collections.abc import Callable

import torch

from bench.peers import Operands


def bare_gemms(x: Operands, schedule: str) -> tuple[Callable[[], None], int]:
    """(a function that runs them, how many): the products of a schedule, all tokens at once.

    "stash" projects both models once and multiplies for the two gradients; "recompute" projects
    twice. The gradient of a frozen head is left out.
    """
    tokens, classes = x.student_hidden.shape[0], x.student_weight.shape[0]
    hidden, weight = x.student_hidden.detach(), x.student_weight.detach()
    s = torch.empty(tokens, classes, dtype=hidden.dtype, device=hidden.device)
    t = torch.empty_like(s)
    hidden_grad, weight_grad = torch.empty_like(hidden), torch.empty_like(weight)
    projections = 1 if schedule == "stash" else 2
    train_head = x.student_weight.requires_grad

    def run() -> None:
        for _ in range(projections):
            torch.mm(hidden, weight.T, out=s)
            torch.mm(x.teacher_hidden, x.teacher_weight.T, out=t)
        torch.mm(s, weight, out=hidden_grad)
        if train_head:
            torch.mm(s.T, hidden, out=weight_grad)

    return run, 2 * projections + 1 + int(train_head)
