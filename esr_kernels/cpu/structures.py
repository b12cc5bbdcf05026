"""Structures that are passed to C: structures.h has the same ones, with their meaning."""

from __future__ import annotations

import ctypes

_Pointer = ctypes.c_void_p
_Strides = ctypes.c_int64 * 3


class Transform(ctypes.Structure):
    _fields_ = [
        ("bias", _Pointer),
        ("slope", ctypes.c_float),
        ("inner", ctypes.c_float),
        ("outer", ctypes.c_float),
    ]


class RowNormalizers(ctypes.Structure):
    _fields_ = [
        ("student_lse", _Pointer),
        ("teacher_lse", _Pointer),
        ("lse_difference", _Pointer),
        ("pull_sum", _Pointer),
        ("student_residual", _Pointer),
        ("teacher_residual", _Pointer),
    ]


class RowPass(ctypes.Structure):
    _fields_ = [
        ("student", _Pointer),
        ("teacher", _Pointer),
        ("student_stride", ctypes.c_int64),
        ("teacher_stride", ctypes.c_int64),
        ("classes", ctypes.c_int64),
        ("student_transform", Transform),
        ("teacher_transform", Transform),
        ("kind", ctypes.c_int32),
        ("a", ctypes.c_float),
        ("b", ctypes.c_float),
        ("row_weight", _Pointer),
        ("labels", _Pointer),
        ("label_weight", ctypes.c_float),
        ("ignored_label", ctypes.c_int64),
        ("normalizers", RowNormalizers),
        ("parts", _Pointer),
        ("sums", _Pointer),
    ]


class Cache(ctypes.Structure):
    _fields_ = [
        ("key", _Pointer),
        ("value", _Pointer),
        ("key_strides", _Strides),
        ("value_strides", _Strides),
        ("lengths", _Pointer),
    ]


class Attention(ctypes.Structure):
    _fields_ = [
        ("query", _Pointer),
        ("out", _Pointer),
        ("row_stride", ctypes.c_int64),
        ("prefix", Cache),
        ("suffix", Cache),
        ("rows", _Pointer),
        ("width", ctypes.c_int64),
        ("kv_heads", ctypes.c_int64),
        ("repeats", ctypes.c_int64),
        ("dim", ctypes.c_int64),
        ("scale", ctypes.c_float),
        ("softcap", ctypes.c_float),
        ("window", ctypes.c_int64),
    ]


class TileLogsumexp(ctypes.Structure):
    _fields_ = [("logits", _Pointer), ("maxima", _Pointer), ("log_sums", _Pointer)]


BY_NAME_IN_C: dict[str, type[ctypes.Structure]] = {
    "transform": Transform,
    "row_normalizers": RowNormalizers,
    "row_pass": RowPass,
    "cache": Cache,
    "attention": Attention,
    "tile_logsumexp": TileLogsumexp,
}


def check_sizes(compiled: ctypes.CDLL) -> None:
    """Raise OSError if a structure has another size in C than here."""
    for name, structure in BY_NAME_IN_C.items():
        here = ctypes.sizeof(structure)
        there = ctypes.c_int64.in_dll(compiled, f"size_of_{name}").value
        if here != there:
            raise OSError(
                f"struct {name} has {there} bytes in the compiled library, {here} in Python"
            )
