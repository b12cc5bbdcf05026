"""The problems of configs/running-sums.yaml: sums of eleven digits, added up one at a time.

    question                  worked solution
    7+7+1+5                   14+1+5
                              15+5
                              20

Each line is what is left to add, so a model has to copy the rest of the line above and to add one
digit. The last line is the answer. `python -m tools.running_sums` writes the two committed files.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from pathlib import Path

DIRECTORY = Path("configs/running-sums")
SYSTEM = "Add from the left, one step a line."  # data.system of the recipe
SUMMANDS = 11
TRAIN, HELDOUT = 1024, 256


def question(digits: list[int]) -> str:
    """The prompt of a problem."""
    return "+".join(map(str, digits))


def worked(digits: list[int]) -> str:
    """The solution, a step a line; its last line is the sum."""
    lines, total = [], digits[0]
    for index, digit in enumerate(digits[1:], start=2):
        total += digit
        lines.append(question([total, *digits[index:]]))
    return "\n".join(lines)


def draws(name: str) -> Iterator[list[int]]:
    """Random problems without end, always the same ones for a name."""
    rng = random.Random(f"running-sums:{name}")
    while True:
        yield [rng.randint(1, 9) for _ in range(SUMMANDS)]


def heldout() -> list[list[int]]:
    """The problems that accuracies are measured on."""
    return _distinct("heldout", HELDOUT, set())


def train() -> list[list[int]]:
    """The problems that students are distilled on."""
    return _distinct("train", TRAIN, {question(digits) for digits in heldout()})


def _distinct(name: str, count: int, without: set[str]) -> list[list[int]]:
    found: dict[str, list[int]] = {}
    for digits in draws(name):
        if question(digits) not in without:
            found[question(digits)] = digits
        if len(found) == count:
            break
    return list(found.values())


def as_lines(problems: list[list[int]]) -> str:
    """Problems as JSON lines, with the columns that the recipe names."""
    rows = ({"question": question(digits), "answer": str(sum(digits))} for digits in problems)
    return "".join(json.dumps(row) + "\n" for row in rows)


def main() -> None:
    """Write both files."""
    DIRECTORY.mkdir(parents=True, exist_ok=True)
    for name, problems in (("train", train()), ("heldout", heldout())):
        (DIRECTORY / f"{name}.jsonl").write_text(as_lines(problems))


if __name__ == "__main__":
    main()
