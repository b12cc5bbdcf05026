"""What two tokenizers share, and the places of a text where their tokens begin together."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from esr_train.alignment import Alignment
from esr_train.models import ModelError
from esr_train.rollout import RolloutBatch
from esr_train.vocabulary import shared_vocabulary, spellings
from tests.tiny import ALPHABET, char_tokenizer

CORPUS = [
    "The quick brown fox jumps over the lazy dog. Where is the dog now?",
    "two plus two is four, and four plus four is eight\nso we are done",
    "naïve café, 東京, emoji 🙂 and   spaces",
] * 8
CPU = torch.device("cpu")


def byte_level(vocab_size: int = 330, eos: str = "<eos>", corpus: list[str] = CORPUS) -> Any:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[eos],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(corpus, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=eos)


def unigram(prepend: str = "never") -> Any:
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=prepend)
    tokenizer.decoder = decoders.Metaspace(prepend_scheme=prepend)
    trainer = trainers.UnigramTrainer(
        vocab_size=130, special_tokens=["<pad>", "</s>"], unk_token="<pad>", show_progress=False
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="</s>", pad_token="<pad>", unk_token="<pad>"
    )


def test_padding_is_no_difference_and_added_tokens_end_the_shared_part() -> None:
    student, longer = char_tokenizer(), char_tokenizer(ALPHABET + "XYZ")
    size = len(student)
    assert shared_vocabulary(student, char_tokenizer(), (40, 32)).classes == 32
    for pair, owner in (((student, longer), "teacher"), ((longer, student), "student")):
        shared = shared_vocabulary(*pair, (64, 64))
        assert shared.classes == size and shared.same_tokens
        assert f"the {owner} alone has 3 of the tokens ('X', 'Y', 'Z')" in str(shared.note)


def test_other_numbers_for_the_same_letters_are_mapped() -> None:
    student, swapped = char_tokenizer(), char_tokenizer(ALPHABET.replace("+=", "=+"))
    shared = shared_vocabulary(student, swapped, (32, 32))
    assert not shared.same_tokens
    ids = dict(zip(shared.student_ids.tolist(), shared.teacher_ids.tolist(), strict=True))
    plus, equals = (student.convert_tokens_to_ids(letter) for letter in "+=")
    assert ids[plus] == equals and ids[equals] == plus
    assert ids[student.eos_token_id] == swapped.eos_token_id


def test_spellings_are_the_bytes_of_texts() -> None:
    for tokenizer in (byte_level(), unigram()):
        spelled = spellings(tokenizer)
        for text in CORPUS[:2]:
            ids = tokenizer(text, add_special_tokens=False)["input_ids"]
            assert b"".join(spelled[i] for i in ids).decode() == text
        assert tokenizer.eos_token_id not in spelled
    text, tokenizer = CORPUS[2], byte_level()
    ids = tokenizer(text)["input_ids"]
    assert b"".join(spellings(tokenizer)[i] for i in ids).decode() == text


def test_a_token_outside_the_alphabet_of_bytes_is_spelled_as_it_is() -> None:
    vocabulary = {"a": 0, " ": 1, "\u0120b": 2, "\u6771": 3}  # a space is U+0120 in this alphabet
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="a"))
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer)
    assert spellings(fast) == {0: b"a", 1: b" ", 2: b" b", 3: "\u6771".encode()}
    assert all(fast.decode([i]).encode() == text for i, text in spellings(fast).items())


def test_shared_tokens_are_spelled_alike() -> None:
    student, teacher = byte_level(), unigram()
    shared = shared_vocabulary(student, teacher, (len(student), len(teacher)))
    ours, theirs = spellings(student), spellings(teacher)
    pairs = list(zip(shared.student_ids.tolist(), shared.teacher_ids.tolist(), strict=True))
    assert pairs[-1] == (student.eos_token_id, teacher.eos_token_id)
    assert len(pairs) > 30 and all(ours[a] == theirs[b] for a, b in pairs[:-1])
    assert len({a for a, _ in pairs}) == len({b for _, b in pairs}) == len(pairs)
    with pytest.raises(ModelError, match="share .* of .* tokens: their tokenizers"):
        # One shares the eight letters of "abcdefgh", the other has thousands that nobody else has.
        alone = PreTrainedTokenizerFast(
            tokenizer_object=Tokenizer(models.WordLevel({f"q{i}x": i for i in range(5000)}))
        )
        shared_vocabulary(alone, char_tokenizer(), (5000, 32))


def batch_of(tokenizer: Any, texts: list[str], ended: list[bool]) -> RolloutBatch:
    rows = [
        tokenizer(text, add_special_tokens=False)["input_ids"] + [tokenizer.eos_token_id] * end
        for text, end in zip(texts, ended, strict=True)
    ]
    width = max(map(len, rows))
    return RolloutBatch(
        [[1, 2]] * len(rows),
        torch.tensor([row + [0] * (width - len(row)) for row in rows]),
        torch.tensor(list(map(len, rows))),
        torch.tensor(ended),
    )


@pytest.mark.parametrize("prepend", ["never", "always", "first"])
@pytest.mark.parametrize("swap", [False, True])
def test_rows_of_both_stand_at_the_same_byte(prepend: str, swap: bool) -> None:
    tokenizers = [byte_level(), unigram(prepend)]
    student, teacher = reversed(tokenizers) if swap else tokenizers
    shared = shared_vocabulary(student, teacher, (len(student), len(teacher)))
    alignment = Alignment(shared, student, teacher)
    texts = ["The dog is over the fox.", "two plus four", "so", "x"]
    batch = batch_of(student, texts, [True, False, True, False])
    comparable = alignment.comparable(batch)
    prompts = [[5] * 3, [5], [5] * 4, [5]]
    ours, theirs = alignment.pair(batch, comparable.float(), prompts, CPU)
    assert len(ours.rows) == len(theirs.rows) == int(comparable.sum())
    spelled = spellings(student), spellings(teacher)
    width = theirs.ids.shape[1]
    for mine, other in zip(ours.rows.tolist(), theirs.rows.tolist(), strict=True):
        row, place = divmod(mine, ours.ids.shape[1])
        assert row == other // width
        place, read = place - 1, other % width - (len(prompts[row]) - 1)
        before = [batch.response(row)[:place], theirs.ids[row, len(prompts[row]) :][:read].tolist()]
        text = [b"".join(s[i] for i in ids) for s, ids in zip(spelled, before, strict=True)]
        if prepend != "always" or swap:
            assert text[0] == text[1]
        else:
            assert text[0] == text[1].removeprefix(b" ")
    # The beginning, each space, and the end of an ended answer are places of both.
    assert comparable[:, 0].all()
    assert comparable[0, len(batch.response(0)) - 1] and comparable[2, len(batch.response(2)) - 1]
    assert int(comparable[0].sum()) >= 5


def test_a_text_that_is_cut_in_a_character_keeps_what_is_whole() -> None:
    student, teacher = byte_level(260), unigram()
    shared = shared_vocabulary(student, teacher, (len(student), len(teacher)))
    batch = batch_of(student, ["dog 🙂"], [False])
    cut = RolloutBatch(batch.prompts, batch.tokens, batch.lengths - 1, batch.finished_by_eos)
    comparable = Alignment(shared, student, teacher).comparable(cut)
    assert comparable[0, 0] and comparable[0, 3] and not comparable[0, 5:].any()


def test_a_special_token_in_an_answer_ends_what_is_compared() -> None:
    student, teacher = byte_level(), unigram()
    shared = shared_vocabulary(student, teacher, (len(student), len(teacher)))
    batch = batch_of(student, ["dog", "the dog"], [True, True])
    batch.tokens[1, 2] = student.eos_token_id
    comparable = Alignment(shared, student, teacher).comparable(batch)
    assert comparable[1, 0] and not comparable[1, 3:].any()


def test_a_token_that_spells_nothing_has_no_place_of_its_own() -> None:
    student, teacher = byte_level(), unigram()
    shared = shared_vocabulary(student, teacher, (len(student), len(teacher)))
    alignment = Alignment(shared, student, teacher)
    batch = batch_of(student, ["the dog"], [True])
    places = int(alignment.comparable(batch).sum())
    alignment._spelled[0][len(student) + 1] = b""
    nothing = torch.tensor([[len(student) + 1]])
    tokens = torch.cat([nothing, batch.tokens], 1)
    batch = RolloutBatch(batch.prompts, tokens, batch.lengths + 1, batch.finished_by_eos)
    comparable = alignment.comparable(batch)
    assert int(comparable.sum()) == places
    ours, theirs = alignment.pair(batch, comparable.float(), [[5]], CPU)
    assert len(ours.rows) == len(theirs.rows) == places


def test_the_same_tokens_need_no_alignment_but_may_follow_other_prompts() -> None:
    tokenizer = char_tokenizer()
    shared = shared_vocabulary(tokenizer, tokenizer, (32, 32))
    alignment = Alignment(shared, tokenizer, tokenizer)
    batch = batch_of(tokenizer, ["1+2", "3"], [True, False])
    assert alignment.comparable(batch) is None
    weights = torch.tensor([[1.0, 0, 1, 1], [1.0, 0, 0, 0]])
    ours, same = alignment.pair(batch, weights, None, CPU)
    assert ours is same
    _, theirs = alignment.pair(batch, weights, [[3, 3, 3], [4]], CPU)
    assert ours.tokens.tolist() == theirs.tokens.tolist() == [0, 2, 3, 0]
    assert theirs.rows.tolist() == [2, 4, 5, theirs.ids.shape[1]]
