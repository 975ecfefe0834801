"""Packages that change a model, where they are installed: adapters, quantised weights, step caches, before and after `install`."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import ditattn
from tiny_pipelines import FAMILIES, TinyPipeline, few_tokens
from tiny_pipelines.footprint import footprint

pytestmark = pytest.mark.usefixtures("one_thread")

SPARSE = {"sparsity": 0.6, "skip_first_steps": 0, "min_tokens": 0}
every_family = pytest.mark.parametrize("name", FAMILIES)
before_or_after = pytest.mark.parametrize("later", [False, True], ids=["before install", "after install"])


def close(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)


# LoRA


def with_adapter(tiny: TinyPipeline) -> None:
    """A LoRA adapter with random weights on the projections of every attention."""
    import peft

    torch.manual_seed(1)
    targets = ["to_q", "to_k", "to_v"]
    tiny.pipe.transformer.add_adapter(peft.LoraConfig(r=4, lora_alpha=8, target_modules=targets, init_lora_weights=False))
    tiny.pipe.transformer.requires_grad_(False)


@every_family
def test_an_adapter_loaded_fused_and_unloaded_while_served(name: str) -> None:
    plain, adapted, tiny = (few_tokens(FAMILIES[name](), name) for _ in range(3))
    with_adapter(adapted)
    expected = {"plain": plain.run(2), "adapted": adapted.run(2)}
    assert not torch.equal(*expected.values())
    model = tiny.pipe.transformer
    with ditattn.install(tiny.pipe, "torch_sdpa") as handle:
        close(tiny.run(2), expected["plain"])
        with_adapter(tiny)
        close(tiny.run(2), expected["adapted"])
        model.fuse_lora()
        close(tiny.run(2), expected["adapted"])
        model.unfuse_lora()
        model.disable_adapters()
        close(tiny.run(2), expected["plain"])
        model.enable_adapters()
        close(tiny.run(2), expected["adapted"])
        model.unload_lora()
        close(tiny.run(2), expected["plain"])
    calls = handle.report().components["transformer"].calls
    assert calls > 0
    assert calls % 6 == 0, "every one of the six runs came through"
    close(tiny.run(2), expected["plain"])


@pytest.mark.shows("LoRA")
@every_family
def test_an_adapter_runs_sparse_whenever_it_was_loaded(name: str) -> None:
    found = []
    for later in (False, True):
        tiny = few_tokens(FAMILIES[name](), name)
        if not later:
            with_adapter(tiny)
        with ditattn.install(tiny.pipe, "rain_fusion_attn", strict=True, **SPARSE) as handle:
            if later:
                with_adapter(tiny)
            found.append(tiny.run(2))
        assert handle.report().components["transformer"].dense == 0
    assert torch.equal(*found)


# quantised weights


def replace_projections(module: nn.Module, make: Any) -> None:
    """Every linear layer of the attention by what `make` makes of it."""
    for path, part in list(module.named_modules()):
        for name, layer in list(part.named_children()):
            if isinstance(layer, nn.Linear) and name in ("to_q", "to_k", "to_v") and path:
                setattr(part, name, make(layer))


def int8_of_torchao(module: nn.Module) -> None:
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    quantize_(module, Int8WeightOnlyConfig())


def q8_of_gguf(module: nn.Module) -> None:
    import gguf
    from diffusers.quantizers.gguf.utils import GGUFLinear, GGUFParameter

    kind = gguf.GGMLQuantizationType.Q8_0

    def quantised(layer: nn.Linear) -> nn.Module:
        made = GGUFLinear(layer.in_features, layer.out_features, layer.bias is not None, compute_dtype=torch.float32)
        made.weight = GGUFParameter(torch.from_numpy(gguf.quantize(layer.weight.detach().numpy(), kind)), quant_type=kind)
        made.bias = layer.bias
        return made.requires_grad_(False)

    replace_projections(module, quantised)


def nf4_of_bitsandbytes(module: nn.Module) -> None:
    import bitsandbytes as bnb

    def quantised(layer: nn.Linear) -> nn.Module:
        made = bnb.nn.Linear4bit(layer.in_features, layer.out_features, layer.bias is not None, torch.float32, quant_type="nf4")
        made.weight = bnb.nn.Params4bit(layer.weight.detach().clone(), requires_grad=False, quant_type="nf4")
        made.bias = layer.bias
        # the move quantises
        return made.to("cpu")

    replace_projections(module, quantised)


QUANTISERS = {"torchao": int8_of_torchao, "gguf": q8_of_gguf, "bitsandbytes": nf4_of_bitsandbytes}


@pytest.mark.shows("quantised weights")
@pytest.mark.parametrize("package", QUANTISERS)
@every_family
@before_or_after
def test_quantised_weights(name: str, package: str, later: bool) -> None:
    if package in ("bitsandbytes", "torchao"):
        pytest.importorskip(package)
    quantise = QUANTISERS[package]
    plain = few_tokens(FAMILIES[name](), name)
    exact = plain.run(2)
    quantise(plain.pipe.transformer)
    native = plain.run(2)
    assert not torch.equal(native, exact)
    for backend, settings in (("torch_sdpa", {}), ("rain_fusion_attn", SPARSE)):
        tiny = few_tokens(FAMILIES[name](), name)
        if not later:
            quantise(tiny.pipe.transformer)
        with ditattn.install(tiny.pipe, backend, strict=True, **settings) as handle:
            if later:
                quantise(tiny.pipe.transformer)
            out = tiny.run(2)
        report = handle.report().components["transformer"]
        assert out.isfinite().all()
        assert report.calls > 0
        if settings:
            assert report.dense == 0
        else:
            close(out, native)


# step caches


@every_family
@before_or_after
def test_a_cache_of_blocks_gives_what_it_gives_natively(name: str, later: bool) -> None:
    """cache-dit's DBCache leaves out blocks whose residual hardly changes; what runs, runs as it would without us."""
    import cache_dit

    settings = {"Fn_compute_blocks": 1, "Bn_compute_blocks": 0, "max_warmup_steps": 1, "residual_diff_threshold": 10.0}

    def cached(tiny: TinyPipeline) -> None:
        cache_dit.enable_cache(tiny.pipe, cache_config=cache_dit.DBCacheConfig(**settings))

    alone, tiny = (few_tokens(FAMILIES[name](), name) for _ in range(2))
    plain = alone.run(4)
    cached(alone)
    native = alone.run(4)
    before = footprint(tiny.pipe)
    if not later:
        cached(tiny)
    with ditattn.install(tiny.pipe, "torch_sdpa") as handle:
        if later:
            cached(tiny)
        close(tiny.run(4), native)
    calls = handle.report().components["transformer"].calls
    assert calls > 0
    cache_dit.disable_cache(tiny.pipe)
    close(tiny.run(4), plain)
    # cache-dit leaves attributes of its own on the blocks; the processors, which are what we touch, are as they were
    assert _processors(footprint(tiny.pipe)) == _processors(before)


def _processors(found: dict[str, Any]) -> dict[str, Any]:
    return {
        path: (part["processor"], part["processor attributes"])
        for path, part in found.items()
        if isinstance(part, dict) and "processor" in part
    }
