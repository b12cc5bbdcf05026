"""Decoding over shared prompts through the attention of real architectures, with random weights."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import peft
import pytest
import torch
import transformers

from esr_train.models import ModelError
from esr_train.rollout import PrefixRollout, RolloutBatch, cache, decoder, loop
from tests.tiny import SETTINGS, by_transformers, char_tokenizer, tiny_llama

TOKENIZER = char_tokenizer()
PROMPTS = [[3, 4, 5], [6], [7, 8, 9, 10, 11, 12, 13, 3, 9, 20, 21, 4], [3, 3]]
LAYERS, WINDOW = 4, 6  # the third prompt is longer than the window
COMMON = SETTINGS | {"num_hidden_layers": LAYERS}
# With tied heads a random Gemma repeats its last token for ever.
GEMMA = {
    "head_dim": 16,
    "query_pre_attn_scalar": 16,
    "sliding_window": WINDOW,
    "tie_word_embeddings": False,
}
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", {}),
    "qwen2": ("Qwen2", {}),
    "qwen2, windows": (
        "Qwen2",
        {"use_sliding_window": True, "sliding_window": WINDOW, "max_window_layers": 2},
    ),
    "qwen3": ("Qwen3", {"head_dim": 16}),
    "mistral": ("Mistral", {"sliding_window": WINDOW}),
    "gemma2": ("Gemma2", GEMMA | {"attn_logit_softcapping": 1.0, "final_logit_softcapping": 5.0}),
    "gemma3": ("Gemma3", GEMMA | {"layer_types": ["sliding_attention", "full_attention"] * 2}),
}


def make(name: str, seed: int = 1) -> Any:
    family, settings = MODELS[name]
    suffix = "TextConfig" if family == "Gemma3" else "Config"
    config = getattr(transformers, family + suffix)(**COMMON | settings)
    torch.manual_seed(seed)
    return getattr(transformers, family + "ForCausalLM")(config).eval()


def greedy(model: Any, length: int = 16, samples: int = 1) -> RolloutBatch:
    return PrefixRollout(model, TOKENIZER).generate(PROMPTS, samples, length, 0.0, (0,))


def assert_greedy_is_theirs(model: Any, samples: int = 1, length: int = 16) -> RolloutBatch:
    ours = greedy(model, length, samples)
    for row, prompt in enumerate(ours.prompts):
        theirs = by_transformers(model, prompt, length)
        assert ours.response(row) == theirs
        assert bool(ours.finished_by_eos[row]) == (theirs[-1] == 0)
    assert len(ours.tokens.unique()) > 5  # not one token over and over
    return ours


@pytest.fixture
def eager_compaction(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows go as soon as they have ended."""
    monkeypatch.setattr(loop, "_should_shrink", lambda gone, *_: gone > 0)


@pytest.mark.usefixtures("eager_compaction")
@pytest.mark.parametrize("name", MODELS)
def test_greedy_is_what_transformers_generates(name: str, caplog: pytest.LogCaptureFixture) -> None:
    model = make(name)
    attention = model.config._attn_implementation
    assert_greedy_is_theirs(model, samples=2)
    shared = not [r for r in caplog.records if r.name == "esr_train.rollout.decoder"]
    assert shared and model.config._attn_implementation == attention


def test_rows_that_end_at_different_times() -> None:
    """EOS and padding are one id here."""
    ended = [assert_greedy_is_theirs(tiny_llama(seed), length=24).lengths for seed in range(4)]
    assert len(torch.cat(ended).unique()) > 3


def _bloom() -> Any:
    """Its attention is of its own making, with biases by distance."""
    settings = {"n_layer": 2, "n_head": 4, "eos_token_id": 0, "bos_token_id": None}
    config = transformers.BloomConfig(
        vocab_size=32, hidden_size=32, initializer_range=0.3, **settings
    )
    return transformers.BloomForCausalLM(config)


def _gpt_oss() -> Any:
    """It goes through the interface with attention sinks, which the kernel does not know."""
    experts = {"num_local_experts": 4, "num_experts_per_tok": 2}
    config = transformers.GptOssConfig(**COMMON, head_dim=16, sliding_window=WINDOW, **experts)
    return transformers.GptOssForCausalLM(config)


class _OtherPositions(transformers.LlamaForCausalLM):
    """A model that looks like any other, and computes something else with a cache that is full."""

    def __init__(self, config: transformers.LlamaConfig) -> None:
        super().__init__(config)
        self.model.rotary_emb.register_forward_pre_hook(
            lambda _, args, kwargs: (
                (args, {"position_ids": kwargs["position_ids"] * 0 + 1})
                if args[0].shape[1] == 1 and cache._active.cache is not None
                else None
            ),
            with_kwargs=True,
        )


