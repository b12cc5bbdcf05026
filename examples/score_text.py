"""Where do two models disagree about a text? Both KLs and log-probs, token by token."""

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from esr_kernels import linear_divergence, token_logprob
from esr_train.tasks import builtin_model_path

names = builtin_model_path("sums-student"), builtin_model_path("sums-teacher")  # or hub ids
student, teacher = (AutoModelForCausalLM.from_pretrained(name) for name in names)
tokenizer = AutoTokenizer.from_pretrained(names[0])

prompt = "23+45+67+12="
text = tokenizer(prompt + "first 23 and 45: 20+40=60, 3+5=8,", return_tensors="pt")["input_ids"]
start = tokenizer(prompt, return_tensors="pt")["input_ids"].shape[1] - 1
target = text[0, start + 1 :]  # the tokens that hidden states from `start` on predict

with torch.no_grad():
    hidden, teacher_hidden = (m.model(text)[0][0, start:-1] for m in (student, teacher))
    models = hidden, student.lm_head.weight, teacher_hidden, teacher.lm_head.weight
    reverse = linear_divergence(*models, "reverse_kl")
    forward = linear_divergence(*models, "forward_kl")
    own = token_logprob(hidden, student.lm_head.weight, target)
    other = token_logprob(teacher_hidden, teacher.lm_head.weight, target)

print("token   KL(student||teacher)  KL(teacher||student)  log p student  log p teacher")
columns = reverse.per_token, forward.per_token, own.logprob, other.logprob
for token, *row in zip(target.tolist(), *(column.tolist() for column in columns), strict=True):
    print(f"{tokenizer.decode([token])!r:6}" + "".join(f"{x:18.4f}" for x in row))
print(f"mean reverse KL {reverse.per_token.mean():.4f} nats a token")
