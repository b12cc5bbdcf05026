"""Grader "math": the answer's value by math-verify, wherever and however it is written.

An answer such as GSM8K's "... #### 72" counts from "####" on. Of a response that boxes several
answers the last one counts; what the first one would have scored is reported beside it, since
published evaluations differ in this choice.
"""

from __future__ import annotations

import threading
from typing import Any

from esr_train.config import ConfigError
from esr_train.grading import Grader

_BOXED = "\\boxed{"


def math_grader() -> Grader:
    """Scores {"accuracy", "first_boxed_accuracy", "boxed"}; an answer without a value scores 0.

    accuracy: of the last boxed answer, or without one of what math-verify finds in the text.
    first_boxed_accuracy: of the first boxed answer instead. boxed: 1.0 if there is one.

    Raises:
        ConfigError: math-verify is not installed.
    """
    try:
        import math_verify
    except ImportError as error:
        raise ConfigError(
            "data.grader: 'math' needs a package: pip install 'math-verify[antlr4_13_2]'"
        ) from error

    def parse(text: str) -> Any:
        # math-verify limits its time by a signal, which only the main thread receives.
        main = threading.current_thread() is threading.main_thread()
        return math_verify.parse(text, parsing_timeout=5 if main else None)

    def same(answer: Any, text: str | None) -> float:
        main = threading.current_thread() is threading.main_thread()
        if text is None:
            return 0.0
        return float(math_verify.verify(answer, parse(text), timeout_seconds=5 if main else None))

    def grade(response: str, answer: str) -> dict[str, float]:
        gold = answer.rpartition("####")[2].strip()
        wanted = parse(f"${gold}$") or parse(gold)
        found = boxed(response)
        last = f"${_BOXED}{found[-1]}}}$" if found else response
        first = f"${_BOXED}{found[0]}}}$" if found else response
        right = same(wanted, last)
        return {
            "accuracy": right,
            "first_boxed_accuracy": right if first == last else same(wanted, first),
            "boxed": float(bool(found)),
        }

    return grade


def boxed(text: str) -> list[str]:
    r"""What stands in each \boxed{...} that is closed, in order; braces may nest."""
    found, start = [], text.find(_BOXED)
    while start != -1:
        inside = start + len(_BOXED)
        depth, end = 1, inside
        while end < len(text) and depth:
            depth += {"{": 1, "}": -1}.get(text[end], 0)
            end += 1
        if depth == 0:
            found.append(text[inside : end - 1])
        start = text.find(_BOXED, inside)
    return found
