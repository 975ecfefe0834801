"""A linear layer whose weight is in MXFP4, in the place of a `torch.nn.Linear`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from ditattn.ops.contract import is_autocast_on
from ditattn.ops.mx_linear import MXWeight, arranged, mx_linear, traced_mx_linear
from ditattn.ops.mx_linear.call import LinearFacts, linear_facts

__all__ = ["MXLinear"]


class MXLinear(nn.Module):
    """x is rounded to the weight's format, the product is summed in float32 and is of x's dtype; under autocast, of autocast's.

    Its buffers `packed`, `scale`, and where there are such scales `dual_scale_bits` and `mul_scale_bits`, are whole numbers, so that
    `.to(dtype)` leaves them as they are; the two last ones hold the bits of float32 numbers. Has no `weight`.
    """

    packed: Tensor
    scale: Tensor
    dual_scale_bits: Tensor | None
    mul_scale_bits: Tensor | None
    like: Tensor

    def __init__(self, weight: MXWeight, bias: nn.Parameter | None, dtype: torch.dtype, kind: str, mul_scale: Tensor | None = None) -> None:
        super().__init__()
        self.in_features, self.out_features, self.kind = weight.in_features, weight.out_features, kind
        weight = arranged(weight)
        self.register_buffer("packed", weight.packed)
        self.register_buffer("scale", weight.scale)
        self.register_buffer("dual_scale_bits", _bits(weight.dual_scale))
        self.register_buffer("mul_scale_bits", _bits(mul_scale))
        # follows .to(dtype), as the weight of a plain layer would
        self.register_buffer("like", torch.empty(0, dtype=dtype, device=weight.packed.device), persistent=False)
        self.register_parameter("bias", bias)
        self.ran = False

    @property
    def mx_weight(self) -> MXWeight:
        return MXWeight(self.in_features, self.packed, self.scale, _number(self.dual_scale_bits))

    @property
    def mul_scale(self) -> Tensor | None:
        """float32 `[K]`, or None."""
        return _number(self.mul_scale_bits)

    def facts(self) -> LinearFacts:
        """Of a call in this layer's dtype."""
        return linear_facts(self.like, self.mx_weight, self.bias, self.mul_scale)

    def num_bytes(self) -> int:
        """As stored, without the bias."""
        stored = (self.packed, self.scale, self.dual_scale_bits, self.mul_scale_bits)
        return sum(x.numel() * x.element_size() for x in stored if x is not None)

    def forward(self, x: Tensor) -> Tensor:
        self.ran = True
        # as torch's linear does, which this layer stands in for
        if is_autocast_on(x.device.type) and x.dtype != torch.float64:
            x = x.to(torch.get_autocast_dtype(x.device.type))
        if torch.compiler.is_compiling():
            # a graph of tensors; what holds them together is not traced
            return traced_mx_linear(x, self.packed, self.scale, _number(self.dual_scale_bits), self.bias, self.mul_scale)
        return mx_linear(x, self.mx_weight, bias=self.bias, mul_scale=self.mul_scale)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> MXLinear:
        super()._apply(fn, recurse)
        # another device may keep the bytes in another storage format
        self.packed = arranged(replace(self.mx_weight)).packed
        return self

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}, kind={self.kind}"

    def __getattr__(self, name: str) -> Any:
        if name == "weight":
            raise AttributeError(f"this layer is quantised ({self.kind}) and has no weight: undo the quantisation first (remove())")
        return super().__getattr__(name)


def _bits(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.float().contiguous().view(torch.int32)


def _number(bits: Tensor | None) -> Tensor | None:
    return None if bits is None else bits.view(torch.float32)
