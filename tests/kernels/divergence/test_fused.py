"""The fused projection and statistics against fp64, with tiles so small that many merge."""

from __future__ import annotations

import math
from dataclasses import asdict

import pytest
import torch
from torch import Tensor

from esr_kernels import plan_linear_divergence
from esr_kernels.common.reference import transformed_logits
from esr_kernels.common.transform import LogitTransform
from esr_kernels.divergence import fused_triton
from esr_kernels.divergence.call import Operands
from esr_kernels.divergence.fused_triton import BLOCKS, Blocks, _split_classes, fused_stats
from esr_kernels.divergence.losses import ReverseKL
from esr_kernels.divergence.statistics import (
    LOG_SUM,
    MAX,
    RowSpec,
    RowStats,
    merge_parts,
    merge_to_part,
)
from tests.kernels import cases

pytestmark = pytest.mark.kernels

TINY = Blocks(tokens=16, classes=16, depth=16, warps=4, stages=2)
PLAIN = LogitTransform()
TOKENS, CLASSES = 37, 203


def _operands(
    dtype: torch.dtype,
    tokens: int = TOKENS,
    classes: int = CLASSES,
    dims: tuple[int, int] = (24, 40),
    std: tuple[float, float] = (1.0, 1.5),
) -> list[Tensor]:
    return list(cases._pair(tokens, classes, dims, std, dtype).tensors)


def _as_operands(
    operands: list[Tensor], biases: tuple[Tensor | None, Tensor | None] = (None, None)
) -> Operands:
    s_hidden, s_weight, t_hidden, t_weight = operands
    return Operands(s_hidden, s_weight, biases[0], None, t_hidden, t_weight, biases[1], None, None)


def _statistics(operands: list[Tensor], spec: RowSpec, biases, dtype: torch.dtype) -> RowStats:
    """The same statistics from whole rows of logits, by their formulas."""
    s, t = (
        transformed_logits(*operands, bias, **asdict(transform), classes=slice(None), dtype=dtype)
        for operands, bias, transform in (
            (operands[:2], biases[0], spec.student),
            (operands[2:], biases[1], spec.teacher),
        )
    )
    p, q = s.softmax(1), t.softmax(1)

    def under(probability: Tensor, value: Tensor) -> Tensor:
        return torch.where(probability == 0, 0, probability * value).sum(1)

    s_lse, t_lse = s.logsumexp(1), t.logsumexp(1)
    return RowStats(
        student_lse=s_lse,
        teacher_lse=t_lse,
        lse_difference=s_lse - t_lse,
        difference_under_student=under(p, t - s),
        difference_under_teacher=under(q, t - s),
        student_entropy=-under(p, s.log_softmax(1)),
        teacher_entropy=-under(q, t.log_softmax(1)),
        agreement=(s.argmax(1) == t.argmax(1)).to(dtype),
        student_residual=torch.zeros_like(s_lse),  # nothing, where nothing is rounded
        teacher_residual=torch.zeros_like(t_lse),
    )


def _check(
    operands: list[Tensor],
    spec: RowSpec = RowSpec(ReverseKL(), PLAIN, PLAIN),  # noqa: B008
    biases: tuple[Tensor | None, Tensor | None] = (None, None),
    blocks: Blocks | None = TINY,
) -> Tensor:
    parts = fused_stats(_as_operands(operands, biases), spec, blocks)
    ours = merge_parts(parts)
    truth = _statistics(operands, spec, biases, torch.float64)
    plain = _statistics(operands, spec, biases, torch.float32)
    _check_residuals(parts, ours)
    for field in RowStats._fields:
        if field.endswith("_residual"):
            continue
        exact = getattr(truth, field)
        error = cases.relative_error(getattr(ours, field), exact)
        allowed = cases.relative_error(getattr(plain, field), exact)
        limit = max(
            cases.ALLOWED_RATIO * allowed, cases.STATISTICS_ULPS * torch.finfo(torch.float32).eps
        )
        assert error <= limit, f"{field}: error {error:.2e}, plain PyTorch {allowed:.2e}"
    return parts


def _check_residuals(parts: Tensor, ours: RowStats) -> None:
    """A log-sum-exp and its residual together are the sum that fp32 rounded."""
    merged = merge_to_part(parts).double()
    exact = merged[:, MAX] + merged[:, LOG_SUM]
    for column, side in enumerate(("student", "teacher")):
        lse, residual = getattr(ours, f"{side}_lse"), getattr(ours, f"{side}_residual")
        assert cases.relative_error(residual, exact[:, column] - lse.double()) < 1e-6


