"""Mean of every block of consecutive tokens: the pooling behind block selection."""

from __future__ import annotations

import torch
from torch import Tensor

from ditattn.arguments import check_count, check_instance, check_tensors
from ditattn.errors import UnsupportedCall
from ditattn.ops.contract import joined, refuse_gradients, split
from ditattn.ops.table import WIDE_FLOATS, CallFacts, Implementation, Names, choose, load, names_of
from ditattn.packages import TRITON
from ditattn.plan.block_plan import BLOCK_SIZE, num_blocks
from ditattn.plan.token_order import TokenOrder, reordered

__all__ = ["TABLE", "block_mean"]

TABLE: tuple[Implementation, ...] = (
    Implementation(
        "triton",
        "ditattn.ops.block_mean.triton:run",
        devices=("cuda",),
        packages=(TRITON,),
        probe="ditattn.ops.triton_targets:why_not_cuda",
        orders_tokens=True,
        orders_heads=True,
    ),
    # the same kernel on CPU tensors in triton's interpreter: for checking, never for running
    Implementation(
        "triton",
        "ditattn.ops.block_mean.triton:run",
        devices=("cpu",),
        packages=(TRITON,),
        probe="ditattn.ops.triton_targets:why_not_interpreted",
        automatic=False,
        orders_tokens=True,
        orders_heads=True,
    ),
    Implementation(
        "cpu",
        "ditattn.ops.block_mean.cpu:run",
        devices=("cpu",),
        probe="ditattn.ops.cpu_library:problem",
        orders_tokens=True,
        orders_heads=True,
    ),
    Implementation("torch", "ditattn.ops.block_mean.pure_torch:run", dtypes=WIDE_FLOATS),
    Implementation("reference", "ditattn.ops.block_mean.reference:run", dtypes=WIDE_FLOATS, automatic=False),
)


def block_mean(x: Tensor, block_size: int = BLOCK_SIZE, *, order: TokenOrder | None = None, implementation: Names = None) -> Tensor:
    """Mean over blocks of `block_size` consecutive tokens; the tail block is the mean of its real tokens.

    Args:
        x: `[B, S, H, D]`, any strides.
        block_size: tokens per block.
        order: blocks are made of the tokens in this order; None leaves them where they are. Where there are G orders, H is a multiple of G
            and each serves a group of heads.
        implementation: a name from `TABLE`, or several in order of preference; None takes the first possible one.

    Returns:
        fp32 `[B, ceil(S / block_size), H, D]`.

    Raises:
        UnsupportedCall: x is not four-dimensional, is empty, has another length or device than the order, or no implementation takes it.

    Examples:
        >>> import torch
        >>> from ditattn import block_mean
        >>> block_mean(torch.ones(1, 300, 4, 64)).shape
        torch.Size([1, 3, 4, 64])
    """
    check_tensors(x=x)
    check_count("block_size", block_size)
    if x.ndim != 4 or 0 in x.shape:
        raise UnsupportedCall(f"block_mean needs a non-empty [B, S, H, D], not {list(x.shape)}")
    if order is not None:
        check_instance("order", order, TokenOrder, "ditattn.plan.token_order.token_order makes one")
        order.check_length(x.shape[1])
        order.check_heads(x.shape[2])
        order.check_device(x.device)
    names = names_of(implementation)
    # a graph that is being traced keeps the choice open: the op takes it, once, when it first runs
    if not torch.compiler.is_compiling():
        names = (choose(TABLE, CallFacts(x.device.type, x.dtype, x.shape[3]), names).name,)
    out: Tensor = _op(x, block_size, joined(names), None if order is None else order.forward)
    return out


@torch.library.custom_op("ditattn::block_mean", mutates_args=())
def _op(x: Tensor, block_size: int, implementations: str, order: Tensor | None = None) -> Tensor:
    row = choose(TABLE, CallFacts(x.device.type, x.dtype, x.shape[3]), split(implementations))
    run = load(row)
    out: Tensor
    if order is None:
        out = run(x, block_size)
    elif row.takes_order(order):
        out = run(x, block_size, order=order)
    else:
        out = run(reordered(x, order), block_size)
    return out.contiguous()


@_op.register_fake
def _(x: Tensor, block_size: int, implementations: str, order: Tensor | None = None) -> Tensor:
    return x.new_empty(x.shape[0], num_blocks(x.shape[1], block_size), *x.shape[2:], dtype=torch.float32)


_op.register_autograd(refuse_gradients)
