"""The rules of the house that import-linter cannot state (`make lint` runs its contracts)."""

from __future__ import annotations

import ast
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

from esr_kernels import linear_divergence
from tests.kernels import cases

ROOT = Path(__file__).parents[1]
PACKAGES = [ROOT / "esr_kernels", ROOT / "esr_train"]
SOURCES = sorted(path for package in PACKAGES for path in package.rglob("*.py"))
# Their arguments are what users write; each is documented.
PUBLIC_OPS = {
    "generate",
    "linear_divergence",
    "linear_topk_divergence",
    "plan_linear_divergence",
    "sample_from_hidden",
    "sample_from_logits",
    "shared_prefix_attention",
    "token_logprob",
}


def _imports(path: Path) -> set[str]:
    return _imports_of(ast.parse(path.read_text(encoding="utf-8")))


def _imports_of(tree: ast.AST) -> set[str]:
    names: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names |= {f"{node.module}.{alias.name}" for alias in node.names} | {str(node.module)}
    return names


def _of(names: set[str], package: str) -> set[str]:
    return {name for name in names if name == package or name.startswith(package + ".")}


def test_triton_is_imported_only_by_files_named_so():
    importers = {path for path in SOURCES if _of(_imports(path), "triton")}
    assert importers, "the search finds nothing"
    assert {path.name for path in importers if not path.stem.endswith("_triton")} == set()


def test_no_triton_file_imports_the_cpu_room():
    files = [path for path in SOURCES if path.stem.endswith("_triton")]
    assert len(files) > 5
    assert [path.name for path in files if _of(_imports(path), "esr_kernels.cpu")] == []


def test_one_process_imports_nothing_for_several_or_for_servers():
    """These are slow to import, and are imported in the functions that need them."""
    ours = ["esr_kernels.common.sharded", "esr_kernels.divergence.sharded"]
    ours += ["esr_train.distributed", "esr_train.fsdp", "esr_train.sharded"]
    ours += [f"esr_train.remote.{n}" for n in ("client", "rollouts", "teacher", "criterion")]
    several = ["torch.distributed.tensor", "torch.distributed.fsdp", *ours]
    own = {name.replace(".", "/") + ".py" for name in ours}
    imports = {path: _imports(path) for path in SOURCES}
    importers = [path for path in SOURCES if any(_of(imports[path], name) for name in several)]
    assert len(importers) > 4, "the search finds nothing"
    for path in importers:
        if not str(path).endswith(tuple(own)):
            tree = ast.parse(path.read_text(encoding="utf-8"))
            tree.body = [n for n in tree.body if isinstance(n, (ast.Import, ast.ImportFrom))]
            assert not any(_of(_imports_of(tree), name) for name in several), path


def test_no_file_is_longer_than_400_lines():
    tracked = [*SOURCES, *(ROOT / "bench").rglob("*.py"), *(ROOT / "tests").rglob("*.py")]
    lengths = {path: len(path.read_text(encoding="utf-8").splitlines()) for path in tracked}
    assert {str(path): length for path, length in lengths.items() if length > 400} == {}


def _parameters(function: ast.FunctionDef) -> int:
    of = function.args
    names = [argument.arg for argument in of.posonlyargs + of.args + of.kwonlyargs]
    return len(names) - (names[:1] == ["self"])


def _is_kernel(function: ast.FunctionDef) -> bool:
    return any("triton.jit" in ast.unparse(decorator) for decorator in function.decorator_list)


def test_no_function_takes_more_than_eight_parameters():
    long = []
    for path in SOURCES:
        # The references have the signatures of the ops that they specify.
        if path.stem in ("reference", "module"):
            continue
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if not isinstance(node, ast.FunctionDef) or _is_kernel(node):
                continue
            if node.name not in PUBLIC_OPS and _parameters(node) > 8:
                long.append(f"{path.relative_to(ROOT)}: {node.name} ({_parameters(node)})")
    assert long == []


def _tensors(value: object) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, (tuple, list)):
        return [tensor for item in value for tensor in _tensors(item)]
    if hasattr(value, "__dataclass_fields__"):
        return _tensors([getattr(value, name) for name in value.__dataclass_fields__])
    return []


@pytest.mark.kernels
def test_a_hidden_state_crosses_at_most_ten_files_on_the_gpus_path():
    """On its way to a gradient: files with a function that is given the student's hidden states, or
    logits or gradients made of them."""
    case = cases._pair(7, 130, (24, 40), (1.0, 1.0), torch.bfloat16)
    hidden = case.student_hidden.requires_grad_()
    weight = case.student_weight.requires_grad_()
    sizes = {(7, 24), (7, 130), (130, 24)}
    files: set[str] = set()

    def watch(frame, event, argument):
        name = frame.f_code.co_filename
        if event == "call" and str(PACKAGES[0]) in name:
            given = list(frame.f_locals.values())
            if any(tuple(tensor.shape) in sizes for tensor in _tensors(given)):
                files.add(str(Path(name).relative_to(PACKAGES[0])))

    sys.setprofile(watch)
    try:
        out = linear_divergence(
            hidden, weight, case.teacher_hidden, case.teacher_weight, impl="triton", plan="stash"
        )
        out.loss.backward()
    finally:
        sys.setprofile(None)
    # The kernels' own functions, which the interpreter calls with handles instead of tensors.
    files |= {"divergence/rows_triton.py", "common/logits_triton.py"}
    # The interpreter runs on CPU tensors. For those of a GPU these files are not entered.
    files -= {"cpu/products.py", "cpu/huge_pages.py"}
    assert {"divergence/op.py", "divergence/stash.py", "common/matmul.py"} <= files
    assert len(files) <= 10, sorted(files)
