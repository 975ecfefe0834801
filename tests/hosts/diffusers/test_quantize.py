"""Linear layers of whole pipelines in MXFP4: which ones, beside what else, and back."""

from __future__ import annotations

import copy
import gc
import io
import logging
import re
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import ditattn
import tiny_pipelines
from ditattn.errors import ConfigError, UnsupportedCall, UnsupportedModel
from ditattn.hosts.diffusers.install import denoisers
from ditattn.ops.mx_linear.reference import decoded_weight
from ditattn.quantization import quantize as quantize_module
from ditattn.quantization.mx_layer import MXLinear
from tiny_pipelines import FAMILIES, TinyPipeline, few_tokens
from tiny_pipelines.footprint import footprint
from tiny_pipelines.wan import transformer

pytestmark = pytest.mark.usefixtures("one_thread")

SPARSE = {"sparsity": 0.6, "skip_first_steps": 0, "min_tokens": 0}
METHODS = ("mxfp4", "mxfp4_dualscale")

ATTENTION = "to_q to_k to_v to_out.N"
ADDED = "add_q_proj add_k_proj add_v_proj to_add_out"
FEED_FORWARD = "net.N.proj net.N"


def named(block: str, **parts: str) -> set[str]:
    return {f"{block}.{part}.{layer}" for part, layers in parts.items() for layer in layers.split()}


DOUBLE_STREAM = named("transformer_blocks.N", attn=f"{ATTENTION} {ADDED}", ff=FEED_FORWARD, ff_context=FEED_FORWARD)
SINGLE_STREAM = named("single_transformer_blocks.N", attn="to_q to_k to_v") | {
    "single_transformer_blocks.N.proj_mlp",
    "single_transformer_blocks.N.proj_out",
}
# numbers in paths are written N
EXPECTED = {
    "wan": named("blocks.N", attnN=ATTENTION, ffn=FEED_FORWARD),
    "hunyuan video": DOUBLE_STREAM | SINGLE_STREAM,
    "flux": DOUBLE_STREAM | SINGLE_STREAM,
    "qwen image": named("transformer_blocks.N", attn=f"{ATTENTION} {ADDED}", img_mlp=FEED_FORWARD, txt_mlp=FEED_FORWARD),
    "ltx video": named("transformer_blocks.N", attnN=ATTENTION, ff=FEED_FORWARD),
    "cogvideox": named("transformer_blocks.N", attnN=ATTENTION, ff=FEED_FORWARD),
}
every_family = pytest.mark.parametrize("name", FAMILIES)


def layers(pipe: Any) -> dict[str, nn.Module]:
    """Linear layers by component and path, ours and torch's."""
    return {
        f"{component}.{path}": part
        for component, module in denoisers(pipe).items()
        for path, part in module.named_modules()
        if isinstance(part, (nn.Linear, MXLinear))
    }


def ours(module: nn.Module) -> dict[str, MXLinear]:
    return {path: part for path, part in module.named_modules() if isinstance(part, MXLinear)}


