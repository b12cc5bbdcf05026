"""The variants of every Triton kernel: one launch for each combination of flags that it compiles.

Launches have the shapes of a Qwen head and tensors without data, so that launchers choose blocks
and splits as they would on a GPU. A kernel that is missing here fails tests/test_gpu_static.py.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from esr_kernels.attention import prefix_triton
from esr_kernels.attention.arguments import AttentionOptions, Cache
from esr_kernels.attention.groups import RowGroups
from esr_kernels.common import scale_triton
from esr_kernels.common.transform import LogitTransform
from esr_kernels.divergence import fused_triton, merge_triton, rows_triton
from esr_kernels.divergence.call import Operands
from esr_kernels.divergence.losses import (
    JSD,
    Divergence,
    ForwardKL,
    KLMix,
    ReverseKL,
    SkewForwardKL,
    SkewReverseKL,
    TotalVariation,
)
from esr_kernels.divergence.statistics import RowSpec, Tile
from esr_kernels.sampling import draw_triton
from esr_kernels.sampling import fused_triton as sampling_fused_triton
from esr_kernels.sampling.params import Classes, RowParams
from esr_kernels.sampling.philox import SampleKeys
from esr_kernels.scoring import selected_triton
from esr_kernels.scoring.tile import Tile as HeadTile
from esr_kernels.scoring.tile import UnselectedGradient

KERNELS = (
    "row_statistics_kernel",
    "pull_sums_kernel",
    "gradient_kernel",
    "merge_kernel",
    "cross_entropy_kernel",
    "fused_statistics_kernel",
    "select_kernel",
    "unselected_statistics_kernel",
    "unselected_gradient_kernel",
    "scatter_kernel",
    "prefix_attention_kernel",
    "suffix_attention_kernel",
    "tile_statistics_kernel",
    "candidates_kernel",
    "cutoff_kernel",
    "draw_kernel",
    "fused_tiles_kernel",
    "scale_kernel",
)

_TOKENS, _CLASSES, _DIMS = 1024, 151_936, (1536, 3584)
_PLAIN = LogitTransform()
_CAPPED = LogitTransform(scale=0.5, softcap=30.0, temperature=0.7)


def _empty(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.empty(*shape, dtype=dtype, device="meta")


def _rows(divergence: Divergence, dtype: torch.dtype, everything: bool) -> None:
    """Statistics, pull sums where the divergence takes them, and gradient."""
    bias = _empty(_CLASSES, dtype=dtype) if everything else None
    labels = _empty(_TOKENS, dtype=torch.int64) if everything else None
    transform = _CAPPED if everything else _PLAIN
    s, t = _empty(_TOKENS, _CLASSES), _empty(_TOKENS, _CLASSES)
    dz = s if dtype == torch.float32 else _empty(_TOKENS, _CLASSES, dtype=dtype)
    rows_triton.stash_rows_(
        Tile(s, t, bias, bias, labels),
        _empty(_TOKENS) if everything else None,
        RowSpec(divergence, transform, transform, label_weight=0.5 if everything else 0.0),
        dz,
    )


def _label_entropy(dtype: torch.dtype, everything: bool, depth: int = _DIMS[0]) -> None:
    """The cross-entropy of a label a row."""
    merge_triton.cross_entropy(
        _empty(_TOKENS, depth, dtype=dtype),
        _empty(_CLASSES, depth, dtype=dtype),
        _empty(_CLASSES, dtype=dtype) if everything else None,
        _empty(_CLASSES, dtype=torch.int64) if everything else None,
        _empty(_TOKENS, dtype=torch.int64),
        _empty(_TOKENS),
        RowSpec(ReverseKL(), *[_CAPPED if everything else _PLAIN] * 2),
    )


def _fused(dtype: torch.dtype, everything: bool, dims: tuple[int, int] = _DIMS) -> None:
    bias = _empty(_CLASSES, dtype=dtype) if everything else None
    transform = _CAPPED if everything else _PLAIN
    operands = [_empty(n, dim, dtype=dtype) for dim in dims for n in (_TOKENS, _CLASSES)]
    s_hidden, s_weight, t_hidden, t_weight = operands
    x = Operands(s_hidden, s_weight, bias, None, t_hidden, t_weight, bias, None, None)
    fused_triton.fused_stats(x, RowSpec(ReverseKL(), transform, transform))


def _selected(dtype: torch.dtype, everything: bool, ids_of_a_token: int = 32) -> None:
    """Statistics and gradient of the classes of no id, and of those that have one."""
    bias = _empty(_CLASSES, dtype=dtype) if everything else None
    transform = _CAPPED if everything else _PLAIN
    z, ids = _empty(_TOKENS, _CLASSES), _empty(_TOKENS, ids_of_a_token, dtype=torch.int64)
    row, selected = _empty(_TOKENS), _empty(_TOKENS, ids_of_a_token)
    dz = z if dtype == torch.float32 else _empty(_TOKENS, _CLASSES, dtype=dtype)
    tile, slope = HeadTile(z, bias, 0), selected if everything else None
    selected_triton.tile_statistics(tile, transform, ids, selected, slope)
    unselected = UnselectedGradient(row, row, row, linear=row if everything else None)
    selected_triton.tile_gradient_(tile, transform, ids, selected, unselected, dz)


def _prefix_attention(
    dtype: torch.dtype,
    everything: bool,
    heads: tuple[int, int] = (16, 8),
    dim: int = 128,
    samples: int = 8,
) -> None:
    """8 prompts of up to 400 tokens, samples of up to 100, by default with Qwen3-0.6B's heads."""
    prompts, prompt_length, length = 8, 400, 100
    batch = prompts * samples
    groups = RowGroups(
        _empty(prompts, samples, dtype=torch.int64), _empty(batch, dtype=torch.int64)
    )
    prefix = _empty(prompts, heads[1], prompt_length, dim, dtype=dtype)
    suffix = _empty(batch, heads[1], length, dim, dtype=dtype)
    prefix_triton.attend(
        _empty(batch, heads[0], dim, dtype=dtype),
        Cache(prefix, prefix, _empty(prompts, dtype=torch.int64)),
        Cache(suffix, suffix, _empty(batch, dtype=torch.int64)),
        groups if everything else None,
        AttentionOptions(dim**-0.5, *((50.0, 128) if everything else (None, None))),
    )


