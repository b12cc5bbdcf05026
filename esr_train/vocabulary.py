"""What the vocabularies of student and teacher have in common.

Three cases, told apart by the tokenizers:

same        Every id means the same to both. The heads may be padded to different sizes.
extended    One has more tokens at the end (Qwen3 has <think> where Qwen2.5 has padding). Both are
            used up to there.
other       The divergence is over tokens that both spell alike, with the same bytes, at positions
            where a token of both begins (`alignment`).
"""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import torch
from torch import Tensor

from esr_train.models import ModelError
from esr_train.terminators import Groups

# Fewer shared tokens than this share of the smaller vocabulary: the text cannot be compared.
_LEAST_SHARED = 0.01


@dataclass(frozen=True)
class Vocabulary:
    """The classes that a divergence is over, and what was left out."""

    classes: int  # the first `classes` ids of both, or how many pairs there are
    student_ids: Tensor | None = None  # [classes] int64, with other tokenizers; else None
    teacher_ids: Tensor | None = None
    note: str | None = None  # what a user should know, for the start of a run
    merge: Groups | None = None  # rows of both heads that count as one class

    @property
    def same_tokens(self) -> bool:
        """Whether the teacher reads the student's tokens as they are."""
        return self.student_ids is None

    def on(self, device: torch.device) -> Vocabulary:
        """The same with its ids on a device."""
        if self.student_ids is None or self.teacher_ids is None:
            return self
        return replace(
            self,
            student_ids=self.student_ids.to(device),
            teacher_ids=self.teacher_ids.to(device),
        )


def shared_vocabulary(student: Any, teacher: Any, rows: tuple[int, int]) -> Vocabulary:
    """The vocabulary that two tokenizers share; `rows` are those of the models' heads.

    Raises:
        ModelError: they share so little that no text can be compared.
    """
    smaller = min(rows)
    names = [
        {index: token for token, index in tokenizer.get_vocab().items() if index < smaller}
        for tokenizer in (student, teacher)
    ]
    if names[0] == names[1]:
        return Vocabulary(smaller)
    in_both = names[0].keys() & names[1].keys()
    in_one = names[0].keys() ^ names[1].keys()
    agree = all(names[0][index] == names[1][index] for index in in_both)
    if agree and in_both and in_one and max(in_both) < min(in_one):
        extra = [names[0].get(index) or names[1][index] for index in sorted(in_one)]
        owner = "student" if min(in_one) in names[0] else "teacher"
        shown = ", ".join(map(repr, extra[:8])) + (", ..." if len(extra) > 8 else "")
        return Vocabulary(
            min(in_one),
            note=f"the {owner} alone has {len(extra)} of the tokens ({shown}): they are not "
            "sampled, and have no part in the divergence",
        )
    return _spelled_alike(student, teacher, rows)


def _spelled_alike(student: Any, teacher: Any, rows: tuple[int, int]) -> Vocabulary:
    ids = [
        {spelled: index for index, spelled in _by_preference(tokenizer) if index < limit}
        for tokenizer, limit in zip((student, teacher), rows, strict=True)
    ]
    pairs = sorted((ids[0][spelled], ids[1][spelled]) for spelled in ids[0].keys() & ids[1].keys())
    smaller = min(map(len, ids))
    if len(pairs) < _LEAST_SHARED * smaller:
        raise ModelError(
            f"student and teacher share {len(pairs)} of {smaller} tokens: their tokenizers have "
            "too little in common to compare texts"
        )
    ends = student.eos_token_id, teacher.eos_token_id
    if None not in ends:
        # Both ways to stop are one class, however they are called.
        pairs = [pair for pair in pairs if pair[0] != ends[0] and pair[1] != ends[1]]
        pairs.append(ends)
    table = torch.tensor(pairs, dtype=torch.int64)
    return Vocabulary(
        len(pairs),
        table[:, 0].contiguous(),
        table[:, 1].contiguous(),
        f"other tokenizers: {len(pairs):,} tokens are spelled alike, of {len(ids[0]):,} of the "
        f"student and {len(ids[1]):,} of the teacher; the divergence is over these, where a token "
        "of both begins",
    )


def _by_preference(tokenizer: Any) -> list[tuple[int, bytes]]:
    """(id, spelling) so that of two ids with one spelling the better one comes last: a byte of a
    byte fallback is spelled like the character that has a token of its own."""
    spelled = spellings(tokenizer)
    tokens = tokenizer.convert_ids_to_tokens(list(spelled))
    fallback = [_fallback_byte(token) is not None for token in tokens]
    order = sorted(zip(spelled.items(), fallback, strict=True), key=lambda item: not item[1])
    return [item for item, _ in order]


def spellings(tokenizer: Any) -> dict[int, bytes]:
    """The bytes that each token stands for, special ones left out.

    Raises:
        ModelError: the tokenizer is of a kind whose tokens have no fixed bytes, such as WordPiece.
    """
    kind = _kind(tokenizer)
    special = set(tokenizer.all_special_ids)
    added = {
        index: token for index, token in tokenizer.added_tokens_decoder.items()
    }  # written as they are, whatever the kind
    found = {}
    for token, index in tokenizer.get_vocab().items():
        if index in special or (index in added and added[index].special):
            continue
        found[index] = token.encode() if index in added else _bytes(token, kind)
    return found


def _kind(tokenizer: Any) -> str:
    """ "byte-level" (GPT-2's letters for bytes) or "metaspace" (U+2581 for a space)."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    decoder = json.dumps(json.loads(backend.to_str()).get("decoder")) if backend else ""
    if "ByteLevel" in decoder:
        return "byte-level"
    if "Metaspace" in decoder or "\\u2581" in decoder:
        return "metaspace"
    if backend and decoder in ("null", '{"type": "Fuse"}'):
        return "plain"
    raise ModelError(
        f"{type(tokenizer).__name__}: tokens of this kind of tokenizer have no fixed bytes, so its "
        "text cannot be compared with that of another tokenizer"
    )


def _bytes(token: str, kind: str) -> bytes:
    if kind == "byte-level":
        letters = _byte_of_letter()
        if all(letter in letters for letter in token):
            return bytes(letters[letter] for letter in token)
        return token.encode()  # decoders of this kind write such a token as it is
    byte = _fallback_byte(token)
    if byte is not None and kind == "metaspace":
        return byte
    return (token.replace("\u2581", " ") if kind == "metaspace" else token).encode()


def _fallback_byte(token: str) -> bytes | None:
    """The byte of a token such as <0x0A>."""
    if len(token) == 6 and token.startswith("<0x") and token.endswith(">"):
        return bytes([int(token[3:5], 16)])
    return None


@cache
def _byte_of_letter() -> dict[str, int]:
    """GPT-2's alphabet: printable bytes are their own letters, the others follow from U+0100."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    letters = {chr(byte): byte for byte in printable}
    return letters | {chr(256 + position): byte for position, byte in enumerate(others)}
