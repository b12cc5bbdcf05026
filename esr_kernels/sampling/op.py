"""One token a row, drawn from its exact distribution: temperature, top-k, top-p, min-p."""

from __future__ import annotations

import torch
from torch import Tensor

from esr_kernels.common import matmul, triton_installed
from esr_kernels.common.arguments import (
    check_bias,
    check_head,
    check_impl,
    check_memory_budget,
    check_size,
    checked_transform,
)
from esr_kernels.common.workspace import borrow_rows, default_memory_budget
from esr_kernels.sampling import draw_torch, reference
from esr_kernels.sampling.arguments import (
    check_keys,
    check_logits,
    check_rows,
    checked_classes,
)
from esr_kernels.sampling.params import Classes, RowParams, Sample, SamplingParams, row_params
from esr_kernels.sampling.philox import SampleKeys, keys_of

__all__ = ["Sample", "SampleKeys", "SamplingParams", "sample_from_hidden", "sample_from_logits"]

_NO_CHANGE = SamplingParams()


def sample_from_logits(
    logits: Tensor,
    keys: SampleKeys,
    params: SamplingParams = _NO_CHANGE,
    *,
    bias: Tensor | None = None,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    num_classes: int | None = None,
    invalid: Tensor | None = None,
    impl: str = "auto",
) -> Sample:
    """Draw one token a row from logits.

    z = softcap * tanh(scale * (logits + b) / softcap) / temperature; -inf for invalid classes.
    Unfiltered, the token is drawn from softmax(z), in two stages, over tiles of 256
    classes, with random words that depend on (seed, row id, step, tile) only:

        tile  = argmax_t  log sum_{i in t} exp z_i + g_t         g_t standard Gumbel
        token = least i in the tile with  sum_{j <= i} p_j > u   p = softmax in the tile

    With filters (`SamplingParams`) the same two stages run over the kept classes.

    Args:
        logits: [B, V] bf16, fp16, fp32 or fp64, raw; read only.
        keys: `SampleKeys`. A row's token is a function of its logits, its id, the seed and the
            step, and of nothing else: not of the batch order, other rows or the launch. A draw
            with the same key repeats; with the same key and different logits, draws are correlated.
        params: `SamplingParams`.
        bias: [V], added to the logits. softcap, logit_scale: the transform above.
        num_classes: classes that exist, from 0; columns beyond it are padding.
        invalid: classes never drawn, and outside of `logprob`'s distribution: [V] bool, True where
            removed, or int64 ids.
        impl: "auto" (Triton on GPU, PyTorch on CPU), "torch", "triton", or "reference".

    Returns:
        `Sample`: tokens [B] int64; logprob [B] fp32, log softmax(z) of the token over all valid
        classes, before filters; log_kept [B] fp32, log of the mass that the filters kept, so that
        logprob - log_kept is the log-probability with which the token was drawn; lse [B] fp32. In
        a greedy row (temperature 0) logprob and lse are at temperature 1, and log_kept is 0.
        A row without a distribution (a logit of NaN or +inf, or no valid class) has logprob and
        log_kept NaN, lse not finite, and as its token the first class of its largest logit that
        is a number, 0 where none is above -inf: always a class below num_classes.

    Raises:
        ValueError, TypeError: naming the argument, what it was and what is allowed.

    Exactness: the distribution is exact up to the rounding of fp32 logits and tile sums, 1e-6 of a
        probability; no tail is cut: Gumbel noise has 64 random bits, the level in a tile 52.
        Repeated calls agree bit for bit. PyTorch and Triton use the same words; as their sums round
        differently, about one draw in a million differs.
    Memory: no [B, V] tensor beyond the logits. On CPU up to three blocks of rows, 2.5 MB each,
        which the next call uses again (`release_workspace`); on GPU 8 bytes a row and tile, and
        with filters twice that and 64 KiB a row.
    Gradients: none; operands are read without autograd.
    Reference: `esr_kernels.sampling.reference.sample_rows`.

    Example:
        >>> keys = SampleKeys(seed=0, rows=torch.arange(len(logits)), step=3)
        >>> sample_from_logits(logits, keys, SamplingParams(0.7, top_p=0.95)).tokens
    """
    check_logits(logits)
    if num_classes is not None:
        check_size("num_classes", num_classes, 1)
        if num_classes > logits.shape[1]:
            raise ValueError(
                f"num_classes must be at most {logits.shape[1]}, the columns of logits, "
                f"got {num_classes}"
            )
    check_bias("bias", bias, logits, logits.shape[1])
    check_impl(impl, "logits", logits)
    transform = checked_transform(
        ("logit_scale", logit_scale), ("softcap", softcap), ("temperature", 1.0)
    )
    keys = check_keys(keys, logits)
    check_rows(params, logits)
    count = num_classes or logits.shape[1]
    on_triton = _on_triton(impl, logits)
    classes = checked_classes(
        count, logits, logits.shape[1], bias, transform, invalid, mask=on_triton
    )
    with torch.no_grad():
        if impl == "reference":
            return reference.sample_rows(logits, classes, params, keys)
        per_row = row_params(params, logits.shape[0], count, logits.device)
        return _sample_rows(logits, classes, per_row, keys, on_triton)


