"""Tiny random models and a character tokenizer: whole runs in a fraction of a second."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from esr_train.config import Config

MakeConfig = Callable[..., Config]  # the fixture `make_config`
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


SETTINGS: dict[str, Any] = {
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


def tiny_llama(seed: int = 0, **changes: Any) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    return LlamaForCausalLM(LlamaConfig(**SETTINGS | changes)).eval()


def by_transformers(model: Any, prompt: list[int], length: int) -> list[int]:
    """The response that transformers' own greedy decoding gives."""
    ids = torch.tensor([prompt])
    how = {"max_new_tokens": length, "do_sample": False, "eos_token_id": 0, "pad_token_id": 0}
    return model.generate(ids, attention_mask=torch.ones_like(ids), **how)[
        0, len(prompt) :
    ].tolist()


def save_pair(directory: Path, seed: int = 0, alphabet: str = ALPHABET, **changes: Any) -> str:
    tiny_llama(seed, **changes).save_pretrained(directory)
    char_tokenizer(alphabet).save_pretrained(directory)
    return str(directory)
