"""Draws from rows of logits in Triton: the GPU path of the sampler, as `sampling_torch` draws them.

statistics  One program per (row, 8 tiles): maximum and log-sum of each tile of 256 classes. Reads
            the logits once, writes 8 bytes a tile.
cutoff      With filters, two launches of one program per row: `sampling_cutoff_triton`. Then the
            statistics once more, over the kept classes.
draw        One program per row: a Gumbel variate for each tile (594 of a Qwen vocabulary, not
            151,936), the best tile, and in it a class by inverting its cumulative sum. Reads the
            tiles' statistics and 256 logits.

Nothing of the size of the logits is written. Every launch is independent of values on the device.
"""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from esr_kernels.sampling.candidates_triton import _candidates_kernel
from esr_kernels.sampling.cutoff_triton import _cutoff_kernel
from esr_kernels.sampling.kernels_triton import _draw_kernel, _tile_statistics_kernel
from esr_kernels.sampling.params import TILE, Classes, RowLaw, Sample
from esr_kernels.sampling.philox import SampleKeys, key_words, step_tensor

# (tiles in a program, warps): 16 logits a thread.
STATISTICS_BLOCK = (8, 4)
# (logits of a row at a time, warps). One program has a multiprocessor for itself where rows are
# few, so the pass over a row takes many warps to keep loads in flight; the passes over its list
# take few, to be short.
CANDIDATES_BLOCK = (4096, 16)
CUTOFF_BLOCK = (2048, 8)
# Candidates of a row that are listed; rows with more are read whole. 64 KiB a row.
CAPACITY = 8192
# Maxima of tiles at a time there.
_MAXIMA = 1024
# Tiles of a row at a time in the draw; columns of the head where it recomputes a tile; warps.
DRAW_BLOCK = (512, 32, 8)
# The place of -inf in the order of the fp32 numbers.
_LOWEST = -0x7F800001


def sample_rows(raw: Tensor, classes: Classes, law: RowLaw, keys: SampleKeys) -> Sample:
    """Draw from raw logits [B, >= count] of bf16, fp16 or fp32, which are only read."""
    raw = raw if raw.stride(1) == 1 else raw.contiguous()
    statistics = tile_statistics(raw, classes, law)
    cutoff, kept = None, None
    if law.filtered:
        cutoff = cutoffs(raw, classes, law, statistics)
        kept = tile_statistics(raw, classes, law, cutoff)
    return draw(raw, None, classes, law, keys, statistics, cutoff, kept)


def _shared_arguments(classes: Classes, law: RowLaw) -> dict[str, object]:
    invalid, softcap = classes.invalid, classes.transform.softcap
    return {
        "bias_ptr": None if classes.bias is None else classes.bias.contiguous(),
        "invalid_ptr": None if invalid is None else invalid.contiguous().view(torch.uint8),
        "inv_temperature_ptr": law.inv_temperature,
        "n_classes": classes.count,
        "n_tiles": triton.cdiv(classes.count, TILE),
        "scale": float(classes.transform.scale),
        "softcap": None if softcap is None else float(softcap),
    }


def tile_statistics(
    raw: Tensor, classes: Classes, law: RowLaw, cutoff: tuple[Tensor, Tensor] | None = None
) -> tuple[Tensor, Tensor]:
    """Maxima and log-sums [B, tiles] fp32, of the classes that `cutoff` keeps."""
    rows, tiles = raw.shape[0], triton.cdiv(classes.count, TILE)
    maxima, log_sums = _empties(2, rows, tiles, like=raw)
    threshold, last = cutoff or (None, None)
    block, warps = STATISTICS_BLOCK
    if rows:
        _tile_statistics_kernel[(rows, triton.cdiv(tiles, block))](
            raw,
            raw.stride(0),
            threshold_ptr=threshold,
            last_ptr=last,
            maxima_ptr=maxima,
            log_sums_ptr=log_sums,
            TILE=TILE,
            BLOCK_TILES=block,
            num_warps=warps,
            **_shared_arguments(classes, law),
        )
    return maxima, log_sums


