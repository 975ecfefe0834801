"""The compiled CPU kernels: which shared object fits this CPU, why none does, and its functions as ctypes sees them.

One object per instruction set lies in `ops/native/`; the CPU is asked through the baseline object, and only an object that the CPU can run
is ever loaded. `DITATTN_CPU_ISA` forces one by name; `none` switches the kernels off. It is read once, at the first use.
"""

from __future__ import annotations

import ctypes
import json
import os
from ctypes import POINTER, c_float, c_int32, c_int64, c_uint32, c_void_p
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

__all__ = [
    "ENVIRONMENT",
    "VARIANTS",
    "Attention",
    "BlockMean",
    "Host",
    "KeySummary",
    "Library",
    "Selection",
    "Tensor4",
    "bf16_problem",
    "parts_problem",
    "problem",
    "selection",
    "tile_problem",
]

ENVIRONMENT = "DITATTN_CPU_ISA"
FOLDER = Path(__file__).parent / "native"

_REINSTALL = "reinstall: pip install --force-reinstall --no-deps ditattn"

# Best last, in the order of the bits of csrc/cpu/instruction_sets.h.
VARIANTS = ("baseline", "avx2", "avx512", "avx512bf16", "amx")


class Tensor4(ctypes.Structure):
    _fields_ = (("data", c_void_p), ("batch_stride", c_int64), ("token_stride", c_int64), ("head_stride", c_int64))


class Host(ctypes.Structure):
    _fields_ = (("release", c_void_p), ("acquire", c_void_p), ("check_signals", c_void_p))


class Attention(ctypes.Structure):
    """`DitattnAttention` of csrc/cpu/abi.h."""

    _fields_ = (
        ("struct_bytes", c_int64),
        *((name, Tensor4) for name in ("query", "key", "value", "out")),
        *((name, c_void_p) for name in ("lse", "indices", "counts")),
        ("indices_stride", c_int64 * 3),
        ("counts_stride", c_int64 * 3),
        ("key_lengths", c_void_p),
        ("order", c_void_p),
        *((name, c_int32) for name in ("batch", "heads", "key_heads", "query_length", "key_length", "head_dim")),
        *((name, c_int32) for name in ("dtype", "bf16_parts", "causal", "num_threads")),
        ("scale", c_float),
        ("overlapped", c_int32),
        ("host", POINTER(Host)),
        ("order_stride", c_int64),
        *((name, Tensor4) for name in ("tail_key", "tail_value")),
        ("tail_counts", c_void_p),
        ("tail_counts_stride", c_int64),
    )


class BlockMean(ctypes.Structure):
    """`DitattnBlockMean` of csrc/cpu/abi.h."""

    _fields_ = (
        ("struct_bytes", c_int64),
        ("input", Tensor4),
        ("out", c_void_p),
        ("order", c_void_p),
        *((name, c_int32) for name in ("batch", "length", "heads", "head_dim", "block_size", "dtype", "num_threads")),
        ("host", POINTER(Host)),
        ("order_stride", c_int64),
        ("order_group", c_int64),
    )


class KeySummary(ctypes.Structure):
    """`DitattnKeySummary` of csrc/cpu/abi.h."""

    _fields_ = (
        ("struct_bytes", c_int64),
        *((name, Tensor4) for name in ("key", "value")),
        *(
            (name, c_void_p)
            for name in ("mean_query", "means", "variances", "value_means", "tail_key", "tail_value", "order", "key_lengths")
        ),
        *((name, c_int32) for name in ("batch", "length", "heads", "head_dim", "dtype", "num_threads")),
        *((name, c_float) for name in ("scale", "least_square")),
        ("host", POINTER(Host)),
        ("order_stride", c_int64),
    )


@dataclass(frozen=True)
class Library:
    """A loaded variant.

    Attributes:
        most_bf16_parts: as how many bf16 parts it can take the numbers that it multiplies: 0 where bf16 tensors are widened to fp32, 1
            where they are multiplied as they are, 3 where there is a tile unit, which also multiplies fp32 tensors as two or three.
    """

    variant: str
    most_bf16_parts: int
    functions: Any


@dataclass(frozen=True)
class Selection:
    """What was chosen for this process.

    Attributes:
        library: the loaded variant, or None.
        problem: why there is none.
        rejected: why better variants than the chosen one were passed over, by name.
    """

    library: Library | None
    problem: str | None
    rejected: dict[str, str]

    def sentence(self) -> str:
        """For people: `amx`, or the reason there is none."""
        return self.library.variant if self.library else str(self.problem)


def problem() -> str | None:
    """None where the kernels can run, else the reason. The probe of every `cpu` row."""
    return selection().problem


