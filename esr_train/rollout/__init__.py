"""Sampling responses from a model with the weights that are being trained."""

from esr_train.rollout.batch import RolloutBatch
from esr_train.rollout.engine import ContextError, PrefixRollout

__all__ = ["ContextError", "PrefixRollout", "RolloutBatch"]
