"""The operators as the tests see them: signatures of packages that are not on the package index, and kernels for the CPU.

The kernels are those of `ascend_operators`, written from the operators' documentation. They are registered for the operators of the
installed packages too, so that every call passes the package's own signature on its way.
"""

from __future__ import annotations

import importlib.machinery
import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

import ascend_linear_operators
import ascend_operators
from ditattn.devices import npu

_LASER = (
    "(Tensor query, Tensor key, Tensor value, Tensor? atten_mask=None, Tensor? alibi_mask=None, Tensor? drop_mask=None, "
    'float scale_value=1., int head_num=2, str input_layout="BNSD", float keep_prob=1., int pre_tokens=2147483647, int next_tokens=1, '
    "bool is_highPrecision=True) -> (Tensor, Tensor)"
)
_INDEXED = (
    "(Tensor query, Tensor key, Tensor value, Tensor select_idx, Tensor select_num_idx, int[] blockshape, Tensor? attn_mask=None, "
    "int[]? actual_seq_qlen=None, int[]? actual_seq_kvlen=None, Tensor? block_table=None, "
    'str q_input_layout="TND", str kv_input_layout="TND", int head_num=1, int mask_type=0, float scale=1., int inner_precise=1, '
    "int block_size=0) -> (Tensor, Tensor)"
)
_COUNTED = (
    "(Tensor query, Tensor key, Tensor value, Tensor sparse_mask, Tensor sparse_count_table, "
    'str input_layout="BNSD", int sparse_size=128, int num_heads=1, int num_key_value_heads=1, float scale_value=1, bool causal=True, '
    "int inner_precise=1, int pre_tokens=214748647, int next_tokens=0, int[]? actual_seq_lengths=None, "
    "int[]? actual_seq_lengths_kv=None) -> "
)
_ESTIMATE = (
    "(Tensor query, Tensor key, int[]? actual_seq_lengths=None, int[]? actual_seq_lengths_kv=None, "
    'str input_layout="BNSD", int stride=8, int sparse_size=128, int num_heads=1, int num_key_value_heads=1, float scale_value=1, '
    "float threshold=1, bool causal=True, bool keep_sink=True, bool keep_recent=True, float row_sparse=1) -> (Tensor, Tensor)"
)

# github.com/sgl-project/sgl-kernel-npu, csrc/attentions/csrc/plugin/register_ops.cpp, package `attentions`
ATTENTIONS = {
    "la": _LASER,
    "rainfusionattention": _INDEXED,
    "ada_block_sparse_attention": _COUNTED + "Tensor",
    "sparse_block_estimate": _ESTIMATE,
}
# the same repository later, package `sgl_kernel_npu`: README of the attention kernels, python/sgl_kernel_npu/sgl_kernel_npu/attentions.py
SGL_KERNEL_NPU = {"laser_attn": _LASER, "ada_block_sparse_attention": _COUNTED + "(Tensor, Tensor)", "sparse_block_estimate": _ESTIMATE}

_libraries: list[torch.library.Library] = []


def declare() -> None:
    """Register the recorded signatures, and the packages that would bring them."""
    for namespace, kind, module, signatures in (
        ("attentions", "DEF", "attentions", ATTENTIONS),
        ("npu", "FRAGMENT", "sgl_kernel_npu", SGL_KERNEL_NPU),
    ):
        library = torch.library.Library(namespace, kind)
        for name, signature in signatures.items():
            library.define(name + signature)
        _libraries.append(library)
        torch.library.register_fake(f"{namespace}::sparse_block_estimate", _estimate_shapes)
        sys.modules[module] = ModuleType(module)
        sys.modules[module].__spec__ = importlib.machinery.ModuleSpec(module, None)


def _estimate_shapes(query: Tensor, key: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
    rows, columns = (-(-x.shape[2] // ascend_operators.BLOCK) for x in (query, key))
    mask = query.new_empty(*query.shape[:2], rows, -(-columns // 32) * 32, dtype=torch.int8)
    return mask, query.new_empty(*query.shape[:2], rows, dtype=torch.int32)


def give_cpu_kernels() -> None:
    """Register the documented semantics for the CPU."""
    import mindiesd  # registers its operators  # noqa: F401

    laser, indexed, counted = ascend_operators.laser, ascend_operators.indexed, ascend_operators.counted
    estimate = {"sparse_block_estimate": ascend_operators.estimate}
    kernels = {
        "attentions": {"la": laser, "rainfusionattention": indexed, "ada_block_sparse_attention": counted, **estimate},
        "npu": {
            "laser_attn": laser,
            "ada_block_sparse_attention": _beside_lse,
            "npu_block_sparse_attention": _masked,
            **estimate,
            **ascend_linear_operators.KERNELS,
        },
        "mindiesd": {
            "la": laser,
            "rainfusionattention": indexed,
            "ada_block_sparse_attention": counted,
            "block_sparse_attention": _masked,
            **estimate,
        },
    }
    for namespace, functions in kernels.items():
        library = torch.library.Library(namespace, "IMPL")
        for name, function in functions.items():
            library.impl(name, _with_defaults(getattr(getattr(torch.ops, namespace), name).default, function), "CPU")
        _libraries.append(library)


def _masked(**arguments: Any) -> Any:
    generation = npu.soc_generation()
    assert generation is not None
    return ascend_operators.masked(generation, **arguments)


def _beside_lse(**arguments: Any) -> Any:
    out = ascend_operators.counted(**arguments)
    return out, out.new_empty(0)


def _with_defaults(operator: Any, function: Callable[..., Any]) -> Callable[..., Any]:
    """torch leaves out arguments that equal their default; the kernel gets every one by name."""
    schema = operator._schema.arguments
    defaults = {argument.name: argument.default_value for argument in schema if argument.has_default_value()}

    def kernel(*args: Any, **kwargs: Any) -> Any:
        names = [argument.name for argument in schema]
        return function(**{**defaults, **dict(zip(names, args, strict=False)), **kwargs})

    return kernel