def bf16_problem() -> str | None:
    """As `problem`, for rows that need bf16 arithmetic."""
    library = selection().library
    if library is None or library.most_bf16_parts:
        return selection().problem
    return f"needs bf16 instructions (avx512bf16 or amx); the kernels for this CPU are '{library.variant}'"


def parts_problem() -> str | None:
    """As `problem`, for rows that multiply fp32 tensors as several bf16 parts: worth it on a tile unit only."""
    why = tile_problem()
    if why is None or selection().library is None:
        return why
    return f"{why}. Without one, several bf16 products take longer than one of fp32"


def tile_problem() -> str | None:
    """As `problem`, for rows that need a tile unit."""
    library = selection().library
    if library is None or library.most_bf16_parts > 1:
        return selection().problem
    why = selection().rejected.get("amx", f"the kernels chosen here are '{library.variant}'")
    return f"needs the tile unit (amx): {why}"


@cache
def selection() -> Selection:
    """The best variant that was built and that this CPU runs, or the one that `DITATTN_CPU_ISA` names. Decided once per process."""
    wanted = os.environ.get(ENVIRONMENT, "")
    if wanted == "none":
        return Selection(None, f"switched off by {ENVIRONMENT}=none", {})
    if wanted and wanted not in VARIANTS:
        return Selection(None, f"{ENVIRONMENT}={wanted} names no variant; there is {', '.join(VARIANTS)}, none", {})
    rejected: dict[str, str] = {}
    for variant in [wanted] if wanted else reversed(VARIANTS):
        loaded = _load(variant)
        if isinstance(loaded, Library):
            return Selection(loaded, None, rejected)
        rejected[variant] = loaded
    reason = f"{ENVIRONMENT}={wanted}: {rejected[wanted]}" if wanted else rejected["baseline"]
    return Selection(None, reason, rejected)


def _load(variant: str) -> Library | str:
    """The library, or why it cannot be used. Nothing but the baseline object is opened before the CPU agreed."""
    if not _path(variant).exists():
        return _why_not_built(variant)
    try:
        if not _runnable() >> VARIANTS.index(variant) & 1:
            return f"this CPU does not have the instructions of '{variant}'"
        # PyDLL: the call keeps the GIL, the library releases it itself and takes it back now and then to notice Ctrl-C
        functions = ctypes.PyDLL(str(_path(variant)))
        functions.ditattn_attention.argtypes = [POINTER(Attention)]
        functions.ditattn_block_mean.argtypes = [POINTER(BlockMean)]
        functions.ditattn_key_summary.argtypes = [POINTER(KeySummary)]
        functions.ditattn_check_plan.argtypes = [c_void_p, c_void_p, c_int64, c_int64, c_int64]
        functions.ditattn_check_order.argtypes = [c_void_p, c_int64, c_int64]
        if functions.ditattn_init():
            return f"the operating system does not permit the registers of '{variant}'"
        return Library(variant, int(functions.ditattn_most_bf16_parts()), functions)
    except OSError as error:
        return f"cannot be loaded: {error}"
    except AttributeError as error:
        return f"was built from other sources than this version's ({error}): {_REINSTALL}"


def _path(variant: str) -> Path:
    return FOLDER / f"libditattn_cpu_{variant}.so"


@cache
def _runnable() -> int:
    """One bit per variant that this CPU can run."""
    ask = ctypes.PyDLL(str(_path("baseline"))).ditattn_runnable_variants
    ask.restype = c_uint32
    return int(ask())


def _why_not_built(variant: str) -> str:
    try:
        failed = json.loads((FOLDER / "build.json").read_text(encoding="utf-8"))["failed"]
    except (OSError, ValueError, KeyError):
        failed = {}
    cause = failed.get(variant, "the package was not built here")
    return f"the CPU kernels are missing: {cause}. Install g++ or clang, then {_REINSTALL}"


@cache
def host() -> Host:
    """Python's own functions for giving up the GIL and for noticing signals."""
    api = ctypes.pythonapi
    addresses = (ctypes.cast(f, c_void_p) for f in (api.PyEval_SaveThread, api.PyEval_RestoreThread, api.PyErr_CheckSignals))
    return Host(*addresses)


OK, NO_MEMORY, BAD_ARGUMENT = 0, 1, 2
"""Statuses of csrc/cpu/abi.h."""


def raise_for(status: int) -> None:
    """Turn a status of csrc/cpu/abi.h into an exception. An interrupt raises its own before it gets here."""
    if status == NO_MEMORY:
        raise MemoryError("the CPU kernel found no memory for packed keys and values")
    if status:
        raise RuntimeError(f"the CPU kernel refused its arguments (status {status}): please report this")
