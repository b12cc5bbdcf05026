from __future__ import annotations

import pytest
import torch

from esr_kernels import cpu
from esr_kernels.attention import reference
from esr_kernels.attention.arguments import Cache, checked_options
from esr_kernels.attention.groups import RowGroups, group_rows
from esr_kernels.attention.op import shared_prefix_attention
from tests.kernels.cases import DEVICE

RAGGED = (0, 1, 1, 1, 1, 3, 0)  # prompt 2 has no row left
LONG = {"length": 300, "own": 70}
WINDOWED = {"window": 16, "softcap": 3.0}
OPTIONS = [{}, {"softcap": 2.0, "scale": 0.5}, {"window": 7}, {"window": 1}, WINDOWED]


# "compiled" and "torch" are what impl="torch" is with a C compiler and without.
IMPLS = ["compiled", "torch", "triton"]


@pytest.fixture
def impl(request, monkeypatch):
    if request.param == "compiled" and (not cpu.is_available() or DEVICE != "cpu"):
        pytest.skip("the compiled attention is for CPUs with a C compiler")
    if request.param == "torch":
        monkeypatch.setattr(cpu, "supports_attention", lambda query: False)
    return "torch" if request.param == "compiled" else request.param


def _case(
    prompt_of_row=RAGGED,
    *,
    prompts=4,
    heads=(6, 2),
    length=37,
    own=9,
    dim=12,
    std=1.0,
    dtype=torch.float64,
):
    """Random operands, prompts and suffixes of mixed lengths; the first of each fills its cache."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape):
        return (std * torch.randn(*shape, generator=generator, dtype=torch.float64)).to(dtype)

    def lengths(count, low, most):
        drawn = torch.randint(low, most + 1, (count,), generator=generator)
        return torch.cat([torch.tensor([most]), drawn[1:]]).to(DEVICE)

    batch = len(prompt_of_row)
    tensors = (
        normal(batch, heads[0], dim).to(DEVICE),
        normal(prompts, heads[1], length, dim).to(DEVICE),
        normal(prompts, heads[1], length, dim).to(DEVICE),
        lengths(prompts, 1, length),
        normal(batch, heads[1], own, dim).to(DEVICE),
        normal(batch, heads[1], own, dim).to(DEVICE),
        lengths(batch, 0, own),
    )
    return tensors, group_rows(prompt_of_row, prompts, DEVICE)


def _in(dtype, tensors):
    return tuple(t.to(dtype) if t.is_floating_point() else t for t in tensors)


def _assert_close(out, truth, relative):
    """Relative L2 error over all rows; all zeros would have 1."""
    error = (out.double() - truth).norm() / truth.norm()
    assert float(error) <= relative, float(error)


def _truth(tensors, groups=None, *, dtype=torch.float64, scale=None, softcap=None, window=None):
    """The reference on the same operands, computed in `dtype`."""
    query, prefix, suffix = tensors[0], Cache(*tensors[1:4]), Cache(*tensors[4:])
    options = checked_options(query.shape[2], scale, softcap, window)
    return reference.attend(query, prefix, suffix, groups, options, dtype)


def _plain(tensors, groups, **options):
    """The reference with every product rounded to the operands' dtype: what plain PyTorch does."""
    return _truth(tensors, groups, dtype=tensors[0].dtype, **options).double()


@pytest.mark.parametrize(
    ("impl", "dtype", "relative"),
    [("torch", torch.float64, 1e-14)]
    # Plain fp32 attention has 1e-7 on these shapes.
    + [(impl, torch.float32, 1e-6) for impl in IMPLS],
    indirect=["impl"],
    ids=str,
)
@pytest.mark.parametrize(
    ("heads", "options"),
    [*(((6, 2), options) for options in OPTIONS), ((4, 4), {}), ((5, 1), WINDOWED)],
    ids=str,
)
def test_it_is_the_reference(heads, options, impl, dtype, relative):
    tensors, groups = _case(heads=heads)
    truth = _truth(tensors, groups, **options)
    out = shared_prefix_attention(*_in(dtype, tensors), groups=groups, impl=impl, **options)
    _assert_close(out, truth, relative)


