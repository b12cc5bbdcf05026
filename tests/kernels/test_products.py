"""Products of `common.matmul` as a GPU computes them, on the CPU: what each version of PyTorch
accepts, what they round, and the settings under which they run."""

from __future__ import annotations

import threading

import pytest
import torch
from torch import Tensor

from esr_kernels.common import full_precision, matmul
from esr_kernels.common.widening import widening
from tests.kernels import yardstick_logits

VERSIONS = ["2.8.0", "2.9.1", "2.10.0", "2.11.0+cu128", "2.12.1", "2.13.0a0+git1234"]
# (release, rocm) from which a product of 16-bit operands into fp32 exists, from ATen's checks:
# `mm.dtype` came with pytorch#150812, in 2.8; ROCm refused it until pytorch#161540 and #162600;
# `addmm.dtype` demanded self.dtype == mat2.dtype until pytorch#167931.
_MM = {False: (2, 8), True: (2, 10)}
_ADDMM_FP32_SELF = (2, 10)


class Aten:
    """torch.mm and torch.addmm of one version, on the CPU, with the checks of its CUDA kernels."""

    def __init__(self, version: str, rocm: bool) -> None:
        self.release = tuple(map(int, version.split(".")[:2]))
        self.rocm = rocm
        self.settings: list[tuple[bool, bool]] = []  # (TF32, bf16 sums) of each product

    def mm(self, a: Tensor, b: Tensor, *, out_dtype=None, out=None) -> Tensor:
        self._check(a, b, out_dtype, out)
        product = _exactly(a, b).to(out_dtype or a.dtype)
        return product if out is None else out.copy_(product)

    def addmm(self, c: Tensor, a: Tensor, b: Tensor, *, beta, alpha, out, out_dtype=None) -> Tensor:
        self._check(a, b, out_dtype, out)
        same = c.dtype == b.dtype
        lifted = out_dtype is not None and c.dtype == out_dtype and self.release >= _ADDMM_FP32_SELF
        if not (same or lifted):
            raise RuntimeError(f"self and mat2 must have the same dtype, got {c.dtype}, {b.dtype}")
        total = alpha * _exactly(a, b)
        return out.copy_(total + beta * c.double() if beta else total)

    def _check(self, a: Tensor, b: Tensor, out_dtype, out) -> None:
        if a.dtype != b.dtype:
            raise RuntimeError(f"expected mat1 and mat2 of one dtype, got {a.dtype}, {b.dtype}")
        result = a.dtype if out_dtype is None else out_dtype
        if out is not None and out.dtype != result:
            raise RuntimeError(f"expected out of {result}, got {out.dtype}")
        if out_dtype is not None and out_dtype != a.dtype:
            if self.release < _MM[self.rocm]:
                raise RuntimeError("gemm input type BFloat16 and output type float not supported")
            if out_dtype != torch.float32 or a.dtype.itemsize != 2:
                raise RuntimeError(f"out_dtype {out_dtype} of {a.dtype}")
        settings = torch.backends.cuda.matmul
        self.settings.append(
            (
                a.dtype == torch.float32 and torch.get_float32_matmul_precision() != "highest",
                result == torch.bfloat16 and settings.allow_bf16_reduced_precision_reduction,
            )
        )


def _exactly(a: Tensor, b: Tensor) -> Tensor:
    return torch.matmul(a.double(), b.double())


@pytest.fixture(params=[False, True], ids=["cuda", "rocm"])
def rocm(request):
    return request.param


@pytest.fixture(params=VERSIONS)
def aten(request, rocm, monkeypatch):
    """`matmul` takes the branches of a GPU; its products are `Aten`'s."""
    version = Aten(request.param, rocm)
    monkeypatch.setattr(matmul, "WIDENING", widening(request.param, rocm))
    _as_on_a_gpu(monkeypatch, version)
    return version


