"""MXFP4 linear layers through torch_npu's own signatures and shape functions."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import ascend_linear_operators
import ditattn
from ditattn.ops.mx_linear import TABLE, ascend, mx_linear
from ditattn.ops.mx_linear.call import LinearCall, LinearFacts, MXWeight
from ditattn.ops.table import choose
from linear_calls import CASES, LinearCase, build, check_linear
from npu.fake_wan import A2, A5, Called, fake_wan

TAKEN = [case for case in CASES if 0 not in case.leading]
PROVIDERS = {False: ascend.PLAIN, True: ascend.DUAL_LEVEL}
# as torch_npu 2.13.0 has them
SIGNATURES = {
    "npu_dynamic_mx_quant": '(Tensor input, *, int axis=-1, str round_mode="rint", int dst_type=296, int block_size=32, int? scale_alg=0, '
    "float dst_type_max=0.0, float max_low_bound=0.0) -> (Tensor, Tensor)",
    "npu_dynamic_dual_level_mx_quant": '(Tensor input, *, Tensor? smooth_scale=None, str round_mode="rint") -> (Tensor, Tensor, Tensor)',
    "npu_quant_matmul": "(Tensor x1, Tensor x2, Tensor scale, *, Tensor? offset=None, Tensor? pertoken_scale=None, Tensor? bias=None, "
    "int? output_dtype=None, int? x1_dtype=None, int? x2_dtype=None, int? pertoken_scale_dtype=None, int? scale_dtype=None, "
    "int[]? group_sizes=None, Tensor? y_scale=None) -> Tensor",
    "npu_format_cast": "(Tensor input, int acl_format, *, int? customize_dtype=None, int? input_dtype=None) -> Tensor",
    "npu_dual_level_quant_matmul": "(Tensor x1, Tensor x2, Tensor x1_level0_scale, Tensor x2_level0_scale, Tensor x1_level1_scale, "
    "Tensor x2_level1_scale, *, Tensor? bias=None, int output_dtype=15) -> Tensor",
}


@pytest.mark.parametrize("name", SIGNATURES)
def test_recorded_signatures_are_the_installed_ones(name: str) -> None:
    recorded = torch._C.parse_schema(name + SIGNATURES[name])
    assert str(recorded) == str(getattr(torch.ops.npu, name).default._schema).removeprefix("npu::")


@pytest.mark.parametrize("dual_level", [False, True])
def test_both_operators_are_found(dual_level: bool) -> None:
    provider = PROVIDERS[dual_level]
    assert provider.probe() is None
    assert "npu." in str(provider.operator.load())
    assert "npu." in str(provider.quantizer.load())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("case", TAKEN, ids=str)
def test_values_through_the_packages_signatures(case: LinearCase, dtype: torch.dtype) -> None:
    problem = build(case, dtype)
    out = PROVIDERS[case.dual_level].run(problem.call()).reshape(*problem.x.shape[:-1], -1)
    check_linear(out.contiguous(), problem)


@pytest.mark.parametrize(
    ("soc_name", "plain", "dual_level"), [(A5, "ascend_mx", "ascend_dual_level"), (A2, "torch", "torch")], ids=["A5", "A2"]
)
def test_who_serves_on_which_generation(soc_name: str, plain: str, dual_level: str, soc: Callable[[str], None]) -> None:
    soc(soc_name)
    for name, needs in ((plain, frozenset({"bias"})), (dual_level, frozenset({"dual_scale"}))):
        assert choose(TABLE, LinearFacts("npu", torch.bfloat16, 1536, needs)).name == name
    assert choose(TABLE, LinearFacts("npu", torch.float32, 1536)).name == "torch"


def test_another_generation_is_told_why(soc: Callable[[str], None]) -> None:
    soc(A2)
    with pytest.raises(ditattn.BackendUnavailable, match="the operator runs on Ascend A5, this is Ascend910B2"):
        choose(TABLE, LinearFacts("npu", torch.bfloat16, 64), ("ascend_mx",))


@pytest.mark.parametrize("in_features", [64, 96, 1056])
def test_the_packages_shape_functions_take_the_plain_product(in_features: int) -> None:
    """The product's own shape function checks the operands' axes, their types and the groups."""
    with FakeTensorMode(), torch.device("npu"):
        width = -(-in_features // 64) * 64
        weight = MXWeight(in_features, torch.empty(48, width // 2, dtype=torch.uint8), torch.empty(48, width // 32, dtype=torch.uint8))
        x = torch.empty(7, in_features, dtype=torch.bfloat16)
        out = ascend.PLAIN.run(LinearCall(x, weight, torch.empty(48)))
    assert (out.shape, out.dtype) == ((7, 48), torch.bfloat16)


def test_the_packages_shape_function_of_dual_level_rounding() -> None:
    with FakeTensorMode(), torch.device("npu"):
        x = torch.empty(7, 1088, dtype=torch.bfloat16)
        packed, level0, level1 = ascend.DUAL_LEVEL.quantizer.load()(x, smooth_scale=None)
    assert (packed.shape, level0.shape, level1.shape) == ((7, 544), (7, 3), (7, 17, 2))


def test_the_dual_level_product_has_no_shape_function_yet() -> None:
    """Where a version brings one, it should be asked here too."""
    assert not torch._C._dispatch_has_kernel_for_dispatch_key("npu::npu_dual_level_quant_matmul", "Meta")


@pytest.fixture
def _documented_shapes() -> Iterator[None]:
    """Shape functions that the package lacks, written from the operators' documentation."""
    missing = {
        name: function
        for name, function in ascend_linear_operators.SHAPES.items()
        if not torch._C._dispatch_has_kernel_for_dispatch_key(f"npu::{name}", "Meta")
    }
    library = torch.library.Library("npu", "IMPL")
    for name, function in missing.items():
        library.impl(name, function, "Meta")
    yield
    library._destroy()