@pytest.mark.parametrize("impl", ["torch", "triton"], indirect=True)
@pytest.mark.parametrize(
    ("shape", "options"),
    [({"std": 4.0}, {}), (LONG, {}), (LONG, WINDOWED | {"window": 40})],
    ids=["peaked", "splits", "splits, window and softcap"],
)
def test_16_bit_errs_no_more_than_plain_pytorch(impl, shape, options):
    tensors, groups = _case(**shape, dtype=torch.float16)
    truth = _truth(tensors, groups, **options)
    plain = (_plain(tensors, groups, **options) - truth).norm() / truth.norm()
    out = shared_prefix_attention(*tensors, groups=groups, impl=impl, **options)
    assert out.dtype == torch.float16
    _assert_close(out, truth, 1.5 * float(plain))


@pytest.mark.parametrize("impl", IMPLS, indirect=True)
@pytest.mark.parametrize(
    ("shape", "prompt_of_row"),
    [
        ({"length": 1, "own": 1, "dim": 1, "heads": (1, 1)}, (0, 1, 2, 3)),
        ({"length": 130, "own": 1}, (0, 1, 2, 3)),
        ({"length": 20, "own": 70, "dim": 17}, (0, 0, 1, 1, 2, 2, 3, 3)),
        ({"length": 5, "own": 0}, (0, 0, 1, 1, 2, 2, 3, 3)),
        ({"prompts": 1, "length": 300, "heads": (6, 2)}, (0,) * 11),
    ],
    ids=["smallest", "one sample", "long suffix", "no suffix", "splits and query blocks"],
)
def test_odd_shapes_in_equal_groups(shape, prompt_of_row, impl):
    """Rows of a prompt next to each other need no groups, and groups say the same."""
    tensors, groups = _case(prompt_of_row, **shape)
    truth = _truth(tensors)
    single = _in(torch.float32, tensors)
    out = shared_prefix_attention(*single, impl=impl)
    _assert_close(out, truth, 1e-6)
    assert torch.equal(out, shared_prefix_attention(*single, groups=groups, impl=impl))


@pytest.mark.parametrize("impl", [*IMPLS, "reference"], indirect=True)
def test_a_row_without_keys_gets_zero(impl):
    tensors, groups = _case()
    tensors[3][1], tensors[6][1:4] = 0, 0  # prompt 1, and three of its rows
    out = shared_prefix_attention(*_in(torch.float32, tensors), groups=groups, impl=impl)
    assert not out[1:4].any() and out[4].any() and out.isfinite().all()


@pytest.mark.parametrize("impl", IMPLS, indirect=True)
def test_what_lies_beyond_the_lengths_does_not_matter(impl):
    tensors, groups = _case(dtype=torch.float32)
    out = shared_prefix_attention(*tensors, groups=groups, impl=impl)
    for keys, values, lengths in (tensors[1:4], tensors[4:7]):
        beyond = torch.arange(keys.shape[2], device=DEVICE) >= lengths[:, None]
        keys.masked_fill_(beyond[:, None, :, None], 1e4)
        values.masked_fill_(beyond[:, None, :, None], -1e4)
    assert torch.equal(out, shared_prefix_attention(*tensors, groups=groups, impl=impl))


@pytest.mark.parametrize("impl", IMPLS, indirect=True)
def test_caches_may_be_views(impl):
    tensors, groups = _case(dtype=torch.float32)
    out = shared_prefix_attention(*tensors, groups=groups, impl=impl)
    views = list(tensors)
    for at in (1, 2, 4, 5):
        views[at] = torch.nn.functional.pad(tensors[at], (0, 0, 0, 5))[:, :, :-5]
        assert not views[at].is_contiguous()
    views[4] = tensors[4].transpose(2, 3).contiguous().transpose(2, 3)
    assert torch.equal(out, shared_prefix_attention(*views, groups=groups, impl=impl))


