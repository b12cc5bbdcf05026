"""The problems of configs/tally.yaml: how many of fifteen words are animals, word by word.

    question                  worked solution
    horse                     horse: yes, 1
    cup                       cup: no, 1
    whale                     whale: yes, 2
                              2

Each line copies the next word of the list, says whether it is an animal, and how many there have
been so far. The last line is the answer. `python -m tools.tally` writes the two committed files.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from pathlib import Path

DIRECTORY = Path("configs/tally")
SYSTEM = "Count the animals in the list. Go through it line by line."  # data.system of the recipe
ANIMALS = frozenset(
    "dog cat horse cow sheep lion tiger wolf fox bear rabbit mouse duck eagle shark whale frog "
    "snake goat pig deer monkey elephant camel".split()
)
THINGS = frozenset(
    "table chair stone river bread lamp paper window door car train bridge shirt spoon knife cup "
    "clock book pencil coin tower hammer garden bottle".split()
)
LENGTH = 15  # words of a list
ANSWERS = range(2, LENGTH - 1)  # all equally frequent: a constant answer is right once in twelve
TRAIN, HELDOUT = 1024, 256


def question(words: list[str]) -> str:
    """The prompt of a problem."""
    return "\n".join(words)


def answer(words: list[str]) -> str:
    """The number of animals."""
    return str(sum(word in ANIMALS for word in words))


def worked(words: list[str]) -> str:
    """The solution, a word a line; its last line is the answer."""
    lines = []
    for end, word in enumerate(words, start=1):
        verdict = "yes" if word in ANIMALS else "no"
        lines.append(f"{word}: {verdict}, {answer(words[:end])}")
    return "\n".join([*lines, answer(words)])


def grade(response: str, answer: str) -> dict[str, float]:
    """Grader: accuracy as of "exact", and whether the line of the last word has the right count.

    The second leaves out what follows the list: the last line, and the end of the answer.
    """
    lines = [line.strip() for line in response.splitlines() if line.strip()]
    counted = lines[LENGTH - 1].rpartition(", ")[2] if len(lines) >= LENGTH else ""
    return {"accuracy": float(lines[-1:] == [answer]), "counted": float(counted == answer)}


def draws(name: str) -> Iterator[list[str]]:
    """Random problems without end, always the same ones for a name."""
    rng, animals, things = random.Random(f"tally:{name}"), sorted(ANIMALS), sorted(THINGS)
    while True:
        count = rng.choice(ANSWERS)
        words = rng.sample(animals, count) + rng.sample(things, LENGTH - count)
        rng.shuffle(words)
        yield words


def heldout() -> list[list[str]]:
    """The problems that accuracies are measured on."""
    return _distinct("heldout", HELDOUT, set())


def train() -> list[list[str]]:
    """The problems that students are distilled on."""
    return _distinct("train", TRAIN, {question(words) for words in heldout()})


def _distinct(name: str, count: int, without: set[str]) -> list[list[str]]:
    found: dict[str, list[str]] = {}
    for words in draws(name):
        if question(words) not in without:
            found[question(words)] = words
        if len(found) == count:
            break
    return list(found.values())


def as_lines(problems: list[list[str]]) -> str:
    """Problems as JSON lines, with the columns that the recipe names."""
    rows = ({"question": question(words), "answer": answer(words)} for words in problems)
    return "".join(json.dumps(row) + "\n" for row in rows)


def main() -> None:
    """Write both files."""
    DIRECTORY.mkdir(parents=True, exist_ok=True)
    for name, problems in (("train", train()), ("heldout", heldout())):
        (DIRECTORY / f"{name}.jsonl").write_text(as_lines(problems))


if __name__ == "__main__":
    main()
