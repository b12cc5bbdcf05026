"""verl 0.9.1: what its FSDP engine reads off a model output for top-k distillation.

With `use_fused_kernels` the engine computes no logits, and takes the divergence from the attribute
`fused_linear_aux` of the model's output (`prepare_model_outputs`). No forward of verl's own sets
it; a patched `forward_with_triton_backend` does, with one line:

    output.fused_linear_aux = fused_linear_aux(
        hidden_states, self.lm_head.weight, teacher_ids, teacher_logprobs, temperature)

Not run here: verl, which needs another transformers. The contract is that of its source, and the
test holds it: fields, shapes [1, nnz], and the values of its `compute_forward_kl_topk`.
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from esr_kernels.scoring.topk import linear_topk_divergence


class FusedLinearAux(NamedTuple):
    """The fields that the engine reads, [1, nnz] each."""

    distillation_losses: Tensor  # differentiable, each token by itself
    student_mass: Tensor  # probability of the teacher's top-k
    teacher_mass: Tensor


def fused_linear_aux(
    hidden_states: Tensor,
    vocab_weights: Tensor,
    teacher_topk_ids: Tensor,
    teacher_topk_log_probs: Tensor,
    temperature: float = 1.0,
    divergence: str = "forward_kl",
) -> FusedLinearAux:
    """The divergence of packed tokens from a teacher's top-k, without logits.

    verl sums the K terms q (log q - log p). Here the rest of the vocabulary is one class more, so
    that the sum is a divergence: it is verl's number plus q_rest (log q_rest - log p_rest), and
    not below 0, where verl clamps.

    Args:
        hidden_states: [1, nnz, D], packed; position i predicts token i + 1.
        vocab_weights: [V, D].
        teacher_topk_ids, teacher_topk_log_probs: [1, nnz, K], or nested tensors of [length, K] as
            the engine's batches have them, without sequence parallelism.
        temperature: of the student; the teacher's log-probabilities are taken as they are.
        divergence: "forward_kl", verl's, or "reverse_kl".

    Raises:
        ValueError, TypeError: by the name that `linear_topk_divergence` has for it.
    """
    ids, logprobs = (
        (packed.values() if packed.is_nested else packed).flatten(0, -2)
        for packed in (teacher_topk_ids, teacher_topk_log_probs)
    )
    out = linear_topk_divergence(
        hidden_states.flatten(0, -2),
        vocab_weights,
        ids,
        logprobs,
        divergence=divergence,
        temperature=temperature,
        reduction="none",
    )
    mass = logprobs.float().exp().sum(-1)
    return FusedLinearAux(out.loss[None], out.student_mass[None], mass[None])
