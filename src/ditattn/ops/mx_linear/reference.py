"""MXFP4 linear layers spelled out: every step as the specifications say it, in float64, on the whole tensors."""

from __future__ import annotations

import torch
from torch import Tensor

from ditattn.ops.mx_linear.call import LinearCall, MXWeight

__all__ = ["decoded_weight", "level0", "nearest_codes", "rounded", "rounded_dual", "run", "shared_exponents"]

VALUES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
BLOCK, LARGE_BLOCK = 32, 512
LARGEST_EXPONENT = 2
BIAS = 127


def run(call: LinearCall) -> Tensor:
    x = call.scaled_x()
    x = rounded(x) if call.weight.dual_scale is None else rounded_dual(x)
    out = x @ decoded_weight(call.weight).T
    out = out if call.bias is None else out + call.bias.double()
    return out.to(call.x.dtype)


def shared_exponents(x: Tensor) -> Tensor:
    """Biased exponents `[..., K / 32]` of `[..., K]`: floor(log2(max |x|)) - 2, at least -127; 126 with an infinity; 255 with a NaN."""
    largest = x.double().abs().unflatten(-1, (-1, BLOCK)).amax(-1)
    # frexp yields a fraction in [1/2, 1)
    exponent = torch.frexp(largest).exponent - 1 - LARGEST_EXPONENT
    biased = (exponent + BIAS).clamp(min=0)
    biased = torch.where(largest == 0, 0, biased)
    biased = torch.where(largest.isinf(), 126 + BIAS, biased)
    return torch.where(largest.isnan(), 255, biased)


def nearest_codes(x: Tensor) -> Tensor:
    """e2m1 codes (0 to 15) of values over their scale: the nearest value, of two equally near the even code, 6 for all that are larger."""
    size = x.double().abs().clamp(max=VALUES[-1])
    distance = torch.stack([(size - value).abs() for value in VALUES], dim=-1)
    nearest = distance == distance.amin(-1, keepdim=True)
    even_first = torch.tensor([0, 2, 4, 6, 1, 3, 5, 7])
    code = even_first[nearest[..., even_first].int().argmax(-1)]
    return code + 8 * x.signbit()


def _scales(exponents: Tensor) -> Tensor:
    scale = torch.exp2(exponents.double() - BIAS)
    return torch.where(exponents == 255, torch.nan, scale).repeat_interleave(BLOCK, dim=-1)


def _decoded(codes: Tensor, exponents: Tensor) -> Tensor:
    """Values of codes `[..., K]`; what float32 cannot hold is infinite."""
    size = torch.tensor(VALUES, dtype=torch.float64)[codes & 7]
    return (torch.where(codes >= 8, -size, size) * _scales(exponents)).float().double()


def _filled(x: Tensor, multiple: int) -> Tensor:
    return torch.cat([x, x.new_zeros(*x.shape[:-1], -x.shape[-1] % multiple)], dim=-1)


def rounded(x: Tensor) -> Tensor:
    """float64 `[..., K]`, the nearest MXFP4 values."""
    filled = _filled(x.cpu(), BLOCK)
    exponents = shared_exponents(filled)
    codes = nearest_codes(filled.double() / _scales(exponents))
    return _decoded(codes, exponents)[..., : x.shape[-1]].to(x.device)


def level0(x: Tensor) -> Tensor:
    """float64 level-0 scales `[..., ceil(K / 512)]`: float32 products of the largest finite |x| with 1 / 6; subnormal ones are 0."""
    finite = torch.where(x.isfinite(), x, torch.zeros_like(x))
    largest = _filled(finite, LARGE_BLOCK).double().abs().unflatten(-1, (-1, LARGE_BLOCK)).amax(-1)
    sixth = torch.tensor(1 / 6, dtype=torch.float32).double()
    scale = (largest * sixth).float()
    return torch.where(scale < 2.0**-126, 0, scale).double()


def rounded_dual(x: Tensor) -> Tensor:
    """float64 `[..., K]`, the nearest dual-level values; float32 becomes bf16 first."""
    x = x.cpu()
    x = x.bfloat16() if x.dtype == torch.float32 else x
    scale = level0(x).repeat_interleave(LARGE_BLOCK, dim=-1)[..., : x.shape[-1]]
    over = (x.float() / scale.float()).to(x.dtype)
    over = torch.where((scale == 0) & x.isfinite(), torch.zeros_like(x), over)
    return rounded(over) * torch.where((scale == 0) & ~x.isfinite(), 1.0, scale)


def decoded_weight(weight: MXWeight) -> Tensor:
    """float64 `[N, K]`."""
    packed = weight.packed.cpu().int()
    codes = torch.stack([packed & 15, packed >> 4], dim=-1).flatten(-2)
    values = _decoded(codes, weight.scale.cpu().int())[:, : weight.in_features]
    if weight.dual_scale is not None:
        values = values * weight.dual_scale.cpu().double().T.repeat_interleave(LARGE_BLOCK, dim=1)[:, : weight.in_features]
    return values.to(weight.packed.device)
