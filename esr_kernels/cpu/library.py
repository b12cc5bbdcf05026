"""Compiling and loading the C of this package, for what PyTorch is slow at on CPU: row passes over
logits, turning them, tiles of a draw, decode attention. Where there is a compiler.

Compiled once per machine with `$CC`, cc, gcc or clang, for the instructions of that machine, into
`$ESR_CACHE` (default ~/.cache/esr); takes about two seconds, and a few milliseconds afterwards.
Without a compiler, or with ESR_NATIVE=0, PyTorch takes over, with a note in the log.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import logging
import os
import platform
import shutil
import subprocess
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from torch import Tensor

_log = logging.getLogger(__name__)
_SOURCES = [
    Path(__file__).with_name(f"{name}_native.c")
    for name in ("rows", "turn", "attention", "tiles", "team")
]
# Nothing here licenses the compiler to reorder sums or to forget about NaN and infinity.
_FLAGS = (
    "-O3 -std=gnu11 -fopenmp-simd -fno-math-errno -fno-trapping-math -fno-signed-zeros "
    "-shared -fPIC"
).split()
# The first that the compiler knows.
_TUNING: tuple[list[str], ...] = (["-march=native"], ["-mcpu=native"], [])
# Below this many logits a second thread costs more than it brings.
_WORTH_A_THREAD = 1 << 16
_PARTS_A_THREAD = 4
_LOADED_IN = os.getpid()


@functools.cache
def library() -> ctypes.CDLL | None:
    """The compiled functions, or None where they cannot be had."""
    switch = os.environ.get("ESR_NATIVE", "1")
    if switch not in ("0", "1"):
        raise ValueError(f"ESR_NATIVE must be 0 or 1, got {switch!r}")
    if switch == "0":
        return None
    try:
        return ctypes.CDLL(str(_compiled()))
    except (
        OSError,
        RuntimeError,
        subprocess.SubprocessError,
    ) as error:
        _log.warning("No compiled code for the CPU (%s); PyTorch does its work, slower", error)
        return None


def cpu_rows() -> str:
    """Who computes row passes on CPU: "native" where `library` is there, else "torch"."""
    return "torch" if library() is None else "native"


def _compiler() -> str:
    for name in (os.environ.get("CC"), "cc", "gcc", "clang"):
        path = shutil.which(name) if name else None
        if path:
            return path
    raise OSError("no C compiler found: looked for $CC, cc, gcc and clang")


def _machine() -> str:
    """What `-march=native` depends on: a cache may be shared between machines."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    wanted = ("flags", "Features", "model name", "CPU part")
    return "\n".join(sorted({line for line in lines if line.startswith(wanted)}))


def _compiled() -> Path:
    compiler = _compiler()
    headers = sorted(_SOURCES[0].parent.glob("*.h"))
    source = b"".join(path.read_bytes() for path in (*_SOURCES, *headers))
    identity = [compiler, *_FLAGS, platform.platform(), _machine()]
    digest = hashlib.sha256(source + "\0".join(identity).encode()).hexdigest()[:16]
    cache = Path(os.environ.get("ESR_CACHE") or Path.home() / ".cache" / "esr").expanduser()
    target = cache / "native" / f"esr-{digest}.so"
    if _is_whole(target):
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent) as directory:
        built = Path(directory) / "esr.so"
        for tuning in _TUNING:
            command = [compiler, *_FLAGS, *tuning, *map(str, _SOURCES), "-o", str(built), "-lm"]
            run = subprocess.run(command, capture_output=True, text=True, timeout=120)
            if run.returncode == 0:
                break
        else:
            raise OSError(f"{' '.join(command)}: {run.stderr.strip()[-300:]}")
        content = built.read_bytes()
        built.write_bytes(content + hashlib.sha256(content).digest())
        os.replace(built, target)  # two processes may build at once: either file will do
    return target


def _is_whole(path: Path) -> bool:
    """Whether a library is there and as it was built: its digest follows it in the file.

    Loading one that was cut short or damaged kills the process.
    """
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        return False
    return hashlib.sha256(content[:-32]).digest() == content[-32:]


def turn_(compiled: ctypes.CDLL, strip: Tensor, out: Tensor) -> None:
    """out [n, m] = strip.T, fp32 on CPU; `strip` is contiguous, and so are the rows of `out`."""
    compiled.turn(
        ctypes.c_void_p(strip.data_ptr()),
        ctypes.c_int64(strip.shape[0]),
        ctypes.c_int64(strip.shape[1]),
        ctypes.c_void_p(out.data_ptr()),
        ctypes.c_int64(out.stride(0)),
    )


def over_rows(name: str, what: ctypes.Structure, rows: int, row_elements: int) -> None:
    """Call the compiled `name(&what, first, last)` over all rows, on PyTorch's threads.

    Rows are not shared between threads, so results do not depend on how many there are.
    """
    compiled = library()
    assert compiled is not None
    function, pointer = getattr(compiled, name), ctypes.byref(what)
    function.restype = None
    threads = min(torch.get_num_threads(), max(1, rows * row_elements // _WORTH_A_THREAD))
    if threads <= 1:
        function(pointer, ctypes.c_int64(0), ctypes.c_int64(rows))
        return
    # Parts are handed out as threads come free: another process may have taken a core.
    parts = min(rows, _PARTS_A_THREAD * threads)
    start = _team(os.getpid())
    if start is not None:
        compiled.over_rows(
            start,
            function,
            pointer,
            ctypes.c_int64(rows),
            ctypes.c_int64(parts),
            ctypes.c_uint(threads),
        )
        return

    def work(part: int) -> None:  # without the interpreter's lock: a call through ctypes
        ends = (rows * end // parts for end in (part, part + 1))
        function(pointer, *map(ctypes.c_int64, ends))

    for _ in _pool(os.getpid(), threads).map(work, range(parts)):
        pass


@functools.cache
def _team(process: int) -> ctypes._FuncPointer | None:
    """GOMP_parallel of the OpenMP that PyTorch runs on: its threads go on spinning for a while
    after an operation, and others would have to share the cores with them.

    None where PyTorch has another library; and in a forked process, where OpenMP would wait for
    threads that only its parent has.
    """
    if process != _LOADED_IN or os.name != "posix":
        return None
    return getattr(ctypes.CDLL(None), "GOMP_parallel", None)


@functools.cache
def _pool(process: int, threads: int) -> ThreadPoolExecutor:
    """Threads for where there is no team; those of a parent do not survive a fork."""
    return ThreadPoolExecutor(max_workers=threads, thread_name_prefix="esr-rows")
