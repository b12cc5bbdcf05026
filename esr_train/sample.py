"""`esr-train sample`: answers of a student or its teacher, with the log-prob of each token.

It uses the engine of training, but the whole vocabulary of the model; training leaves out tokens
for which the other model has no embedding.
"""

from __future__ import annotations

from typing import Any

import torch

from esr_kernels import SamplingParams
from esr_train.config import Config, ConfigError, ModelConfig, TeacherConfig
from esr_train.data import PromptEncoder
from esr_train.models import load_model, load_tokenizer
from esr_train.rollout import PrefixRollout, RolloutBatch

_TOKENS_A_LINE = 8


def sample_text(
    config: Config,
    spec: ModelConfig,
    prompts: list[str],
    samples: int,
    max_new_tokens: int,
    params: SamplingParams,
    seed: int,
) -> str:
    """Every prompt with `samples` answers, as text for a terminal.

    Prompts are formatted by the chat template as those of training are. Log-probs
    are those of the whole distribution at the temperature, before the filters of `params`.

    Raises:
        ConfigError, ModelError, ContextError: no chat template, a teacher on a server, a model that
            cannot be loaded, prompts that do not fit its context.
    """
    if isinstance(spec, TeacherConfig) and spec.url:
        raise ConfigError(
            f"teacher.url: got {spec.url!r}, must be null for sample --teacher, which samples "
            "here; ask the server itself"
        )
    tokenizer = load_tokenizer(spec, config.runtime)
    encode = PromptEncoder(tokenizer, config.data)
    ids = [encode(prompt) for prompt in prompts]
    rollout = PrefixRollout(load_model(spec, config.runtime), tokenizer)
    batch = rollout.generate(
        ids,
        samples,
        max_new_tokens,
        params.temperature,
        (seed, "sample"),
        top_k=params.top_k,
        top_p=params.top_p,
        min_p=params.min_p,
    )
    parts = []
    for row, prompt in enumerate(batch.prompts):
        if row % samples == 0:
            text = tokenizer.decode(prompt, skip_special_tokens=False)
            parts.append(f"prompt ({len(prompt)} tokens): {text!r}")
        parts.append(_answer(batch, row, row % samples + 1, tokenizer))
    return "\n\n".join(parts)


def _answer(batch: RolloutBatch, row: int, number: int, tokenizer: Any) -> str:
    """One answer: how it ended, its log-prob, its text, and its tokens with a log-prob each."""
    assert batch.logprob is not None
    response = batch.response(row)
    logprobs = batch.logprob[row, : len(response)]
    total = float(logprobs.sum(dtype=torch.float64))
    end = "ended by EOS" if batch.finished_by_eos[row] else "cut"
    lines = [
        f"sample {number}: {_count(len(response), 'token')}, {end}, log-prob {total:.3f} "
        f"({total / len(response):.3f} a token)",
        f"  {tokenizer.decode(response, skip_special_tokens=True)!r}",
    ]
    pieces = [
        f"{tokenizer.decode([token], skip_special_tokens=False)!r} {logprob:.2f}"
        for token, logprob in zip(response, logprobs.tolist(), strict=True)
    ]
    for start in range(0, len(pieces), _TOKENS_A_LINE):
        lines.append("  " + "  ".join(pieces[start : start + _TOKENS_A_LINE]))
    return "\n".join(lines)


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"
