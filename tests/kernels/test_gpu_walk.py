"""The path of every op on a GPU, walked on tensors without numbers (`imagined_gpu`): devices,
dtypes, strides, alignment, and that the host waits for nothing. A CUDA graph can hold each call.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from esr_kernels import (
    SampleKeys,
    SamplingParams,
    group_rows,
    linear_divergence,
    linear_topk_divergence,
    plan_linear_divergence,
    sample_from_hidden,
    sample_from_logits,
    shared_prefix_attention,
    token_logprob,
)
from esr_kernels.attention.groups import RowGroups
from esr_kernels.common import matmul
from esr_kernels.divergence import rows_triton
from tests.kernels import imagined_gpu

GPU = torch.device("cuda", 0)
# An odd number of classes, D that is a multiple of 16 bytes; tokens for several chunks.
TOKENS, CLASSES, STUDENT, TEACHER = 300, 1003, 64, 48
DTYPES = [torch.bfloat16, torch.float16, torch.float32]


@pytest.fixture(autouse=True)
def _on_an_imagined_gpu(monkeypatch):
    with imagined_gpu.imagined_gpu(monkeypatch):
        yield


def _empty(*shape: int, dtype: torch.dtype = torch.float32, device=GPU) -> Tensor:
    return torch.empty(*shape, dtype=dtype, device=device)


def _every_other(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """A view with gaps between its elements, that starts in the middle of its memory."""
    last = (slice(None),) * (len(shape) - 1) + (slice(1, None, 2),)
    return _empty(*shape[:-1], 2 * shape[-1] + 1, dtype=dtype)[last]


def _head(dtype: torch.dtype, classes: int = CLASSES, depth: int = STUDENT) -> tuple[Tensor, ...]:
    hidden, weight = _empty(TOKENS, depth, dtype=dtype), _empty(classes, depth, dtype=dtype)
    return hidden.requires_grad_(), weight.requires_grad_()


def _models(dtype: torch.dtype) -> tuple[Tensor, ...]:
    teacher = _head(dtype, CLASSES + 13, TEACHER)
    return *_head(dtype), *(x.detach() for x in teacher)


OPTIONS = {
    "plain": lambda dtype: {},
    "weights": lambda dtype: {"token_weights": _every_other(TOKENS)},
    "mean": lambda dtype: {"token_weights": _every_other(TOKENS), "reduction": "mean"},
    "expanded weights": lambda dtype: {"token_weights": _empty(1).expand(TOKENS)},
    "CPU weights": lambda dtype: {"token_weights": torch.rand(TOKENS), "compact": False},
    "compacted": lambda dtype: {"token_weights": (torch.arange(TOKENS) % 3).float()},
    "labels": lambda dtype: {
        "labels": _every_other(TOKENS, dtype=torch.int64),
        "label_weight": 0.3,
        "student_softcap": 30.0,
    },
    "CPU labels": lambda dtype: {"labels": torch.arange(TOKENS), "label_weight": 0.3},
    "biases": lambda dtype: {
        "student_bias": _every_other(CLASSES, dtype=dtype).requires_grad_(),
        "teacher_bias": _every_other(CLASSES + 13, dtype=dtype),
    },
    "two passes": lambda dtype: {"divergence": "jsd", "temperature": 0.7},
    "ids": lambda dtype: {
        "student_ids": _every_other(977, dtype=torch.int64),
        "teacher_ids": torch.arange(977),
        "student_bias": _empty(CLASSES, dtype=dtype).requires_grad_(),
    },
    "none": lambda dtype: {"reduction": "none", "token_weights": _every_other(TOKENS)},
    "weight_grad": lambda dtype: {"weight_grad": _empty(CLASSES, STUDENT)},
}
PLANS = {
    "stash": {"plan": "stash"},
    "stash of chunks": {"plan": "stash", "memory_budget": 3 << 20},
    "recompute": {"plan": "recompute"},
    "recompute in tiles": {"plan": "recompute", "memory_budget": 3 << 20},
    "fused": {"plan": "fused"},
    "auto": {},
}
_CANNOT = {("none", "stash"), ("none", "stash of chunks"), ("ids", "fused")}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("name", OPTIONS)
def test_linear_divergence(name, plan, dtype):
    if (name, plan) in _CANNOT:
        pytest.skip("refused at the boundary")
    student, weight, *teacher = _models(dtype)
    options = {**OPTIONS[name](dtype), **PLANS[plan]}
    out = linear_divergence(student, weight, *teacher, **options)
    loss = out.loss
    (loss * _every_other(TOKENS) if loss.dim() else loss * 0.5).sum().backward()
    assert student.grad.dtype == dtype and student.grad.device == GPU
    if "weight_grad" not in options:
        assert weight.grad.dtype == dtype and weight.grad.shape == weight.shape
    if options.get("student_bias") is not None:
        assert options["student_bias"].grad.dtype == dtype
    assert all(field.device == GPU for field in out)
    assert imagined_gpu.launches


@pytest.mark.parametrize("plan", ["stash", "recompute", "fused"])
def test_operands_of_any_strides(plan):
    """Hidden states and heads that are transposed, offset, or every other column."""
    hidden = _empty(STUDENT, TOKENS, dtype=torch.bfloat16).T.requires_grad_()
    weight = _every_other(CLASSES, STUDENT, dtype=torch.bfloat16).requires_grad_()
    teacher = _empty(TOKENS + 1, TEACHER + 8, dtype=torch.bfloat16)[1:, 8:]
    teacher_weight = _empty(TEACHER, CLASSES, dtype=torch.bfloat16).T
    linear_divergence(hidden, weight, teacher, teacher_weight, plan=plan).loss.backward()
    assert hidden.grad.shape == hidden.shape and weight.grad.shape == weight.shape


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("budget", [None, 1 << 19])
def test_token_logprob(dtype, budget):
    hidden, weight = _head(dtype)
    bias = _every_other(CLASSES, dtype=dtype).requires_grad_()
    tokens = _every_other(TOKENS, dtype=torch.int64)
    scored = token_logprob(hidden, weight, tokens, bias=bias, softcap=30.0, memory_budget=budget)
    (scored.logprob - 0.1 * scored.entropy).sum().backward()
    assert hidden.grad.dtype == weight.grad.dtype == bias.grad.dtype == dtype


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("weights", ["strided", "expanded", "CPU"])
def test_linear_topk_divergence(dtype, weights):
    hidden, weight = _head(dtype)
    ids, logprobs = _every_other(TOKENS, 5, dtype=torch.int64), _every_other(TOKENS, 5)
    token_weights = {
        "strided": lambda: _every_other(TOKENS),
        "expanded": lambda: _empty(1).expand(TOKENS),
        "CPU": lambda: torch.rand(TOKENS),
    }[weights]()
    out = linear_topk_divergence(hidden, weight, ids, logprobs, token_weights=token_weights)
    out.loss.backward()
    assert hidden.grad.dtype == weight.grad.dtype == dtype


FILTERS = [SamplingParams(), SamplingParams(0.0), SamplingParams(0.7, 40, 0.9, 0.01)]


def _keys(rows: int) -> SampleKeys:
    return SampleKeys(
        1, _every_other(rows, dtype=torch.int64), torch.empty((), dtype=torch.int64, device=GPU)
    )


def _per_row(rows: int) -> SamplingParams:
    return SamplingParams(
        _every_other(rows), _every_other(rows, dtype=torch.int64), _every_other(rows)
    )


@pytest.mark.parametrize("params", [*FILTERS, _per_row], ids=["plain", "greedy", "all", "per row"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rows", [7, 300])
def test_sampling(rows, dtype, params):
    """7 rows without filters are drawn by the fused kernel."""
    params = params(rows) if callable(params) else params
    bias = _every_other(CLASSES, dtype=dtype)
    options = {"bias": bias, "invalid": _every_other(CLASSES, dtype=torch.bool), "softcap": 30.0}
    hidden, weight = _head(dtype)
    drawn = sample_from_hidden(hidden[:rows], weight, _keys(rows), params, **options)
    assert drawn.tokens.dtype == torch.int64 and drawn.tokens.device == GPU
    logits = _every_other(rows, CLASSES, dtype=dtype)
    drawn = sample_from_logits(logits, _keys(rows), params, **options)
    assert drawn.logprob.shape == (rows,)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("grouped", [False, True])
def test_shared_prefix_attention(dtype, grouped):
    prompts, rows, heads, kv_heads, dim = 3, 12, 4, 2, 64
    groups = None
    if grouped:
        made = group_rows([0] * 5 + [1] * 4 + [2] * 3, prompts)
        groups = RowGroups(*(_every_other(*x.shape, dtype=torch.int64) for x in made))
    out = shared_prefix_attention(
        _every_other(rows, heads, dim, dtype=dtype),
        _empty(kv_heads, prompts, 40, dim, dtype=dtype).transpose(0, 1),
        _every_other(prompts, kv_heads, 40, dim, dtype=dtype),
        _every_other(prompts, dtype=torch.int64),
        _empty(rows, 9, kv_heads, dim, dtype=dtype).transpose(1, 2),
        _empty(rows, 9, kv_heads, dim, dtype=dtype).transpose(1, 2),
        _every_other(rows, dtype=torch.int64),
        groups=groups,
        window=None if grouped else 16,
    )
    assert out.dtype == dtype and out.shape == (rows, heads, dim)
    assert imagined_gpu.launches == ["prefix_attention_kernel", "suffix_attention_kernel"]


FULL_SIZE = {
    "stash": {"plan": "stash"},
    "stash of chunks": {"plan": "stash", "memory_budget": 3 << 30},
    "recompute": {"plan": "recompute", "memory_budget": 2 << 30},
    "mapped stash": {"plan": "stash", "ids": True},
    "mapped recompute": {"plan": "recompute", "memory_budget": 2 << 30, "ids": True},
}


@pytest.mark.parametrize("name", FULL_SIZE)
def test_a_call_of_full_size(name):
    """8,192 tokens of a 1.5B student and a 7B teacher: the peak is the plan's, no product small."""
    how = dict(FULL_SIZE[name])
    tokens, classes, student, teacher = 8192, 151_936, 1536, 3584
    bf16 = torch.bfloat16
    operands = [
        _empty(*shape, dtype=bf16)
        for shape in ((tokens, student), (classes, student), (tokens, teacher), (classes, teacher))
    ]
    for x in operands[:2]:
        x.requires_grad_()
    mapped = how.pop("ids", False)
    plan = plan_linear_divergence(tokens, classes, student, teacher, ids=mapped, **how)
    ids = {}
    if mapped:
        ids = {f"{model}_ids": torch.arange(classes) for model in ("student", "teacher")}
    imagined_gpu.products.clear()
    before = imagined_gpu.memory.restart()
    linear_divergence(*operands, plan=plan, **ids).loss.backward()
    gradients = sum(x.numel() * x.itemsize for x in operands[:2])
    peak = imagined_gpu.memory.peak - before - gradients
    # Vectors over tokens, and the ids on the GPU, are not counted.
    assert 0.7 * plan.extra_bytes < peak <= plan.extra_bytes + (16 << 20)
    assert all(min(x) >= 256 and max(x) >= 8192 for x in imagined_gpu.products)