@pytest.fixture
def _through(monkeypatch: pytest.MonkeyPatch) -> None:
    """Our own operation is opaque to fake tensors; here its inside runs."""
    module = sys.modules["ditattn.ops.mx_linear"]
    monkeypatch.setattr(module, "_op", module._op._init_fn)


CALLS = {
    "mxfp4": (["npu.npu_dynamic_mx_quant", "npu.npu_quant_matmul"], []),
    "mxfp4_dualscale": (["npu.npu_dynamic_dual_level_mx_quant", "npu.npu_dual_level_quant_matmul"], ["npu.npu_format_cast"]),
}
"""Operators of every call of a layer, and those that prepare its weight once."""


@pytest.mark.usefixtures("_documented_shapes", "_through")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("method", CALLS)
def test_a_quantised_wan_on_an_npu(method: str, dtype: torch.dtype, soc: Callable[[str], None]) -> None:
    """Fake tensors throughout: weights are rounded, and cast to FRACTAL_NZ where the dual-level product wants it, on the device."""
    soc(A5)
    of_calls, of_weights = CALLS[method]
    with fake_wan(dtype) as (model, inputs):
        with Called() as preparing:
            handle = ditattn.quantize(model, method)
        with torch.no_grad(), Called() as called:
            out = model(**inputs, return_dict=False)[0]
        report = handle.report().components["WanTransformer3DModel"]
    assert (out.shape, out.dtype, out.device.type) == (inputs["hidden_states"].shape, dtype, "npu")
    assert (report.layers, report.ran) == (20, 20)
    assert report.implementations == ["ascend_mx" if method == "mxfp4" else "ascend_dual_level"]
    assert preparing.names == of_weights * 20
    assert [name for name in called.names if "quant" in name] == of_calls * 20


WRONG = {
    "weight in plain bytes": ("_fractal", lambda packed: packed, "torch.uint8 times torch.uint8"),
    "level-1 scales not in pairs": ("_pairs", lambda scale: scale.unsqueeze(-1), "a level-1 scale .* of x2"),
    "bias of the layer's dtype": ("_float32", lambda bias: bias, "a bias that is not float32"),
}
"""What would be handed over wrongly, by the function that prepares it, and what the operator says."""


@pytest.mark.usefixtures("_documented_shapes", "_through")
@pytest.mark.parametrize("case", WRONG)
def test_the_documented_shapes_refuse_a_wrong_call(case: str, soc: Callable[[str], None], monkeypatch: pytest.MonkeyPatch) -> None:
    """Else the test above would say nothing."""
    soc(A5)
    name, wrong, message = WRONG[case]
    monkeypatch.setattr(ascend, name, wrong)
    with fake_wan(torch.bfloat16) as (model, inputs):
        ditattn.quantize(model, "mxfp4_dualscale")
        with torch.no_grad(), pytest.raises(RuntimeError, match=f"the operator forbids: {message}"):
            model(**inputs)


def test_no_token_reaches_no_operator() -> None:
    problem = build(LinearCase("empty", leading=(0,), dual_level=True), torch.bfloat16)
    assert mx_linear(problem.x, problem.weight).shape == (0, 48)
