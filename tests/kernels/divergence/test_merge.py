"""merge_student_ids and merge_teacher_ids: several classes count as one, in every way to compute.

The numerics suite has two such cases for every divergence, plan and row pass; here are the meaning,
what the suite does not reach, and the errors.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from esr_kernels import JSD, LinearDivergenceLoss, linear_divergence, plan_linear_divergence
from esr_kernels.divergence import arguments
from tests.kernels import cases
from tests.kernels.cases import DEVICE, TOKENS

GROUP = {"merge_student_ids": [2, 5], "merge_teacher_ids": (5, 2)}


def _small(*, teacher_rows: int = 9) -> list[torch.Tensor]:
    """On the CPU, where values of ids are looked at."""
    generator = torch.Generator().manual_seed(0)
    shapes = (4, 8), (9, 8), (4, 6), (teacher_rows, 6)
    return [torch.randn(*shape, generator=generator) for shape in shapes]


def test_probabilities_are_summed():
    """Written from the definition: softmax over all classes, then sums."""
    hidden, weight, teacher_hidden, teacher_weight = (x.double() for x in _small(teacher_rows=10))
    hidden.requires_grad_()
    weight.requires_grad_()
    labels = torch.tensor([5, 0, -100, 2])
    # Row 9 is a class of the teacher alone.
    how = {"num_classes": 9, "labels": labels, "label_weight": 0.5}
    groups = {"merge_student_ids": [5, 2], "merge_teacher_ids": [2, 5, 9]}
    out = linear_divergence(
        hidden, weight, teacher_hidden, teacher_weight, "reverse_kl", **how, **groups
    )
    ours = torch.autograd.grad(out.loss, (hidden, weight))

    def events(logits, members):
        probability = logits.softmax(1)
        others = [c for c in range(9) if c not in members]
        merged = probability[:, members].sum(1, keepdim=True)
        return torch.cat([probability[:, others], merged], dim=1)

    p = events(hidden @ weight.T, [2, 5])
    q = events(teacher_hidden @ teacher_weight.T, [2, 5, 9])
    kl = (p * (p / q).log()).sum(1)
    cross_entropy = -(p[0, 7].log() + p[1, 0].log() + p[3, 7].log())
    loss = kl.sum() + 0.5 * cross_entropy
    torch.testing.assert_close(out.loss, loss)
    torch.testing.assert_close(out.per_token, kl)
    torch.testing.assert_close(out.student_entropy, -(p * p.log()).sum(1))
    torch.testing.assert_close(out.teacher_entropy, -(q * q.log()).sum(1))
    assert torch.equal(out.agreement, (p.argmax(1) == q.argmax(1)).double())
    for gradient, expected in zip(ours, torch.autograd.grad(loss, (hidden, weight)), strict=True):
        torch.testing.assert_close(gradient, expected)


@pytest.mark.parametrize("plan", ["stash", "recompute"])
def test_models_that_end_differently_agree_once_ends_are_merged(plan):
    """The student is sure of one end, the teacher of another: a difference in name only."""
    logits = torch.full((1, 9), -2.0)
    student, teacher = logits.clone(), logits.clone()
    student[0, 2] = teacher[0, 5] = 6.0
    student[0, 5] = teacher[0, 2] = -4.0
    student.requires_grad_()
    tensors = student, torch.eye(9), teacher, torch.eye(9)
    apart = linear_divergence(*tensors, plan=plan)
    merged = linear_divergence(*tensors, plan=plan, **GROUP)
    assert apart.per_token > 5 and merged.per_token.abs() < 1e-6
    assert apart.agreement == 0 and merged.agreement == 1
    torch.testing.assert_close(merged.student_lse, apart.student_lse)
    (pull,) = torch.autograd.grad(apart.loss, student)
    (rest,) = torch.autograd.grad(merged.loss, student)
    assert rest.norm() < 1e-6 * pull.norm()


@pytest.mark.parametrize("plan", ["stash", "recompute"])
@pytest.mark.parametrize("divergence", ["forward_kl", JSD(0.3)], ids=str)
def test_a_group_of_one_class_changes_nothing(divergence, plan):
    student_hidden, *heads = _small()
    hidden = student_hidden.requires_grad_()
    one = linear_divergence(
        hidden, *heads, divergence, plan=plan, merge_student_ids=[4], merge_teacher_ids=[4]
    )
    none = linear_divergence(hidden, *heads, divergence, plan=plan)
    for ours, expected in zip(one, none, strict=True):
        torch.testing.assert_close(ours, expected)
    gradients = [torch.autograd.grad(out.loss, hidden)[0] for out in (one, none)]
    torch.testing.assert_close(*gradients)


@pytest.mark.kernels
@pytest.mark.parametrize("divergence", ["reverse_kl", JSD(0.3)], ids=str)
def test_a_fused_forward(divergence):
    for dtype in (torch.float32, torch.bfloat16):
        yardsticks = cases.yardsticks("merged_classes", divergence, dtype, rounds_dz=True)
        case = cases.merged_classes(dtype)
        result = cases.ours(case, divergence, plan="fused", impl="triton")
        cases.assert_as_good_as_plain(result, *yardsticks)


@pytest.mark.parametrize("plan", ["stash", "recompute"])
def test_memory_of_the_callers_for_the_heads_gradient(plan):
    case = cases.merged_classes(torch.float32)
    weight = case.student_weight.requires_grad_()
    case.student_hidden.requires_grad_()
    options = {**case.options, "plan": plan}
    (expected,) = torch.autograd.grad(linear_divergence(*case.tensors, **options).loss, weight)
    weight_grad = torch.ones_like(weight, requires_grad=False)
    linear_divergence(*case.tensors, weight_grad=weight_grad, **options).loss.backward()
    assert cases.relative_error(weight_grad - 1, expected) < 1e-6


@pytest.mark.parametrize(
    "case_name, divergence, how",
    [
        ("merged_classes", "reverse_kl", {"plan": "stash", "reduction": "mean"}),
        ("merged_classes", JSD(0.3), {"plan": "recompute", "reduction": "none"}),
        ("merged_and_mapped", "forward_kl", {"plan": "auto"}),
    ],
    ids=str,
)
def test_a_compiled_call(case_name, divergence, how):
    torch._dynamo.reset()
    case = cases.CASES[case_name](torch.float32)
    leaves, options = cases._leaves(case, None)

    def run(hidden, weight):
        tensors = hidden * 1.5, weight, case.teacher_hidden, case.teacher_weight
        return linear_divergence(*tensors, divergence, **{**options, **how}).loss.sum()

    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    inputs = list(leaves.values())
    results = []
    for function in (run, compiled):
        loss = function(*inputs[:2])
        results.append((loss, *torch.autograd.grad(loss, inputs)))
    for expected, ours in zip(*results, strict=True):
        assert expected.norm() > 0 and cases.relative_error(ours, expected) < 1e-6


@pytest.mark.parametrize(
    "impl", ["auto", "torch", pytest.param("triton", marks=pytest.mark.kernels)]
)
@pytest.mark.parametrize("plan", ["stash", "recompute"])
def test_a_removed_class_stays_removed_under_a_softcap(plan, impl):
    """A bias of -inf, which is how the members leave the row passes."""
    case = cases._pair(TOKENS, 203, (24, 40), (4.0, 4.0), torch.float32)
    bias = torch.zeros(203, device=DEVICE)
    bias[7] = -torch.inf
    case.options = {
        "student_bias": bias,
        "teacher_bias": bias.clone(),
        "student_softcap": 5.0,
        "teacher_softcap": 7.0,
    }
    result = cases.ours(case, "reverse_kl", plan=plan, impl=impl)
    assert result["d student_weight"][7].eq(0).all()
    case.options = {"student_softcap": 5.0, "teacher_softcap": 7.0}
    alive = [c for c in range(203) if c != 7]
    case.student_weight, case.teacher_weight = (
        case.student_weight[alive],
        case.teacher_weight[alive],
    )
    without, truth = cases.plain(case, "reverse_kl"), cases.oracle(case, "reverse_kl")
    result["d student_weight"] = result["d student_weight"][alive]
    cases.assert_as_good_as_plain(result, without, truth)


def test_a_module_and_rows_of_weight_0():
    case = cases.merged_classes(torch.float32)
    case.options["token_weights"][3:9] = 0
    merge = {name: case.options.pop(name) for name in list(case.options) if "merge" in name}
    options = {"label_weight": case.options.pop("label_weight"), "num_classes": 1003, **merge}
    del case.options["num_classes"]
    case.student_hidden[4] = torch.nan
    ours = LinearDivergenceLoss(**options)(*case.tensors, **case.options)
    expected = linear_divergence(*case.tensors, **options, **case.options, impl="reference")
    for field in ("loss", "per_token", "cross_entropy", "student_entropy", "agreement"):
        torch.testing.assert_close(getattr(ours, field), getattr(expected, field))
    assert ours.per_token[3:9].eq(0).all()


def test_a_plan_counts_the_merged_class():
    sizes = (4096, 151_936, 1536, 3584)
    plain = plan_linear_divergence(*sizes, plan="stash", memory_budget=3 << 30)
    merged = plan_linear_divergence(
        *sizes,
        plan="stash",
        memory_budget=3 << 30,
        merge_student_ids=[151_643, 151_645],
        merge_teacher_ids=torch.tensor([151_645, 151_643]),
    )
    assert merged.problem.merged == (2, 2) and plain.problem.merged == (0, 0)
    # The hidden gradient in fp32, and 15 bytes a class of temporary biases.
    least = 4096 * 1536 * 4 + 151_936 * 15
    same = replace(merged, problem=plain.problem)
    assert least < merged.extra_bytes - same.extra_bytes < 1.2 * least


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"merge_student_ids": [1]}, ValueError, "merge_teacher_ids must be given together"),
        ({**GROUP, "merge_student_ids": []}, ValueError, "merge_student_ids must not be empty"),
        ({**GROUP, "merge_student_ids": [2, 2]}, ValueError, "merge_student_ids must be distinct"),
        ({**GROUP, "merge_student_ids": [-2]}, ValueError, "merge_student_ids must be 0 or more"),
        (
            {**GROUP, "merge_teacher_ids": [2, 5, 9]},
            ValueError,
            r"merge_teacher_ids must lie in \[0, 9\), the rows of teacher_weight, got 9",
        ),
        ({**GROUP, "merge_teacher_ids": [2.0]}, TypeError, "merge_teacher_ids must be integers"),
        ({**GROUP, "merge_teacher_ids": 2}, TypeError, "merge_teacher_ids must be integers"),
        (
            {**GROUP, "merge_teacher_ids": torch.tensor([2.0])},
            TypeError,
            "merge_teacher_ids must be torch.int64|merge_teacher_ids must be int64",
        ),
        (
            {"merge_student_ids": [2, 5], "merge_teacher_ids": [2]},
            ValueError,
            "merge_teacher_ids must have row 5, the class of both models that is row 5",
        ),
        (
            {
                "student_ids": torch.tensor([3, 5, 7]),
                "teacher_ids": torch.tensor([8, 1, 2]),
                "merge_student_ids": [5, 0],
                "merge_teacher_ids": [1, 2],
            },
            ValueError,
            "merge_student_ids must have row 7, the class of both models that is row 2",
        ),
    ],
)
def test_groups_that_no_call_can_use(options, error, message):
    for impl in ("auto", "reference"):
        with pytest.raises(error, match=message):
            linear_divergence(*_small(), impl=impl, **options)


def test_members_beyond_the_shared_classes_need_no_counterpart():
    """Rows 7 and 8 of the student, beyond the classes that both models have."""
    how = {"num_classes": 7, "merge_student_ids": [2, 8], "merge_teacher_ids": [2]}
    ours = linear_divergence(*_small(), **how)
    expected = linear_divergence(*_small(), **how, impl="reference")
    torch.testing.assert_close(ours.loss, expected.loss)


def test_a_sharded_vocabulary_is_refused():
    class Group:
        def size(self):
            return 2

    with pytest.raises(ValueError, match="merge_student_ids cannot be merged over a sharded"):
        linear_divergence(*_small(), group=Group(), **GROUP)


def test_a_map_that_was_not_checked_gives_nan(monkeypatch):
    """As on a GPU, where the map is not read."""
    monkeypatch.setattr(arguments, "check_classes_of_merge", lambda *arguments: None)
    maps = {"student_ids": torch.tensor([3, 5, 7]), "teacher_ids": torch.tensor([8, 1, 2])}
    out = linear_divergence(*_small(), **maps, merge_student_ids=[5], merge_teacher_ids=[2])
    assert out.loss.isnan()
