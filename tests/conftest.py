"""Tiny random models and a character tokenizer: whole runs in a fraction of a second."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from esr_train.config import Config, config_from_dict, with_overrides

ALPHABET = "0123456789+=abcdefghij ."
TEMPLATE = (
    "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    "{% if add_generation_prompt %}={% endif %}"
)


def char_tokenizer(alphabet: str = ALPHABET) -> PreTrainedTokenizerFast:
    """<eos> is id 0 and the pad token too, <unk> is 1, then one id a character."""
    vocabulary = {token: i for i, token in enumerate(["<eos>", "<unk>", *alphabet])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<eos>",
        pad_token="<eos>",
        unk_token="<unk>",
        chat_template=TEMPLATE,
    )


def tiny_llama(seed: int = 0, **changes: Any) -> LlamaForCausalLM:
    settings = {
        "vocab_size": 32,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 128,
        "initializer_range": 0.3,
        "bos_token_id": None,
        "eos_token_id": 0,
        "pad_token_id": 0,
    }
    torch.manual_seed(seed)
    return LlamaForCausalLM(LlamaConfig(**{**settings, **changes})).eval()


def save_pair(directory: Path, seed: int = 0, alphabet: str = ALPHABET, **changes: Any) -> str:
    tiny_llama(seed, **changes).save_pretrained(directory)
    char_tokenizer(alphabet).save_pretrained(directory)
    return str(directory)


@pytest.fixture(scope="session")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    """Directories of a student and a teacher, of different widths and padded vocabularies."""
    root = tmp_path_factory.mktemp("models")
    student = save_pair(root / "student", seed=0)
    teacher = save_pair(root / "teacher", seed=1, hidden_size=48, vocab_size=40)
    return student, teacher


@pytest.fixture
def make_config(pair: tuple[str, str]) -> Callable[..., Config]:
    """A configuration that runs in a moment; keyword arguments are sections or keys."""
    base = config_from_dict(
        {
            "student": {"model": pair[0]},
            "teacher": {"model": pair[1]},
            "rollout": {"task": "sums", "prompts": 4, "samples": 2, "max_new_tokens": 6},
            "optim": {"lr": 0.003, "warmup_steps": 2},
            "eval": {"every": 2, "problems": 5, "max_new_tokens": 8, "teacher_text": 6},
            "steps": 3,
        }
    )
    return lambda **changes: with_overrides(
        base, {key.replace("__", "."): value for key, value in changes.items()}
    )


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)