@pytest.mark.usefixtures("eager_compaction")
@pytest.mark.parametrize(
    ("build", "reason"),
    [
        (_bloom, "does not use transformers' attention interface"),
        (_gpt_oss, "s_aux"),
        (lambda: _OtherPositions(tiny_llama().config), "hidden states differ by"),
    ],
    ids=["bloom", "gpt-oss", "another answer"],
)
def test_other_models_decode_with_a_note(
    build: Callable[[], Any], reason: str, caplog: pytest.LogCaptureFixture
) -> None:
    torch.manual_seed(1)
    model = build().eval()
    with caplog.at_level(logging.WARNING, "esr_train"):
        assert_greedy_is_theirs(model)
    # Once per engine, not once per rollout.
    [note] = [r.getMessage() for r in caplog.records if r.name == "esr_train.rollout.decoder"]
    assert "decodes without shared prompts" in note and reason in note


def test_keys_and_values_are_those_of_prompts_and_responses() -> None:
    """P * L + B * N of them, not B * (L + N); the last of N tokens is drawn and never read."""
    samples, length = 16, 9
    rollout = PrefixRollout(make("llama"), TOKENIZER)
    rollout.generate(PROMPTS, samples, length, 1.0, (0,))
    of_a_token = 2 * LAYERS * 2 * 8 * 4  # keys and values, layers, heads, head dimension, fp32
    prompts, longest = len(PROMPTS), max(map(len, PROMPTS))
    tokens = prompts * longest + prompts * samples * (length - 1)
    assert rollout.kv_bytes == of_a_token * tokens
    assert rollout.kv_bytes < 0.5 * of_a_token * prompts * samples * (longest + length - 1)


def test_prompts_prefilled_in_parts_give_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    model = make("gemma3")
    whole = greedy(model)
    monkeypatch.setattr(decoder, "_PREFILL_TOKENS", 6)
    assert list(decoder._chunks([1, 2, 3, 12])) == [(0, 2), (2, 3), (3, 4)]
    parts = greedy(model)
    assert torch.equal(parts.tokens, whole.tokens)


def test_everything_is_put_back_when_a_step_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    model = make("llama").train()
    model.model.layers[1].eval()
    training = [module.training for module in model.modules()]
    rollout = PrefixRollout(model, TOKENIZER)
    rollout.generate(PROMPTS, 1, 2, 0.0, (0,))

    def fail(*_: Any, **__: Any) -> None:
        assert model.config._attn_implementation == cache.ATTENTION
        raise RuntimeError("no")

    monkeypatch.setattr(cache, "shared_prefix_attention", fail)
    with pytest.raises(RuntimeError, match="^no$"):
        rollout.generate(PROMPTS, 1, 2, 0.0, (0,))
    assert model.config._attn_implementation == "sdpa" and cache._active.cache is None
    assert [module.training for module in model.modules()] == training


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable`:FutureWarning")
def test_a_model_in_training_samples_without_dropout_and_checkpointing() -> None:
    model = tiny_llama(1, attention_dropout=0.5)
    expected = greedy(model)
    model.gradient_checkpointing_enable()
    model.config.use_cache = False
    model.train()
    assert torch.equal(greedy(model).tokens, expected.tokens)
    assert model.training and all(module.training for module in model.modules())


def test_a_peft_student_samples_through_its_adapters() -> None:
    model = make("qwen3")
    before = greedy(model)
    config = peft.LoraConfig(target_modules=["k_proj", "up_proj"], init_lora_weights=False)
    student = peft.get_peft_model(model, config).eval()
    assert not torch.equal(assert_greedy_is_theirs(student).tokens, before.tokens)


def _prompted(config: Any) -> Any:
    return peft.get_peft_model(make("llama"), config).eval()


def _hooked() -> Any:
    model = make("llama")
    model.lm_head.register_forward_hook(lambda module, inputs, out: out * 2)
    return model


@pytest.mark.parametrize(
    ("build", "reason"),
    [
        (lambda: _prompted(peft.LoraConfig(target_modules=["lm_head"])), "head trains lora_A"),
        (
            lambda: _prompted(peft.PromptTuningConfig("CAUSAL_LM", num_virtual_tokens=3)),
            r"shape \[1, 7, 32\], not \[1, 4, 32\]",
        ),
        (
            lambda: _prompted(peft.PrefixTuningConfig("CAUSAL_LM", num_virtual_tokens=3)),
            "its logits are not",
        ),
        (_hooked, "its logits are not"),
    ],
    ids=["lora on the head", "prompt tuning", "prefix tuning", "hook"],
)
def test_logits_that_are_no_head_over_the_decoder_are_refused(
    build: Callable[[], Any], reason: str
) -> None:
    """They would be sampled without what is beside the two."""
    with pytest.raises(ModelError, match=reason):
        PrefixRollout(build(), TOKENIZER)
