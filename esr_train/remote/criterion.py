"""The divergence from a teacher that is known by the log-probs of its most probable tokens."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from esr_kernels import linear_topk_divergence
from esr_train.config import LossConfig
from esr_train.metrics import TOP_MASS
from esr_train.models import Head
from esr_train.remote.teacher import RemoteTeacher
from esr_train.teacher import Sequences
from esr_train.vocabulary import Vocabulary


class TopDivergence:
    """Over the tokens that the server names and all others as one class: a lower bound of the
    divergence over the vocabulary, whose gradient reaches every class (`tail="bucket"`).

    Raises:
        ServerError: the server does not give them.
    """

    names = ("divergence", *TOP_MASS)

    def __init__(self, config: LossConfig, teacher: RemoteTeacher, classes: Vocabulary) -> None:
        self._config, self._classes = config, classes
        self.reads = teacher.top
        teacher.probe()

    def loss(
        self, hidden: Tensor, student: Head, laid_out: Sequences, of_teacher: Any
    ) -> tuple[Tensor, list[Tensor], tuple[float, float, int]]:
        out = linear_topk_divergence(
            hidden,
            student.weight,
            of_teacher.ids,
            of_teacher.logprobs,
            divergence=self._config.divergence,
            token_weights=laid_out.weights,
            bias=student.bias,
            softcap=student.softcap,
            logit_scale=student.scale,
            num_classes=self._classes.classes,
            impl=self._config.impl,
        )
        known = of_teacher.logprobs.exp().sum(1).clamp(max=1)
        return out.loss, [out.per_token, out.student_mass, known], (0.0, 0.0, 0)
