"""A teacher known by the top-k log-probabilities that a server returned or a file holds."""

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from esr_kernels import linear_divergence, linear_topk_divergence
from esr_train.tasks import builtin_model_path
from esr_train.tasks.sums import SumsTask, step_by_step, summands_of

names = builtin_model_path("sums-student"), builtin_model_path("sums-teacher")  # or hub ids
student, teacher = (AutoModelForCausalLM.from_pretrained(name) for name in names)
tokenizer = AutoTokenizer.from_pretrained(names[0])
optimizer = torch.optim.AdamW(student.parameters(), lr=1e-4)

[problem] = SumsTask().problems("train", 1, seed=0)
text = problem.prompt + step_by_step(summands_of(problem))
ids = tokenizer(text, return_tensors="pt")["input_ids"]
with torch.no_grad():
    teacher_hidden = teacher.model(ids)[0][0]
    top = teacher.lm_head(teacher_hidden).log_softmax(-1).topk(8)  # values and indices [T, 8]

for step in range(8):
    hidden = student.model(ids)[0][0]
    out = linear_topk_divergence(
        hidden, student.lm_head.weight, top.indices, top.values, reduction="mean"
    )  # forward KL, all other tokens as one class: a lower bound of the exact one
    out.loss.backward()
    heads = student.lm_head.weight.detach(), teacher.lm_head.weight
    models = hidden.detach(), heads[0], teacher_hidden, heads[1]
    exact = linear_divergence(*models, "forward_kl", reduction="mean").loss.item()
    optimizer.step()
    optimizer.zero_grad()
    print(f"step {step}: KL by the top 8 {out.loss.item():.4f}, over all tokens {exact:.4f}")