def _sampling(dtype: torch.dtype, everything: bool, fused_dim: int | None = None) -> None:
    """A draw from logits, or from hidden states of `fused_dim`; unfiltered, or everything."""
    transform = LogitTransform(0.5, 30.0) if everything else _PLAIN
    rows, row = 64, _empty(64)
    classes = Classes(
        _CLASSES,
        _empty(_CLASSES, dtype=dtype) if everything else None,
        transform,
        _empty(_CLASSES, dtype=torch.bool) if everything else None,
    )
    filters = everything and fused_dim is None
    params = RowParams(
        row if everything else None,
        _empty(rows, dtype=torch.bool) if everything else None,
        False,
        _empty(rows, dtype=torch.int64) if filters else None,
        row if filters else None,
        {"min_p": row} if filters else {},
    )
    seed = _empty(1, dtype=torch.int64) if everything else 1 << 40
    keys = SampleKeys(seed, _empty(rows, dtype=torch.int64), _empty(rows, dtype=torch.int64))
    if fused_dim is None:
        draw_triton.sample_rows(_empty(rows, _CLASSES, dtype=dtype), classes, params, keys)
    else:
        hidden, weight = (_empty(n, fused_dim, dtype=dtype) for n in (rows, _CLASSES))
        sampling_fused_triton.sample(hidden, weight, classes, params, keys)


