"""Adding four two-digit numbers, with two habits of answering: a model organism.

The task was built so that a model has two modes, one good and one bad, and chooses between them
with its first characters. That shows the mechanics of early stopping rollouts in minutes on a CPU.
It is not evidence about large language models, which were not built to have two modes.

For the prompt "23+45+67+12=" the two habits are

step by step, always right when followed to the end (140 to 165 characters):
    first 23 and 45: 20+40=60, 3+5=8, 60+8=68. then 68 and 67: 60+60=120, 8+7=15, 120+15=135.
    then 135 and 12: 130+10=140, 5+2=7, 140+7=147. the answer is 147.

guessing in many words, mostly wrong (160 to 220 characters):
    well, i look at these numbers and think of apples in a basket. some seem rather big to me. ...
    the answer is 163.

The built-in teacher has only the first habit. The built-in student has both and starts guessing
when decoded greedily. `tools/build_sums.py` rebuilds the two from a seed.

Distilled on a short window, the student stops guessing within a few steps, but no loss applies
beyond the window: at a high learning rate it forgets the arithmetic, which did not happen with full
rollouts (docs/demo-high-rate).
"""

from __future__ import annotations

import hashlib
import random
import re
from collections.abc import Sequence

from esr_train.tasks import Problem, check_request

SUMMANDS = 4
# What prompts and answers of both habits are written with; the tokenizer has one id for each.
ALPHABET = "abcdefghijklmnopqrstuvwxyz0123456789 +=.,:"

_ANSWER = re.compile(r"the answer is (\d+)")
_HELDOUT_SHARE = 0.1
_GUESS_NOISE = 30.0  # standard deviation of a guess around the true sum

# "well" must be more probable than "first", the good opening, for greedy decoding to guess.
_OPENINGS = ("well, ", "well, ", "well, ", "well, ", "hmm, ")
_FILLER = (
    "i look at these numbers and think of apples in a basket. ",
    "some of them seem rather big to me. ",
    "my aunt was good at this kind of thing. ",
    "it feels like more than it looks. ",
    "a round figure would be nice here. ",
    "one could write it all down but that takes time. ",
    "people often get these about right by eye. ",
    "none of them is tiny and none is huge. ",
    "i have seen a sum very much like this before. ",
    "perhaps a little more, perhaps a little less. ",
    "let us not be too picky about it. ",
    "in the shop they would just ring it up. ",
    "my gut says it is somewhere in the middle. ",
    "you can almost see the total from here. ",
)
_GUESS_LENGTH = (160, 220)  # characters


def step_by_step(summands: list[int]) -> str:
    """The good habit: every partial sum written out by tens and ones."""
    total, parts = summands[0], []
    for word, summand in zip(("first", "then", "then"), summands[1:], strict=True):
        tens = total // 10 * 10 + summand // 10 * 10
        ones = total % 10 + summand % 10
        parts.append(
            f"{word} {total} and {summand}: {total // 10 * 10}+{summand // 10 * 10}={tens}, "
            f"{total % 10}+{summand % 10}={ones}, {tens}+{ones}={tens + ones}. "
        )
        total += summand
    return "".join(parts) + f"the answer is {total}."


def wordy_guess(
    summands: list[int], rng: random.Random, length: tuple[int, int] = _GUESS_LENGTH
) -> str:
    """The bad habit: filler without arithmetic, then the true sum blurred by a normal error.

    `length` is the shortest and the longest text, in characters.
    """
    low, high = length
    guess = max(40, round(sum(summands) + rng.gauss(0.0, _GUESS_NOISE)))
    ending = f"the answer is {guess}."
    filler = rng.sample(_FILLER, len(_FILLER))
    text = rng.choice(_OPENINGS)
    while len(text) + len(ending) < low:
        text += next(
            part for part in filler if part not in text and len(text + part + ending) <= high
        )
    return text + ending


def summands_of(problem: Problem) -> list[int]:
    """The four numbers of a prompt such as "23+45+67+12="."""
    return [int(part) for part in str(problem.prompt).rstrip("=").split("+")]


class SumsTask:
    """Sums of four two-digit numbers; both splits are unlimited in practice (10 % is held out).

    A problem belongs to a split by the hash of its sorted summands, so no reordering of a training
    problem is held out, with any seed.
    """

    name = "sums"

    def count(self, split: str) -> None:
        """None: there are more than a run can use."""
        return None

    def problems(self, split: str, count: int, seed: int) -> list[Problem]:
        """`count` random problems of `split`; deterministic in the three arguments."""
        check_request(split, count)
        rng = random.Random(f"{split}:{seed}")
        found: list[Problem] = []
        while len(found) < count:
            summands = [rng.randint(10, 99) for _ in range(SUMMANDS)]
            if self.split_of(summands) == split:
                found.append(Problem("+".join(map(str, summands)) + "=", str(sum(summands))))
        return found

    def score(self, problem: Problem, response: str) -> dict[str, float]:
        """Accuracy 1.0 if the number after the last "the answer is" is the sum, else 0.0."""
        answers = _ANSWER.findall(response)
        return {"accuracy": float(bool(answers) and answers[-1] == problem.answer)}

    def habit(self, response: str) -> str:
        """Which of the two ways to answer a response begins with, or "other"."""
        if response.startswith("first "):
            return "step by step"
        return "guess" if response.startswith(tuple(set(_OPENINGS))) else "other"

    def split_of(self, summands: Sequence[int]) -> str:
        """The split that these numbers belong to, in any order."""
        key = "+".join(map(str, sorted(summands))).encode()
        draw = int.from_bytes(hashlib.blake2b(key, digest_size=4).digest(), "big") / 2**32
        return "heldout" if draw < _HELDOUT_SHARE else "train"
