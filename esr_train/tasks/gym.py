"""Tasks of reasoning-gym (an extra: pip install reasoning-gym), made up without end.

    data: {task: "reasoning_gym:chain_sum"}

A problem belongs to a split by the hash of its question. The package's own scorer judges what
stands between <answer> and </answer>, or the last line of a response without these tags.
"""

from __future__ import annotations

import hashlib
from typing import Any

from esr_train.tasks import Problem, check_request

_HELDOUT_SHARE = 0.1
_AT_ONCE = 256
# A task may have fewer problems than are asked of it, and would be searched for ever.
_MOST_DRAWS = 50


class GymTask:
    """The procedural dataset `name` of reasoning-gym.

    Raises:
        ValueError: for a name that the package does not have, or without the package.
    """

    def __init__(self, name: str) -> None:
        try:
            import reasoning_gym
        except ImportError as error:
            raise ValueError(
                f"'reasoning_gym:{name}' needs a package: pip install reasoning-gym"
            ) from error
        self._gym, self._task = reasoning_gym, name
        self.name = f"reasoning_gym:{name}"
        try:
            self._scorer = reasoning_gym.create_dataset(name, seed=0, size=1)
        except ValueError as error:
            raise ValueError(f"reasoning-gym has no dataset {name!r}: {error}") from error
        self._entries: dict[str, dict[str, Any]] = {}  # by question, for the scorer

    def count(self, split: str) -> None:
        """None: problems are made up."""
        return None

    def problems(self, split: str, count: int, seed: int) -> list[Problem]:
        """`count` different problems of `split`; deterministic in the three arguments.

        Raises:
            ValueError: the task does not have so many.
        """
        check_request(split, count)
        found: dict[str, Problem] = {}
        draws = 0
        while len(found) < count and draws < _MOST_DRAWS * (1 + count // _AT_ONCE):
            of_draw = hashlib.blake2b(f"{split}:{seed}:{draws}".encode(), digest_size=4).digest()
            drawn = self._gym.create_dataset(
                self._task, seed=int.from_bytes(of_draw, "big") >> 1, size=_AT_ONCE
            )
            for entry in drawn:
                question = entry["question"]
                if _split(question) == split and len(found) < count:
                    self._entries[question] = entry
                    found[question] = Problem(question, str(entry["answer"]))
            draws += 1
        if len(found) < count:
            raise ValueError(f"count: got {count}, but {self.name} gave {len(found)} {split} ones")
        return list(found.values())

    def score(self, problem: Problem, response: str) -> dict[str, float]:
        """`accuracy`, the package's score of the answer, in which some tasks give credit for a part
        of it, and `solved`, 1.0 where that is full credit.

        The answer is what stands between the package's tags; without them, as many lines at the end
        of `response` as a right answer has.
        """
        entry = self._entries[str(problem.prompt)]
        answer = self._gym.utils.extract_answer(response)
        if answer is None:
            lines = [line.strip() for line in response.strip().splitlines()]
            wanted = len(str(entry["answer"]).strip().splitlines())
            answer = "\n".join(lines[-max(1, wanted) :]) or None
        score = float(self._scorer.score_answer(answer, entry))
        return {"accuracy": score, "solved": float(score == 1)}


def _split(question: str) -> str:
    draw = int.from_bytes(hashlib.blake2b(question.encode(), digest_size=4).digest(), "big") / 2**32
    return "heldout" if draw < _HELDOUT_SHARE else "train"
