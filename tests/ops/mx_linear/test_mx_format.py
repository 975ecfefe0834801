"""MXFP4, bit by bit: the portable rounding, the reference, torchao's and ml_dtypes' say the same."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from ditattn.ops.mx_linear import mx_format, quantized_weight, reference
from ditattn.ops.mx_linear.call import MXWeight


def _recorded() -> ModuleType:
    spec = importlib.util.spec_from_file_location("recorded", Path(__file__).with_name("recorded.py"))
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


recorded = _recorded()
Quantizer = Callable[[Tensor], tuple[Tensor, Tensor]]


def ours(x: Tensor) -> tuple[Tensor, Tensor]:
    """Packed bytes `[blocks, 16]` and exponents `[blocks]` of `[blocks, 32]`."""
    weight = quantized_weight(x)
    assert weight.packed.shape == (len(x), 32), "padded to a pair of blocks"
    return weight.packed[:, :16], weight.scale[:, 0]


def spelled_out(x: Tensor) -> tuple[Tensor, Tensor]:
    exponents = reference.shared_exponents(x)
    codes = reference.nearest_codes(x.double() / reference._scales(exponents))
    return (codes[:, ::2] | (codes[:, 1::2] << 4)).to(torch.uint8), exponents.flatten().to(torch.uint8)


def assert_same(found: tuple[Tensor, Tensor], expected: tuple[Tensor, Tensor]) -> None:
    """The same exponents, and the same codes where the exponent is a number."""
    assert torch.equal(found[1], expected[1])
    numbers = expected[1] != mx_format.NAN_EXPONENT
    assert numbers.sum() > 0.9 * len(numbers)
    assert torch.equal(found[0][numbers], expected[0][numbers])


def recorded_torchao() -> tuple[Tensor, tuple[Tensor, Tensor]]:
    record = json.loads(recorded.FILE.read_text())
    assert record["source"].startswith("torchao 0.18.0")
    x = recorded.tensor_of(record["float32"], torch.float32, 32)
    packed, scale = (recorded.tensor_of(record[name], torch.uint8, columns) for name, columns in (("packed", 16), ("scale", 1)))
    # see SMALLEST_LARGEST
    kept = ~(x.abs().amax(1) < recorded.SMALLEST_LARGEST) | (x == 0).all(1)
    assert kept.sum() > 120
    return x[kept], (packed[kept], scale[kept].flatten())


@pytest.mark.parametrize("quantizer", [ours, spelled_out], ids=["ours", "reference"])
def test_against_recorded_results_of_torchao(quantizer: Quantizer) -> None:
    x, expected = recorded_torchao()
    assert_same(quantizer(x), expected)
    assert (x == 0).all(1).any()
    assert x.isnan().any()
    assert x.isinf().any()


def test_the_record_is_what_torchao_says() -> None:
    pytest.importorskip("torchao.prototype.mx_formats.mx_tensor")
    record = json.loads(recorded.FILE.read_text())
    x = recorded.inputs()
    packed, scale = recorded.torchao_result(x)
    numbers = scale != mx_format.NAN_EXPONENT
    assert recorded.text_of(x) == record["float32"]
    assert recorded.text_of(scale) == record["scale"]
    assert torch.equal(packed[numbers], recorded.tensor_of(record["packed"], torch.uint8, 16)[numbers])


def of_ml_dtypes(x: Tensor) -> tuple[Tensor, Tensor]:
    """Rounding by ml_dtypes' own casts; the exponents by its e8m0, whose cast rounds, of numbers that are powers of two."""
    import ml_dtypes

    power = torch.exp2(torch.floor(torch.log2(x.double().abs().amax(1, keepdim=True))) - 2).clamp(2.0**-127, 2.0**127).float()
    scale = power.numpy().astype(ml_dtypes.float8_e8m0fnu)
    over = (x.double() / torch.from_numpy(scale.astype("float64"))).float()
    codes = torch.from_numpy(over.numpy().astype(ml_dtypes.float4_e2m1fn).view("uint8"))
    return codes[:, ::2] | (codes[:, 1::2] << 4), torch.from_numpy(scale.view("uint8")).flatten()


def finite_blocks() -> Tensor:
    x = recorded.inputs()
    return x[x.isfinite().all(1) & (x != 0).any(1)]


@pytest.mark.parametrize("quantizer", [ours, spelled_out], ids=["ours", "reference"])
def test_against_ml_dtypes(quantizer: Quantizer) -> None:
    pytest.importorskip("ml_dtypes")
    x = finite_blocks()
    assert (x.abs().amax(1) < 2.0**-124).any(), "scales at the lower end too"
    found, expected = quantizer(x), of_ml_dtypes(x)
    assert_same(found, expected)


FINITE = st.floats(width=32, allow_nan=False)


