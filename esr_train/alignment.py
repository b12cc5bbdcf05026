"""Student and teacher on the same text: which hidden states of both are compared.

With a common tokenizer the teacher reads the student's tokens, after its own prompt if it has one,
and each token is a position. With other tokenizers the teacher reads the same bytes in its own
tokens. Two hidden states are compared where a token of both begins at the same byte: each model has
then read the same text and predicts what comes next. The end of an answer is such a position.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from esr_train.rollout import RolloutBatch
from esr_train.teacher import Sequences, sequences
from esr_train.vocabulary import Vocabulary, spellings


class Alignment:
    """Lays out batches for a student and a teacher with the vocabulary that they share."""

    def __init__(self, vocabulary: Vocabulary, student: Any, teacher: Any) -> None:
        self.vocabulary, self._teacher = vocabulary, teacher
        if not vocabulary.same_tokens:
            self._spelled = [spellings(tokenizer) for tokenizer in (student, teacher)]

    def comparable(self, batch: RolloutBatch) -> Tensor | None:
        """Positions [B, N] bool where a token of both models begins; None for all of them."""
        if self.vocabulary.same_tokens:
            return None
        found = torch.zeros(batch.tokens.shape, dtype=torch.bool)
        for row in range(len(batch.prompts)):
            positions, _ = self._teacher_tokens(batch, row)
            found[row, list(positions)] = True
        return found

    def as_teacher_reads(self, batch: RolloutBatch, row: int) -> list[int]:
        """The tokens of a response that the teacher is given."""
        if self.vocabulary.same_tokens:
            return batch.response(row)
        return self._teacher_tokens(batch, row)[1]

    def pair(
        self,
        batch: RolloutBatch,
        weights: Tensor,
        teacher_prompts: list[list[int]] | None,
        device: torch.device,
    ) -> tuple[Sequences, Sequences]:
        """The batch as the student and as the teacher reads it: row t of either belongs to the same
        place of a text, and has a non-zero weight [B, N].

        `teacher_prompts` [B], where the teacher's differ from the student's. Positions that are not
        `comparable` must have weight 0.
        """
        student = sequences(batch, weights, device)
        if not self.vocabulary.same_tokens:
            assert teacher_prompts is not None, "another tokenizer encodes prompts of its own"
            return student, self._retokenized(batch, weights, teacher_prompts, device)
        if teacher_prompts is None:
            return student, student
        return student, sequences(replace(batch, prompts=teacher_prompts), weights, device)

    def _retokenized(
        self,
        batch: RolloutBatch,
        weights: Tensor,
        teacher_prompts: list[list[int]],
        device: torch.device,
    ) -> Sequences:
        aligned = [self._teacher_tokens(batch, row) for row in range(len(batch.prompts))]
        lengths = torch.tensor([len(tokens) for _, tokens in aligned], dtype=torch.int64)
        # One position more than tokens: the end of a text.
        shape = (len(aligned), int(lengths.max()) + 1)
        read, read_weights = torch.zeros(shape, dtype=torch.int64), torch.zeros(shape)
        for row, (positions, tokens) in enumerate(aligned):
            read[row, : len(tokens)] = torch.tensor(tokens, dtype=torch.int64)
            # In the student's order: positions of both increase together.
            for position in weights[row].nonzero()[:, 0].tolist():
                read_weights[row, positions[position]] = weights[row, position]
        as_read = RolloutBatch(teacher_prompts, read, lengths, batch.finished_by_eos)
        return sequences(as_read, read_weights, device)

    def _teacher_tokens(self, batch: RolloutBatch, row: int) -> tuple[dict[int, int], list[int]]:
        """({student's position: teacher's position}, the teacher's tokens) of a response."""
        response = batch.response(row)
        own, _ = self._spelled
        if bool(batch.finished_by_eos[row]):
            response = response[:-1]
        # Up to a special token in the middle of an answer, which spells no text.
        known = next((i for i, token in enumerate(response) if token not in own), len(response))
        ends = bool(batch.finished_by_eos[row]) and known == len(response)
        spelled = [own[token] for token in response[:known]]
        raw = b"".join(spelled)
        text = raw.decode(errors="ignore")  # a character may be cut off at the end
        tokens, starts = self._encode(text)
        begins = {start: position for position, start in enumerate(starts)}
        positions, at = {}, 0
        # Text that is no UTF-8 in the middle would shift what follows.
        limit = len(text.encode()) if raw.startswith(text.encode()) else 0
        for position, part in enumerate([*spelled, b""]):
            last = position == len(spelled)
            if at in begins and at <= limit and (not last or ends):
                positions[position] = begins.pop(at)  # once, though a token may spell nothing
            at += len(part)
        return positions, tokens

    def _encode(self, text: str) -> tuple[list[int], list[int]]:
        """The teacher's tokens of a text that follows a prompt, and the byte at which each begins,
        with the end of the text as the last."""
        _, spelled = self._spelled
        for guard in ("", "\n"):
            # Some tokenizers write a space before a text; after a line break they do not.
            ids = self._teacher(guard + text, add_special_tokens=False)["input_ids"]
            starts, at = [], 0
            for token in ids:
                starts.append(at)
                at += len(spelled.get(token, b""))
            extra = at - len(text.encode())
            if extra in starts or (extra == at and not text):
                first = starts.index(extra) if ids and extra in starts else len(ids)
                whole = b"".join(spelled.get(token, b"") for token in ids[first:])
                if whole == text.encode():
                    return list(ids[first:]), [s - extra for s in starts[first:]] + [at - extra]
        return [], [0]  # such a text has only its beginning in common
