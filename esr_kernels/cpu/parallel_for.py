"""A loop over rows in C, on PyTorch's threads."""

from __future__ import annotations

import ctypes
import functools
import os
from concurrent.futures import ThreadPoolExecutor

import torch

from esr_kernels.cpu.library import library

# With fewer logits a thread, starting the thread takes longer than it saves.
_ELEMENTS_PER_THREAD = 1 << 16
_PARTS_PER_THREAD = 4
_IMPORTED_IN = os.getpid()


def parallel_for(name: str, arguments: ctypes.Structure, rows: int, elements_per_row: int) -> None:
    """Call the compiled function `name(&arguments, first, last)` for all rows.

    A row is computed by one thread, so results do not depend on the number of threads.
    """
    compiled = library()
    assert compiled is not None
    function, pointer = getattr(compiled, name), ctypes.byref(arguments)
    function.restype = None
    threads = max(1, rows * elements_per_row // _ELEMENTS_PER_THREAD)
    threads = min(torch.get_num_threads(), threads)
    if threads <= 1:
        function(pointer, ctypes.c_int64(0), ctypes.c_int64(rows))
        return
    # More parts than threads: another process may slow down one of the cores.
    parts = min(rows, _PARTS_PER_THREAD * threads)
    gomp_parallel = _pytorch_gomp_parallel(os.getpid())
    if gomp_parallel is not None:
        compiled.parallel_for(
            gomp_parallel,
            function,
            pointer,
            ctypes.c_int64(rows),
            ctypes.c_int64(parts),
            ctypes.c_uint(threads),
        )
        return

    def run(part: int) -> None:  # ctypes releases the GIL during the call
        ends = (rows * end // parts for end in (part, part + 1))
        function(pointer, *map(ctypes.c_int64, ends))

    for _ in _pool(os.getpid(), threads).map(run, range(parts)):
        pass


@functools.cache
def _pytorch_gomp_parallel(process: int) -> ctypes._FuncPointer | None:
    """GOMP_parallel of the OpenMP library that PyTorch runs on; None if that is not certain.

    PyTorch's threads keep spinning for a while after an operation, and threads of our own would
    compete with them for the cores. Those of another OpenMP library, which some other module may
    have loaded, would too.

    None in a forked process, where OpenMP would wait for threads that only the parent has.
    """
    if process != _IMPORTED_IN:
        return None
    # The first one among PyTorch's dependencies, and the one that symbols of PyTorch bind to, which
    # differ where another library was preloaded.
    dependency = _symbol(ctypes.CDLL(torch._C.__file__, mode=os.RTLD_NOW | os.RTLD_NOLOAD))
    bound = _symbol(ctypes.CDLL(None))
    return bound if bound is not None and _address(bound) == _address(dependency) else None


def _symbol(scope: ctypes.CDLL) -> ctypes._FuncPointer | None:
    return getattr(scope, "GOMP_parallel", None)


def _address(function: ctypes._FuncPointer | None) -> int | None:
    return None if function is None else ctypes.cast(function, ctypes.c_void_p).value


@functools.cache
def _pool(process: int, threads: int) -> ThreadPoolExecutor:
    """Threads without OpenMP; one pool a process, since threads do not survive a fork."""
    return ThreadPoolExecutor(max_workers=threads, thread_name_prefix="esr-rows")
