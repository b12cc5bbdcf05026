"""Hidden states and heads of a real pair of models on text that the student wrote: SmolLM2-135M and
copies of it, for questions that random logits cannot answer."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from esr_train.config import ModelConfig, RuntimeConfig
from esr_train.data import TokenizedTask
from esr_train.models import decoder, head, load_model, load_tokenizer
from esr_train.tasks import load_task

PROMPTS, NEW_TOKENS = 8, 64
# Students by how far they are from the teacher: fewer layers (what configs/smollm2.yaml starts
# from), one layer fewer, and the teacher itself with hidden states that err by 2 %.
STUDENTS = {"3 layers fewer": [15, 18, 21], "1 layer fewer": [18], "2 % noise": []}
_NOISE = 0.02


class RealPair(NamedTuple):
    """[T, D] states and [V, D] heads, fp32."""

    student_hidden: Tensor
    student_weight: Tensor
    teacher_hidden: Tensor
    teacher_weight: Tensor


@torch.no_grad()
def real_pair(student: str) -> RealPair:
    """The pair on `PROMPTS` responses of `NEW_TOKENS` tokens that the student sampled."""
    runtime = RuntimeConfig(dtype="float32")
    spec = ModelConfig(model="smollm2", drop_layers=STUDENTS[student])
    tokenizer = load_tokenizer(spec, runtime)
    models = load_model(spec, runtime), load_model(ModelConfig(model="smollm2"), runtime)
    tokenized = TokenizedTask(load_task("prompts"), tokenizer)
    torch.manual_seed(0)
    rows: tuple[list[Tensor], list[Tensor]] = ([], [])
    for problem in tokenized.task.problems("train", PROMPTS, 0)[:PROMPTS]:
        prompt = torch.tensor([tokenized.ids(problem)])
        text = models[0].generate(
            prompt, do_sample=True, top_k=0, max_new_tokens=NEW_TOKENS, min_new_tokens=NEW_TOKENS
        )
        for model, states in zip(models, rows, strict=True):
            hidden = decoder(model)(input_ids=text, use_cache=False).last_hidden_state[0]
            states.append(hidden[prompt.shape[1] - 1 : -1])
    hidden = [torch.cat(states) for states in rows]
    if not STUDENTS[student]:
        scale = _NOISE * hidden[0].norm(dim=1, keepdim=True) / hidden[0].shape[1] ** 0.5
        hidden[0] = hidden[0] + scale * torch.randn_like(hidden[0])
    return RealPair(hidden[0], head(models[0]).weight, hidden[1], head(models[1]).weight)