def test_groups_of_rows():
    groups = group_rows(RAGGED, 4)
    assert groups.rows.tolist() == [
        [0, 6, -1, -1],
        [1, 2, 3, 4],
        [-1, -1, -1, -1],
        [5, -1, -1, -1],
    ]
    assert groups.rows.flatten()[groups.place].tolist() == list(range(7))
    with pytest.raises(ValueError, match="prompt_of_row.*0 to 3, got 4 for row 1"):
        group_rows([0, 4], 4)
    with pytest.raises(TypeError, match="prompt_of_row must hold ints, got 'a' for row 1"):
        group_rows([0, "a"], 4)
    with pytest.raises(ValueError, match="prompts must be an integer of at least 0, got -1"):
        group_rows([], -1)


def test_no_rows():
    tensors, _ = _case()
    query, pk, pv, lengths, sk, sv, own = tensors
    empty = (query[:0], pk, pv, lengths, sk[:0], sv[:0], own[:0])
    assert shared_prefix_attention(*empty).shape == (0, 6, 12)


NAMES = (
    "query prefix_key prefix_value prefix_lengths suffix_key suffix_value suffix_lengths".split()
)


@pytest.mark.parametrize(
    ("argument", "change", "message"),
    [
        ("query", lambda x: x[0], r"query must have shape \[B, Hq, D\], got \[6, 12\]"),
        ("query", lambda x: x.long(), "query must be one of .*int64"),
        ("query", lambda x: x[:, :5], "prefix_key.*divides the query's 5, got 2"),
        ("prefix_key", lambda x: x[..., :5], r"prefix_key must have shape \[P, Hkv, L, 12\]"),
        ("prefix_value", lambda x: x[:, :, :5], r"prefix_value must have shape \[4, 2, 37, 12\]"),
        ("suffix_key", lambda x: x[:3], r"suffix_key must have shape \[7, 2, N, 12\]"),
        ("suffix_value", lambda x: x.float(), "suffix_value must be float64"),
        ("prefix_lengths", lambda x: x.int(), "prefix_lengths must be int64, got"),
        ("prefix_lengths", lambda x: x + 1, "prefix_lengths must be from 0 to 37, got .* to 38"),
        ("suffix_lengths", lambda x: x - 1 - x.min(), "suffix_lengths must be from 0 to 9, got -1"),
        ("groups", lambda _: None, "7 rows for 4 prompts"),
        ("groups", lambda g: g._replace(rows=g.rows[:3]), r"groups.rows must have shape \[4, G\]"),
        ("groups", lambda g: RowGroups(g.rows, g.place * 0), "place must be the index"),
        ("groups", lambda g: g._replace(rows=g.rows.abs()), "rows must name each row once"),
        ("scale", lambda _: float("nan"), "scale must be None or finite"),
        ("softcap", lambda _: 0.0, "softcap must be None or finite in fp32 and above 0"),
        ("softcap", lambda _: 1e39, "softcap must be None or finite in fp32 and above 0"),
        ("scale", lambda _: 1e39, "scale must be None or finite in fp32"),
        ("window", lambda _: True, "window must be None or an integer of at least 1"),
        ("query", lambda x: x[..., :0], "query must have heads of at least one dimension"),
        ("prefix_lengths", lambda x: x.tolist(), "prefix_lengths must be a torch.Tensor, got list"),
        ("groups", lambda g: (g.rows, g.place), "groups must be None or what group_rows returns"),
        ("groups", lambda g: RowGroups(g.rows, g.place.int()), "groups.place must be int64"),
        ("groups", lambda g: g._replace(rows=g.rows.double()), "groups.rows must be int64"),
        ("groups", lambda g: g._replace(place=g.place - 9), "place must be the index"),
        ("window", lambda _: 0, "window must be None or an integer of at least 1"),
        ("impl", lambda _: "cuda", "impl must be one of"),
    ],
)
def test_bad_input_names_the_argument(argument, change, message):
    """On the CPU: the host does not wait for a GPU to read lengths and groups."""
    tensors, groups = _case()
    tensors, groups = [x.cpu() for x in tensors], RowGroups(*(x.cpu() for x in groups))
    arguments = dict(zip(NAMES, tensors, strict=True), groups=groups)
    arguments[argument] = change(arguments.get(argument))
    with pytest.raises((TypeError, ValueError), match=message):
        shared_prefix_attention(**arguments)
