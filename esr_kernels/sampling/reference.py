"""The specification of the sampler in plain PyTorch, fp64, with a full sort of every row.

The noise (`philox`) is part of the specification, so tokens are those of the other
implementations except for differences in rounding.
"""

from __future__ import annotations

import torch
from torch import Tensor

from esr_kernels.sampling.params import FLOORS, TILE, Classes, Sample, SamplingParams
from esr_kernels.sampling.philox import SampleKeys, gumbel, tile_words, uniform


def kept_classes(log_p: Tensor, params: SamplingParams) -> Tensor:
    """Which classes [B, V] the filters keep of the distributions `log_p` [B, V]."""
    batch, classes = log_p.shape

    def per_row(value: float | Tensor) -> Tensor:
        value = torch.as_tensor(value, device=log_p.device)
        return (value.float() if value.is_floating_point() else value).expand(batch)

    top_k, top_p = per_row(params.top_k), per_row(params.top_p)
    sorted_log_p, order = log_p.sort(dim=1, descending=True, stable=True)
    sorted_p = sorted_log_p.exp()
    rank = torch.arange(classes, device=log_p.device)
    keep = (rank < top_k[:, None]) | (top_k[:, None] == 0)
    among = torch.where(keep, sorted_p, 0.0)
    # A class stays if those before it have not yet reached top_p.
    before = among.cumsum(1) - among
    keep &= (before < top_p[:, None] * among.sum(1, keepdim=True)) | (top_p[:, None] == 1)
    top = sorted_log_p[:, 0]
    for name, floor in FLOORS.items():
        value = per_row(getattr(params, name)).to(top.dtype)
        lowest = floor.lowest(value, top, torch.zeros_like(top))
        keep &= sorted_log_p >= torch.minimum(lowest, top)[:, None]
    return torch.zeros_like(keep).scatter(1, order, keep)


def sample_rows(raw: Tensor, classes: Classes, params: SamplingParams, keys: SampleKeys) -> Sample:
    """Draw from raw logits [B, >= count] in fp64; the results are rounded to fp32 at the end."""
    batch, device = raw.shape[0], raw.device

    def per_row(value: float | Tensor) -> Tensor:
        return torch.as_tensor(value, device=device).expand(batch)

    z = raw[:, : classes.count].double()
    if classes.bias is not None:
        z = z + classes.bias.double()
    z = z * classes.transform.scale
    softcap = classes.transform.softcap
    if softcap is not None:
        z = torch.where(z == -torch.inf, z, softcap * torch.tanh(z / softcap))
    temperature = per_row(params.temperature).double()
    greedy = temperature == 0
    z = z / torch.where(greedy, 1.0, temperature)[:, None]
    if classes.invalid is not None:
        z[:, classes.invalid] = -torch.inf
    lse = z.logsumexp(1)
    log_p = z.log_softmax(1)  # not z - lse, which loses the digits of large logits
    keep = kept_classes(log_p, params)
    log_kept = torch.where(keep, log_p, -torch.inf).logsumexp(1)
    kept_z = torch.where(keep, z, -torch.inf)
    tiles = -(-classes.count // TILE)
    tiled = torch.nn.functional.pad(kept_z, (0, -classes.count % TILE), value=-torch.inf)
    tiled = tiled.unflatten(1, (tiles, TILE))
    words = tile_words(keys, tiles)
    tile = (tiled.logsumexp(2) + gumbel(*words[:2])).argmax(1)
    inside = tiled[torch.arange(batch, device=device), tile].softmax(1)
    level = uniform(*words[2:]).gather(1, tile[:, None])
    drawn = tile * TILE + (inside.cumsum(1) <= level).sum(1).clamp(max=TILE - 1)
    largest = torch.where(z.isnan(), -torch.inf, z).argmax(1)
    proper = lse.isfinite()
    tokens = torch.where(greedy | ~proper, largest, drawn)
    logprob = log_p.gather(1, tokens[:, None])[:, 0]
    log_kept = torch.where(greedy, 0.0, log_kept)
    return Sample(
        tokens,
        torch.where(proper, logprob, torch.nan).float(),
        torch.where(proper, log_kept, torch.nan).float(),
        lse.float(),
    )