def _as_on_a_gpu(monkeypatch, version: Aten) -> None:
    monkeypatch.setattr(matmul, "_on_gpu", lambda operand: True)
    monkeypatch.setattr(torch, "mm", version.mm)
    monkeypatch.setattr(torch, "addmm", version.addmm)
    # Several strips of everything that is copied.
    monkeypatch.setattr(matmul, "_STRIP_ELEMENTS", {"cpu": 40, "gpu": 40})
    monkeypatch.setattr(matmul, "_STRIP_STEP", 4)


def _matrix(rows: int, columns: int, dtype: torch.dtype, seed: int) -> Tensor:
    values = torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))
    return values.to(dtype)


TOKENS, CLASSES, DEPTH = 5, 23, 8
PAIRS = [
    (torch.bfloat16, torch.bfloat16),
    (torch.float16, torch.float16),
    (torch.float32, torch.float32),
    (torch.float32, torch.bfloat16),
]


@pytest.mark.parametrize("ids", [False, True], ids=["", "ids"])
@pytest.mark.parametrize("dtypes", PAIRS, ids=str)
def test_logits(aten, dtypes, ids):
    hidden, weight = _matrix(TOKENS, DEPTH, dtypes[0], 0), _matrix(CLASSES, DEPTH, dtypes[1], 1)
    rows = torch.randperm(CLASSES)[:17] if ids else None
    used = weight if rows is None else weight[rows]
    out = torch.empty(TOKENS, 32)[:, : used.shape[0]]
    matmul.project(hidden, weight, out, rows)
    torch.testing.assert_close(out, _exactly(hidden, used.T).float(), rtol=1e-6, atol=0)
    assert torch.equal(out, _exactly(hidden, used.T).float())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_the_yardstick_multiplies_as_the_device(dtype, monkeypatch):
    """Its logits are the product of the 16-bit operands, with the gradients of plain PyTorch."""
    head = [_matrix(n, DEPTH, dtype, 5).requires_grad_() for n in (TOKENS, CLASSES)]
    upstream = _matrix(TOKENS, CLASSES, torch.float32, 6)
    plain = yardstick_logits.fp32_logits(*head)
    expected = torch.autograd.grad(plain, head, upstream)
    aten = Aten("2.11.0", rocm=False)
    monkeypatch.setattr(torch, "mm", aten.mm)
    monkeypatch.setattr(yardstick_logits, "multiplies_in_16_bits", lambda *head: True)
    logits = yardstick_logits.fp32_logits(*head)
    assert len(aten.settings) == 1, "one product, of operands that Aten does not refuse"
    assert torch.equal(logits, _exactly(*(x.detach() for x in (head[0], head[1].T))).float())
    for gradient, exact in zip(torch.autograd.grad(logits, head, upstream), expected, strict=True):
        assert gradient.dtype == dtype and torch.equal(gradient, exact)


