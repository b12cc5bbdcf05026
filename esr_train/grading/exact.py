"""Grader "exact": the last line of a response is the answer, up to white space around words."""

from __future__ import annotations


def grade(response: str, answer: str) -> dict[str, float]:
    """Accuracy 1.0 if the last line that is not empty equals the answer, or all of it does."""
    wanted = " ".join(answer.split())
    lines = [" ".join(line.split()) for line in response.splitlines() if line.strip()]
    return {"accuracy": float(bool(lines) and wanted in (lines[-1], " ".join(lines)))}