def relative(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


@pytest.fixture(scope="module")
def wan() -> TinyPipeline:
    return few_tokens(tiny_pipelines.wan(), "wan")


@every_family
def test_attention_projections_and_feed_forward_and_nothing_else(name: str) -> None:
    tiny = FAMILIES[name]()
    with ditattn.quantize(tiny.pipe, "mxfp4") as handle:
        for module in denoisers(tiny.pipe).values():
            assert {re.sub(r"\d+", "N", path) for path in ours(module)} == EXPECTED[name]
    assert all(one.left_alone == {} for one in handle.report().components.values())


@every_family
@pytest.mark.parametrize("method", METHODS)
def test_every_family_runs_and_is_restored(name: str, method: str) -> None:
    tiny = few_tokens(FAMILIES[name](), name)
    native, before, objects = tiny.run(2), footprint(tiny.pipe), layers(tiny.pipe)
    with ditattn.quantize(tiny.pipe, method) as handle:
        found = tiny.run(2)
        report = handle.report()
    # four bits are coarse and these models small: another picture, of the same size
    assert 1e-3 < relative(found, native) < 0.9
    for component in report.components.values():
        assert component.ran == component.layers == component.kinds[method] > 0
        assert component.implementations == ["torch"]
        assert 0 < component.bytes_saved < component.bytes_before
    assert torch.equal(tiny.run(2), native)
    assert footprint(tiny.pipe) == before
    assert {path: id(part) for path, part in layers(tiny.pipe).items()} == {path: id(part) for path, part in objects.items()}
    assert handle.report() == report


@pytest.mark.parametrize("quantized_first", [False, True], ids=["install first", "quantize first"])
@pytest.mark.parametrize("undone_in_order", [False, True], ids=["last one out first", "first one out first"])
def test_beside_the_sparse_attention_in_either_order(wan: TinyPipeline, quantized_first: bool, undone_in_order: bool) -> None:
    native, before = wan.run(2), footprint(wan.pipe)

    def install() -> Any:
        return ditattn.install(wan.pipe, "rain_fusion_attn", **SPARSE)

    def quantize() -> Any:
        return ditattn.quantize(wan.pipe, "mxfp4")

    with quantize():
        quantized = wan.run(2)
        with install():
            expected = wan.run(2)
    first, second = (quantize(), install()) if quantized_first else (install(), quantize())
    both = wan.run(2)
    assert torch.equal(both, expected)
    assert not torch.equal(both, quantized)
    attention = first if not quantized_first else second
    component = attention.report().components["transformer"]
    assert component.sparse == component.calls > 0
    for handle in (first, second) if undone_in_order else (second, first):
        handle.remove()
    assert torch.equal(wan.run(2), native)
    assert footprint(wan.pipe) == before


def test_two_denoisers_and_patterns_of_one_of_them() -> None:
    tiny = tiny_pipelines.wan_two_transformers()
    with ditattn.quantize(tiny.pipe, "mxfp4", skip=["transformer_2.*", "blocks.0.attn1.*"]) as handle:
        first = handle.report().components["transformer"]
        assert sorted(first.skipped) == [f"blocks.0.attn1.{name}" for name in ("to_k", "to_out.0", "to_q", "to_v")]
        assert first.layers == 2 * 10 - 4
        assert not ours(tiny.pipe.transformer_2)


def test_a_bare_transformer() -> None:
    model = transformer()
    with ditattn.quantize(model, "mxfp4") as handle:
        assert list(handle.report().components) == ["WanTransformer3DModel"]
    assert not ours(model)


def test_a_layer_in_two_places_is_quantised_once() -> None:
    model = transformer()
    model.blocks[1].attn1.to_q = model.blocks[0].attn1.to_q
    shared = model.blocks[0].attn1.to_q
    with ditattn.quantize(model, "mxfp4") as handle:
        assert model.blocks[1].attn1.to_q is model.blocks[0].attn1.to_q
        assert isinstance(model.blocks[0].attn1.to_q, MXLinear)
        assert handle.report().components["WanTransformer3DModel"].layers == 19
    assert model.blocks[1].attn1.to_q is model.blocks[0].attn1.to_q is shared


def pickled(model: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    loaded: nn.Module = torch.load(file, weights_only=False)
    return loaded


@pytest.mark.parametrize("copied", [copy.deepcopy, pickled], ids=["deepcopy", "pickle"])
@pytest.mark.parametrize("method", METHODS)
def test_copies_are_quantised_and_of_their_own(copied: Callable[[nn.Module], nn.Module], method: str) -> None:
    tiny = few_tokens(tiny_pipelines.wan(), "wan")
    native = tiny.run(1)
    with ditattn.quantize(tiny.pipe, method):
        expected = tiny.run(1)
        twin = TinyPipeline(type(tiny.pipe)(**{**tiny.pipe.components, "transformer": copied(tiny.pipe.transformer)}), tiny.arguments)
    assert torch.equal(tiny.run(1), native)
    assert torch.equal(twin.run(1), expected)


@pytest.mark.parametrize("method", METHODS)
def test_another_dtype_leaves_the_numbers_alone(method: str) -> None:
    model = transformer()
    original = model.blocks[0].ffn.net[0].proj
    with ditattn.quantize(model, method):
        layer = ours(model)["blocks.0.ffn.net.0.proj"]
        before = decoded_weight(layer.mx_weight)
        model.to(torch.bfloat16)
        assert torch.equal(decoded_weight(layer.mx_weight), before)
        assert layer.bias is not None
        assert layer.bias.dtype == torch.bfloat16
        assert layer(torch.ones(3, layer.in_features).bfloat16()).dtype == torch.bfloat16
    # what comes back fits the rest of the model
    assert model.blocks[0].ffn.net[0].proj is original
    assert original.weight.dtype == torch.bfloat16


def test_state_dict_holds_the_packed_weights_and_loads_them_again() -> None:
    model, other = transformer(0), transformer(1)
    with ditattn.quantize(model, "mxfp4"), ditattn.quantize(other, "mxfp4"):
        state = model.state_dict()
        assert state["blocks.0.attn1.to_q.packed"].dtype == torch.uint8
        assert "blocks.0.attn1.to_q.weight" not in state
        other.load_state_dict(state)
        for path, layer in ours(model).items():
            assert torch.equal(ours(other)[path].packed, layer.packed)


def test_saving_is_refused_with_the_way_out(tmp_path: Path) -> None:
    tiny = few_tokens(tiny_pipelines.wan(), "wan")
    with ditattn.quantize(tiny.pipe, "mxfp4"), pytest.raises(UnsupportedModel, match=r"save it before, or after remove\(\)"):
        tiny.pipe.transformer.save_pretrained(tmp_path)
    tiny.pipe.transformer.save_pretrained(tmp_path)
    assert list(tmp_path.glob("*.safetensors"))


def test_what_asks_for_the_weight_is_told_why_there_is_none() -> None:
    model = transformer()
    with ditattn.quantize(model, "mxfp4"):
        assert not hasattr(model.blocks[0].attn1.to_q, "weight")
        with pytest.raises(AttributeError, match=r"quantised \(mxfp4\) and has no weight"):
            model.blocks[0].attn1.fuse_projections()


class OtherLinear(nn.Linear):
    """As other packages derive theirs."""


class OtherTensor(Tensor):
    """As other packages hold quantised weights."""


def test_layers_that_others_quantised_are_left_alone_and_named() -> None:
    model = transformer()
    attention = model.blocks[0].attn1
    attention.to_q = OtherLinear(64, 64)
    attention.to_k.weight = nn.Parameter(attention.to_k.weight.detach().as_subclass(OtherTensor), requires_grad=False)
    attention.to_v.register_forward_pre_hook(lambda module, arguments: None)
    model.blocks[1].ffn.net[2].to(torch.float64)
    with ditattn.quantize(model, "mxfp4") as handle:
        found = handle.report().components["WanTransformer3DModel"].left_alone
        assert list(found) == ["blocks.0.attn1.to_q", "blocks.0.attn1.to_k", "blocks.0.attn1.to_v", "blocks.1.ffn.net.2"]
        assert "OtherLinear" in found["blocks.0.attn1.to_q"]
        assert "its weight is of class OtherTensor" in found["blocks.0.attn1.to_k"]
        assert "hooks hang on it" in found["blocks.0.attn1.to_v"]
        assert "torch.float64" in found["blocks.1.ffn.net.2"]
        assert "blocks.0.attn1.to_q: quantised already or special" in handle.report().summary()


def test_lora_around_a_layer_stays_and_the_layer_is_quantised() -> None:
    peft = pytest.importorskip("peft")
    tiny = few_tokens(tiny_pipelines.wan(), "wan")
    torch.manual_seed(1)
    config = peft.LoraConfig(r=4, lora_alpha=8, target_modules=["to_q", "to_k", "to_v"], init_lora_weights=False)
    tiny.pipe.transformer.add_adapter(config)
    tiny.pipe.transformer.requires_grad_(False)
    adapted = tiny.run(1)
    with ditattn.quantize(tiny.pipe, "mxfp4") as handle:
        served = set(ours(tiny.pipe.transformer))
        assert "blocks.0.attn1.to_q.base_layer" in served
        assert not any("lora_" in path for path in served)
        found = tiny.run(1)
        assert relative(found, adapted) < 0.9
        assert handle.report().components["transformer"].ran == 20
        tiny.pipe.transformer.disable_adapters()
        assert not torch.equal(tiny.run(1), found), "the adapter works"
        tiny.pipe.transformer.enable_adapters()
        with pytest.raises(AttributeError, match="has no weight"):
            tiny.pipe.transformer.fuse_lora()
    assert torch.equal(tiny.run(1), adapted)


@pytest.mark.parametrize("kind", ["int8", "mxfp4"])
def test_layers_of_torchao_are_left_alone_and_named(kind: str) -> None:
    pytest.importorskip("torchao")
    from torchao.prototype.mx_formats.inference_workflow import MXDynamicActivationMXWeightConfig
    from torchao.quantization import Int8WeightOnlyConfig, quantize_
    from torchao.quantization.quantize_.common.kernel_preference import KernelPreference

    fp4 = torch.float4_e2m1fn_x2
    configs = {
        "int8": Int8WeightOnlyConfig(),
        "mxfp4": MXDynamicActivationMXWeightConfig(activation_dtype=fp4, weight_dtype=fp4, kernel_preference=KernelPreference.EMULATED),
    }
    tiny = few_tokens(tiny_pipelines.wan(), "wan")
    # what torchao's MXFP4 is written for
    tiny.pipe.to(dtype=torch.bfloat16 if kind == "mxfp4" else torch.float32)
    quantize_(tiny.pipe.transformer, configs[kind], filter_fn=lambda module, path: isinstance(module, nn.Linear) and "attn1" in path)
    native = tiny.run(1)
    with ditattn.quantize(tiny.pipe, "mxfp4") as handle:
        found = handle.report().components["transformer"]
        assert sorted(found.left_alone) == sorted(
            f"blocks.{n}.attn1.{part}" for n in (0, 1) for part in ("to_q", "to_k", "to_v", "to_out.0")
        )
        assert "quantised already" in next(iter(found.left_alone.values()))
        assert found.layers == 12
        tiny.run(1)
    assert torch.equal(tiny.run(1), native)


def test_dropped_originals_are_freed_and_cannot_come_back() -> None:
    tiny = few_tokens(tiny_pipelines.wan(), "wan")
    weight = weakref.ref(tiny.pipe.transformer.blocks[0].attn1.to_q.weight)
    handle = ditattn.quantize(tiny.pipe, "mxfp4", keep_originals=False)
    gc.collect()
    assert weight() is None
    assert "originals dropped" in handle.report().summary()
    tiny.run(1)
    with pytest.raises(ConfigError, match="load the model again"):
        handle.remove()
    with pytest.raises(ConfigError, match="call it without 'with'"), handle:
        pass


def test_compiled_models_keep_their_layers() -> None:
    model = transformer()
    inputs = {
        "hidden_states": torch.randn(1, 16, 1, 8, 8),
        "timestep": torch.ones(1, dtype=torch.int64),
        "encoder_hidden_states": torch.randn(1, 8, model.config.text_dim),
        "return_dict": False,
    }
    with ditattn.quantize(model, "mxfp4") as handle, torch.no_grad():
        expected = model(**inputs)[0]
        for layer in ours(model).values():
            layer.ran = False
        compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
        torch.testing.assert_close(compiled(**inputs)[0], expected)
        component = handle.report().components["WanTransformer3DModel"]
        assert component.ran == component.layers


def test_under_autocast_a_layer_is_what_a_plain_one_is() -> None:
    model = transformer()
    x = torch.randn(3, 64)
    with ditattn.quantize(model, "mxfp4"), torch.no_grad():
        layer = model.blocks[0].attn1.to_q
        with torch.autocast("cpu", dtype=torch.bfloat16):
            found = layer(x)
        assert found.dtype == torch.bfloat16
        assert torch.equal(found, layer(x.bfloat16()))


def test_training_is_refused() -> None:
    model = transformer()
    with ditattn.quantize(model, "mxfp4"):
        x = torch.randn(3, 64, requires_grad=True)
        with pytest.raises(UnsupportedCall, match="forward only, and gradients were asked for"):
            model.blocks[0].attn1.to_q(x).sum().backward()


def test_the_user_is_told_once_that_it_saves_no_time(caplog: pytest.LogCaptureFixture) -> None:
    quantize_module._warn_once.cache_clear()
    with caplog.at_level(logging.WARNING, "ditattn"):
        for _ in range(2):
            with ditattn.quantize(transformer(), "mxfp4"):
                pass
    assert [record.getMessage() for record in caplog.records] == [
        "FP4 layers on cpu: none of its FP4 units, if it has any, are used ('torch' computes them), so this saves memory and costs time"
    ]


@pytest.mark.parametrize(
    ("arguments", "error", "text"),
    [
        ({"method": "mxfp8"}, ConfigError, "no quantisation 'mxfp8'; did you mean 'mxfp4'"),
        ({}, ConfigError, "name either a quantisation"),
        ({"method": "mxfp4", "checkpoint": "."}, ConfigError, "name either a quantisation"),
        (
            {"method": "mxfp4", "skip": "blocks.7.*"},
            ConfigError,
            r"no linear layer is called blocks.7.\*; they are called like blocks.0.attn1.to_q",
        ),
        ({"method": "mxfp4", "skip": [3]}, ConfigError, "skip must be patterns"),
        ({"method": "mxfp4", "skip": "*"}, UnsupportedModel, "all are skipped"),
        ({"method": "mxfp4", "keep_originals": 1}, ConfigError, "keep_originals must be True or False"),
        ({"checkpoint": "/no/such/folder"}, ConfigError, "no folder /no/such/folder"),
    ],
)
def test_wrong_arguments(arguments: dict[str, Any], error: type[Exception], text: str) -> None:
    model = transformer()
    with pytest.raises(error, match=text):
        ditattn.quantize(model, **arguments)
    assert not ours(model)
    assert "save_pretrained" not in vars(model)


def test_what_cannot_be_quantised_at_all() -> None:
    model = transformer()
    with ditattn.quantize(model, "mxfp4"):
        with pytest.raises(UnsupportedModel, match=r"can be quantised \(blocks.0.attn1.to_q: quantised already \(mxfp4\)\)"):
            ditattn.quantize(model, "mxfp4")
        assert len(ours(model)) == 20, "what was there stays"
    with pytest.raises(UnsupportedModel, match="nothing can be quantised: Linear: Linear is not a known model family"):
        ditattn.quantize(nn.Linear(3, 3), "mxfp4")
    with pytest.raises(UnsupportedModel, match="on meta: quantise before weights are offloaded"):
        ditattn.quantize(transformer().to("meta"), "mxfp4")
