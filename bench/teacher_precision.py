"""The teacher's head in 8 bits: what it saves, and what it does to divergence and gradient.

    python -m bench.teacher_precision      writes bench/results/teacher_precision.json

The teacher's head is frozen and often the larger one. On a real pair of models, against a teacher
in fp32: bf16 head and states (what a bf16 model has anyway); int8 and fp8 (e4m3) heads with one
scale a row, states kept; and both operands in 8 bits with one scale a row, which is what an 8-bit
matrix unit needs.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from bench.real_pair import STUDENTS, RealPair, real_pair

RESULT = Path(__file__).parent / "results" / "teacher_precision.json"
SHAPES = ((1536, 3584), (1024, 2560))


def to_bf16(x: Tensor) -> Tensor:
    return x.bfloat16().float()


def to_int8(x: Tensor) -> Tensor:
    """Symmetric, one scale a row, rounded to nearest."""
    scale = x.abs().amax(1, keepdim=True) / 127
    return (x / scale).round().clamp(-127, 127) * scale


def to_fp8(x: Tensor) -> Tensor:
    """e4m3, one scale a row that puts its largest entry at the format's largest, 448."""
    scale = x.abs().amax(1, keepdim=True) / 448
    return (x / scale).to(torch.float8_e4m3fn).float() * scale


Rounding = Callable[[Tensor], Tensor]
# (rounding of the states, rounding of the head)
FORMATS: dict[str, tuple[Rounding, Rounding]] = {
    "bf16": (to_bf16, to_bf16),
    "int8 head": (to_bf16, to_int8),
    "fp8 head": (to_bf16, to_fp8),
    "int8 head and states": (to_int8, to_int8),
    "fp8 head and states": (to_fp8, to_fp8),
}


def divergence_and_gradient(s: Tensor, t: Tensor, divergence: str) -> tuple[Tensor, Tensor]:
    """Per-token KL [T] and dz [T, V]."""
    log_p, log_q = s.log_softmax(-1), t.log_softmax(-1)
    if divergence == "forward_kl":
        return (log_q.exp() * (log_q - log_p)).sum(-1), log_p.exp() - log_q.exp()
    gap = log_p - log_q
    kl = (log_p.exp() * gap).sum(-1)
    return kl, log_p.exp() * (gap - kl[:, None])


def measure(pair: RealPair, divergence: str) -> dict[str, dict[str, float]]:
    """Errors of each format against the fp32 teacher; nats a token, and relative L2."""
    s = pair.student_hidden @ pair.student_weight.T
    exact = pair.teacher_hidden @ pair.teacher_weight.T
    kl, dz = divergence_and_gradient(s, exact, divergence)
    truth = {"dX": dz @ pair.student_weight, "dW": dz.T @ pair.student_hidden}
    rows = {}
    for name, (of_states, of_head) in FORMATS.items():
        t = of_states(pair.teacher_hidden) @ of_head(pair.teacher_weight).T
        rounded_kl, rounded_dz = divergence_and_gradient(s, t, divergence)
        ours = {"dX": rounded_dz @ pair.student_weight, "dW": rounded_dz.T @ pair.student_hidden}
        rows[name] = {
            "kl": float(kl.mean()),
            "bias": float((rounded_kl - kl).mean()),
            "mean |error|": float((rounded_kl - kl).abs().mean()),
            "max |error|": float((rounded_kl - kl).abs().max()),
            **{
                f"error {key}": float((ours[key] - truth[key]).norm() / truth[key].norm())
                for key in truth
            },
        }
    return rows


def savings() -> list[str]:
    """Of a stash's FLOPs 2 T V (3 Ds + Dt) when the teacher's product runs at twice the rate."""
    lines = []
    for student, teacher in SHAPES:
        share = teacher / 2 / (3 * student + teacher)
        saved = 151_936 * teacher / 1e9
        lines.append(
            f"Ds {student}, Dt {teacher}: an 8-bit product saves {share:.0%} of the time of the "
            f"products, an 8-bit head {saved:.2f} GB"
        )
    return lines


@torch.no_grad()
def main() -> None:
    torch.set_flush_denormal(True)  # probabilities of 1e-40 make a product many times slower
    records = {}
    columns = ("bias", "mean |error|", "max |error|", "error dX", "error dW")
    print(f"{'student':<16}{'divergence':<12}{'teacher':<22}{'KL':>8}", end="")
    print("".join(f"{column:>14}" for column in columns))
    for student in STUDENTS:
        pair = real_pair(student)
        for divergence in ("forward_kl", "reverse_kl"):
            records[f"{student}, {divergence}"] = rows = measure(pair, divergence)
            for name, row in rows.items():
                print(f"{student:<16}{divergence:<12}{name:<22}{row['kl']:>8.4f}", end="")
                print("".join(f"{row[column]:>14.1e}" for column in columns))
    print("\n".join(savings()))
    RESULT.write_text(json.dumps(records, indent=1) + "\n")


if __name__ == "__main__":
    main()
