"""Building, caching and loading the C, and refusing a library that is not the user's own."""

from __future__ import annotations

import ctypes
import multiprocessing
import os
import re
import shutil

import pytest
import torch

from esr_kernels import cpu, linear_divergence
from esr_kernels.attention.op import shared_prefix_attention
from esr_kernels.cpu import library, parallel_for, structures
from tests.kernels.attention.test_op import _case

pytestmark = pytest.mark.skipif(not cpu.is_available(), reason="needs a C compiler")


def _forget() -> None:
    library.library.cache_clear()
    library.is_enabled.cache_clear()


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """An empty cache for the library, compiled without optimization: 0.3 s instead of 2.5."""
    monkeypatch.setenv("ESR_CACHE", str(tmp_path))
    monkeypatch.setattr(library, "_TUNING", (["-O0"],))
    _forget()
    yield tmp_path
    _forget()


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_two_processes_that_build_at_once_both_succeed(cache):
    fork = multiprocessing.get_context("fork")
    both = [fork.Process(target=library._build) for _ in range(2)]
    for process in both:
        process.start()
    for process in both:
        process.join(120)
    assert [process.exitcode for process in both] == [0, 0]
    [built] = (cache / "native").iterdir()
    assert built == library._build() and library._is_intact(built)


@pytest.mark.parametrize("why", ["no compiler", "unwritable cache", "switched off"])
def test_without_the_library_pytorch_does_the_work(why, cache, tmp_path, monkeypatch, caplog):
    (tmp_path / "file").write_text("")
    environment = {
        "no compiler": {"CC": "", "PATH": str(tmp_path)},
        "unwritable cache": {"ESR_CACHE": str(tmp_path / "file")},
        "switched off": {"ESR_NATIVE": "0"},
    }[why]
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    x = torch.randn(4, 8), torch.randn(30, 8), torch.randn(4, 8), torch.randn(30, 8)
    assert not cpu.is_available()
    assert float(linear_divergence(*x).loss) > 0
    assert ("No compiled code for the CPU" in caplog.text) == (why != "switched off")
    assert not list(tmp_path.glob("native/*"))


def test_a_damaged_library_is_built_again(cache):
    path = library._build()
    whole = path.read_bytes()
    flipped = whole[:5000] + bytes([whole[5000] ^ 1]) + whole[5001:]
    for damaged in (whole[:9000], b"junk", b"", flipped):
        path.write_bytes(damaged)
        assert library._build() == path
        assert library._is_intact(path) and path.read_bytes() != damaged


def _not_c(_: str, names: list[str]) -> list[str]:
    return [name for name in names if not name.endswith((".c", ".h"))]


def test_a_changed_source_is_compiled_again(cache, monkeypatch):
    first = library._build()
    copy = cache / "package"
    shutil.copytree(library._SOURCES[0].parent, copy, ignore=_not_c)
    monkeypatch.setattr(library, "_SOURCES", [copy / path.name for path in library._SOURCES])
    assert library._build() == first
    header = next(copy.glob("*.h"))
    header.write_text(header.read_text() + "\n/* changed */\n")
    assert library._build() != first and library._build().exists()


def _refusal(caplog) -> str:
    """The warning with which the library is not loaded."""
    caplog.clear()
    _forget()
    assert not cpu.is_available()
    [record] = caplog.records
    return record.getMessage()


def test_the_cache_is_private_and_may_be_read_by_others(cache):
    directory = library._build().parent
    assert directory.stat().st_mode & 0o777 == 0o700
    assert [path.stat().st_mode & 0o777 for path in directory.iterdir()] == [0o700]
    directory.chmod(0o755)
    _forget()
    assert cpu.is_available()


def _link(path):
    path.rename(path.with_suffix(".elsewhere"))
    path.symlink_to(path.with_suffix(".elsewhere"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda path: path.parent.chmod(0o770), "{path.parent} has mode 0770.*chmod go-w"),
        (lambda path: path.parent.chmod(0o702), "{path.parent} has mode 0702.*chmod go-w"),
        (lambda path: path.chmod(0o720), "{path} has mode 0720"),
        (_link, "{path} is a symbolic link"),
    ],
    ids=["group", "others", "library", "link"],
)
def test_what_others_can_change_is_refused(change, message, cache, caplog):
    path = library._build()
    change(path)
    assert re.search(message.format(path=path), _refusal(caplog))


@pytest.mark.parametrize("own", [[], ["native"]], ids=["directory", "library"])
def test_what_belongs_to_another_user_is_refused(own, cache, caplog, monkeypatch):
    path, check = library._build(), library._check_private
    foreign = path if own else path.parent

    def as_another_user(path, status):
        with monkeypatch.context() as patch:
            if path.name not in own:
                patch.setattr(os, "geteuid", lambda: status.st_uid + 1)
            check(path, status)

    monkeypatch.setattr(library, "_check_private", as_another_user)
    assert re.search(f"{foreign} belongs to user .* ESR_CACHE", _refusal(caplog))


def test_cc_may_have_flags(cache, monkeypatch):
    first, compiler = library._build(), library._compiler()[0]
    monkeypatch.setenv("CC", f"env '{compiler}' -DUNUSED='a b'")
    assert library._compiler()[1:] == [compiler, "-DUNUSED=a b"]
    second = library._build()
    assert second != first and second.exists()


@pytest.mark.parametrize("command", ["cc 'unclosed", "cc --no-such-flag"])
def test_a_cc_that_does_not_work_is_named(command, cache, caplog, monkeypatch):
    monkeypatch.setenv("CC", command)
    warning = _refusal(caplog)
    assert command in warning or "cc --no-such-flag" in warning


def test_every_structure_is_compared_with_c():
    declared = {
        item
        for item in vars(structures).values()
        if isinstance(item, type) and issubclass(item, ctypes.Structure)
    }
    assert declared == set(structures.BY_NAME_IN_C.values())


@pytest.mark.parametrize("name", structures.BY_NAME_IN_C)
def test_a_structure_of_another_size_in_c_is_refused(name, cache, caplog, monkeypatch):
    class Longer(structures.BY_NAME_IN_C[name]):
        _fields_ = [("added", ctypes.c_int64)]

    monkeypatch.setitem(structures.BY_NAME_IN_C, name, Longer)
    size = ctypes.sizeof(Longer)
    assert f"struct {name} has {size - 8} bytes" in _refusal(caplog)


@pytest.mark.parametrize("processor", ["x86-64", "haswell"])
def test_older_instructions_compute_the_same(processor, cache, monkeypatch):
    """Vectors of 4 and of 8 numbers, and transposes without vectors."""
    tensors, _ = _case((0,) * 30, prompts=1, length=400, own=100, dim=64, dtype=torch.float32)
    tensors = [tensor.cpu() for tensor in tensors]
    tiles = torch.randn(40, 7, 256)
    expected = shared_prefix_attention(*tensors), *cpu.tile_logsumexp(tiles)
    monkeypatch.setattr(library, "_TUNING", ([f"-march={processor}", "-O1"],))
    try:
        compiled = ctypes.CDLL(str(library._build()))
    except OSError:
        pytest.skip("a compiler for another processor")
    monkeypatch.setattr(parallel_for, "library", lambda: compiled)
    older = shared_prefix_attention(*tensors), *cpu.tile_logsumexp(tiles)
    for out, close_to, bound in zip(older, expected, (1e-5, 1e-6, 1e-6), strict=True):
        torch.testing.assert_close(out, close_to, rtol=0, atol=bound)