def cutoffs(
    raw: Tensor, classes: Classes, law: RowLaw, statistics: tuple[Tensor, Tensor]
) -> tuple[Tensor, Tensor]:
    """(threshold fp32, last class kept at it int32), each [B]."""
    rows, tiles = statistics[0].shape
    threshold, tops, totals, bounds = _empties(4, rows, like=raw)
    last, counts = _empties(2, rows, like=raw, dtype=torch.int32)
    ranked = law.top_k is not None or law.top_p is not None
    capacity = min(CAPACITY, triton.next_power_of_2(classes.count)) if ranked else 1
    (values,) = _empties(1, rows, capacity, like=raw)
    (ids,) = _empties(1, rows, capacity, like=raw, dtype=torch.int32)
    if not rows:
        return threshold, last
    arguments = {
        **_shared_arguments(classes, law),
        "top_k_ptr": law.top_k,
        "top_p_ptr": law.top_p,
        "values_ptr": values,
        "ids_ptr": ids,
        "counts_ptr": counts,
        "tops_ptr": tops,
        "totals_ptr": totals,
        "bounds_ptr": bounds,
        "RANKED": ranked,
        "CAPACITY": capacity,
    }
    widest = triton.next_power_of_2(classes.count)
    _candidates_kernel[(rows,)](
        raw,
        raw.stride(0),
        maxima_ptr=statistics[0],
        log_sums_ptr=statistics[1],
        LOWEST=_LOWEST,
        BLOCK_TILES=min(_MAXIMA, triton.next_power_of_2(tiles)),
        BLOCK=min(CANDIDATES_BLOCK[0], widest),
        num_warps=CANDIDATES_BLOCK[1],
        **arguments,
    )
    _cutoff_kernel[(rows,)](
        raw,
        raw.stride(0),
        min_p_ptr=law.min_p,
        threshold_ptr=threshold,
        last_ptr=last,
        BLOCK=min(CUTOFF_BLOCK[0], widest),
        num_warps=CUTOFF_BLOCK[1],
        **arguments,
    )
    return threshold, last


def draw(
    source: Tensor,
    weight: Tensor | None,
    classes: Classes,
    law: RowLaw,
    keys: SampleKeys,
    statistics: tuple[Tensor, Tensor],
    cutoff: tuple[Tensor, Tensor] | None = None,
    kept: tuple[Tensor, Tensor] | None = None,
) -> Sample:
    """Draw by the statistics of tiles; `source` is logits, or hidden states with `weight`."""
    rows = source.shape[0]
    (tokens,) = _empties(1, rows, like=source, dtype=torch.int64)
    fields = _empties(3, rows, like=source)
    if not rows:
        return Sample(tokens, *fields)
    step = step_tensor(keys)
    threshold, last = cutoff or (None, None)
    kept_maxima, kept_log_sums = kept or (None, None)
    low, high = key_words(keys.seed)
    tiles, depth, warps = DRAW_BLOCK
    _draw_kernel[(rows,)](
        source,
        source.stride(0),
        weight,
        0 if weight is None else weight.stride(0),
        0 if weight is None else weight.shape[1],
        greedy_ptr=None if law.greedy is None else law.greedy.view(torch.uint8),
        threshold_ptr=threshold,
        last_ptr=last,
        maxima_ptr=statistics[0],
        log_sums_ptr=statistics[1],
        kept_maxima_ptr=kept_maxima,
        kept_log_sums_ptr=kept_log_sums,
        rows_ptr=keys.rows.contiguous(),
        step_ptr=step,
        step_stride=0 if step.numel() == 1 else step.stride(0),
        seed_low=_signed(low),
        seed_high=_signed(high),
        tokens_ptr=tokens,
        logprob_ptr=fields[0],
        log_kept_ptr=fields[1],
        lse_ptr=fields[2],
        FROM_HIDDEN=weight is not None,
        ALL_GREEDY=law.all_greedy,
        TILE=TILE,
        BLOCK_TILES=min(tiles, triton.next_power_of_2(statistics[0].shape[1])),
        BLOCK_D=depth,
        num_warps=warps,
        **_shared_arguments(classes, law),
    )
    return Sample(tokens, *fields)


def _empties(
    count: int, *shape: int, like: Tensor, dtype: torch.dtype = torch.float32
) -> list[Tensor]:
    """Tensors apart, so that each is aligned: for others Triton compiles another kernel."""
    return [torch.empty(shape, dtype=dtype, device=like.device) for _ in range(count)]


def _signed(word: int) -> int:
    """A 32-bit word as Triton passes it, so that no seed compiles another kernel."""
    return word - (1 << 32) if word >> 31 else word
