"""NeMo-RL: a distillation loss in the shape of its `LossFunction`s, from hidden states.

Its `DistillationLossFn` is given top-k log-probabilities, after the logits; its pull request 3978
has teachers that ship hidden states in their place, which is what this takes.

Not run here: NeMo-RL, which is not on the package index. The contract is that of the class as its
source had it in 2026: returns, alignment (`token_mask[:, 1:]`), masks and the division by
`global_valid_toks` are tested against these lines written out; how hidden states and the teacher's
head reach a worker is not, and no tensor-parallel run was made (`group` is the option for one).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from esr_kernels.divergence.losses import Divergence, resolve_divergence
from esr_kernels.integrations.rows import masked_divergence


class DistillationLossFn:
    """Exact divergence over the whole vocabulary, as (loss, metrics).

    Args:
        divergence: as in `linear_divergence`; `KLMix(w, 1 - w)` is NeMo-RL's kl_type "mixed".
        options: its other keyword arguments: temperature, num_classes, group, ...
    """

    def __init__(self, divergence: Divergence | str = "reverse_kl", **options: Any) -> None:
        self.divergence, self.options = resolve_divergence(divergence), options

    def __call__(
        self,
        student_hidden: Tensor,
        student_weight: Tensor,
        teacher_hidden: Tensor,
        teacher_weight: Tensor,
        data: Mapping[str, Tensor],
        global_valid_seqs: Tensor,
        global_valid_toks: Tensor,
    ) -> tuple[Tensor, dict[str, Any]]:
        """The sum over the valid tokens divided by `global_valid_toks`.

        Args:
            student_hidden: [B, S, Ds], and teacher_hidden [B, S, Dt]; position i predicts i + 1.
            student_weight, teacher_weight: [V, Ds] and [V, Dt].
            data: "token_mask" [B, S] of the tokens that are trained on, "sample_mask" [B].
            global_valid_seqs: not used: a loss of tokens.
            global_valid_toks: valid tokens of all microbatches and ranks.
        """
        valid = (data["token_mask"][:, 1:] * data["sample_mask"][:, None]) != 0
        out = masked_divergence(
            student_hidden[:, :-1].flatten(0, 1),
            teacher_hidden[:, :-1].flatten(0, 1),
            valid.flatten(),
            student_weight=student_weight,
            teacher_weight=teacher_weight,
            divergence=self.divergence,
            **self.options,
        )
        loss = out.loss / global_valid_toks.clamp(min=1)
        return loss, {
            "loss": float(loss.detach()),
            "student_entropy": float(out.student_entropy.sum() / valid.sum().clamp(min=1)),
            "num_valid_samples": int(data["sample_mask"].sum()),
        }
