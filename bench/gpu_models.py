"""Whole models for `gpu_suite`: training steps and rollouts of random Qwen2.5 shapes.

A step samples, scores with a frozen teacher, and updates the student; a short one (early stopping
rollouts) and a full one differ in the tokens of a response only. TRL's loss takes the place of ours
on the same hidden states. No token ends a response, so all have the same length.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from bench.gpu_timing import Part, Record, device, once
from bench.measure import MIB, extra_bytes
from bench.peers import Operands, ours, trl_chunked
from esr_train.rollout import PrefixRollout, engine


@dataclass(frozen=True)
class Shape:
    """Of a Qwen2 model with random weights."""

    hidden: int
    intermediate: int
    layers: int
    heads: int
    key_heads: int
    classes: int

    def model(self) -> Any:
        from transformers import Qwen2Config, Qwen2ForCausalLM

        config = Qwen2Config(
            vocab_size=self.classes,
            hidden_size=self.hidden,
            intermediate_size=self.intermediate,
            num_hidden_layers=self.layers,
            num_attention_heads=self.heads,
            num_key_value_heads=self.key_heads,
            max_position_embeddings=4096,
            tie_word_embeddings=True,
            bos_token_id=None,
            eos_token_id=None,
        )
        with torch.device(device()):
            return Qwen2ForCausalLM(config).to(torch.bfloat16).eval()


@dataclass(frozen=True)
class Run:
    student: Shape
    teacher: Shape
    prompts: int
    prompt_length: int
    samples: int
    short: int  # tokens of a response, of early stopping rollouts
    full: int
    micro_batch: int  # responses


QWEN_05B = Shape(896, 4864, 24, 14, 2, 151_936)
QWEN_15B = Shape(1536, 8960, 28, 12, 2, 151_936)
QWEN = Run(QWEN_05B, QWEN_15B, 16, 128, 4, 100, 1000, 8)
TINY = Run(Shape(32, 48, 2, 4, 2, 203), Shape(48, 64, 2, 4, 2, 203), 2, 7, 2, 3, 6, 2)


class _NoEnd:
    """A tokenizer, as far as sampling asks for one: no token ends a response."""

    eos_token_id = None


def _prompts(run: Run) -> list[list[int]]:
    generator = torch.Generator().manual_seed(0)
    size = (run.prompts, run.prompt_length)
    return torch.randint(0, run.student.classes, size, generator=generator).tolist()


def rollouts(run: Run) -> Iterator[Part]:
    """Tokens a second of both shapes: ours, ours without graphs, and transformers' generate."""
    for shape in (run.student, run.teacher):
        model, prompts = shape.model(), _prompts(run)
        what = f"rollout, D={shape.hidden}, {run.prompts} x {run.samples} of {run.short} tokens"
        for name, captured in (("with graphs", True), ("without graphs", False)):
            rollout = partial(_rollout, PrefixRollout(model, _NoEnd()), prompts, run, captured)
            yield f"{what}: ours, {name}", partial(_tokens_a_second, rollout, run)
        generate = partial(_generate, model, torch.tensor(prompts, device=device()), run)
        yield f"{what}: transformers generate", partial(_tokens_a_second, generate, run)
        del model


def _rollout(engine_: PrefixRollout, prompts: list[list[int]], run: Run, captured: bool) -> Any:
    without = mock.patch.object(engine, "_recorder", lambda device: None)
    with contextlib.nullcontext() if captured else without:
        return engine_.generate(prompts, run.samples, run.short, 1.0, (0,))


def _generate(model: Any, ids: Tensor, run: Run) -> Tensor:
    return model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        num_return_sequences=run.samples,
        max_new_tokens=run.short,
        do_sample=True,
        top_k=0,
        top_p=1.0,
        pad_token_id=0,
    )


def _tokens_a_second(rollout: Callable[[], object], run: Run) -> Record:
    # Graphs are captured in the third step of a shape, in the run that warms up.
    seconds = once(rollout)
    tokens = run.prompts * run.samples * run.short
    return {"s": seconds, "tokens/s": tokens / seconds}


def steps(run: Run) -> Iterator[Part]:
    """A step of early stopping rollouts with our loss and with TRL's, and a full step."""
    student, teacher = run.student.model(), run.teacher.model()
    optimizer = torch.optim.AdamW(student.parameters(), lr=1e-6, fused=device() == "cuda")
    sampler = PrefixRollout(student, _NoEnd())
    losses = {"ours": lambda: ours("auto"), "TRL's loss": trl_chunked}
    for name, length in (("ours", run.short), ("TRL's loss", run.short), ("ours", run.full)):
        step = _Step(run, student, teacher, optimizer, sampler, length)
        what = f"step, D={run.student.hidden} teacher D={run.teacher.hidden}"
        what = f"{what}, {run.prompts} x {run.samples} responses of {length} tokens"
        yield f"{what}: {name}", partial(_timed_step, step, losses[name])


@dataclass
class _Step:
    run: Run
    student: Any
    teacher: Any
    optimizer: torch.optim.Optimizer
    sampler: PrefixRollout
    length: int

    def sample(self) -> Tensor:
        """Whole sequences [responses, tokens]."""
        prompts = _prompts(self.run)
        batch = self.sampler.generate(prompts, self.run.samples, self.length, 1.0, (0,))
        asked = torch.tensor(prompts).repeat_interleave(self.run.samples, 0)
        return torch.cat([asked.to(device()), batch.tokens.to(device())], 1)

    def update(self, loss: Callable[[Operands], Tensor], sequences: Tensor) -> None:
        """Gradient of the divergence on all response tokens, and an optimizer's step."""
        first = self.run.prompt_length - 1  # its hidden state predicts the first response token
        for ids in sequences.split(self.run.micro_batch):
            with torch.no_grad():
                t = self.teacher.model(input_ids=ids).last_hidden_state[:, first:-1]
            s = self.student.model(input_ids=ids).last_hidden_state[:, first:-1]
            # The loss leaves its gradients in leaves, from where the model's backward goes on.
            leaf = s.detach().flatten(0, 1).contiguous().requires_grad_()
            x = Operands(
                leaf,
                self.student.lm_head.weight,
                t.flatten(0, 1).contiguous(),
                self.teacher.lm_head.weight.detach(),
                1.0,
            )
            loss(x)
            s.backward(leaf.grad.view_as(s))
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)


def _timed_step(step: _Step, make: Callable[[], Callable[[Operands], Tensor]]) -> Record:
    loss = make()
    sequences = step.sample()
    repeats = 1 if step.length == step.run.full else 2
    update = partial(step.update, loss, sequences)
    record: Record = {"update s": once(update, repeats), "rollout s": once(step.sample, 1)}
    peak = extra_bytes(update)
    record["s"] = record["update s"] + record["rollout s"]
    record["extra MiB"] = None if peak is None else peak / MIB
    return record
