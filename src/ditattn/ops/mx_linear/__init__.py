"""Linear layers in MXFP4 (W4A4): contract, custom op and table of implementations.

    round(x * mul_scale) weight^T + bias

The weight is stored in MXFP4, and x is rounded to the weight's format in every call, as on devices with FP4 units. Forward only; there is
no backward. The custom op `ditattn::mx_linear` has a fake, so that compiled graphs keep it whole.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from ditattn.arguments import check_instance, check_tensors
from ditattn.errors import UnsupportedCall
from ditattn.ops.contract import joined, refuse_gradients, split, without_autocast
from ditattn.ops.mx_linear.call import BLOCK, LinearCall, MXWeight, linear_facts, num_dual_blocks, padded_features
from ditattn.ops.mx_linear.mx_format import quantized_weight
from ditattn.ops.table import FLOATS, HALF, Implementation, Names, choose, load, names_of
from ditattn.packages import TORCH_NPU

__all__ = ["TABLE", "MXWeight", "arranged", "mx_linear", "quantized_weight", "traced_mx_linear"]

_OPTIONS = frozenset({"bias", "mul_scale"})

TABLE: tuple[Implementation, ...] = (
    Implementation(
        "ascend_dual_level",
        "ditattn.ops.mx_linear.ascend:DUAL_LEVEL",
        devices=("npu",),
        dtypes=HALF,
        honours=_OPTIONS | {"dual_scale"},
        packages=(TORCH_NPU,),
        provider=True,
    ),
    Implementation(
        "ascend_mx",
        "ditattn.ops.mx_linear.ascend:PLAIN",
        devices=("npu",),
        dtypes=HALF,
        honours=_OPTIONS,
        packages=(TORCH_NPU,),
        provider=True,
    ),
    Implementation("torch", "ditattn.ops.mx_linear.pure_torch:run", dtypes=FLOATS, honours=_OPTIONS | {"dual_scale"}),
    Implementation("reference", "ditattn.ops.mx_linear.reference:run", dtypes=FLOATS, honours=_OPTIONS | {"dual_scale"}, automatic=False),
)


def mx_linear(
    x: Tensor,
    weight: MXWeight,
    *,
    bias: Tensor | None = None,
    mul_scale: Tensor | None = None,
    implementation: Names = None,
) -> Tensor:
    """A linear layer whose weight is stored in MXFP4 and whose activations are rounded to the weight's format.

    Args:
        x: `[..., K]` in float32, bf16 or fp16, any strides, any leading shape, also an empty one.
        weight: of `quantized_weight`, `[N, K]`, on the device of x.
        bias: `[N]`, in any floating dtype.
        mul_scale: float32 `[K]`, multiplied into x before x is rounded, as calibrated checkpoints ask for.
        implementation: a name from `TABLE`, or several in order of preference; None takes the first possible one.

    Returns:
        `[..., N]`, contiguous, in the dtype of x. Products are summed in float32.

    Raises:
        UnsupportedCall: tensors that do not fit together, or a call that no implementation takes.
        BackendUnavailable: the named implementation cannot run here.

    Examples:
        >>> import torch
        >>> from ditattn.ops.mx_linear import mx_linear, quantized_weight
        >>> weight = quantized_weight(torch.randn(96, 64))
        >>> mx_linear(torch.randn(2, 10, 64), weight).shape
        torch.Size([2, 10, 96])
        >>> weight.num_bytes() * 8 / (96 * 64)  # bits a value
        4.25
    """
    _check(x, weight, bias, mul_scale)
    names = names_of(implementation)
    # a graph that is being traced keeps the choice open: the op takes it, once, when it first runs
    if not torch.compiler.is_compiling():
        names = (choose(TABLE, linear_facts(x, weight, bias, mul_scale), names).name,)
    out: Tensor = _op(x, weight.packed, weight.scale, weight.dual_scale, bias, mul_scale, joined(names))
    return out


def traced_mx_linear(
    x: Tensor, packed: Tensor, scale: Tensor, dual_scale: Tensor | None, bias: Tensor | None, mul_scale: Tensor | None
) -> Tensor:
    """`mx_linear` for code that is being traced: unchecked, on the tensors of a weight; the op chooses when it first runs."""
    out: Tensor = _op(x, packed, scale, dual_scale, bias, mul_scale, "")
    return out


def arranged(weight: MXWeight) -> MXWeight:
    """The weight as the implementation of its device keeps it, for weights that stay: the same numbers."""
    if weight.packed.device.type != "npu":
        return weight.plain()
    from ditattn.ops.mx_linear import ascend

    return ascend.arranged(weight)


def _check(x: Tensor, weight: MXWeight, bias: Tensor | None, mul_scale: Tensor | None) -> None:
    """Raise UnsupportedCall unless the tensors fit together."""
    check_instance("weight", weight, MXWeight, "ditattn.ops.mx_linear.quantized_weight makes one")
    optional = {"bias": bias, "mul_scale": mul_scale, "weight.dual_scale": weight.dual_scale}
    given = {"weight.packed": weight.packed, "weight.scale": weight.scale, **{name: t for name, t in optional.items() if t is not None}}
    check_tensors(x=x, **given)
    width, rows = padded_features(weight.in_features), weight.packed.shape[0]
    expected: dict[str, tuple[tuple[int, ...], torch.dtype | None]] = {
        "weight.packed": ((rows, width // 2), torch.uint8),
        "weight.scale": ((rows, width // BLOCK), torch.uint8),
        "weight.dual_scale": ((num_dual_blocks(weight.in_features), rows), torch.float32),
        "bias": ((rows,), None),
        "mul_scale": ((weight.in_features,), torch.float32),
    }
    if x.ndim == 0 or x.shape[-1] != weight.in_features:
        raise UnsupportedCall(f"x must be [..., {weight.in_features}] for this weight, not {list(x.shape)}")
    for name, tensor in given.items():
        shape, dtype = expected[name]
        # bytes in a storage format of the device's own are int8
        found = torch.uint8 if name == "weight.packed" and tensor.dtype == torch.int8 and tensor.device.type == "npu" else tensor.dtype
        if tensor.shape != shape or (found != dtype if dtype else not found.is_floating_point):
            wanted = f"{dtype or 'floating'} {list(shape)}"
            raise UnsupportedCall(f"{name} must be {wanted}, not {tensor.dtype} {list(tensor.shape)}")
        if tensor.device != x.device:
            raise UnsupportedCall(f"{name} must be on {x.device} as x is, not on {tensor.device}")


@torch.library.custom_op("ditattn::mx_linear", mutates_args=())
def _op(
    x: Tensor,
    packed: Tensor,
    scale: Tensor,
    dual_scale: Tensor | None,
    bias: Tensor | None,
    mul_scale: Tensor | None,
    implementations: str,
) -> Tensor:
    weight = MXWeight(x.shape[-1], packed, scale, dual_scale)
    call = LinearCall(x.reshape(-1, x.shape[-1]), weight, bias, mul_scale)
    shape = (*x.shape[:-1], weight.out_features)
    # kernels take no empty tensors
    if 0 in shape:
        return x.new_empty(shape)
    row = choose(TABLE, call.facts(), split(implementations))
    if row.name != "ascend_dual_level":
        call = replace(call, weight=weight.plain())
    with without_autocast(x.device):
        out: Tensor = load(row)(call)
    return out.reshape(shape).contiguous()


@_op.register_fake
def _(
    x: Tensor,
    packed: Tensor,
    scale: Tensor,
    dual_scale: Tensor | None,
    bias: Tensor | None,
    mul_scale: Tensor | None,
    implementations: str,
) -> Tensor:
    return x.new_empty(*x.shape[:-1], packed.shape[0])


_op.register_autograd(refuse_gradients)
