"""Adapters that bring attention of their own into the denoiser's self-attention modules."""

from __future__ import annotations

import pytest
import torch

import ditattn
import tiny_pipelines
from ditattn.errors import DenseInStrictMode
from tiny_pipelines import TinyPipeline
from tiny_pipelines.pipeline import noise

pytestmark = pytest.mark.usefixtures("one_thread")

SPARSE = {"sparsity": 0.6, "skip_first_steps": 0, "min_tokens": 0}
IMAGE_DIM, TEXT_DIM, WIDTH = 12, 40, 64


def flux_with_ip_adapter() -> TinyPipeline:
    """Flux with an IP-Adapter in its double-stream layer: cross-attention to four image tokens beside the self-attention."""
    tiny = tiny_pipelines.flux()
    projection = {
        "proj.weight": noise(4 * TEXT_DIM, IMAGE_DIM),
        "proj.bias": noise(4 * TEXT_DIM),
        "norm.weight": noise(TEXT_DIM),
        "norm.bias": noise(TEXT_DIM),
    }
    attention = {
        f"0.{name}_ip.{part}": noise(*shape)
        for name in ("to_k", "to_v")
        for part, shape in (("weight", (WIDTH, TEXT_DIM)), ("bias", (WIDTH,)))
    }
    tiny.pipe.transformer._load_ip_adapter_weights([{"image_proj": projection, "ip_adapter": attention}], low_cpu_mem_usage=False)
    tiny.pipe.transformer.requires_grad_(False)
    image = [noise(1, 1, IMAGE_DIM)]
    return TinyPipeline(tiny.pipe, {**tiny.arguments, "ip_adapter_image_embeds": image, "negative_ip_adapter_image_embeds": image})


def test_an_adapters_cross_attention_is_native_and_no_matter_of_strictness() -> None:
    tiny = flux_with_ip_adapter()
    native = tiny.run(2)
    tiny.pipe.set_ip_adapter_scale(0.0)
    assert not torch.equal(tiny.run(2), native)
    tiny.pipe.set_ip_adapter_scale(1.0)
    with ditattn.install(tiny.pipe, "rain_fusion_attn", strict=True, **{**SPARSE, "sparsity": 0.01}) as handle:
        torch.testing.assert_close(tiny.run(2), native, rtol=0, atol=1e-4)
    report = handle.report().components["transformer"]
    assert report.sparse == 2 * 2 * 2
    assert report.dense_reasons == {"query and key lengths differ": 2 * 2}


def test_strict_still_looks_at_the_self_attention_beside_the_adapter() -> None:
    tiny = flux_with_ip_adapter()
    # ids that are no grid of one token each
    tiny.pipe.transformer.register_forward_pre_hook(
        lambda _module, args, named: (args, {**named, "img_ids": named["img_ids"] * 2}), with_kwargs=True
    )
    with ditattn.install(tiny.pipe, "rain_fusion_attn", strict=True, **SPARSE), pytest.raises(DenseInStrictMode, match="unknown geometry"):
        tiny.run(1)


@pytest.mark.slow
def test_a_compiled_model_counts_no_layer_for_the_adapter() -> None:
    tiny = flux_with_ip_adapter()
    cells = []
    for compiled in (False, True):
        if compiled:
            tiny.pipe.transformer.compile(backend="eager")
        with ditattn.install(tiny.pipe, "rain_fusion_attn", strict=True, **SPARSE) as handle:
            tiny.run(2)
        cells.append({key: cell.sparse for key, cell in handle._stage.models[0].log.cells.items() if cell.sparse})
    assert cells[0] == cells[1]
    assert {layer for _, layer in cells[0]} == {0, 1}


def test_strict_registered_names_leave_cross_attention_alone() -> None:
    tiny = tiny_pipelines.wan()
    with ditattn.register(strict=True, **SPARSE) as registration:
        tiny.pipe.transformer.set_attention_backend("rain_fusion_attn")
        tiny.run(1)
    assert set(registration.report().components["WanTransformer3DModel"].dense_reasons) == {"not self-attention of the denoiser"}