@pytest.mark.parametrize(
    ("dtype", "std"),
    [
        (torch.float32, (1.0, 1.5)),
        (torch.float32, (10.0, 30.0)),
        (torch.bfloat16, (1.0, 1.5)),
        (torch.float16, (10.0, 30.0)),
    ],
    ids=str,
)
def test_random_and_peaked(dtype, std):
    parts = _check(_operands(dtype, std=std))
    assert parts.shape == (TOKENS, 13, 10), "a split for every tile, where tokens are few"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_several_tiles_to_a_split(dtype, monkeypatch):
    monkeypatch.setattr("esr_kernels.divergence.fused_triton._WANTED_PROGRAMS", 10)
    monkeypatch.setattr("esr_kernels.divergence.fused_triton._MOST_TIMES", 1)
    parts = _check(_operands(dtype, std=(4.0, 4.0)))
    assert parts.shape[1] == 3


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize(
    ("tokens", "classes", "dims"),
    [(1, 203, (24, 40)), (17, 1, (8, 8)), (16, 32, (16, 32)), (5, 31, (1, 7)), (33, 17, (37, 5))],
    ids=str,
)
def test_odd_sizes(dtype, tokens, classes, dims):
    _check(_operands(dtype, tokens, classes, dims))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_every_transform(dtype):
    generator = torch.Generator().manual_seed(1)
    biases = tuple(
        torch.randn(CLASSES, generator=generator).to(dtype).to(cases.DEVICE) for _ in range(2)
    )
    spec = RowSpec(ReverseKL(), LogitTransform(1.7, 5.0, 0.7), LogitTransform(0.6, 7.0, 1.3))
    _check(_operands(dtype, std=(4.0, 4.0)), spec, biases)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_classes_removed_by_the_bias(dtype):
    """Whole tiles of -inf, a last class of -inf, and a class that only the student lost."""
    bias = torch.zeros(CLASSES, dtype=dtype, device=cases.DEVICE)
    bias[:40] = -torch.inf
    bias[100:140] = -torch.inf
    bias[-1] = -torch.inf
    _check(_operands(dtype), biases=(bias, bias.clone()))
    student_only = torch.zeros_like(bias)
    student_only[50] = -torch.inf
    stats = merge_parts(
        fused_stats(
            _as_operands(_operands(dtype), (student_only, None)),
            RowSpec(ReverseKL(), PLAIN, PLAIN),
            TINY,
        )
    )
    assert bool(stats.difference_under_student.isfinite().all())
    assert bool((stats.difference_under_teacher == torch.inf).all()), "KL(q || p) is infinite there"


def test_models_of_different_dtype_and_strided_heads():
    operands = _operands(torch.bfloat16)
    operands[2:] = [tensor.float() for tensor in operands[2:]]
    operands[1] = operands[1].T.contiguous().T
    operands[0] = torch.nn.functional.pad(operands[0], (3, 5))[:, 3:-5]
    _check(operands)


def test_shards_merge_to_the_whole():
    operands = _operands(torch.bfloat16)
    spec = RowSpec(ReverseKL(), PLAIN, PLAIN)
    s_hidden, s_weight, t_hidden, t_weight = operands
    parts = [
        fused_stats(
            _as_operands([s_hidden, s_weight[shard], t_hidden, t_weight[shard]]), spec, TINY
        )
        for shard in (slice(0, 50), slice(50, 51), slice(51, CLASSES))
    ]
    ours = merge_parts(torch.cat(parts, dim=1))
    truth = _statistics(operands, spec, (None, None), torch.float64)
    assert cases.relative_error(ours.lse_difference, truth.lse_difference) < 1e-6
    assert torch.equal(ours.agreement.double(), truth.agreement)


@pytest.mark.parametrize("splits", [1, 13])
def test_first_class_of_the_maximum(splits, monkeypatch):
    """Of equal logits the lowest class, as torch.argmax has it, within a tile and across tiles."""
    monkeypatch.setattr("esr_kernels.divergence.fused_triton._WANTED_PROGRAMS", splits)
    monkeypatch.setattr("esr_kernels.divergence.fused_triton._MOST_TIMES", 1)
    hidden = torch.ones(1, 16, device=cases.DEVICE)
    weight = torch.zeros(CLASSES, 16, device=cases.DEVICE)
    weight[[70, 71, 180]] = 1.0
    spec = RowSpec(ReverseKL(), PLAIN, PLAIN)
    parts = fused_stats(_as_operands([hidden, weight, hidden, weight.flip(0)]), spec, TINY)
    assert parts.shape[1] == splits
    found = parts[0, :, 8:].gather(0, parts[0, :, :2].argmax(0)[None])
    assert found.tolist() == [[70, 202 - 180]]


def test_nan_stays_in_its_row():
    operands = _operands(torch.float32)
    operands[0][3, 5] = torch.nan
    spec = RowSpec(ReverseKL(), PLAIN, PLAIN)
    stats = merge_parts(fused_stats(_as_operands(operands), spec, TINY))
    assert stats.student_lse.isnan().nonzero().tolist() == [[3]]


