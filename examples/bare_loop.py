"""On-policy distillation in a loop of your own: sample 16 tokens, score them, take a step."""

import torch
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoModelForCausalLM, AutoTokenizer

from esr_kernels import linear_divergence
from esr_train.rollout import PrefixRollout
from esr_train.tasks import builtin_model_path
from esr_train.tasks.sums import SumsTask

names = builtin_model_path("sums-student"), builtin_model_path("sums-teacher")  # or hub ids
student, teacher = (AutoModelForCausalLM.from_pretrained(name) for name in names)
tokenizer = AutoTokenizer.from_pretrained(names[0])
engine = PrefixRollout(student, tokenizer)  # samples with the weights that are being trained
optimizer = torch.optim.AdamW(student.parameters(), lr=1e-4)

for step in range(6):
    problems = SumsTask().problems("train", 16, seed=step)
    prompts = [tokenizer(problem.prompt)["input_ids"] for problem in problems]
    batch = engine.generate(prompts, 1, 16, 1.0, ("bare loop", step))  # 1 sample each, T = 1
    texts = [torch.tensor(prompt + batch.response(i)) for i, prompt in enumerate(batch.prompts)]
    ids = pad_sequence(texts, batch_first=True)  # [B, S]
    mask = pad_sequence([torch.ones_like(text) for text in texts], batch_first=True)
    # The hidden state at a position predicts the next token: from the prompt's last one on.
    start = torch.tensor([len(prompt) for prompt in batch.prompts])[:, None] - 1
    position = torch.arange(ids.shape[1])
    sampled = (position >= start) & (position < start + batch.lengths[:, None])

    with torch.no_grad():
        teacher_hidden = teacher.model(ids, attention_mask=mask).last_hidden_state[sampled]
    hidden = student.model(ids, attention_mask=mask).last_hidden_state[sampled]
    heads = student.lm_head.weight, teacher.lm_head.weight
    out = linear_divergence(hidden, heads[0], teacher_hidden, heads[1], reduction="mean")
    out.loss.backward()  # reverse KL unless another divergence is named
    optimizer.step()
    optimizer.zero_grad()
    print(f"step {step}: reverse KL {out.loss.item():.3f} nats a token")
