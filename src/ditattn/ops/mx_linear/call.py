"""One linear layer with an MXFP4 weight as a value: what every implementation of `mx_linear` takes.

Letters: K input features, N output features, P input features padded with zeros to whole pairs of blocks.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ditattn.ops.table import CallFacts

__all__ = ["BLOCK", "DUAL_BLOCK", "LinearCall", "LinearFacts", "MXWeight", "linear_facts", "num_dual_blocks", "padded_features"]

BLOCK = 32
"""Values that share an exponent (OCP Microscaling Formats 1.0)."""

DUAL_BLOCK = 512
"""Values that share a float32 scale above the exponents (Ascend's dual-level format)."""

# Ascend's operators take exponents in pairs
_PADDING = 2 * BLOCK


def padded_features(in_features: int) -> int:
    """P: what a row of a weight holds."""
    return -(-in_features // _PADDING) * _PADDING


def num_dual_blocks(in_features: int) -> int:
    """Level-0 scales of a row."""
    return -(-in_features // DUAL_BLOCK)


@dataclass(frozen=True, eq=False)
class MXWeight:
    """A weight `[N, K]` in MXFP4.

    Attributes:
        in_features: K.
        packed: uint8 `[N, P / 2]`, two e2m1 values a byte, the earlier one in the low four bits; int8 where an implementation keeps the
            same bytes in a storage format of its own.
        scale: uint8 `[N, P / 32]`, exponents e8m0: 2^(scale - 127), 255 is NaN.
        dual_scale: float32 `[ceil(K / 512), N]`, level-0 scales, which multiply the exponents'; None in plain MXFP4.
    """

    in_features: int
    packed: Tensor
    scale: Tensor
    dual_scale: Tensor | None = None

    @property
    def out_features(self) -> int:
        return int(self.packed.shape[0])

    def plain(self) -> MXWeight:
        """The same with uint8 bytes, in the usual storage format."""
        if self.packed.dtype == torch.uint8:
            return self
        return replace(self, packed=(self.packed.to(torch.int16) & 255).to(torch.uint8))

    def num_bytes(self) -> int:
        """As stored."""
        return sum(x.numel() * x.element_size() for x in (self.packed, self.scale, self.dual_scale) if x is not None)


@dataclass(frozen=True)
class LinearFacts(CallFacts):
    """`CallFacts` of a linear layer: `head_dim` is the number of input features."""

    def sentence(self) -> str:
        extras = f", {', '.join(sorted(self.needs))}" if self.needs else ""
        return f"{self.device}, {str(self.dtype).removeprefix('torch.')}, {self.head_dim} input features{extras}"


@dataclass(frozen=True, eq=False)
class LinearCall:
    """x in MXFP4 times the weight. The tensors fit together: the op has checked that.

    Attributes:
        x: `[tokens, K]`, one token at least.
        weight: its format is also that of the activations.
        bias: `[N]`.
        mul_scale: float32 `[K]`, multiplied into x in x's dtype before x is rounded.
    """

    x: Tensor
    weight: MXWeight
    bias: Tensor | None = None
    mul_scale: Tensor | None = None

    def facts(self) -> LinearFacts:
        """What the choice of an implementation depends on."""
        return linear_facts(self.x, self.weight, self.bias, self.mul_scale)

    def scaled_x(self) -> Tensor:
        """x after `mul_scale`."""
        return self.x if self.mul_scale is None else self.x * self.mul_scale.to(self.x.dtype)


def linear_facts(x: Tensor, weight: MXWeight, bias: Tensor | None, mul_scale: Tensor | None) -> LinearFacts:
    """Facts of a call with x of any leading shape."""
    given = {"dual_scale": weight.dual_scale, "bias": bias, "mul_scale": mul_scale}
    needs = frozenset(name for name, tensor in given.items() if tensor is not None)
    return LinearFacts(x.device.type, x.dtype, weight.in_features, needs)
