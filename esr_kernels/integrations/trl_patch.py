"""`linear_divergence` under TRL's trainers, for the time of a `with` block."""

from __future__ import annotations

import functools
import inspect
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from esr_kernels.integrations import peers, trl_losses
from esr_kernels.integrations.trl_options import check_options

_LOSS = (
    "student_hidden_states teacher_hidden_states student_lm_head_weight teacher_lm_head_weight "
    "completion_mask beta num_items_in_batch student_lm_head_bias teacher_lm_head_bias "
    "student_logit_scale teacher_logit_scale student_final_logit_softcapping "
    "teacher_final_logit_softcapping temperature"
).split()
_COMPUTE_LOSS = "self model inputs return_outputs num_items_in_batch".split()


peers.require("trl", "1.16", "2")


@contextmanager
def patched(**options: Any) -> Iterator[None]:
    """Inside, TRL's `DistillationTrainer` and experimental `GKDTrainer` compute their loss here.

    Losses, metrics and normalisation (`num_items_in_batch`) are TRL's. Logits are held within a
    byte budget, and a trained head takes 4 products in place of 6 (8 for JSD). Of GKD,
    `compute_loss(return_outputs=True)`, as evaluation calls it, stays TRL's: it returns logits.

    The patch is of TRL's module and class, so it holds for all threads. A `with` block inside of
    another one has its own options, and at its end those of the outer one are back; TRL's own
    functions are back at the end of the outermost, after an exception too.

    Args:
        options: of `linear_divergence`: plan, memory_budget, impl, num_classes,
            teacher_temperature, merge_student_ids, merge_teacher_ids, and divergence, which takes
            the place of TRL's beta.

    Raises:
        ImportError: TRL is not installed, or its functions are not those that this replaces.
        TypeError, ValueError: an option that is unknown, or its value. A pair that TRL refuses for
            its vocabularies is refused as by TRL, with the name of the subclass that takes it.

    Example:
        >>> with patched():
        ...     trl.DistillationTrainer(model, teacher, args, train_dataset=prompts).train()
    """
    check_options(options)
    from trl.trainer import distillation_trainer as module

    GKDTrainer = _gkd_trainer()
    loss = getattr(module, "_chunked_divergence_loss", None)
    if loss is None:
        raise ImportError("trl: trl.trainer.distillation_trainer has no _chunked_divergence_loss")
    gkd_loss = GKDTrainer.compute_loss
    peers.check_parameters("trl", loss, _LOSS)
    peers.check_parameters("trl", gkd_loss, _COMPUTE_LOSS)
    signature = inspect.signature(loss)
    module._chunked_divergence_loss = trl_losses.chunked_divergence_loss(signature, options)
    GKDTrainer.compute_loss = trl_losses.gkd_loss(gkd_loss, options)
    try:
        yield
    except ValueError as error:
        if "requires a shared vocabulary" not in str(error):
            raise
        raise ValueError(
            f"{error} Or, for one tokenizer whose heads are padded to different sizes, train with "
            "esr_kernels.integrations.trl.DistillationTrainer in place of TRL's."
        ) from error
    finally:
        module._chunked_divergence_loss = loss
        GKDTrainer.compute_loss = gkd_loss


@functools.cache
def _gkd_trainer() -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # TRL warns whoever imports an experimental trainer
        from trl.experimental.gkd.gkd_trainer import GKDTrainer
    return GKDTrainer
