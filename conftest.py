"""Where Triton kernels run in the tests: on a GPU if there is one, else in Triton's interpreter,
or, with ESR_TRITON_ON_CPU=1, in a sanitizer that executes their compiled form on the CPU. With
ESR_GPU_EXP=1 exponentials in the latter two err as a GPU's do; otherwise they are right to the last
bit.

Triton reads the variable when it is first imported, and torch imports Triton: so this looks for a
GPU without them, and lies at the root, where pytest reads it first.
"""

import os

import pytest

HAS_GPU = os.path.exists("/dev/nvidiactl") or os.path.exists("/dev/kfd")
GPU_EXP = os.environ.get("ESR_GPU_EXP") == "1"
SANITIZES = os.environ.get("ESR_TRITON_ON_CPU") == "1"
if not HAS_GPU and not SANITIZES:
    os.environ.setdefault("TRITON_INTERPRET", "1")


def _round_like_a_gpu() -> None:
    """Triton 3.7's interpreter truncates fp32 to bf16 where the hardware rounds to nearest even."""
    import numpy as np
    import triton.language as tl
    from triton.runtime import interpreter

    truncate = interpreter.InterpreterBuilder.create_fp_trunc

    def round_to_nearest(self, source, target):
        if source.dtype.scalar != tl.float32 or target.scalar != tl.bfloat16:
            return truncate(self, source, target)
        bits = source.data.view(np.uint32).astype(np.uint64)
        bits = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
        return interpreter.TensorHandle(bits.astype(np.uint16), target.scalar)

    interpreter.InterpreterBuilder.create_fp_trunc = round_to_nearest


def _multiply_like_a_gpu() -> None:
    """Triton 3.7's interpreter holds bf16 as raw bits, and multiplies the bits."""
    import numpy as np
    import triton.language as tl
    from triton.runtime import interpreter

    multiply = interpreter.InterpreterBuilder.create_dot

    def widen(operand):
        if operand.dtype.scalar != tl.bfloat16:
            return operand
        bits = operand.data.astype(np.uint32) << 16
        return interpreter.TensorHandle(bits.view(np.float32), tl.float32)

    def dot(self, a, b, accumulator, *options):
        return multiply(self, widen(a), widen(b), accumulator, *options)

    interpreter.InterpreterBuilder.create_dot = dot


def _patch_the_language_once_a_launch() -> None:
    """Triton 3.7's interpreter replaces the functions of `triton.language` at each call of a jitted
    helper. Once for each module that a launch calls is enough, and halves the time."""
    from triton.runtime import interpreter

    launch, patched = interpreter.GridExecutor.__call__, set()

    def launched(self, *args, **kwargs):
        patched.clear()
        return launch(self, *args, **kwargs)

    def called(self, *args, **kwargs):
        if self.fn.__module__ not in patched:
            patched.add(self.fn.__module__)
            interpreter._patch_lang(self.fn)
        return self.rewrite()(*args, **kwargs)

    interpreter.GridExecutor.__call__ = launched
    interpreter.InterpretedFunction.__call__ = called


def _to_the_last_bit(function):
    """By fp64, and rounded: NumPy's functions of fp32 err by up to 2.5 units in the last place, as
    the processor's vectors have it, and the yardstick's by 1."""
    import numpy as np

    def of(value):
        value = np.asarray(value)
        return function(value.astype(np.float64)).astype(value.dtype)

    return of


def exp_of_a_gpu(x):
    """exp of fp32 as NVIDIA's compiler has it, 2 ** (x * log2 e): the product is rounded, the power
    errs by up to 2**-22 of itself, here by a share of that which the bits decide, and what is below
    the normal numbers is 0 (PTX: ex2.approx.ftz.f32)."""
    import numpy as np

    x = np.asarray(x)
    if x.dtype != np.float32:
        return np.exp(x)
    with np.errstate(over="ignore"):
        y = x * np.float32(1.4426950408889634)
        share = (y.view(np.uint32) * np.uint32(2654435761)).astype(np.float64) / 2**31 - 1
        power = np.exp2(y.astype(np.float64)) * (1 + np.where(y == 0, 0, share) * 2.0**-22)
        return np.where(power < np.finfo(np.float32).tiny, 0, power).astype(np.float32)


def _exponential():
    import numpy as np

    return exp_of_a_gpu if GPU_EXP else _to_the_last_bit(np.exp)


def _exponentials_of_the_interpreter() -> None:
    import numpy as np
    from triton.runtime import interpreter

    def on_handles(function):
        return lambda self, x: interpreter.TensorHandle(function(x.data), x.dtype.scalar)

    interpreter.InterpreterBuilder.create_exp = on_handles(_exponential())
    interpreter.InterpreterBuilder.create_log = on_handles(_to_the_last_bit(np.log))


def _exponentials_of_the_sanitizer() -> None:
    import numpy as np
    from ttsem import ops

    for function in (np.exp2, np.log, np.log2):
        ops.OPS[f"math.{function.__name__}"] = ops._float_unop(_to_the_last_bit(function))
    ops.OPS["math.exp"] = ops._float_unop(_exponential())


if os.environ.get("TRITON_INTERPRET") == "1":
    _round_like_a_gpu()
    _exponentials_of_the_interpreter()
    _multiply_like_a_gpu()
    _patch_the_language_once_a_launch()


_SESSION = pytest.StashKey()  # the sanitizer's own


def launches_kernels(item: pytest.Item) -> bool:
    """Whether a test is marked so, named so, or parametrized with impl="triton"."""
    callspec = getattr(item, "callspec", None)
    asked = callspec is not None and callspec.params.get("impl") == "triton"
    named = "sanitize" in item.nodeid
    return asked or named or item.get_closest_marker("kernels") is not None


def pytest_configure(config: pytest.Config) -> None:
    """Open the sanitizer in this process, so that it serves the workers of `-n` as well."""
    if not SANITIZES:
        return
    from ttsem.sanitize import session

    _exponentials_of_the_sanitizer()
    opened = session(source="<pytest>")
    config.stash[_SESSION] = opened.__enter__()
    config.add_cleanup(lambda: opened.__exit__(None, None, None))


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """A sanitizer run is about kernels: what launches none is for `make test`. A slow test runs
    only where -m asks for some."""
    kept = [item for item in items if not SANITIZES or launches_kernels(item)]
    if not config.getoption("-m"):
        kept = [item for item in kept if item.get_closest_marker("slow") is None]
    config.hook.pytest_deselected(items=[item for item in items if item not in kept])
    items[:] = kept


@pytest.fixture(autouse=True)
def _checked_for_races(request: pytest.FixtureRequest):
    """Fails a test one of whose launches was too large for the sanitizer to look for races in."""
    if not SANITIZES:
        yield
        return
    state = request.config.stash[_SESSION]
    before = state.races_unchecked
    yield
    assert state.races_unchecked == before, "a launch too large to be checked for races"
