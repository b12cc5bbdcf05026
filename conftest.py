"""Where Triton kernels run in the tests: on a GPU if there is one, else in Triton's interpreter,
or, with ESR_TRITON_ON_CPU=1, in a sanitizer that executes their compiled form on the CPU.

Triton reads the variable when it is first imported, and torch imports Triton: so this looks for a
GPU without them, and lies at the root, where pytest reads it first.
"""

import os

_HAS_GPU = os.path.exists("/dev/nvidiactl") or os.path.exists("/dev/kfd")
if not _HAS_GPU and os.environ.get("ESR_TRITON_ON_CPU") != "1":
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


if os.environ.get("TRITON_INTERPRET") == "1":
    _round_like_a_gpu()
    _multiply_like_a_gpu()