def test_repeats_bit_for_bit():
    operands = _operands(torch.bfloat16)
    spec = RowSpec(ReverseKL(), PLAIN, PLAIN)
    first, second = (fused_stats(_as_operands(operands), spec, TINY) for _ in range(2))
    assert torch.equal(first, second)


def test_no_tokens():
    operands = _operands(torch.bfloat16)
    operands[0], operands[2] = operands[0][:0], operands[2][:0]
    parts = fused_stats(_as_operands(operands), RowSpec(ReverseKL(), PLAIN, PLAIN))
    assert parts.shape[0] == 0 and parts.shape[2] == 10


def test_committed_tiles():
    """Of every kind, at the sizes that a GPU would take."""
    _check(_operands(torch.bfloat16, 5, 300, (32, 48)), blocks=None)
    _check(_operands(torch.float32, 5, 150, (32, 48)), blocks=None)
    _check(_operands(torch.bfloat16, 5, 150, (31, 48)), blocks=None)


@pytest.mark.parametrize("operand", [0, 3])
def test_dtypes_must_agree(operand):
    operands = _operands(torch.bfloat16)
    operands[operand] = operands[operand].double()
    name = ("student", "teacher")[operand // 2]
    with pytest.raises(TypeError, match=f"{name}_hidden and {name}_weight must share a dtype"):
        fused_stats(_as_operands(operands), RowSpec(ReverseKL(), PLAIN, PLAIN), TINY)


@pytest.mark.parametrize("rows", [1, 100, 8192, 1 << 20])
@pytest.mark.parametrize("classes", [1, 127, 151_936])
def test_splits_cover_the_classes_once(rows, classes):
    for blocks in BLOCKS.values():
        splits, each = _split_classes(rows, classes, blocks, 132)
        assert (splits - 1) * each < classes <= splits * each
        assert each % blocks.classes == 0
        assert splits <= 65_535, "the second dimension of a CUDA grid"


@pytest.mark.parametrize("processors", [108, 132, 148, 304])
@pytest.mark.parametrize("rows", [1600, 4096, 6400, 8192, 100_000])
def test_the_last_round_of_programs_is_full(rows, processors):
    """The busiest processor has at most 4 % more tiles than the mean; 512 programs cost 20 %."""
    blocks = BLOCKS["16-bit", "sm_90"]
    splits, each = _split_classes(rows, 151_936, blocks, processors)
    token_blocks = math.ceil(rows / blocks.tokens)
    busiest = math.ceil(token_blocks * splits / processors) * each / blocks.classes
    mean = token_blocks * math.ceil(151_936 / blocks.classes) / processors
    assert busiest <= 1.04 * mean
    plan = plan_linear_divergence(rows, 151_936, 64, 64, plan="fused", train_hidden=False)
    assert plan._fused_splits >= splits, "the plan's memory is an upper bound"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("bias", [False, True], ids=["", "bias"])
def test_descriptors_load_what_pointers_load(dtype, bias, monkeypatch):
    """Rows, classes and a depth that fill no whole block, several tiles to a split."""
    monkeypatch.setattr(fused_triton, "_WANTED_PROGRAMS", 3)
    operands = _operands(dtype)
    biases = tuple(torch.randn(CLASSES).to(operands[0]) for _ in range(2)) if bias else (None, None)
    spec, x = RowSpec(ReverseKL(), PLAIN, PLAIN), _as_operands(operands, biases)
    described = TINY._replace(descriptors=True)
    side = fused_triton._side(*operands[:2], None, described)
    assert hasattr(side.hidden, "block_shape") and hasattr(side.weight, "block_shape")
    assert torch.equal(fused_stats(x, spec, described), fused_stats(x, spec, TINY))


@pytest.mark.parametrize("broken", ["offset", "stride", "expanded", "no depth"])
def test_rows_that_descriptors_cannot_load_are_loaded_by_pointers(broken):
    operands = _operands(torch.bfloat16)
    hidden = operands[0]
    if broken == "offset":
        storage = hidden.new_empty(hidden.numel() + 1)
        operands[0] = storage[1:].view_as(hidden).copy_(hidden)
    elif broken == "stride":
        storage = hidden.new_empty(len(hidden), hidden.shape[1] + 1)
        operands[0] = storage[:, :-1].copy_(hidden)
    elif broken == "expanded":
        operands[0] = hidden[:1].expand_as(hidden)
    else:
        operands[:2] = (x[:, :0] for x in operands[:2])
    described = TINY._replace(descriptors=True)
    assert not hasattr(fused_triton._side(*operands[:2], None, described).hidden, "block_shape")
    spec, x = RowSpec(ReverseKL(), PLAIN, PLAIN), _as_operands(operands)
    assert torch.equal(fused_stats(x, spec, described), fused_stats(x, spec, TINY))
