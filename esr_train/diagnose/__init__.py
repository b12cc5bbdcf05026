"""`esr-train diagnose`: what early stopping rests on, measured on the models of a configuration.

One file a diagnostic, in the order of the report: `teacher_decay`, `where`, `cascade`,
`commitment`, `signals`. They ask `bench` for texts and values of models, and return numbers with
intervals (`intervals`); tables and figures are made of these numbers.
"""

from esr_train.diagnose.dry_run import describe_diagnosis
from esr_train.diagnose.run import diagnose

__all__ = ["describe_diagnosis", "diagnose"]
