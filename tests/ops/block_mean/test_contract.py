"""Every implementation of the block mean that this machine can run, against the oracle."""

from __future__ import annotations

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import oracle
from cases import DEVICES, DTYPES, LAYOUTS, MEAN_CASES
from ditattn.errors import UnsupportedCall
from ditattn.ops import cpu_library
from ditattn.ops.block_mean import TABLE, block_mean
from ditattn.ops.table import CallFacts, explain
from ditattn.plan.token_order import TokenOrder, token_order


def _names(dtype: torch.dtype, device: str, dim: int = 64) -> list[str]:
    return [v.implementation.name for v in explain(TABLE, CallFacts(device, dtype, dim)) if v.reason is None]


COMBINATIONS = [
    pytest.param(name, dtype, device, id=f"{name}-{str(dtype)[6:]}-{device}")
    for device in DEVICES
    for dtype in DTYPES
    for name in _names(dtype, device)
]
NAMES = [(name, device) for device in DEVICES for name in _names(torch.float32, device)]


def _tensor(length: int, dtype: torch.dtype, device: str, layout: str = "padded", dim: int = 64) -> torch.Tensor:
    x = (3 + torch.randn(2, length, 3, dim)).to(dtype).to(device)
    return LAYOUTS[layout](x).copy_(x)


def _check(name: str, x: torch.Tensor, block: int) -> None:
    mean = block_mean(x, block, implementation=name)
    exact = oracle.block_mean(x, block)
    assert mean.shape == exact.shape
    assert mean.dtype == torch.float32
    assert mean.is_contiguous()
    # summed in fp32 whatever the input: a few units in the last place of the largest term
    assert (mean - exact).abs().max() <= 4 * 2**-24 * x.abs().max().double() * min(block, x.shape[1]) ** 0.5


@pytest.mark.parametrize(("name", "dtype", "device"), COMBINATIONS)
@pytest.mark.parametrize(("length", "block"), MEAN_CASES)
def test_lengths_and_blocks(name: str, dtype: torch.dtype, device: str, length: int, block: int) -> None:
    _check(name, _tensor(length, dtype, device), block)


@pytest.mark.skipif(cpu_library.problem() is not None, reason="no compiled kernels")
@pytest.mark.parametrize("block", [2**31 - 1, 2**32 + 128])
def test_a_block_size_beyond_32_bits(block: int) -> None:
    """The C structure would wrap it: a mean of nothing, or means written past the result."""
    _check("cpu", _tensor(300, torch.float32, "cpu"), block)


@pytest.mark.parametrize(("name", "dtype", "device"), COMBINATIONS)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dim", [1, 5, 80, 128])
def test_layouts(name: str, dtype: torch.dtype, device: str, layout: str, dim: int) -> None:
    if name in _names(dtype, device, dim):
        _check(name, _tensor(300, dtype, device, layout, dim), 128)


@pytest.mark.parametrize(("name", "dtype", "device"), COMBINATIONS)
@pytest.mark.parametrize("layout", ["padded", "transposed"])
def test_blocks_of_tokens_in_another_order(name: str, dtype: torch.dtype, device: str, layout: str) -> None:
    """The same bits as on a reordered copy."""
    x = _tensor(330, dtype, device, layout)
    order = token_order("tile", (3, 11, 10), device=device)
    mean = block_mean(x, order=order, implementation=name)
    assert torch.equal(mean, block_mean(order.apply(x), implementation=name))
    assert not torch.equal(mean, block_mean(x, implementation=name))
    with pytest.raises(UnsupportedCall, match="order is for 330 tokens, the call has 329"):
        block_mean(x[:, 1:], order=order, implementation=name)


