"""Forward KL against a frozen student head from a cache instead of a teacher: what it would save.

    python -m bench.kl_cache               writes bench/results/kl_cache.json

With the student's head W frozen (LoRA), forward KL is linear in the teacher but for its entropy:

    KL(q || p) = -H(q) - h . c + lse(W h),    c = q W  [T, Ds]
    dX         = p W - c

so c and H(q) are all that a step needs of the teacher: two products a step (W h, p W) instead of
three (and no teacher). c belongs to the tokens of one rollout: it costs a product with the
teacher's head and one with the student's to make, and is worth that only for rollouts that are
trained on more than once. Timed with plain PyTorch, fp32, in chunks of tokens.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from bench.measure import interleaved
from bench.peers import Operands, make_operands, ours

RESULT = Path(__file__).parent / "results" / "kl_cache.json"
TOKENS, STUDENT_DIM, TEACHER_DIM, CLASSES = 512, 256, 512, 151_936
CHUNK, ROUNDS = 128, 3


def make_cache(x: Operands) -> tuple[Tensor, Tensor]:
    """(q W [T, Ds], H(q) [T])."""
    cache, entropy = [], []
    for hidden in x.teacher_hidden.split(CHUNK):
        log_q = (hidden @ x.teacher_weight.T).log_softmax(-1)
        q = log_q.exp()
        entropy.append(-torch.linalg.vecdot(q, log_q))
        cache.append(q @ x.student_weight)
    return torch.cat(cache), torch.cat(entropy)


def cached_step(x: Operands, cache: Tensor, entropy: Tensor) -> tuple[Tensor, Tensor]:
    """(sum of the tokens' KL, dX)."""
    hidden = x.student_hidden.detach()
    lse, gradient = [], []
    for rows in hidden.split(CHUNK):
        logits = rows @ x.student_weight.T
        lse.append(logits.logsumexp(-1))
        logits.sub_(lse[-1][:, None]).exp_()
        gradient.append(logits @ x.student_weight)
    loss = torch.cat(lse) - torch.linalg.vecdot(hidden, cache) - entropy
    return loss.sum(), torch.cat(gradient) - cache


def direct_step(x: Operands) -> tuple[Tensor, Tensor]:
    """`linear_divergence` with the head frozen: three products."""
    x.clear()
    loss = ours("stash")(x)
    assert x.student_hidden.grad is not None
    return loss, x.student_hidden.grad


def main() -> None:
    x = make_operands(TOKENS, STUDENT_DIM, TEACHER_DIM, CLASSES, beta=0.0, train_head=False)
    cache, entropy = make_cache(x)
    loss, gradient = cached_step(x, cache, entropy)
    expected, direct = direct_step(x)
    record: dict[str, float] = {
        "loss difference": float((loss - expected).abs() / expected),
        "gradient difference": float((gradient - direct).norm() / direct.norm()),
    }
    runs: dict[str, Callable[[], object]] = {
        "direct step": lambda: direct_step(x),
        "cached step": lambda: cached_step(x, cache, entropy),
        "making the cache": lambda: make_cache(x),
    }
    seconds = interleaved(runs, ROUNDS)
    record.update({name: statistics.median(times) for name, times in seconds.items()})
    saved = record["direct step"] - record["cached step"]
    record["steps a rollout to break even"] = record["making the cache"] / saved
    record["threads"] = torch.get_num_threads()
    for name, value in record.items():
        print(f"{name:<30}{value:.4g}")
    RESULT.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