def test_the_statistics_of_many_tiles_are_counted(monkeypatch):
    """In blocks as narrow as Triton 3.6 has them."""
    monkeypatch.setattr(rows_triton, "STATISTICS_BLOCK", (1, 4))
    tokens, classes, dim = 4096, 60_000, 64
    operands = [_empty(rows, dim) for rows in (tokens, classes) * 2]
    plan = plan_linear_divergence(
        tokens, classes, dim, dim, plan="recompute", memory_budget=96 << 20, dtype=torch.float32
    )
    before = imagined_gpu.memory.restart()
    with torch.no_grad():
        linear_divergence(*operands, plan=plan)
    peak = imagined_gpu.memory.peak - before
    assert 0.9 * plan.extra_bytes < peak <= plan.extra_bytes + (1 << 20)


MISTAKES = {
    "reads a value": (lambda x: x.sum().item(), "makes the host wait"),
    "asks for truth": (lambda x: bool(x.any()), "makes the host wait"),
    "counts": (lambda x: x.nonzero(), "makes the host wait"),
    "indexes by a mask": (lambda x: x[x > 0], "a mask makes the host wait"),
    "copies to the host": (lambda x: x.cpu(), "a copy to the host"),
    "moves to the host": (lambda x: x.to("cpu"), "a copy to the host"),
    "mixes devices": (lambda x: x + torch.ones(4), "add of tensors on"),
    "mixes GPUs": (lambda x: x + _empty(4, device=torch.device("cuda", 1)), "add of tensors on"),
    "blocks": (lambda x: torch.ones(4).to(GPU), "a copy to the GPU that blocks"),
    "pages": (lambda x: torch.ones(4).to(GPU, non_blocking=True), "from memory not pinned"),
    "misaligns": (lambda x: _empty(8, 13) @ _empty(13, 16), "mm of .* with rows of 52 bytes"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_the_walk_notices(mistake):
    act, message = MISTAKES[mistake]
    with pytest.raises(AssertionError, match=message):
        act(_empty(4, 4))


@pytest.mark.parametrize("damage", ["stride", "device", "fp64"])
def test_a_launch_notices(damage, monkeypatch):
    """What a kernel is given, checked where it would be launched."""
    from esr_kernels.common.transform import LogitTransform
    from esr_kernels.divergence.losses import ReverseKL
    from esr_kernels.divergence.statistics import RowSpec, Tile

    spec = RowSpec(ReverseKL(), LogitTransform(), LogitTransform())
    teacher = {
        "stride": lambda: _empty(4, 120)[:, ::3],
        "device": lambda: _empty(4, 40, device=torch.device("cuda", 1)),
        "fp64": lambda: _empty(4, 40, dtype=torch.float64),
    }[damage]()
    with pytest.raises(AssertionError, match="t_ptr of _row_statistics_kernel"):
        rows_triton.tile_stats(Tile(_empty(4, 40), teacher), spec)


def test_products_widen():
    """The branch that no CPU takes: 16-bit operands, fp32 logits."""
    seen = []
    product = torch.mm
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "mm", lambda *a, **k: seen.append(k) or product(*a, **k))
        hidden, weight = _empty(8, 16, dtype=torch.bfloat16), _empty(40, 16, dtype=torch.bfloat16)
        matmul.project(hidden, weight, _empty(8, 64)[:, :40])
    assert [k["out_dtype"] for k in seen] == [torch.float32]
