"""MXFP4 in plain torch: rounding to it, packing, and back. OCP Microscaling Formats 1.0; the dual-level format is Ascend's.

A block of 32 values shares the scale 2^(floor(log2(max |x|)) - 2), as e8m0: 2^-127 at least, NaN where a value is NaN. Values over the
scale are rounded to the nearest of 0, 0.5, 1, 1.5, 2, 3, 4, 6, ties to the even code, larger ones to 6. What the specification leaves open:
a block with an infinity has the scale 2^126, so that the infinity stays one, since 6 x 2^126 is beyond float32, and what is beside it
becomes small or 0.

Dual-level (`npu_dynamic_dual_level_mx_quant`): 512 values share the float32 scale max |x| * (1 / 6), infinities and NaN left out; x over
it, rounded to x's own dtype, is then rounded to MXFP4. A scale below float32's smallest normal number is 0, and so are its values.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn.functional import pad

from ditattn.ops.mx_linear.call import BLOCK, DUAL_BLOCK, MXWeight, num_dual_blocks, padded_features

__all__ = ["E2M1_VALUES", "dequantized", "exponent_scale", "level0_scale", "quantized_weight", "rounded", "rounded_dual"]

E2M1_VALUES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
E2M1_MAX = E2M1_VALUES[-1]
MANTISSA_BITS = 23
NAN_EXPONENT = 255
# the quiet bit of a NaN, and as a number without exponent 2^-127
_TOP_MANTISSA_BIT = 1 << (MANTISSA_BITS - 1)
# between each value and the next
HALFWAY = (0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0)
# values handled at once: temporaries stay at tens of MiB, whatever the layer
CHUNK = 1 << 22


def chunks(rows: int, columns: int) -> Iterator[slice]:
    """Row ranges of at most about CHUNK values."""
    step = max(1, CHUNK // max(columns, 1))
    return (slice(start, min(start + step, rows)) for start in range(0, rows, step))


def shared_exponent(blocks: Tensor) -> Tensor:
    """Biased e8m0 exponents (int32) of float32 blocks `[..., 32]`: `[..., 1]`."""
    largest = blocks.abs().amax(-1, keepdim=True)
    biased = ((largest.view(torch.int32) >> MANTISSA_BITS) & NAN_EXPONENT) - 2
    return torch.where(largest.isnan(), NAN_EXPONENT, biased.clamp_(min=0))


def exponent_scale(exponent: Tensor) -> Tensor:
    """float32 scales of biased e8m0 exponents."""
    exponent = exponent.to(torch.int32)
    special = (exponent == 0) | (exponent == NAN_EXPONENT)
    return ((exponent << MANTISSA_BITS) | (special * _TOP_MANTISSA_BIT).to(torch.int32)).view(torch.float32)


def _inverse_scale(exponent: Tensor) -> Tensor:
    """1 / scale of exponents that rounding yields; any number for NaN."""
    return ((NAN_EXPONENT - 1 - exponent) << MANTISSA_BITS).view(torch.float32)


def rounded(x: Tensor) -> Tensor:
    """The nearest MXFP4 values of float32 `[..., P]`, P a multiple of 32."""
    blocks = x.unflatten(-1, (-1, BLOCK))
    exponent = shared_exponent(blocks)
    y = (blocks * _inverse_scale(exponent)).clamp_(-E2M1_MAX, E2M1_MAX)
    # half a power of two below 4, so that rounding to a multiple of it is rounding to e2m1
    binade = (y.abs().clamp_(min=1).view(torch.int32) & (NAN_EXPONENT << MANTISSA_BITS)).view(torch.float32)
    step = binade.mul_(0.5)
    y = (y / step).round_().mul_(step).mul_(exponent_scale(exponent))
    return y.flatten(-2)


def level0_scale(x: Tensor) -> Tensor:
    """float32 level-0 scales `[..., ceil(K / 512)]` of `[..., K]` in any float dtype."""
    return _level0_scale(_dual_blocks(x)).squeeze(-1)


def _dual_blocks(x: Tensor) -> Tensor:
    return pad(x, (0, -x.shape[-1] % DUAL_BLOCK)).unflatten(-1, (-1, DUAL_BLOCK))


def _level0_scale(blocks: Tensor) -> Tensor:
    largest = torch.where(blocks.isfinite(), blocks, 0).abs().amax(-1, keepdim=True).float()
    scale = largest * (1 / E2M1_MAX)
    return torch.where(scale < torch.finfo(torch.float32).tiny, 0, scale)


def level1_input(x: Tensor) -> tuple[Tensor, Tensor]:
    """What of bf16 or fp16 x `[..., K]` is rounded to MXFP4, and the level-0 scales.

    float32, K padded to a multiple of 512, and `[..., ceil(K / 512), 1]`.
    """
    blocks = _dual_blocks(x)
    scale = _level0_scale(blocks)
    over = (blocks.float() / torch.where(scale == 0, 1, scale)).to(x.dtype).float()
    # a scale of 0 makes every value 0 but those that are no numbers
    return torch.where((scale == 0) & blocks.isfinite(), 0, over).flatten(-2), scale


def rounded_dual(x: Tensor) -> Tensor:
    """The nearest dual-level values, float32, of bf16 or fp16 `[..., K]`, K padded to a multiple of 512."""
    over, scale = level1_input(x)
    values = rounded(over).unflatten(-1, (-1, DUAL_BLOCK))
    return values.mul_(torch.where(scale == 0, 1, scale)).flatten(-2)


def dual_dtype(dtype: torch.dtype) -> torch.dtype:
    """What dual-level rounding starts from: Ascend's operator takes 16 bits, float32 is made bf16."""
    return torch.bfloat16 if dtype == torch.float32 else dtype