@pytest.mark.parametrize(("name", "dtype", "device"), COMBINATIONS)
@pytest.mark.parametrize("layout", ["padded", "transposed"])
def test_an_order_per_head(name: str, dtype: torch.dtype, device: str, layout: str) -> None:
    """Three heads in three orders, as each alone; then one order for all three, as a group of query heads has it."""
    x = _tensor(300, dtype, device, layout)
    generator = torch.Generator().manual_seed(0)
    forward = torch.stack([torch.randperm(300, generator=generator) for _ in range(3)]).to(device)
    order = TokenOrder(forward, forward.argsort(-1), (0, 1), (0, 300), 300)
    mean = block_mean(x, order=order, implementation=name)
    for h in range(3):
        alone = TokenOrder(forward[h], forward[h].argsort(), (0, 1), (0, 300), 300)
        assert torch.equal(mean[:, :, h : h + 1], block_mean(x[:, :, h : h + 1], order=alone, implementation=name))
    shared, first = (TokenOrder(f, f.argsort(-1), (0, 1), (0, 300), 300) for f in (forward[:1], forward[0]))
    assert torch.equal(block_mean(x, order=shared, implementation=name), block_mean(x, order=first, implementation=name))
    two = TokenOrder(forward[:2], forward[:2].argsort(-1), (0, 1), (0, 300), 300)
    with pytest.raises(UnsupportedCall, match="3 heads are not a multiple of the 2"):
        block_mean(x, order=two, implementation=name)


@pytest.mark.parametrize(("name", "device"), NAMES)
def test_an_order_of_any_stride(name: str, device: str) -> None:
    x = _tensor(300, torch.float32, device)
    forward = torch.randperm(300, generator=torch.Generator().manual_seed(0)).to(device)
    gapped = torch.stack([forward, forward.flip(0)], dim=1)[:, 0]
    assert not gapped.is_contiguous()
    dense, strided = (
        block_mean(x, order=TokenOrder(f, f.argsort(), (0, 1), (0, 300), 300), implementation=name) for f in (forward, gapped)
    )
    assert torch.equal(dense, strided)


@pytest.mark.parametrize(("name", "device"), NAMES)
@pytest.mark.parametrize("poison", [torch.nan, torch.inf, -torch.inf])
def test_nan_and_inf_stay_in_their_block(name: str, device: str, poison: float) -> None:
    x = _tensor(300, torch.float32, device)
    x[1, 130, 2, 7] = poison
    mean = block_mean(x, implementation=name)
    expected = torch.ones_like(mean, dtype=torch.bool)
    expected[1, 1, 2, 7] = False
    assert torch.equal(mean.isfinite(), expected)


@pytest.mark.parametrize(("name", "device"), NAMES)
def test_fake_agrees_with_the_real_op(name: str, device: str) -> None:
    x = _tensor(300, torch.bfloat16, device, "transposed")
    real = block_mean(x, implementation=name)
    with FakeTensorMode() as mode:
        fake = block_mean(mode.from_tensor(x), implementation=name)
    assert (fake.shape, fake.dtype, fake.stride()) == (real.shape, real.dtype, real.stride())


@pytest.mark.parametrize(("name", "device"), NAMES)
def test_opcheck(name: str, device: str) -> None:
    torch.library.opcheck(torch.ops.ditattn.block_mean.default, (_tensor(140, torch.float32, device), 128, name))


@pytest.mark.parametrize(
    ("x", "block", "text"),
    [
        (torch.ones(4, 4, 4), 128, "non-empty"),
        (torch.ones(1, 0, 4, 4), 128, "non-empty"),
        (torch.ones(1, 4, 4, 4), 0, "block_size must be a positive whole number, not int 0"),
        (torch.ones(1, 4, 4, 4, dtype=torch.float8_e4m3fn), 128, "no implementation takes this call"),
    ],
)
def test_bad_calls_say_what_is_wrong(x: torch.Tensor, block: int, text: str) -> None:
    with pytest.raises(UnsupportedCall, match=text):
        block_mean(x, block)


def test_an_order_of_another_device_says_so() -> None:
    order = TokenOrder(*(torch.arange(300, device="meta") for _ in range(2)), (0, 1), (0, 300), 300)
    with pytest.raises(UnsupportedCall, match="the token order is on meta, the tensors on cpu"):
        block_mean(_tensor(300, torch.float32, "cpu"), order=order)


def test_compiles_into_one_graph() -> None:
    x = _tensor(300, torch.float32, "cpu")
    assert torch.equal(torch.compile(lambda y: block_mean(y), fullgraph=True, backend="aot_eager")(x), block_mean(x))
