"""Draw tokens from hidden states: exact filters, and noise that belongs to a row."""

import torch

from esr_kernels import SampleKeys, SamplingParams, sample_from_hidden

torch.manual_seed(0)
hidden, head = torch.randn(6, 64), torch.randn(5_000, 64) / 8  # last hidden states, output head
params = SamplingParams(temperature=0.7, top_k=50, top_p=0.95)
ids = torch.arange(6)  # a number for each row, the same for as long as the row lives

drawn = sample_from_hidden(hidden, head, SampleKeys(seed=0, rows=ids, step=0), params)
print("tokens                       ", drawn.tokens.tolist())
print("log p(token), whole softmax  ", [round(x, 2) for x in drawn.logprob.tolist()])
print("log of the mass that was kept", [round(x, 2) for x in drawn.log_kept.tolist()])

# A row's token depends on its logits, id, seed and step: not on its neighbours.
alone = sample_from_hidden(hidden[4:5], head, SampleKeys(0, ids[4:5], 0), params)
print("row 4 alone draws the same:", bool(alone.tokens == drawn.tokens[4]))

# Other steps, other tokens, in the proportions of the filtered softmax.
count = 20_000
keys = SampleKeys(0, torch.arange(count), step=1)
many = sample_from_hidden(hidden[:1].expand(count, -1), head, keys, SamplingParams(top_k=3))
top = (hidden[0] @ head.T).topk(3)
for token, p in zip(top.indices.tolist(), top.values.softmax(0).tolist(), strict=True):
    share = (many.tokens == token).float().mean()
    print(f"token {token:5d}: probability {p:.3f}, drawn {share:.3f} of {count} times")
