"""The tokens that end an answer, for the student and for the teacher.

Two models of one family may end their answers by different tokens: a base model by <|endoftext|>, a
chat model by <|im_end|>. To the loss that is a disagreement at every end, and a student that is
trained on it learns to avoid its own ends. `loss.merge_terminators` makes all ends of both models
one class on both sides.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from torch import Tensor

# Rows of the student's head and of the teacher's.
Groups = tuple[tuple[int, ...], tuple[int, ...]]


@dataclass(frozen=True)
class Terminators:
    """Token ids that end an answer."""

    student: tuple[int, ...]
    teacher: tuple[int, ...]

    def groups(self, rows: tuple[int, int], shared: int | tuple[Tensor, Tensor]) -> Groups:
        """Where sampling stops and what the loss may merge: a model's own ends and the other's.

        Args:
            rows: of the student's head and of the teacher's.
            shared: the number of ids that mean the same to both, or for each class that both have
                the student's id and the teacher's.
        """
        pairs: Iterable[tuple[int, int]]
        if isinstance(shared, int):
            pairs = ((token, token) for token in range(shared))
        else:
            pairs = zip(shared[0].tolist(), shared[1].tolist(), strict=True)
        student, teacher = set(self.student), set(self.teacher)
        for of_student, of_teacher in pairs:
            if of_student in self.student or of_teacher in self.teacher:
                student.add(of_student)
                teacher.add(of_teacher)
        groups = [
            tuple(sorted(token for token in group if token < count))
            for group, count in ((student, rows[0]), (teacher, rows[1]))
        ]
        return groups[0], groups[1]

    def describe(self, student: Any, teacher: Any, merged: bool) -> str:
        """What is printed at the start of a run; the arguments are tokenizers."""
        sides = [
            [repr(tokenizer.convert_ids_to_tokens(token) or token) for token in ends]
            for tokenizer, ends in ((student, self.student), (teacher, self.teacher))
        ]
        texts = [", ".join(names) or "nothing" for names in sides]
        line = f"answers end by: {texts[0]} (student); {texts[1]} (teacher)"
        if merged:
            return f"{line}; one class in the loss"
        if set(sides[0]) == set(sides[1]):
            return line
        return (
            f"{line}\nwarning: student and teacher end their answers by different tokens. The loss "
            "trains the student away from ends that the teacher does not use; with "
            "loss.merge_terminators=true all ends count as one class"
        )
