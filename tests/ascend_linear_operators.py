"""Ascend's MXFP4 operators as their documentation describes them, on the CPU, with the operators' own argument names.

Each refuses what its documentation forbids, so that a call that would be wrong on the device fails here. Sources, read in 2026-11: CANN
ops-nn `quant/dynamic_dual_level_mx_quant` (README, aclnnDynamicDualLevelMxQuant.md, op_kernel/arch35), `quant/dynamic_mx_quant`,
`matmul/dual_level_quant_batch_matmul` (aclnnDualLevelQuantMatmulWeightNz.md); op-plugin's `npu_dual_level_quant_matmul.md`,
`npu_dynamic_dual_level_mx_quant.md` and the operator's own test `test_npu_dual_level_quant_matmul.py`; for how `npu_quant_matmul` is
called with FP4, MindIE-SD `mindiesd/quantization/layer.py` and torch_npu's own shape function.

Written with loops over blocks, apart from the package's own rounding: only the table of values is shared with nothing.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

FLOAT4_E2M1, FLOAT8_E8M0 = 296, 293
FRACTAL_NZ = 29
VALUES = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0], dtype=torch.float64)
MIDDLES = (VALUES[1:] + VALUES[:-1]) / 2
SIXTH = torch.tensor(0x3E2AAAAB, dtype=torch.int32).view(torch.float32)
# addresses of what was cast to FRACTAL_NZ
_cast: dict[int, Tensor] = {}


def demand(condition: bool, what: str) -> None:
    if not condition:
        raise RuntimeError(f"the operator forbids: {what}")


def format_cast(input: Tensor, acl_format: int, customize_dtype: Any = None, input_dtype: Any = None) -> Tensor:
    """The same numbers in another storage format."""
    _check_cast(input, acl_format, customize_dtype)
    cast = input.clone()
    _cast[cast.data_ptr()] = cast
    return cast


def _check_cast(input: Tensor, acl_format: int, customize_dtype: Any) -> None:
    demand(acl_format == FRACTAL_NZ and customize_dtype is not None, f"format {acl_format} of {customize_dtype}")
    demand(input.dtype == torch.int8, f"{input.dtype} for FP4: view it as int8")


def cast_shape(input: Tensor, acl_format: int, customize_dtype: Any = None, input_dtype: Any = None) -> Tensor:
    """What `format_cast` returns, without numbers."""
    _check_cast(input, acl_format, customize_dtype)
    return torch.empty_like(input)


def _check_quantised(x: Tensor, round_mode: str) -> None:
    demand(x.dtype in (torch.bfloat16, torch.float16), f"{x.dtype}")
    demand(x.numel() > 0, "empty tensors")
    demand(x.shape[-1] % 2 == 0, "an odd last axis")
    demand(round_mode in ("rint", "round", "floor"), round_mode)


def _blocks(x: Tensor) -> tuple[Tensor, Tensor]:
    """Codes `[rows, K]` and exponents `[rows, ceil(K / 32)]` of `[rows, K]`, block by block."""
    codes, exponents = torch.zeros(x.shape, dtype=torch.int64), []
    for start in range(0, x.shape[1], 32):
        block = x[:, start : start + 32].double()
        largest = block.abs().amax(1, keepdim=True)
        power = torch.floor(torch.log2(largest)) - 2
        power = torch.where(largest == 0, torch.tensor(-127.0, dtype=torch.float64), power).clamp(min=-127)
        size = block.abs() / torch.exp2(power)
        # halves to even: a middle belongs to the even one of its neighbours
        nearest = torch.searchsorted(MIDDLES, size.contiguous())
        on_middle = (nearest < 7) & (size == MIDDLES[nearest.clamp(max=6)])
        nearest = torch.where(on_middle & (nearest % 2 == 1), nearest + 1, nearest)
        codes[:, start : start + 32] = nearest + 8 * block.signbit()
        exponents.append(power + 127)
    return codes, torch.cat(exponents, dim=1)


def _stored(codes: Tensor, exponents: Tensor, leading: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """Bytes, the earlier value low, and exponents in pairs, padded with 0."""
    packed = (codes[:, ::2] + 16 * codes[:, 1::2]).to(torch.uint8)
    pairs = torch.cat([exponents, exponents.new_zeros(len(exponents), exponents.shape[1] % 2)], dim=1)
    return packed.view(*leading, -1), pairs.to(torch.uint8).view(*leading, -1, 2)


def dynamic_mx_quant(
    input: Tensor,
    axis: int = -1,
    round_mode: str = "rint",
    dst_type: int = FLOAT4_E2M1,
    block_size: int = 32,
    scale_alg: int | None = 0,
    dst_type_max: float = 0.0,
    max_low_bound: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """`[..., K]` -> bytes `[..., K / 2]`, e8m0 `[..., ceil(K / 64), 2]`."""
    _check_quantised(input, round_mode)
    demand((axis, dst_type, block_size, scale_alg) == (-1, FLOAT4_E2M1, 32, 0) and dst_type_max == max_low_bound == 0, "other formats here")
    codes, exponents = _blocks(input.reshape(-1, input.shape[-1]).float())
    return _stored(codes, exponents, tuple(input.shape[:-1]))


def dynamic_dual_level_mx_quant(input: Tensor, smooth_scale: Tensor | None = None, round_mode: str = "rint") -> tuple[Tensor, ...]:
    """`[..., K]` -> bytes `[..., K / 2]`, float32 `[..., ceil(K / 512)]`, e8m0 `[..., ceil(K / 64), 2]`."""
    _check_quantised(input, round_mode)
    demand(smooth_scale is None, "smooth_scale, in some versions")
    x = input.reshape(-1, input.shape[-1])
    over, scales = torch.zeros(x.shape), []
    for start in range(0, x.shape[1], 512):
        block = x[:, start : start + 512].float()
        scale = block.abs().amax(1, keepdim=True) * SIXTH
        over[:, start : start + 512] = torch.where(block == 0, 0, (block / scale).to(x.dtype).float())
        scales.append(scale)
    codes, exponents = _blocks(over)
    packed, pairs = _stored(codes, exponents, tuple(input.shape[:-1]))
    return packed, torch.cat(scales, dim=1).view(*input.shape[:-1], -1), pairs


def _decoded(packed: Tensor, pairs: Tensor) -> Tensor:
    """float64 `[rows, K]` of bytes `[rows, K / 2]` and exponents `[rows, ., 2]`."""
    codes = torch.stack([packed.int() & 15, (packed.int() >> 4) & 15], dim=-1).flatten(1)
    size = VALUES[(codes & 7).long()]
    exponents = pairs.flatten(1)[:, : -(-codes.shape[1] // 32)].double() - 127
    return torch.where(codes >= 8, -size, size) * torch.exp2(exponents).repeat_interleave(32, dim=1)[:, : codes.shape[1]]


def quant_matmul(
    x1: Tensor,
    x2: Tensor,
    scale: Tensor,
    offset: Tensor | None = None,
    pertoken_scale: Tensor | None = None,
    bias: Tensor | None = None,
    output_dtype: Any = None,
    x1_dtype: int | None = None,
    x2_dtype: int | None = None,
    pertoken_scale_dtype: int | None = None,
    scale_dtype: int | None = None,
    group_sizes: list[int] | None = None,
    y_scale: Tensor | None = None,
) -> Tensor:
    """FP4 alone: x1 `[M, K / 2]`, x2 `[K / 2, N]` and its scale `[K / 64, N, 2]` as transposed views, x1's scale `[M, K / 64, 2]`."""
    demand((x1_dtype, x2_dtype) == (FLOAT4_E2M1, FLOAT4_E2M1), f"{x1_dtype} times {x2_dtype} here")
    demand((scale_dtype, pertoken_scale_dtype) == (FLOAT8_E8M0, FLOAT8_E8M0), "scales that are not e8m0")
    demand(group_sizes is not None and list(group_sizes) == [1, 1, 32], f"groups of {group_sizes}")
    demand(x1.is_contiguous() and x2.stride() == (1, x2.shape[0]), "an x2 that is not a transposed view")
    demand(pertoken_scale is not None and pertoken_scale.shape == (len(x1), -(-x1.shape[1] // 32), 2), "another scale of x1")
    demand(scale.shape == (-(-x2.shape[0] // 32), x2.shape[1], 2), f"a scale {list(scale.shape)}")
    demand(bias is None or bias.dtype == torch.float32, "a bias that is not float32")
    assert pertoken_scale is not None
    out = _decoded(x1, pertoken_scale) @ _decoded(x2.T, scale.transpose(0, 1)).T
    return _output(out, bias, output_dtype)


def dual_level_quant_matmul(
    x1: Tensor,
    x2: Tensor,
    x1_level0_scale: Tensor,
    x2_level0_scale: Tensor,
    x1_level1_scale: Tensor,
    x2_level1_scale: Tensor,
    bias: Tensor | None = None,
    output_dtype: Any = torch.bfloat16,
) -> Tensor:
    """x1 `[M, K / 2]`, x2 `[N, K / 2]` in FRACTAL_NZ.

    Scales of level 0 `[M, K / 512]` and `[K / 512, N]`, of level 1 `[M, K / 64, 2]` and `[N, K / 64, 2]`.
    """
    demand(x2.data_ptr() in _cast, "an x2 that is not in FRACTAL_NZ")
    _check_dual_level(x1, x2, x1_level0_scale, x2_level0_scale, x1_level1_scale, x2_level1_scale, bias)
    a, b = _decoded(x1, x1_level1_scale), _decoded(x2, x2_level1_scale)
    out = torch.zeros(len(x1), len(x2), dtype=torch.float64)
    for group in range(x1_level0_scale.shape[1]):
        columns = slice(512 * group, 512 * (group + 1))
        out += (a[:, columns] @ b[:, columns].T) * x1_level0_scale[:, group : group + 1].double() * x2_level0_scale[group].double()
    return _output(out, bias, output_dtype)


def _check_dual_level(
    x1: Tensor,
    x2: Tensor,
    x1_level0_scale: Tensor,
    x2_level0_scale: Tensor,
    x1_level1_scale: Tensor,
    x2_level1_scale: Tensor,
    bias: Tensor | None,
) -> None:
    groups, pairs = -(-x1.shape[1] // 256), -(-x1.shape[1] // 32)
    operands = (x1, x2, x1_level0_scale, x2_level0_scale, x1_level1_scale, x2_level1_scale)
    demand(all(x.numel() and x.is_contiguous() for x in operands), "empty or strided operands")
    # bytes of FP4 are uint8, and int8 once they are in another storage format
    demand((x1.dtype, x2.dtype) == (torch.uint8, torch.int8), f"{x1.dtype} times {x2.dtype}")
    demand(x2.shape[1] == x1.shape[1], f"rows of {x1.shape[1]} and {x2.shape[1]} bytes")
    demand(x1_level1_scale.dtype == x2_level1_scale.dtype == torch.uint8, "level-1 scales that are not bytes of e8m0")
    demand(x1_level0_scale.dtype == x2_level0_scale.dtype == torch.float32, "level-0 scales that are not float32")
    demand(x1_level0_scale.shape == (len(x1), groups), f"a level-0 scale {list(x1_level0_scale.shape)} of x1")
    demand(x2_level0_scale.shape == (groups, len(x2)), f"a level-0 scale {list(x2_level0_scale.shape)} of x2")
    demand(x1_level1_scale.shape == (len(x1), pairs, 2), f"a level-1 scale {list(x1_level1_scale.shape)} of x1")
    demand(x2_level1_scale.shape == (len(x2), pairs, 2), f"a level-1 scale {list(x2_level1_scale.shape)} of x2")
    demand(bias is None or (bias.dtype == torch.float32 and bias.is_contiguous()), "a bias that is not float32")
    demand(bias is None or bias.shape == (len(x2),), "a bias of another length")


def dual_level_shape(
    x1: Tensor,
    x2: Tensor,
    x1_level0_scale: Tensor,
    x2_level0_scale: Tensor,
    x1_level1_scale: Tensor,
    x2_level1_scale: Tensor,
    bias: Tensor | None = None,
    output_dtype: Any = torch.bfloat16,
) -> Tensor:
    """What `dual_level_quant_matmul` returns, without numbers. That x2 is in FRACTAL_NZ shows in its type alone."""
    _check_dual_level(x1, x2, x1_level0_scale, x2_level0_scale, x1_level1_scale, x2_level1_scale, bias)
    return x1.new_empty(len(x1), len(x2), dtype=_output_dtype(output_dtype))


def _output(out: Tensor, bias: Tensor | None, output_dtype: Any) -> Tensor:
    return (out if bias is None else out + bias.double()).to(_output_dtype(output_dtype))


def _output_dtype(given: Any) -> torch.dtype:
    # torch hands dtypes over as numbers
    dtypes = {5: torch.float16, 15: torch.bfloat16, torch.float16: torch.float16, torch.bfloat16: torch.bfloat16}
    demand(given in dtypes, f"output {given}")
    return dtypes[given]


KERNELS: dict[str, Callable[..., Any]] = {
    "npu_dynamic_mx_quant": dynamic_mx_quant,
    "npu_dynamic_dual_level_mx_quant": dynamic_dual_level_mx_quant,
    "npu_quant_matmul": quant_matmul,
    "npu_dual_level_quant_matmul": dual_level_quant_matmul,
    "npu_format_cast": format_cast,
}

# of operators that torch_npu 2.13.0 has no shape function of its own for
SHAPES: dict[str, Callable[..., Any]] = {"npu_format_cast": cast_shape, "npu_dual_level_quant_matmul": dual_level_shape}
