"""sglang's attention layers with our classes behind them, on its forward context and with the metadata that its stage builds."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from sglang.multimodal_gen.runtime.layers.attention import layer as attention_layer
from sglang.multimodal_gen.runtime.layers.attention.layer import LocalAttention, UlyssesAttention, USPAttention
from sglang.multimodal_gen.runtime.layers.attention.selector import component_attn_backend_context_manager
from sglang.multimodal_gen.runtime.managers.forward_context import set_forward_context
from sglang.multimodal_gen.runtime.platforms import AttentionBackendEnum
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounter
from torch.nn.functional import scaled_dot_product_attention

from ditattn.errors import ConfigError, UnsupportedCall
from ditattn.hosts.sglang.serving import serving
from hosts.sglang import reference
from hosts.sglang.server import HEAD_SIZE, LATENTS, STEPS, TOKENS, forward_of, request

Serve = Callable[..., Any]
HEADS = 2
NOW = {"skip_first_steps": 0, "min_tokens": 0}
# name of --attention-backend, and the backend that serves
SPARSE = [
    ("rain_fusion_attn", None),
    ("block_sparse_attn", None),
    ("rain_fusion_attn", "permuted_sparse_attn"),
    ("block_sparse_attn", "permuted_sparse_attn"),
]


@pytest.fixture(autouse=True)
def _without_gradients() -> Any:
    with torch.no_grad():
        yield


@pytest.fixture
def qkv() -> list[Tensor]:
    return list(torch.randn(3, 1, TOKENS, HEADS, HEAD_SIZE))


def build(kind: Any = USPAttention, number: int = 0, **kwargs: Any) -> Any:
    if kind is not LocalAttention:
        kwargs.setdefault("prefix", f"blocks.{number}.attn1")
    return kind(num_heads=HEADS, head_size=HEAD_SIZE, causal=kwargs.pop("causal", False), **kwargs)


def dense(query: Tensor, key: Tensor, value: Tensor, **kwargs: Any) -> Tensor:
    return scaled_dot_product_attention(*(x.transpose(1, 2) for x in (query, key, value)), **kwargs).transpose(1, 2)


@pytest.mark.parametrize("kind", [LocalAttention, USPAttention])
@pytest.mark.parametrize(("name", "backend"), SPARSE)
def test_sparse_as_our_own_layer_and_counted(serve: Serve, qkv: list[Tensor], kind: Any, name: str, backend: str | None) -> None:
    asked = {"sparsity": 0.75, **NOW}
    server_args, batch = serve(name, **asked, **({"backend": backend} if backend else {})), request()
    layer = build(kind)
    assert layer.backend is AttentionBackendEnum[name.upper()]
    with forward_of(1, batch, server_args):
        out = layer(*qkv)
    expected, density = reference.sparse(backend or name, asked, qkv, LATENTS, step=1, steps=STEPS)
    assert density < 0.8
    torch.testing.assert_close(out, expected, atol=2e-6, rtol=1e-5)
    assert (out - dense(*qkv)).abs().max() > 1e-3
    report = serving().end_of_stage().components["transformer"]
    assert (report.backend, report.sparse, report.dense) == (backend or name, 1, 0)
    assert report.sparse_density == pytest.approx(density)
    assert report.sparse_density_by_step == {1: pytest.approx(density)}
    assert report.sparse_density_by_layer == {0: pytest.approx(density)}
    assert report.step_sources == {"sglang": 1}
    assert report.schedule_steps == STEPS
    assert report.token_grids == {"4x16x24": 1}


@pytest.mark.parametrize("kind", [LocalAttention, USPAttention, UlyssesAttention])
@pytest.mark.parametrize(("name", "config"), [("laser_attn", {}), *((name, {"sparsity": 0, **NOW}) for name, _ in SPARSE[:3])])
def test_dense_as_sglangs_sdpa(serve: Serve, qkv: list[Tensor], kind: Any, name: str, config: dict[str, Any]) -> None:
    server_args, batch = serve(name, **config), request()
    layer, theirs = build(kind), build(kind, required_attention_backend=AttentionBackendEnum.TORCH_SDPA)
    with forward_of(0, batch, server_args):
        out, expected = layer(*qkv), theirs(*qkv)
    if kind is UlyssesAttention:
        (out, _), (expected, _) = out, expected
    torch.testing.assert_close(out, expected, atol=2e-6, rtol=1e-5)
    report = serving().end_of_stage().components["transformer"]
    assert (report.backend, report.sparse, report.dense) == (name, 0, 1)


def test_without_keys_sglangs_defaults_hold(serve: Serve) -> None:
    serve("rain_fusion_attn")
    build()
    [model] = serving().stage.models
    assert (model.config.sparsity, model.config.skip_first_steps) == (0.2, 10)
    serve("rain_fusion_attn", preset="fast")
    build()
    assert serving().stage.models[0].config.sparsity == 0.9
    serve("rain_fusion_attn", backend="rain_fusion_attn")
    build()
    assert (serving().stage.models[0].config.sparsity, serving().stage.models[0].config.skip_first_steps) == (0.75, "auto")


def test_steps_layers_and_branches(serve: Serve, qkv: list[Tensor]) -> None:
    server_args, batch = serve("rain_fusion_attn", sparsity=0.75, skip_first_steps="50%", skip_layers="1", min_tokens=0), request()
    layers = [build(number=number) for number in range(3)]
    for step in range(STEPS):
        for _branch in range(2):
            with forward_of(step, batch, server_args):
                for layer in layers:
                    layer(*qkv)
    report = serving().end_of_stage().components["transformer"]
    assert report.step_sources == {"sglang": 2 * STEPS}
    assert report.dense_reasons == {"first steps": 2 * 2 * 3, "skipped layer": 2 * 2}
    assert report.sparse == 2 * 2 * 2
    assert [layer for layer, density in report.sparse_density_by_layer.items() if density] == [0, 2]
    # another request begins to count anew, and its first steps are dense again
    with forward_of(0, batch, server_args):
        layers[0](*qkv)
    assert serving().end_of_stage().components["transformer"].dense_reasons == {"first steps": 1}


def test_plans_are_kept_for_each_branch(serve: Serve, qkv: list[Tensor]) -> None:
    other = [x.flip(1) for x in qkv]
    server_args, batch = serve("rain_fusion_attn", sparsity=0.75, plan_refresh_steps=2, **NOW), request()
    layer = build()
    outs = []
    for step in range(2):
        for tensors in (qkv, other):
            with forward_of(step, batch, server_args):
                outs.append(layer(*tensors))
    torch.testing.assert_close(outs[2:], outs[:2])
    assert serving().end_of_stage().components["transformer"].reused_plans == 2
    # two forwards of a step in one context of sglang's
    with forward_of(0, batch, server_args):
        again = [layer(*tensors) for tensors in (qkv, other)]
    torch.testing.assert_close(again, outs[:2])


def test_layers_that_do_not_exist_are_named(serve: Serve, qkv: list[Tensor]) -> None:
    server_args, batch = serve("rain_fusion_attn", skip_layers="7", **NOW), request()
    layer = build()
    with (
        pytest.raises(ConfigError, match="skip_layers names 7, but transformer has self-attention layers 0-0"),
        forward_of(0, batch, server_args),
    ):
        layer(*qkv)


def test_a_layer_that_is_built_again_keeps_its_number(serve: Serve) -> None:
    serve("rain_fusion_attn")
    layers = [build(number=0), build(number=1), build(number=0), build(LocalAttention)]
    assert [layer.attn_impl._layer.number for layer in layers] == [0, 1, 0, 2]


def test_cross_attention_is_left_alone(serve: Serve, qkv: list[Tensor]) -> None:
    query, key, value = qkv[0], qkv[1][:, :77], qkv[2][:, :77]
    server_args, batch = serve("rain_fusion_attn", sparsity=0.75, **NOW), request()
    usp, ulysses = build(is_cross_attention=True), build(UlyssesAttention, is_cross_attention=True)
    assert usp.backend is AttentionBackendEnum.TORCH_SDPA
    # sglang resolves this one without saying that it is cross-attention
    assert ulysses.backend is AttentionBackendEnum.RAIN_FUSION_ATTN
    with forward_of(1, batch, server_args):
        for layer in (usp, ulysses):
            out = layer.attn_impl.forward(query, key, value, None)
            torch.testing.assert_close(out, dense(query, key, value), atol=2e-6, rtol=1e-5)
    assert serving().end_of_stage() is None


def test_encoders_are_left_alone(serve: Serve, qkv: list[Tensor]) -> None:
    serve("rain_fusion_attn", sparsity=0.75, **NOW)
    with component_attn_backend_context_manager(None, component_name="text_encoder", allow_global_backend_fallback=True):
        encoder = build(LocalAttention, causal=True)
    denoiser = build()
    with set_forward_context(current_timestep=0, attn_metadata=None):
        for layer, is_causal in ((encoder, True), (denoiser, False)):
            torch.testing.assert_close(layer(*qkv), dense(*qkv, is_causal=is_causal), atol=2e-6, rtol=1e-5)
    assert [model.name for model in serving().stage.models] == ["transformer"]
    assert serving().end_of_stage() is None


def test_components_have_reports_of_their_own(serve: Serve, qkv: list[Tensor]) -> None:
    server_args, batch = serve("rain_fusion_attn", sparsity=0.75, **NOW), request()
    layers = {}
    for name in ("transformer", "transformer_2"):
        with component_attn_backend_context_manager(None, component_name=name):
            layers[name] = build()
    for step, name in enumerate(("transformer", "transformer", "transformer_2")):
        with forward_of(step, batch, server_args):
            layers[name](*qkv)
    # both in one context, as models with two towers do it
    with forward_of(3, batch, server_args):
        for name in layers:
            layers[name](*qkv)
    report = serving().end_of_stage()
    assert {name: component.sparse for name, component in report.components.items()} == {"transformer": 3, "transformer_2": 2}


@pytest.mark.parametrize(
    ("latents", "reason"),
    [
        ((1, 4, 4, 32, 30), "token count does not match the grid"),
        ((1, TOKENS, 64), "unknown geometry"),
        ((1, 4, 4, 32, 1), "unknown geometry"),
    ],
)
def test_tokens_that_are_not_known_run_densely_and_are_counted(serve: Serve, qkv: list[Tensor], latents: Any, reason: str) -> None:
    server_args, batch = serve("rain_fusion_attn", sparsity=0.75, **NOW), request(latents)
    layer = build()
    with forward_of(1, batch, server_args):
        torch.testing.assert_close(layer(*qkv), dense(*qkv), atol=2e-6, rtol=1e-5)
    assert serving().end_of_stage().components["transformer"].dense_reasons == {reason: 1}


def test_an_image_is_one_frame(serve: Serve, qkv: list[Tensor]) -> None:
    server_args, batch = serve("rain_fusion_attn", sparsity=0.75, **NOW), request((1, 4, 64, 96))
    layer = build()
    with forward_of(1, batch, server_args):
        layer(*qkv)
    report = serving().end_of_stage().components["transformer"]
    assert (report.sparse, report.token_grids) == (1, {"1x32x48": 1})


@pytest.mark.parametrize(("prefix", "sparse", "reasons"), [("mova_video", 1, {}), ("Wan", 0, {"unknown geometry": 1})])
def test_stages_that_build_no_metadata(serve: Serve, qkv: list[Tensor], prefix: str, sparse: int, reasons: dict[str, int]) -> None:
    serve("rain_fusion_attn", prefix=prefix, sparsity=0.75, min_tokens=0, skip_first_steps=1)
    layer = build()
    with set_forward_context(current_timestep=1, attn_metadata=None, forward_batch=request()):
        layer(*qkv)
    report = serving().end_of_stage().components["transformer"]
    assert (report.sparse, report.dense_reasons) == (sparse, reasons)


def test_text_behind_the_video_is_kept_whole(serve: Serve) -> None:
    qkv = list(torch.randn(3, 1, TOKENS + 77, HEADS, HEAD_SIZE))
    server_args, batch = serve("rain_fusion_attn", prefix="Hunyuan", sparsity=0.75, **NOW), request()
    layer = build()
    refiner = [x[:, :77] for x in qkv]
    with forward_of(1, batch, server_args):
        torch.testing.assert_close(build(number=1)(*refiner), dense(*refiner), atol=2e-6, rtol=1e-5)
        out = layer(*qkv)
    report = serving().end_of_stage().components["transformer"]
    assert (report.sparse, report.dense_reasons) == (1, {"token count does not match the grid": 1})
    # text is kept whole, as queries and as keys
    torch.testing.assert_close(out[:, TOKENS:], dense(qkv[0][:, TOKENS:], *qkv[1:]), atol=2e-6, rtol=1e-5)
    assert (out - dense(*qkv)).abs().max() > 1e-3


def test_masked_calls_are_sglangs(serve: Serve, qkv: list[Tensor]) -> None:
    server_args, batch = serve("rain_fusion_attn", sparsity=0.75, **NOW), request()
    layer, mask = build(), torch.ones(1, TOKENS, dtype=torch.bool)
    mask[:, -100:] = False
    with forward_of(1, batch, server_args):
        out = layer(*qkv, attn_mask=mask)
    torch.testing.assert_close(out, dense(*qkv, attn_mask=mask[:, None, None]), atol=2e-6, rtol=1e-5)
    assert serving().end_of_stage() is None


def test_causal_attention_with_cached_keys_is_sglangs(serve: Serve, qkv: list[Tensor]) -> None:
    query, key, value = qkv[0][:, -128:], qkv[1], qkv[2]
    server_args, batch = serve("block_sparse_attn", sparsity=0.5, **NOW), request()
    layer, theirs = build(causal=True), build(causal=True, required_attention_backend=AttentionBackendEnum.TORCH_SDPA)
    with forward_of(1, batch, server_args):
        torch.testing.assert_close(layer(query, key, value), theirs(query, key, value), atol=2e-6, rtol=1e-5)
    assert serving().end_of_stage().components["transformer"].dense_reasons == {"causal attention with more keys than queries": 1}


def test_ring_attention_is_refused(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    serve("rain_fusion_attn")
    monkeypatch.setattr(attention_layer, "get_ring_parallel_world_size", lambda: 2)
    with pytest.raises(RuntimeError, match="RAIN_FUSION_ATTN does not declare support"):
        build()


def test_what_is_not_served_says_so(serve: Serve, qkv: list[Tensor]) -> None:
    serve("rain_fusion_attn")
    impl = build().attn_impl
    assert impl.forward_into(*qkv, torch.empty_like(qkv[0]), None) is False
    with pytest.raises(NotImplementedError, match="packed varlen"):
        impl.forward_varlen(*(x[0] for x in qkv), cu_seqlens=torch.tensor([0, TOKENS]), max_seqlen=TOKENS)
    with pytest.raises(NotImplementedError, match="ring"):
        impl.forward_ring_kv_chunk(*(x[0] for x in qkv))
    with pytest.raises(UnsupportedCall, match="dropout"):
        build(LocalAttention, dropout_p=0.1)


def test_gradients_are_refused(serve: Serve, qkv: list[Tensor]) -> None:
    server_args, batch = serve("rain_fusion_attn", sparsity=0.75, **NOW), request()
    layer = build()
    with torch.enable_grad(), forward_of(1, batch, server_args):
        out = layer(*(x.requires_grad_() for x in qkv))
        with pytest.raises(UnsupportedCall):
            out.sum().backward()


class Block(nn.Module):
    """Around one layer, as the blocks that sglang compiles."""

    def __init__(self, number: int) -> None:
        super().__init__()
        self.impl = build(number=number).attn_impl

    def forward(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        out: Tensor = self.impl.forward(query, key, value, None) * 2
        return out


def test_compiled_blocks_know_step_and_layer_by_one_graph(serve: Serve, qkv: list[Tensor]) -> None:
    server_args, batch = serve("rain_fusion_attn", sparsity=0.75, skip_first_steps=1, skip_layers="3", min_tokens=0), request()
    counter = CompileCounter()
    blocks = [Block(number) for number in range(4)]
    for block in blocks:
        block.compile(backend=counter, fullgraph=True)
    expected, _ = reference.sparse("rain_fusion_attn", {"sparsity": 0.75, **NOW}, qkv, LATENTS, step=1, steps=STEPS)
    for step in range(2):
        with forward_of(step, batch, server_args):
            outs = [block(*qkv) for block in blocks]
    for out in outs[:3]:
        torch.testing.assert_close(out, expected * 2, atol=4e-6, rtol=1e-5)
    torch.testing.assert_close(outs[3], dense(*qkv) * 2, atol=4e-6, rtol=1e-5)
    assert counter.frame_count == 1
    report = serving().end_of_stage().components["transformer"]
    assert (report.sparse, report.dense_reasons) == (3, {"first steps": 4, "skipped layer": 1})
