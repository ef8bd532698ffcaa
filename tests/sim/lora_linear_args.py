"""The arguments of lora_linear's launchers as C structures."""

from __future__ import annotations

import ctypes


class Matrix(ctypes.Structure):
    _fields_ = [
        ("data", ctypes.c_void_p), ("dtype", ctypes.c_int), ("row", ctypes.c_int64), ("col", ctypes.c_int64),
    ]  # fmt: skip


class Dropout(ctypes.Structure):
    _fields_ = [("seed", ctypes.c_void_p), ("threshold", ctypes.c_uint32), ("keep_scale", ctypes.c_float)]


class Scales(ctypes.Structure):
    _fields_ = [(name, ctypes.c_void_p) for name in ("d", "p_b", "p_d", "g_b", "g_d")]


class Arguments(ctypes.Structure):
    """LoraLinearArgs of csrc/include/peftkern/cuda.h."""

    _fields_ = [
        ("x", Matrix), ("w", Matrix), ("w_by_row", ctypes.c_bool), ("out", Matrix),
        *((name, ctypes.c_int64) for name in "MNKR"), ("v", ctypes.c_void_p), ("a", Matrix), ("b", Matrix),
        ("scaling", ctypes.c_float), ("scales", Scales), ("bias", ctypes.c_void_p),
        ("bias_dtype", ctypes.c_int), ("dropout", Dropout),
        ("counters", ctypes.c_void_p), ("multiprocessors", ctypes.c_int), ("stream", ctypes.c_void_p),
    ]  # fmt: skip


class Quantised(ctypes.Structure):
    """csrc/include/peftkern/quantised.h."""

    _fields_ = [
        ("code", ctypes.c_int), ("order", ctypes.c_int), ("N", ctypes.c_int64), ("K", ctypes.c_int64),
        ("codes", ctypes.c_void_p), ("row", ctypes.c_int64), ("integers", ctypes.c_bool), ("block_bytes", ctypes.c_int64),
        ("flat", ctypes.c_bool), *((name, ctypes.c_int64) for name in ("group", "rows", "groups")),
        ("number", ctypes.c_int), *((name, ctypes.c_void_p) for name in ("scales", "zeros", "book", "outer")),
        ("outer_group", ctypes.c_int64), ("offset", ctypes.c_void_p),
    ]  # fmt: skip
