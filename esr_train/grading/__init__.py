"""Graders: functions from a response and the problem's answer to scores from 0 to 1.

    grade = load_grader("math")
    grade("so it is \\boxed{1/2}", "0.5")   # {"accuracy": 1.0, ...}

"accuracy" is the score that reports are about; a grader may return others beside it.
"""

from __future__ import annotations

from collections.abc import Callable

from esr_train.config import ConfigError
from esr_train.import_path import imported

Grader = Callable[[str, str], dict[str, float]]
NAMES = ("exact", "math", "function_call", "python")


def load_grader(name: str, allow_code: bool = False) -> Grader:
    """The grader called `name`, or the function at an import path "package.module:function".

    Raises:
        ConfigError: an unknown name, a package that is missing, or a grader that would run code
            without `allow_code`.
    """
    if name == "exact":
        from esr_train.grading.exact import grade

        return grade
    if name == "math":
        from esr_train.grading.math import math_grader

        return math_grader()
    if name == "function_call":
        from esr_train.grading.function_call import grade

        return grade
    if name == "python":
        if not allow_code:
            raise ConfigError(
                "data.grader: got 'python', which runs the code that a model wrote; set "
                "data.allow_code=true to let it"
            )
        from esr_train.grading.python import python_grader

        return python_grader()
    if ":" not in name:
        allowed = ", ".join(map(repr, NAMES))
        raise ConfigError(
            f"data.grader: got {name!r}, allowed are {allowed} and an import path a.b:function"
        )
    grader: Grader = imported("data.grader", name)
    return grader
