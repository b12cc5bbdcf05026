"""Code that makes the package faster on CPUs. Each function has a counterpart in PyTorch elsewhere
in the package, so that nothing depends on this room.

    rows, tile_logsumexp, attention    passes over logits, draws and decode attention in C
    products                           the order of operands in a projection, on AMD processors
    huge_pages                         large buffers in pages of 2 MiB
    library, structures, parallel_for  how the C is built and loaded, called, and run on threads

The C is compiled at the first call that may use it. `is_available`, the `supports_` functions and
the result of `project_transposed` tell the caller when to use PyTorch instead. With ESR_NATIVE=0
all of them return False, nothing is compiled, and memory is left as it is.

The names below are the whole interface. This room imports nothing else of `esr_kernels`, and no
Triton file imports it.
"""

from esr_kernels.cpu.attention import attend, supports_attention
from esr_kernels.cpu.huge_pages import on_huge_pages
from esr_kernels.cpu.library import is_available
from esr_kernels.cpu.products import project_transposed
from esr_kernels.cpu.rows import RowPass, RowTransform
from esr_kernels.cpu.tile_logsumexp import supports_tiles, tile_logsumexp

__all__ = [
    "RowPass",
    "RowTransform",
    "attend",
    "is_available",
    "on_huge_pages",
    "project_transposed",
    "supports_attention",
    "supports_tiles",
    "tile_logsumexp",
]
