"""Exact dense attention: contract, custom op and table of implementations.

    softmax(scale * Q K^T + mask) V

Forward only; there is no backward. The custom op `ditattn::dense_attention` has a fake, so that compiled graphs keep it whole.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ditattn.arguments import check_flag, check_tensors
from ditattn.ops.calls import DenseCall
from ditattn.ops.contract import check_mask, check_qkv, checked_scale, joined, refuse_gradients, split, without_autocast
from ditattn.ops.table import FLOATS, HALF, KERNEL_HEAD_DIMS, PADDED_HEAD_DIMS, WIDE_FLOATS, Implementation, Names, choose, load, names_of
from ditattn.packages import ATTENTIONS, MINDIESD, SGL_KERNEL_NPU, TORCH_NPU, Package

__all__ = ["LASER_NAMES", "TABLE", "compute", "dense_attention"]

_SDPA_HONOURS = frozenset({"causal", "key_lengths", "attn_mask", "gqa", "unequal_lengths"})
_CPU_HONOURS = frozenset({"causal", "key_lengths", "gqa", "unequal_lengths"})
_FLASH_HONOURS = frozenset({"causal", "gqa", "unequal_lengths"})

# the packages that bring Ascend's Laser operator, in order of preference
LASER_NAMES = ("laser_sgl_kernel_npu", "laser_attentions", "laser_mindiesd")


def _laser(name: str, provider: str, package: Package) -> Implementation:
    return Implementation(
        name,
        provider,
        devices=("npu",),
        dtypes=HALF,
        head_dims=PADDED_HEAD_DIMS,
        honours=frozenset({"gqa"}),
        packages=(TORCH_NPU, package),
        automatic=False,
        provider=True,
    )


def _flash(device: str, dtypes: tuple[str, ...]) -> Implementation:
    return Implementation(
        "flash",
        "ditattn.ops.dense_attention.pure_torch:run_flash",
        devices=(device,),
        dtypes=dtypes,
        honours=_FLASH_HONOURS,
        limits="ditattn.ops.dense_attention.pure_torch:limits_of_flash",
        automatic=False,
    )


def _on_cpu(name: str, target: str, dtypes: tuple[str, ...], probe: str, **rest: Any) -> Implementation:
    """A row of the compiled kernels for CPUs."""
    return Implementation(
        name,
        target,
        devices=("cpu",),
        dtypes=dtypes,
        head_dims=PADDED_HEAD_DIMS,
        honours=_CPU_HONOURS,
        probe=probe,
        **rest,
    )


TABLE: tuple[Implementation, ...] = (
    Implementation(
        "cudnn",
        "ditattn.ops.dense_attention.pure_torch:run_cudnn",
        devices=("cuda",),
        dtypes=HALF,
        head_dims=KERNEL_HEAD_DIMS,
        honours=frozenset({"unequal_lengths"}),
        probe="ditattn.ops.dense_attention.pure_torch:why_not_cudnn",
        limits="ditattn.ops.dense_attention.pure_torch:limits_of_cudnn",
    ),
    # where the CPU has matrix instructions that a kernel does not use as well, torch may be faster
    _on_cpu(
        "cpu",
        "ditattn.ops.dense_attention.cpu:run",
        FLOATS,
        "ditattn.ops.cpu_library:problem",
        preference="ditattn.ops.preference:dense_on_cpu",
    ),
    _on_cpu(
        "cpu_fast_fp32",
        "ditattn.ops.dense_attention.cpu:run_fast_fp32",
        ("float32",),
        "ditattn.ops.cpu_library:bf16_problem",
        automatic=False,
        computes_in="bfloat16",
    ),
    # the two schedules of `cpu` for bf16 tensors on a tile unit, which takes the faster one by itself
    _on_cpu(
        "cpu_sequential",
        "ditattn.ops.dense_attention.cpu:run_sequential",
        ("bfloat16",),
        "ditattn.ops.cpu_library:tile_problem",
        automatic=False,
    ),
    _on_cpu(
        "cpu_overlapped",
        "ditattn.ops.dense_attention.cpu:run_overlapped",
        ("bfloat16",),
        "ditattn.ops.cpu_library:tile_problem",
        automatic=False,
    ),
    # fp32 products from bf16 products of the tile unit: never timed on one, so they run by name only
    _on_cpu(
        "cpu_bf16x3",
        "ditattn.ops.dense_attention.cpu:run_bf16x3",
        ("float32", "float16"),
        "ditattn.ops.cpu_library:parts_problem",
        automatic=False,
        computes_in="bfloat16",
        parts=2,
    ),
    _on_cpu(
        "cpu_bf16x6", "ditattn.ops.dense_attention.cpu:run_bf16x6", ("float32",), "ditattn.ops.cpu_library:parts_problem", automatic=False
    ),
    Implementation("torch", "ditattn.ops.dense_attention.pure_torch:run", dtypes=WIDE_FLOATS, honours=_SDPA_HONOURS),
    _flash("cpu", FLOATS),
    _flash("cuda", HALF),
    Implementation(
        "flash",
        "ditattn.ops.dense_attention.ascend:run_fused",
        devices=("npu",),
        dtypes=HALF,
        honours=frozenset({"gqa", "unequal_lengths"}),
        packages=(TORCH_NPU,),
        automatic=False,
    ),
    _laser("laser_sgl_kernel_npu", "ditattn.ops.dense_attention.ascend:LASER_SGL_KERNEL_NPU", SGL_KERNEL_NPU),
    _laser("laser_attentions", "ditattn.ops.dense_attention.ascend:LASER_ATTENTIONS", ATTENTIONS),
    _laser("laser_mindiesd", "ditattn.ops.dense_attention.ascend:LASER_MINDIESD", MINDIESD),
    Implementation("reference", "ditattn.ops.dense_attention.reference:run", dtypes=WIDE_FLOATS, honours=_SDPA_HONOURS, automatic=False),
)


def dense_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    scale: float | None = None,
    causal: bool = False,
    key_lengths: Tensor | None = None,
    attn_mask: Tensor | None = None,
    implementation: Names = None,
) -> Tensor:
    """Exact attention over every key.

    Args:
        query: `[B, S, H, D]`, any strides.
        key: `[B, T, G, D]`, H a multiple of G.
        value: of the key's shape.
        scale: factor on the scores, 1 / sqrt(D) when None; applied in fp32.
        causal: query i sees keys 0..i (aligned at the start, as torch's SDPA does).
        key_lengths: int32 or int64 `[B]` on the tensors' device; only that many leading keys of each batch element are real. Length 0
            yields zeros.
        attn_mask: bool (True is kept) or additive, broadcastable to `[B, H, S, T]`.
        implementation: a name from `TABLE`, or several in order of preference; None takes the first possible one.

    Returns:
        `[B, S, H, D]`, contiguous, in the query's dtype.

    Raises:
        UnsupportedCall: an argument of a wrong type, tensors that do not fit together, a scale that is not finite, or a call that no
            implementation takes.
        BackendUnavailable: the named implementation cannot run here.

    Examples:
        >>> import torch
        >>> from ditattn import dense_attention
        >>> query, key, value = torch.randn(3, 1, 256, 4, 64)
        >>> dense_attention(query, key, value).shape
        torch.Size([1, 256, 4, 64])
    """
    optional = {"key_lengths": key_lengths, "attn_mask": attn_mask}
    check_tensors(query=query, key=key, value=value, **{name: x for name, x in optional.items() if x is not None})
    check_flag("causal", causal)
    check_qkv(query, key, value, key_lengths)
    if attn_mask is not None:
        check_mask(attn_mask, query, key)
    scale = checked_scale(scale, query.shape[3])
    names = names_of(implementation)
    # a graph that is being traced keeps the choice open: the op takes it, once, when it first runs
    if not torch.compiler.is_compiling():
        call = DenseCall(query, key, value, scale, causal, key_lengths, attn_mask)
        names = (choose(TABLE, call.facts(), names).name,)
    out: Tensor = _op(query, key, value, scale, causal, key_lengths, attn_mask, joined(names))
    return out


def compute(call: DenseCall, row: Implementation) -> Tensor:
    """The call by a chosen row, unchecked and without an op around it: for code that torch sees as one operation already."""
    with without_autocast(call.query.device):
        out: Tensor = load(row)(call)
    return out.contiguous()


@torch.library.custom_op("ditattn::dense_attention", mutates_args=())
def _op(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scale: float,
    causal: bool,
    key_lengths: Tensor | None,
    attn_mask: Tensor | None,
    implementations: str,
) -> Tensor:
    call = DenseCall(query, key, value, scale, causal, key_lengths, attn_mask)
    return compute(call, choose(TABLE, call.facts(), split(implementations)))


@_op.register_fake
def _(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scale: float,
    causal: bool,
    key_lengths: Tensor | None,
    attn_mask: Tensor | None,
    implementations: str,
) -> Tensor:
    return query.new_empty(query.shape)


_op.register_autograd(refuse_gradients)
