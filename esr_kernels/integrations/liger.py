"""Liger's `LigerFusedLinearJSDLoss` by call signature; Liger itself is not needed."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from esr_kernels.divergence.op import linear_divergence
from esr_kernels.integrations.peers import divergence_of
from esr_kernels.scoring.token_logprob import token_logprob


class FusedLinearJSDLoss(nn.Module):
    """`liger_kernel.chunked_loss.LigerFusedLinearJSDLoss` of liger-kernel 0.8.5, from our ops.

        loss = (soft * sum_i D_i + hard * sum_i CE_i) / number of labels that are not ignore_index

    D is forward KL for beta 0, reverse KL for beta 1, else JSD(beta), at `temperature`; CE is the
    student's cross-entropy at temperature 1. Of fp32 operands, Liger's numbers; of 16-bit ones
    Liger rounds the logits, and this does not. Two things differ. Vocabularies of two sizes: Liger
    gives the student logits of 0 for the teacher's extra rows; here they have probability 0. A
    frozen head gets no gradient, and no product for it is computed.

    Args:
        weight_hard_loss, weight_soft_loss: hard and soft above.
        beta, ignore_index, temperature: above.
        compiled, chunk_size: taken and not used; chunks follow the memory budget.
        return_soft_hard_loss: return (loss, soft, hard), the last two unweighted and detached.

    Raises:
        ValueError, TypeError: by the name that `linear_divergence` or `token_logprob` has for it.
    """

    def __init__(
        self,
        weight_hard_loss: float = 0.5,
        weight_soft_loss: float = 0.5,
        beta: float = 0.5,
        ignore_index: int = -100,
        temperature: float = 1.0,
        compiled: bool = True,
        chunk_size: int = 1024,
        return_soft_hard_loss: bool = False,
    ) -> None:
        super().__init__()
        self.weight_hard_loss, self.weight_soft_loss = weight_hard_loss, weight_soft_loss
        self.beta, self.divergence = beta, divergence_of(beta)
        self.ignore_index, self.temperature = ignore_index, temperature
        self.compiled, self.chunk_size = compiled, chunk_size
        self.return_soft_hard_loss = return_soft_hard_loss

    def forward(
        self,
        student_input: Tensor,
        student_weight: Tensor,
        teacher_input: Tensor,
        teacher_weight: Tensor,
        true_labels: Tensor,
        student_bias: Tensor | None = None,
        teacher_bias: Tensor | None = None,
    ) -> Tensor | tuple[Tensor, Tensor, Tensor]:
        """The loss of rows [T, Ds] and [T, Dt] with labels [T] int64."""
        valid = true_labels != self.ignore_index
        # Liger's cross-entropy is at temperature 1: only then one pass has both.
        one_pass = self.temperature == 1.0 and self.weight_soft_loss != 0
        share = self.weight_hard_loss / self.weight_soft_loss if one_pass else 0.0
        out = linear_divergence(
            student_input,
            student_weight,
            teacher_input,
            teacher_weight,
            self.divergence,
            token_weights=valid.to(torch.float32),
            temperature=self.temperature,
            student_bias=student_bias,
            teacher_bias=teacher_bias,
            labels=torch.where(valid, true_labels, -100) if one_pass else None,
            label_weight=share,
        )
        soft, cross_entropy = out.per_token.sum(), out.cross_entropy
        loss = out.loss * self.weight_soft_loss
        if not one_pass and (self.weight_hard_loss != 0 or self.return_soft_hard_loss):
            labels = torch.where(valid, true_labels, -100)
            scored = token_logprob(student_input, student_weight, labels, bias=student_bias)
            cross_entropy = -scored.logprob
            loss = loss + self.weight_hard_loss * cross_entropy.sum()
        count = valid.sum().clamp(min=1)
        if not self.return_soft_hard_loss:
            return loss / count
        return loss / count, soft / count, cross_entropy.detach().sum() / count
