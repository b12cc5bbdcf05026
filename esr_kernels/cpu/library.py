"""Builds, caches and loads the C of this room.

The sources are compiled when they are first needed, with `$CC`, cc, gcc or clang and for the
instructions of this machine, which takes about two seconds. The library is cached in
`$ESR_CACHE/native` (default ~/.cache/esr/native) and loads in a few milliseconds afterwards. A
cached library is executed, so the directory and the file must belong to the user and be writable by
nobody else.

If the library cannot be built or loaded, a warning says why, and PyTorch is used instead.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import logging
import os
import platform
import shlex
import shutil
import stat
import subprocess
import tempfile
from pathlib import Path

from esr_kernels.cpu.structures import check_sizes

_log = logging.getLogger(__name__)
_SOURCES = [
    Path(__file__).with_name(f"{name}.c")
    for name in ("rows", "transpose", "attention", "tile_logsumexp", "parallel_for", "structures")
]
# None of these lets the compiler reorder sums or ignore NaN and infinity.
_FLAGS = (
    "-O3 -std=gnu11 -fopenmp-simd -fno-math-errno -fno-trapping-math -fno-signed-zeros "
    "-shared -fPIC"
).split()
# Tried in turn: x86 compilers take the first, some others the second.
_TUNING: tuple[list[str], ...] = (["-march=native"], ["-mcpu=native"], [])


@functools.cache
def is_enabled() -> bool:
    """Whether this room may do anything: False with ESR_NATIVE=0."""
    switch = os.environ.get("ESR_NATIVE", "1")
    if switch not in ("0", "1"):
        raise ValueError(f"ESR_NATIVE must be 0 or 1, got {switch!r}")
    return switch == "1"


@functools.cache
def library() -> ctypes.CDLL | None:
    """The compiled functions, or None if they are disabled or unavailable."""
    if not is_enabled():
        return None
    try:
        compiled = ctypes.CDLL(str(_build()))
        check_sizes(compiled)
    except (OSError, RuntimeError, subprocess.SubprocessError) as error:
        _log.warning(
            "No compiled code for the CPU (%s); PyTorch is used instead, which is slower", error
        )
        return None
    return compiled


def is_available() -> bool:
    """Whether there is compiled code, built at the first call."""
    return library() is not None


def _compiler() -> list[str]:
    """The command that starts the compiler: $CC may hold several words."""
    try:
        given = shlex.split(os.environ.get("CC", ""))
    except ValueError as error:
        raise OSError(f"CC={os.environ['CC']!r} is not a valid command: {error}") from error
    for command in (given, ["cc"], ["gcc"], ["clang"]):
        path = shutil.which(command[0]) if command else None
        if path:
            return [path, *command[1:]]
    raise OSError("no C compiler found: looked for $CC, cc, gcc and clang")


def _processor() -> str:
    """What `-march=native` depends on: machines may share a cache."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    wanted = ("flags", "Features", "model name", "CPU part")
    return "\n".join(sorted({line for line in lines if line.startswith(wanted)}))


def _build() -> Path:
    """The path of the library, compiled if the cache has none for these sources and flags."""
    if os.name != "posix":
        raise OSError(f"compiled code needs a POSIX system, this one is {os.name!r}")
    compiler = _compiler()
    headers = sorted(_SOURCES[0].parent.glob("*.h"))
    source = b"".join(path.read_bytes() for path in (*_SOURCES, *headers))
    identity = [*compiler, *_FLAGS, platform.platform(), _processor()]
    digest = hashlib.sha256(source + "\0".join(identity).encode()).hexdigest()[:16]
    directory = _cache_directory()
    target = directory / f"esr-{digest}.so"
    if _is_intact(target):
        return target
    with tempfile.TemporaryDirectory(dir=directory) as scratch:
        built = Path(scratch) / "esr.so"
        for tuning in _TUNING:
            command = [*compiler, *_FLAGS, *tuning, *map(str, _SOURCES), "-o", str(built), "-lm"]
            run = subprocess.run(command, capture_output=True, text=True, timeout=120)
            if run.returncode == 0:
                break
        else:
            raise OSError(f"{shlex.join(command)}: {run.stderr.strip()[-300:]}")
        content = built.read_bytes()
        built.write_bytes(content + hashlib.sha256(content).digest())
        built.chmod(0o700)
        # Atomic: if two processes build at once, each finds one whole file or the other.
        os.replace(built, target)
    return target


def _cache_directory() -> Path:
    cache = Path(os.environ.get("ESR_CACHE") or Path.home() / ".cache" / "esr").expanduser()
    directory = cache / "native"
    directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    _check_private(directory, os.stat(directory))
    return directory


def _check_private(path: Path, status: os.stat_result) -> None:
    """Raise PermissionError unless only this user can change what is at `path`."""
    user, mode = os.geteuid(), stat.S_IMODE(status.st_mode)
    if status.st_uid != user:
        raise PermissionError(
            f"{path} belongs to user {status.st_uid}, not to the current user {user}: "
            "remove it, or set ESR_CACHE to a directory of your own"
        )
    if mode & (stat.S_IWGRP | stat.S_IWOTH):
        raise PermissionError(
            f"{path} has mode {mode:04o}, so other users can write to it: delete the libraries "
            f"that you did not build, then run chmod go-w {shlex.quote(str(path))}"
        )


def _is_intact(path: Path) -> bool:
    """Whether the file exists and is what was built: its SHA-256 digest follows the library.

    Loading a truncated library would kill the process.
    """
    try:
        file = os.open(path, os.O_RDONLY | os.O_NOFOLLOW)
    except FileNotFoundError:
        return False
    except OSError as error:
        if path.is_symlink():
            raise PermissionError(f"{path} is a symbolic link: remove it") from error
        raise
    with open(file, "rb") as opened:
        _check_private(path, os.fstat(file))
        content = opened.read()
    return hashlib.sha256(content[:-32]).digest() == content[-32:]
