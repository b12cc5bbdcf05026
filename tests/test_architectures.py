"""Three steps of whole runs against a loop in plain PyTorch: architectures, full fine-tuning and
LoRA, and teachers that have the student's tokenizer, a longer vocabulary or another tokenizer."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    Gemma2Config,
    Gemma2ForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from esr_train.rollout import RolloutBatch
from tests.test_lora import LORA
from tests.test_other_readers import questions
from tests.test_train import build, losses
from tests.test_vocabulary import byte_level
from tests.tiny import ALPHABET, MakeConfig, char_tokenizer, save_pair, tiny_llama

SMALL = {
    "vocab_size": 32,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 128,
    "initializer_range": 0.3,
    "bos_token_id": None,
    "eos_token_id": 0,
    "pad_token_id": 0,
}
ARCHITECTURES: dict[str, Callable[[], Any]] = {
    "llama": lambda: tiny_llama(2),
    "qwen2": lambda: Qwen2ForCausalLM(Qwen2Config(**SMALL)),
    "qwen3": lambda: Qwen3ForCausalLM(Qwen3Config(**SMALL)),
    "gemma2": lambda: Gemma2ForCausalLM(Gemma2Config(**SMALL, final_logit_softcapping=3.0)),
}


@pytest.fixture(scope="session")
def students(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """A directory with a tiny random model of each architecture."""
    root, paths = tmp_path_factory.mktemp("architectures"), {}
    for name, make in ARCHITECTURES.items():
        torch.manual_seed(2)
        make().save_pretrained(root / name)
        char_tokenizer().save_pretrained(root / name)
        paths[name] = str(root / name)
    return paths


@pytest.fixture(scope="session")
def teachers(pair: tuple[str, str], tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Teachers with the students' tokenizer, with more tokens than it has, and with another one."""
    root = tmp_path_factory.mktemp("teachers")
    other = byte_level(300, corpus=["12+30=42 a.", "abc 1+2=3", "10+20 = 30."] * 8)
    end = {"eos_token_id": other.eos_token_id, "pad_token_id": other.eos_token_id}
    tiny_llama(5, vocab_size=len(other) + 3, **end).save_pretrained(root / "other")
    other.save_pretrained(root / "other")
    longer = save_pair(root / "extended", seed=4, alphabet=ALPHABET + "XYZ", vocab_size=40)
    return {"same": pair[1], "extended": longer, "other": str(root / "other")}


class PlainReader:
    """Where a response is compared, and over which classes, from its text alone.

    A student's token is a character, so that a teacher's token begins where one of the student's
    does.
    """

    def __init__(self, kind: str, teacher: str) -> None:
        self.own, self.read = char_tokenizer(), AutoTokenizer.from_pretrained(teacher)
        self.other = kind == "other"
        # Padding has no token; "same" pads both heads, and the classes are the rows of the shorter.
        first = range(32 if kind == "same" else len(self.own))
        self.classes = [list(first), list(first)]
        if self.other:
            shared = [c for c in ALPHABET if self.read.tokenize(c)]
            assert shared == list(ALPHABET)
            self.classes = [self.own.convert_tokens_to_ids(shared), []]
            self.classes[1] = [self.read(c)["input_ids"][0] for c in shared]
            self.classes[0].append(self.own.eos_token_id)
            self.classes[1].append(self.read.eos_token_id)

    def __call__(self, batch: RolloutBatch, row: int) -> tuple[Any, ...]:
        """(student's ids, rows that predict, teacher's ids, rows that predict) of a response."""
        prompt, response = batch.prompts[row], batch.response(row)
        ids, start = prompt + response, len(prompt) - 1
        if not self.other:
            at = [start + i for i in range(len(response))]
            return ids, at, ids, at
        # Up to the first special token or row of padding, which spell no text.
        spelled = self.own.convert_tokens_to_ids(list(ALPHABET))
        cut = next((i for i, token in enumerate(response) if token not in spelled), len(response))
        text = self.own.decode(response[:cut])
        assert len(text) == cut
        encoded = self.read(text, return_offsets_mapping=True) if text else {"input_ids": []}
        begins = [begin for begin, _ in encoded.get("offset_mapping", [])]
        if cut < len(response) and cut == len(response) - 1 and batch.finished_by_eos[row]:
            begins.append(cut)  # where both could stop, and the student did
        read_prompt = self.read(self.own.decode(prompt))["input_ids"]
        read = [len(read_prompt) - 1 + i for i in range(len(begins))]
        return ids, [start + b for b in begins], read_prompt + encoded["input_ids"], read


def plain_step(
    student: Any, teacher: Any, batch: RolloutBatch, reader: PlainReader
) -> torch.Tensor:
    """Reverse KL, the mean over the compared places of all responses, from whole logits."""
    divergences = []
    for row in range(len(batch.prompts)):
        ids, at, read, read_at = reader(batch, row)
        with torch.no_grad():
            teacher_logits = teacher(input_ids=torch.tensor([read])).logits[0, read_at]
        logits = student(input_ids=torch.tensor([ids])).logits[0, at]
        p = logits[:, reader.classes[0]].log_softmax(-1)
        q = teacher_logits[:, reader.classes[1]].log_softmax(-1)
        divergences.append((p.exp() * (p - q)).sum(-1))
    return torch.cat(divergences).mean()


@pytest.mark.parametrize("reader", ["same", "extended", "other"])
@pytest.mark.parametrize("kind", ["full", "lora"])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_three_steps_are_those_of_plain_pytorch(
    make_config: MakeConfig,
    students: dict[str, str],
    teachers: dict[str, str],
    tmp_path: Path,
    name: str,
    kind: str,
    reader: str,
) -> None:
    config = make_config(
        student={"model": students[name], "lora": LORA if kind == "lora" else None},
        teacher={"model": teachers[reader]},
        data={"task": questions(tmp_path / "a.jsonl"), "chat": False},
        eval__every=0,
        eval__teacher_text=0,
        optim__micro_batch=3,
    )
    trainer = build(config, tmp_path)
    model: Any = AutoModelForCausalLM.from_pretrained(students[name])
    if kind == "lora":
        settings = peft.LoraConfig(r=4, lora_alpha=8, target_modules="all-linear")
        model = peft.get_peft_model(model, settings)
        own = dict(trainer.student.named_parameters())
        with torch.no_grad():
            for key, parameter in model.named_parameters():
                parameter.copy_(own[key])
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, weight_decay=0.0)
    teacher = AutoModelForCausalLM.from_pretrained(config.teacher.model)
    plain_reader = PlainReader(reader, config.teacher.model)
    expected: list[float] = []
    real = trainer._gradient

    def both(step: int, batch: RolloutBatch, *rest: Any) -> Any:
        """The same rollout for plain PyTorch, whose weights are updated one step behind."""
        loss = plain_step(model, teacher, batch, plain_reader)
        expected.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.param_groups[0]["lr"] = config.optim.lr * min(1.0, step / 2)
        optimizer.step()
        return real(step, batch, *rest)

    trainer._gradient = both  # type: ignore[method-assign]
    trainer.run()
    assert losses(tmp_path) == pytest.approx(expected, rel=1e-4)
    assert len(set(expected)) == 3
    moved = dict(model.named_parameters())
    for key, parameter in trainer.student.named_parameters():
        torch.testing.assert_close(parameter, moved[key], rtol=1e-3, atol=1e-4)