def sample_from_hidden(
    hidden: Tensor,
    weight: Tensor,
    keys: SampleKeys,
    params: SamplingParams = _NO_CHANGE,
    *,
    bias: Tensor | None = None,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    num_classes: int | None = None,
    invalid: Tensor | None = None,
    memory_budget: int | None = None,
    impl: str = "auto",
) -> Sample:
    """Draw one token a row from hidden states: `sample_from_logits(hidden @ weight.T, ...)`.

    Args:
        hidden: [B, D] and `weight` [V, D], of the same dtype (or autocast to the same).
        memory_budget: bytes of logits that may exist at once; None takes
            `default_memory_budget(device)`. Rows are processed in chunks that fit.
        All others: as in `sample_from_logits`; `bias` is [V].

    Returns:
        `Sample`, as in `sample_from_logits`. Logits are fp32 for operands of any dtype (fp64 for
        fp64).

    Raises:
        ValueError, TypeError: naming the argument, what it was and what is allowed.

    Exactness: as in `sample_from_logits`, given the logits. A matrix product may round a row
        differently in another batch, which changes a token's probability by about 1e-6 and, with
        the same key, the token in about as many draws.
    Memory: a chunk of fp32 logits within the budget. On GPU few rows without filters
        (`calibration.Rates`) are drawn without any logits in memory.
    Gradients: none.
    Reference: `esr_kernels.sampling.reference.sample_rows` of the product in fp64.
    """
    transform = checked_transform(
        ("logit_scale", logit_scale), ("softcap", softcap), ("temperature", 1.0)
    )
    head = check_head("", hidden, weight, bias, transform, num_classes, impl)
    keys = check_keys(keys, hidden)
    check_rows(params, hidden)
    rows, dtype = hidden.shape[0], matmul.logits_dtype(head.hidden.dtype)
    chunk = _rows_at_once(head.classes * dtype.itemsize, memory_budget, hidden.device.type)
    on_triton = _on_triton(impl, hidden)
    classes = checked_classes(
        head.classes, hidden, weight.shape[0], head.bias, head.transform, invalid, mask=on_triton
    )
    with torch.no_grad():
        if impl == "reference":
            logits = head.hidden.double() @ head.weight.double().T
            return reference.sample_rows(logits, classes, params, keys)
        per_row = row_params(params, rows, head.classes, hidden.device)
        if on_triton and not per_row.filtered:
            from esr_kernels.sampling import fused_triton

            if fused_triton.is_faster(rows, hidden.shape[1], str(hidden.device)):
                return fused_triton.sample(head.hidden, head.weight, classes, per_row, keys)

        def sample(some: slice) -> Sample:
            count = some.stop - some.start
            logits = borrow_rows("logits to sample", (count, head.classes), hidden.device, dtype)
            matmul.project(head.hidden[some], head.weight[: head.classes], logits)
            return _sample_rows(
                logits, classes, per_row.of_rows(some), keys_of(keys, some), on_triton
            )

        parts = [
            sample(slice(start, min(start + chunk, rows)))
            for start in range(0, max(rows, 1), chunk)
        ]
        return Sample(*(torch.cat(fields) for fields in zip(*parts, strict=True)))


def _on_triton(impl: str, operand: Tensor) -> bool:
    if impl == "auto":
        on_gpu = operand.device.type != "cpu" and operand.dtype != torch.float64
        return on_gpu and triton_installed.TRITON
    return impl == "triton"


def _sample_rows(
    logits: Tensor, classes: Classes, params: RowParams, keys: SampleKeys, on_triton: bool
) -> Sample:
    if on_triton:
        from esr_kernels.sampling import draw_triton

        return draw_triton.sample_rows(logits, classes, params, keys)
    return draw_torch.sample_rows(logits, classes, params, keys)


def _rows_at_once(row_bytes: int, memory_budget: int | None, device: str) -> int:
    check_memory_budget(memory_budget)
    if memory_budget is not None and memory_budget < row_bytes:
        raise ValueError(
            f"memory_budget must be at least {row_bytes} bytes, a row of logits, "
            f"got {memory_budget}"
        )
    return max(1, (memory_budget or default_memory_budget(device)) // row_bytes)
