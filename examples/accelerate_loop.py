"""Under Accelerate, on any number of processes: accelerate launch examples/accelerate_loop.py"""

import torch
from accelerate import Accelerator
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer

from esr_kernels import linear_divergence
from esr_train.tasks import builtin_model_path
from esr_train.tasks.sums import SumsTask

names = builtin_model_path("sums-student"), builtin_model_path("sums-teacher")  # or hub ids
tokenizer = AutoTokenizer.from_pretrained(names[0])
student, teacher = map(AutoModelForCausalLM.from_pretrained, names)


class Distilled(nn.Module):
    def __init__(self, student, teacher):
        super().__init__()
        self.models = nn.ModuleList([student, teacher.requires_grad_(False)])

    def forward(self, ids, start):  # the loss is inside: here a wrapper has gathered the weights
        hidden = [m.model(ids)[0][:, start - 1 : -1].flatten(0, 1) for m in self.models]
        heads = [m.lm_head.weight for m in self.models]
        return linear_divergence(hidden[0], heads[0], hidden[1], heads[1], reduction="mean").loss


accelerator = Accelerator()
torch.manual_seed(accelerator.process_index)  # other prompts and samples on each process
optimizer = torch.optim.AdamW(student.parameters(), lr=1e-4)
model, optimizer = accelerator.prepare(Distilled(student, teacher), optimizer)
for step in range(4):
    problems = SumsTask().problems("train", 16, seed=torch.randint(2**31, ()).item())
    ids = tokenizer([p.prompt for p in problems], return_tensors="pt")["input_ids"]  # of one length
    texts = student.generate(ids.to(accelerator.device), max_new_tokens=16, do_sample=True)
    loss = model(texts, start=ids.shape[1])
    accelerator.backward(loss)
    optimizer.step()
    optimizer.zero_grad()
    accelerator.print(f"step {step}: reverse KL {loss.item():.3f} nats a token")