@pytest.mark.parametrize("accumulate", [False, True], ids=["", "added"])
@pytest.mark.parametrize("ids", [False, True], ids=["", "ids"])
@pytest.mark.parametrize("out_dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("gradient", ["hidden", "weight"])
def test_gradients(aten, gradient, out_dtype, ids, accumulate):
    """alpha * product + what was there, rounded to the result's dtype once."""
    dz = _matrix(TOKENS, CLASSES - 6 if ids else CLASSES, torch.bfloat16, 2)
    rows = torch.randperm(CLASSES)[: dz.shape[1]] if ids else None
    hidden, weight = (_matrix(n, DEPTH, torch.bfloat16, 3) for n in (TOKENS, CLASSES))
    how = {"alpha": 0.5, "accumulate": accumulate}
    if gradient == "hidden":
        out = _matrix(TOKENS, DEPTH, out_dtype, 4)
        expected = 0.5 * _exactly(dz, weight if rows is None else weight[rows])
        expected = (expected + out.double() if accumulate else expected).to(out_dtype)
        matmul.hidden_gradient(dz, weight, out, rows, **how)
    else:
        out = _matrix(CLASSES, DEPTH, out_dtype, 4)
        added = 0.5 * _exactly(dz.T, hidden)
        part = out.double() if rows is None else out[rows].double()
        part = part + added if accumulate else added
        expected = (
            part.to(out_dtype) if rows is None else out.index_copy(0, rows, part.to(out_dtype))
        )
        matmul.weight_gradient(dz, hidden, out, rows, **how)
    # Apart where a version has no product that adds, or where rows are gathered: rounded twice.
    eps = torch.finfo(out_dtype).eps
    torch.testing.assert_close(out, expected, rtol=2 * eps, atol=2 * eps)


@pytest.mark.parametrize("version", ["2.8.0", "2.9.1"])
def test_the_rules_notice_an_addition_that_a_version_lacks(version, monkeypatch):
    aten = Aten(version, rocm=False)
    monkeypatch.setattr(matmul, "WIDENING", widening("2.10.0", rocm=False))
    _as_on_a_gpu(monkeypatch, aten)
    dz, hidden = _matrix(5, 23, torch.bfloat16, 0), _matrix(5, 8, torch.bfloat16, 1)
    with pytest.raises(RuntimeError, match="must have the same dtype"):
        matmul.weight_gradient(dz, hidden, torch.zeros(23, 8), alpha=1.0, accumulate=True)


def test_a_version_that_is_no_version():
    with pytest.raises(ValueError, match="version must start with two numbers, got 'nightly'"):
        widening("nightly", rocm=False)


def _use(interface: str) -> None:
    if interface == "older":
        torch.set_float32_matmul_precision("high")
    else:
        torch.backends.cuda.matmul.fp32_precision = "tf32"


@pytest.fixture
def _restored():
    """PyTorch's settings, as they were."""
    settings = torch.backends.cuda.matmul
    yield
    torch.set_float32_matmul_precision("highest")
    settings.allow_bf16_reduced_precision_reduction = True


def _state() -> tuple[object, ...]:
    settings = torch.backends.cuda.matmul
    newer = getattr(settings, "fp32_precision", None)
    return newer, settings.allow_bf16_reduced_precision_reduction


@pytest.mark.parametrize("interface", ["older", "newer"])
@pytest.mark.usefixtures("_restored")
def test_products_do_not_take_tf32_or_sum_in_bf16(interface, monkeypatch):
    if interface == "newer" and not hasattr(torch.backends.cuda.matmul, "fp32_precision"):
        pytest.skip("PyTorch before 2.9")
    aten = Aten("2.13.0", rocm=False)
    _as_on_a_gpu(monkeypatch, aten)
    _use(interface)
    before = _state()
    for dtype in (torch.float32, torch.bfloat16):
        dz, weight = _matrix(5, 23, dtype, 0), _matrix(23, 8, dtype, 1)
        matmul.project(_matrix(5, 8, dtype, 2), weight, torch.empty(5, 23))
        matmul.hidden_gradient(
            dz, weight, torch.empty(5, 8, dtype=dtype), alpha=1, accumulate=False
        )
    assert len(aten.settings) == 4 and not any(map(any, aten.settings))
    assert _state() == before


@pytest.mark.usefixtures("_restored")
def test_a_setting_returns_after_the_last_of_several_threads():
    torch.set_float32_matmul_precision("high")
    inside, leave = threading.Barrier(2), threading.Event()

    def hold():
        with full_precision.full_precision(torch.float32, torch.float32):
            inside.wait()
            leave.wait()

    thread = threading.Thread(target=hold)
    thread.start()
    inside.wait()
    with full_precision.full_precision(torch.float32, torch.float32):
        pass
    assert torch.get_float32_matmul_precision() == "highest"  # the other thread is in its product
    leave.set()
    thread.join()
    assert torch.get_float32_matmul_precision() == "high"


@pytest.mark.usefixtures("_restored")
def test_a_setting_returns_after_an_error():
    torch.set_float32_matmul_precision("high")
    with pytest.raises(RuntimeError, match="a product that fails"):
        with full_precision.full_precision(torch.float32, torch.float32):
            raise RuntimeError("a product that fails")
    assert torch.get_float32_matmul_precision() == "high"