def _scale(dtype: torch.dtype, adds: bool) -> None:
    x = _empty(_CLASSES, _DIMS[0], dtype=dtype)
    if adds:
        scale_triton.add_scaled_(_empty(*x.shape), x, _empty(1))
    else:
        scale_triton.scale_(x, _empty(1))


_BF16, _FP16, _FP32 = torch.bfloat16, torch.float16, torch.float32
VARIANTS: dict[str, Callable[[], None]] = {
    "rows: forward": partial(_rows, ForwardKL(), _BF16, False),
    "rows: reverse": partial(_rows, ReverseKL(), _BF16, False),
    "rows: mix, all, bf16": partial(_rows, KLMix(0.5, 0.5), _BF16, True),
    "rows: mix, all, fp16": partial(_rows, KLMix(0.5, 0.5), _FP16, True),
    "rows: mix, all, fp32": partial(_rows, KLMix(0.5, 0.5), _FP32, True),
    "rows: jsd, all": partial(_rows, JSD(), _BF16, True),
    "rows: skew forward, all": partial(_rows, SkewForwardKL(), _BF16, True),
    "rows: skew reverse, all": partial(_rows, SkewReverseKL(), _BF16, True),
    "rows: total variation, all": partial(_rows, TotalVariation(), _BF16, True),
    "labels: bf16": partial(_label_entropy, _BF16, False),
    "labels: fp32, all, odd D": partial(_label_entropy, _FP32, True, 1535),
    "fused: bf16": partial(_fused, _BF16, False),
    "fused: bf16, all": partial(_fused, _BF16, True),
    "fused: fp16, all": partial(_fused, _FP16, True),
    "fused: fp32, all": partial(_fused, _FP32, True),
    "fused: bf16, all, odd D": partial(_fused, _BF16, True, (1535, 3585)),
    "fused: fp32, all, odd D": partial(_fused, _FP32, True, (1535, 3585)),
    "scale: bf16": partial(_scale, _BF16, False),
    "scale: fp32": partial(_scale, _FP32, False),
    "scale: fp32, adds": partial(_scale, _FP32, True),
    "selected: bf16": partial(_selected, _BF16, False),
    "selected: bf16, one id": partial(_selected, _BF16, False, 1),
    "selected: bf16, all": partial(_selected, _BF16, True),
    "selected: fp32, all": partial(_selected, _FP32, True),
    "prefix attention: bf16": partial(_prefix_attention, _BF16, False),
    "prefix attention: bf16, all": partial(_prefix_attention, _BF16, True),
    "prefix attention: bf16, 32 rows": partial(_prefix_attention, _BF16, True, samples=32),
    "prefix attention: fp16, all, D 64": partial(_prefix_attention, _FP16, True, (14, 2), 64),
    "prefix attention: bf16, all, D 256": partial(_prefix_attention, _BF16, True, (8, 4), 256),
    "prefix attention: bf16, odd D": partial(_prefix_attention, _BF16, True, (9, 3), 80),
    "prefix attention: fp32, all, D 64": partial(_prefix_attention, _FP32, True, (9, 3), 64),
    "prefix attention: fp32, all": partial(_prefix_attention, _FP32, True),
    "prefix attention: fp32, all, D 256": partial(_prefix_attention, _FP32, True, (8, 4), 256),
    "sampling: fp32": partial(_sampling, _FP32, False),
    "sampling: fp32, all": partial(_sampling, _FP32, True),
    "sampling: bf16, all": partial(_sampling, _BF16, True),
    "sampling: fused, bf16": partial(_sampling, _BF16, False, 1536),
    "sampling: fused, bf16, all": partial(_sampling, _BF16, True, 1536),
    "sampling: fused, fp16, all": partial(_sampling, _FP16, True, 1536),
    "sampling: fused, fp32, all": partial(_sampling, _FP32, True, 1536),
    "sampling: fused, bf16, all, odd D": partial(_sampling, _BF16, True, 1535),
    "sampling: fused, fp32, all, odd D": partial(_sampling, _FP32, True, 1535),
}