@settings(max_examples=50)
@given(st.lists(st.one_of(FINITE, st.floats(-8, 8, width=32)), min_size=32, max_size=32))
def test_any_block_is_rounded_as_the_reference_does(values: list[float]) -> None:
    x = torch.tensor(values).unsqueeze(0)
    assert_same(ours(x), spelled_out(x))
    exact = reference.rounded(x)
    assert torch.equal(mx_format.rounded(x).double(), exact)
    weight = quantized_weight(x)
    assert torch.equal(mx_format.dequantized(weight, torch.float32)[:, :32].double(), exact)
    assert torch.equal(reference.decoded_weight(weight), exact)


def test_every_code_is_its_own_nearest_value() -> None:
    x = torch.tensor([*mx_format.E2M1_VALUES, *(-value for value in mx_format.E2M1_VALUES)] * 2).unsqueeze(0)
    packed, scale = ours(x)
    assert scale == 127
    codes = torch.stack([packed & 15, packed >> 4], -1).flatten()
    assert codes.tolist() == [*range(16)] * 2
    assert torch.equal(mx_format.rounded(x), x)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_values_beside_the_padding_are_the_same(dtype: torch.dtype) -> None:
    x = torch.randn(5, 40).to(dtype)
    weight = quantized_weight(x)
    assert (weight.packed[:, 20:] == 0).all()
    assert torch.equal(reference.decoded_weight(weight)[:, :32], reference.rounded(x[:, :32]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_plain_values_are_exact_in_bf16(dtype: torch.dtype) -> None:
    weight = quantized_weight(torch.randn(64, 96) * torch.exp2(torch.randint(-20, 20, (64, 1)).float()))
    assert torch.equal(mx_format.dequantized(weight, dtype).double()[:, :96], reference.decoded_weight(weight))


def spread(rows: int, columns: int, dtype: torch.dtype) -> Tensor:
    sizes = torch.exp2(torch.randint(-10, 10, (rows, -(-columns // 32))).float()).repeat_interleave(32, 1)[:, :columns]
    return (torch.randn(rows, columns) * sizes).to(dtype)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("columns", [32, 512, 600, 1536])
def test_dual_level_rounding_is_the_references(dtype: torch.dtype, columns: int) -> None:
    x = spread(40, columns, dtype)
    exact = reference.rounded_dual(x)
    # one float32 product
    torch.testing.assert_close(mx_format.rounded_dual(x)[:, :columns].double(), exact, rtol=2**-24, atol=0)
    assert torch.equal(mx_format.level0_scale(x).double(), reference.level0(x))
    torch.testing.assert_close(reference.decoded_weight(quantized_weight(x, dual_level=True)), exact, rtol=0, atol=0)


def test_dual_level_is_another_format_than_plain_mxfp4() -> None:
    """The largest value of 512 is met exactly; a power of two alone leaves it up to a third too small."""
    x = torch.full((1, 512), 0.1).bfloat16()
    x[0, 0] = 7.9
    plain, dual = reference.rounded(x), reference.rounded_dual(x)
    assert plain[0, 0] == 6
    assert dual[0, 0].float() == pytest.approx(float(x[0, 0]), rel=1e-6)
    assert not torch.equal(plain, dual)


@pytest.mark.parametrize("rounded", [reference.rounded_dual, mx_format.rounded_dual], ids=["reference", "ours"])
def test_dual_level_specials(rounded: Callable[[Tensor], Tensor]) -> None:
    x = torch.zeros(5, 512).bfloat16()
    # a level-0 scale below the smallest normal number is 0
    x[1, :2] = torch.tensor([2.0**-125, -(2.0**-126)])
    x[2, :2] = torch.tensor([torch.inf, 3.0])
    x[3, :3] = torch.tensor([torch.nan, 3.0, 2.0])
    x[3, 40] = 3.0
    x[4, :2] = torch.tensor([6.0, -0.25])
    found = rounded(x)
    assert (found[0] == 0).all()
    assert (found[1] == 0).all()
    assert found[2, 0] == torch.inf
    assert found[3, :32].isnan().all()
    assert found[3, 40] == 3
    assert found[4, :2].tolist() == pytest.approx([6, 0])


def test_special_exponents() -> None:
    exponents = torch.tensor([0, 1, 127, 254, 255], dtype=torch.uint8)
    found = mx_format.exponent_scale(exponents)
    assert found[:4].tolist() == [2.0**-127, 2.0**-126, 1.0, 2.0**127]
    assert found[4].isnan()
    torch_says = exponents.view(torch.float8_e8m0fnu).float()
    assert torch.equal(found[:4], torch_says[:4])
    assert torch_says[4].isnan()


def test_bytes_in_a_storage_format_of_the_device() -> None:
    weight = quantized_weight(torch.randn(4, 64))
    moved = MXWeight(64, weight.packed.view(torch.int8), weight.scale)
    assert torch.equal(moved.plain().packed, weight.packed)