def quantized_weight(weight: Tensor, *, dual_level: bool = False) -> MXWeight:
    """A weight `[N, K]` (float32, bf16, fp16) in MXFP4, some rows at a time."""
    num_rows, in_features = weight.shape
    width = padded_features(in_features)
    packed = weight.new_empty(num_rows, width // 2, dtype=torch.uint8)
    scale = weight.new_empty(num_rows, width // BLOCK, dtype=torch.uint8)
    dual_scale = weight.new_empty(num_dual_blocks(in_features), num_rows, dtype=torch.float32) if dual_level else None
    for rows in chunks(num_rows, width):
        part = weight[rows]
        if dual_scale is not None:
            values, level0 = level1_input(part.to(dual_dtype(part.dtype)))
            values = values[:, :width]
            dual_scale[:, rows] = level0.squeeze(-1).T
        else:
            values = part.float()
        packed[rows], scale[rows] = _packed(pad(values, (0, width - values.shape[1])))
    return MXWeight(in_features, packed, scale, dual_scale)


def _packed(x: Tensor) -> tuple[Tensor, Tensor]:
    """Bytes and exponents of float32 `[N, P]`."""
    blocks = x.unflatten(-1, (-1, BLOCK))
    exponent = shared_exponent(blocks)
    y = blocks * _inverse_scale(exponent)
    size = y.abs()
    codes = (size > HALFWAY[0]).to(torch.uint8)
    for number, halfway in enumerate(HALFWAY[1:], 1):
        # ties go to the even one of two codes
        codes += (size > halfway) if number % 2 == 0 else (size >= halfway)
    codes = (codes | (y.signbit().to(torch.uint8) << 3)).flatten(-2)
    return codes[:, ::2] | (codes[:, 1::2] << 4), exponent.squeeze(-1).to(torch.uint8)


def dequantized(weight: MXWeight, dtype: torch.dtype, rows: slice | None = None) -> Tensor:
    """Rows of a weight, `[N, P]` in `dtype`: exact in bf16 and float32, but for level-0 scales, which are multiplied in in `dtype`."""
    rows = rows or slice(None)
    values = _pairs(weight.packed.device, dtype).index_select(0, weight.packed[rows].flatten().int())
    blocks = values.view(-1, weight.scale.shape[1], BLOCK)
    blocks.mul_(exponent_scale(weight.scale[rows]).unsqueeze(-1).to(dtype))
    out = blocks.flatten(-2)
    if weight.dual_scale is None:
        return out
    return out.mul_(weight.dual_scale[:, rows].T.repeat_interleave(DUAL_BLOCK, dim=1)[:, : out.shape[1]])


def _pairs(device: torch.device, dtype: torch.dtype) -> Tensor:
    """The two values of every byte: `[256, 2]`. Made on the device, which copies nothing from the host."""
    code = torch.arange(8, device=device)
    quarters = torch.where(code < 2, 2 * code, (2 + (code & 1)) << (code >> 1))
    positive = quarters.to(dtype) / 4
    values = torch.cat([positive, -positive])
    return torch.stack([values.repeat(16), values.repeat_interleave(16)], dim=1)
