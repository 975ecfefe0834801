"""vllm_omni 0.30.0 from its wheel: its plug-in loader, registry, config, selector, Attention layer and forward context, on the CPU."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from vllm_omni.diffusion.attention.backends.abstract import (
    AttentionBackend,
    AttentionImpl,
    AttentionMetadata,
    VideoTokenLayout,
    VideoTokenSpan,
)
from vllm_omni.diffusion.attention.backends.rainfusion_attn import RainFusionAttentionBackend
from vllm_omni.diffusion.attention.backends.registry import DiffusionAttentionBackendEnum, register_diffusion_backend
from vllm_omni.diffusion.attention.backends.sdpa import SDPAImpl
from vllm_omni.diffusion.attention.layer import Attention
from vllm_omni.diffusion.forward_context import (
    set_forward_context,
    set_forward_context_denoise_step_idx,
    set_forward_context_denoise_total_steps,
)

from ditattn.backends.base import CallRecord
from ditattn.backends.registry import BACKENDS, load_backend
from ditattn.backends.sparse import Reason
from ditattn.errors import BackendUnavailable, ConfigError, UnknownBackend, UnknownKey, UnsupportedCall
from ditattn.hosts.vllm_omni.environment import KEYS, SWITCH
from ditattn.hosts.vllm_omni.run import run_of_process
from ditattn.models import TokenLayout
from ditattn.plan.token_grids import TokenGrid
from ditattn.runtime.metadata import build_attn_metadata
from ditattn.runtime.step import Step

SLOT = DiffusionAttentionBackendEnum.RAINFUSION_ATTN
SPARSE = [name for name in BACKENDS if load_backend(name).is_sparse]
GRID, HEADS, HEAD_SIZE = (8, 16, 16), 2, 64
TOKENS = 2048
VIDEO = VideoTokenLayout(prefix_len=0, latent_grid=GRID, used_len=TOKENS)


def attention_config(**block_sparse: Any) -> dict[str, Any]:
    return {"default": {"backend": "RAINFUSION_ATTN", "block_sparse": block_sparse}}


def layer(prefix: str = "blocks.3.attn1", **more: Any) -> Attention:
    given = {"num_heads": HEADS, "head_size": HEAD_SIZE, "causal": False, "softmax_scale": HEAD_SIZE**-0.5, "qkv_layout": "BSND"}
    return Attention(**{**given, "prefix": prefix, **more})


def tensors(tokens: int = TOKENS, heads: int = HEADS, seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(1, tokens, heads, HEAD_SIZE, generator=generator) for _ in range(3)]


def call(attention: Any, qkv: list[Tensor], metadata: Any, step: int | None, num_steps: int | None = None) -> Tensor:
    """A call of a layer in a step of the denoising loop, which vllm_omni's pipelines announce so."""
    with set_forward_context():
        set_forward_context_denoise_step_idx(step)
        set_forward_context_denoise_total_steps(num_steps)
        # nobody configured parallelism in this context
        attention._get_active_parallel_strategy = lambda: attention._no_parallel_strategy
        return attention(*qkv, metadata)


def sdpa(qkv: list[Tensor], mask: Tensor | None = None) -> Tensor:
    query, key, value = (x.transpose(1, 2) for x in qkv)
    return scaled_dot_product_attention(query, key, value, attn_mask=mask).transpose(1, 2)


def our_own(name: str, qkv: list[Tensor], layout: TokenLayout, **keys: Any) -> tuple[Tensor, CallRecord]:
    """The same call without vllm_omni."""
    backend = load_backend(name)
    records: list[CallRecord] = []
    impl = backend.get_impl_cls()(HEADS, HEAD_SIZE, layer_index=3, observer=records.append)
    config = backend.get_config_cls().from_mapping({"min_tokens": 0, "skip_first_steps": 0, **keys})
    metadata = build_attn_metadata(backend.get_builder_cls()(), config, Step(1, None, "none"), layout)
    return impl.forward(*qkv, metadata), records[0]


@pytest.fixture
def served(load_plugins: Callable[..., None]) -> Callable[..., None]:
    """vllm_omni with one of our backends registered, for sequences of any length."""

    def load(name: str = "permuted_sparse_attn", keys: str = "min_tokens=0") -> None:
        load_plugins(**{SWITCH: name, KEYS: keys})

    return load


def test_nothing_is_touched_unless_it_is_asked_for(load_plugins: Callable[..., None], configured: Any) -> None:
    for value in ({}, {SWITCH: "0"}, {SWITCH: ""}):
        load_plugins(**value)
        assert not SLOT.is_overridden()
    assert SLOT.get_class() is RainFusionAttentionBackend
    with configured(attention_config(sparsity=0.75)), pytest.raises(ValueError, match="runs on npu only"):
        layer()


@pytest.mark.parametrize("name", SPARSE)
def test_their_registry_finds_our_class_on_a_platform_that_theirs_refuses(name: str, served: Any, configured: Any) -> None:
    served(name)
    served(name)
    assert SLOT.get_path() == "ditattn.hosts.vllm_omni.DitattnBackend"
    found = SLOT.get_class()
    assert issubclass(found, AttentionBackend)
    assert issubclass(found.get_impl_cls(), AttentionImpl)
    assert found.get_name() == "RAINFUSION_ATTN"
    with configured(attention_config(sparsity=0.75)):
        made = layer()
    assert made.attn_backend is found
    assert made.attention._layer.backend.name == name


def test_the_switch_alone_takes_the_recommended_backend(load_plugins: Callable[..., None], configured: Any) -> None:
    load_plugins(**{SWITCH: "1"})
    with configured({"default": "RAINFUSION_ATTN"}):
        made = layer()
    assert made.attention._layer.backend.name == "permuted_sparse_attn"
    # vllm_omni's own defaults of block_sparse
    assert (made.attention._layer.config.sparsity, made.attention._layer.config.skip_first_steps) == (0.8, 0)


def test_another_plug_in_in_the_same_place_is_named(load_plugins: Callable[..., None]) -> None:
    register_diffusion_backend(SLOT, "other_package.Backend")
    with pytest.raises(BackendUnavailable, match=r"other_package\.Backend"):
        load_plugins(**{SWITCH: "1"})


@pytest.mark.parametrize(
    ("environment", "error", "message"),
    [
        ({SWITCH: "rainfusion"}, UnknownBackend, "did you mean 'rain_fusion_attn'"),
        ({SWITCH: "torch_sdpa"}, UnknownBackend, "take one of block_sparse_attn, rain_fusion_attn, permuted_sparse_attn"),
        ({SWITCH: "1", KEYS: "sparsity=0.5"}, ConfigError, r"block_sparse\.sparsity"),
        ({SWITCH: "1", KEYS: "plan_refresh_steps=4"}, ConfigError, "does not say which request"),
        ({SWITCH: "1", KEYS: "residual=true"}, ConfigError, "residual cannot be honoured: vllm-omni does not say which request"),
        ({SWITCH: "1", KEYS: "brick=auto"}, UnknownKey, "did you mean 'bricks'"),
    ],
)
def test_what_cannot_be_honoured_stops_the_start(load_plugins: Callable[..., None], environment: Any, error: Any, message: str) -> None:
    with pytest.raises(error, match=message):
        load_plugins(**environment)
    assert not SLOT.is_overridden()


@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        ({"sparsity": 0.5, "precision": "fp8"}, ConfigError, "MindIE-SD"),
        ({"sparsity": 1.0}, ConfigError, "sparsity"),
        ({"sparsity": 0.5, "start_steps": 2}, UnknownKey, "did you mean 'start_step'"),
    ],
)
def test_keys_of_a_layer_are_honoured_or_refused(served: Any, given: dict[str, Any], error: Any, message: str) -> None:
    served()
    impl = SLOT.get_class().get_impl_cls()
    with pytest.raises(error, match=message):
        impl(num_heads=HEADS, head_size=HEAD_SIZE, softmax_scale=0.125, prefix="blocks.0.attn1", backend_kwargs=given)


@pytest.mark.parametrize("name", SPARSE)
def test_sparse_calls_are_our_own_path(name: str, served: Any, configured: Any) -> None:
    served(name)
    with configured(attention_config(sparsity=0.75)):
        made = layer()
    qkv = tensors()
    out = call(made, qkv, AttentionMetadata(video_layout=VIDEO), step=1)
    expected, record = our_own(name, qkv, TokenLayout((1, 1, *GRID), (1, 1, 1)), sparsity=0.75)
    assert record.plan is not None
    assert record.plan.density() < 0.7
    torch.testing.assert_close(out, expected, rtol=0, atol=0)
    assert (out - sdpa(qkv)).abs().max() > 1e-2


@pytest.mark.parametrize("name", SPARSE)
@pytest.mark.parametrize(
    ("block_sparse", "step", "num_steps", "reason"),
    [
        ({"sparsity": 0.0}, 1, None, Reason.SPARSITY_ZERO),
        ({"sparsity": 0.75, "start_step": 2}, 1, None, Reason.FIRST_STEPS),
        ({"sparsity": 0.75, "start_step": 2}, None, None, Reason.STEP_UNKNOWN),
        ({"sparsity": 0.75, "end_step": 2}, 8, 10, Reason.LAST_STEPS),
        ({"sparsity": 0.75, "skip_layers": "0,3-4"}, 1, None, Reason.SKIPPED_LAYER),
    ],
)
def test_dense_calls_are_the_platforms_own(
    name: str, served: Any, configured: Any, block_sparse: dict[str, Any], step: int | None, num_steps: int | None, reason: str
) -> None:
    served(name)
    with configured(attention_config(**block_sparse)):
        made, other = layer("blocks.3.attn1"), layer("blocks.5.attn1")
    qkv = tensors()
    metadata = AttentionMetadata(video_layout=VIDEO)
    assert isinstance(made.attention._dense, SDPAImpl)
    torch.testing.assert_close(call(made, qkv, metadata, step, num_steps), sdpa(qkv), rtol=1e-5, atol=1e-5)
    assert run_of_process().log_of(made.attention._layer).reasons == {reason: 1}
    if reason == Reason.SKIPPED_LAYER:
        assert (call(other, qkv, metadata, step, num_steps) - sdpa(qkv)).abs().max() > 1e-2
    if reason == Reason.LAST_STEPS:
        assert (call(made, qkv, metadata, 7, num_steps) - sdpa(qkv)).abs().max() > 1e-2


def test_last_steps_of_a_run_of_unknown_length_are_an_error(served: Any, configured: Any) -> None:
    served()
    with configured(attention_config(sparsity=0.75, end_step=2)):
        made = layer()
    with pytest.raises(UnsupportedCall, match=r"end_step=2 .* does not say how many steps"):
        call(made, tensors(), AttentionMetadata(video_layout=VIDEO), step=1)


def test_padding_behind_the_video_is_seen_by_nobody(served: Any, configured: Any) -> None:
    served("rain_fusion_attn")
    with configured(attention_config(sparsity=0.75)):
        made = layer()
    assert made.attn_backend.supports_attention_mask()
    padded = tensors(TOKENS + 6)
    mask = (torch.arange(TOKENS + 6) < TOKENS)[None]
    out = call(made, padded, AttentionMetadata(video_layout=VIDEO, attn_mask=mask), step=1)
    expected, _ = our_own("rain_fusion_attn", [x[:, :TOKENS] for x in padded], TokenLayout((1, 1, *GRID), (1, 1, 1)), sparsity=0.75)
    torch.testing.assert_close(out[:, :TOKENS], expected, rtol=0, atol=0)
    assert not out[:, TOKENS:].any()
    with configured(attention_config(sparsity=0.0)):
        dense = layer()
    out = call(dense, padded, AttentionMetadata(video_layout=VIDEO, attn_mask=mask), step=1)
    torch.testing.assert_close(out[:, :TOKENS], sdpa(padded, mask[:, None, None])[:, :TOKENS], rtol=1e-5, atol=1e-5)


def test_text_before_the_video_and_reference_videos_are_known(served: Any, configured: Any) -> None:
    served("rain_fusion_attn")
    with configured(attention_config(sparsity=0.75)):
        made = layer()
    qkv = tensors(582 + TOKENS)
    spans = (VideoTokenSpan(60, (2, 16, 16), "reference"), VideoTokenSpan(582, GRID, "target"))
    metadata = AttentionMetadata(video_layout=VideoTokenLayout(used_len=582 + TOKENS, video_spans=spans))
    grids = [TokenGrid(582, GRID), TokenGrid(60, (2, 16, 16))]
    expected, record = our_own("rain_fusion_attn", qkv, TokenLayout.of_grids(1, 1, grids, 582 + TOKENS), sparsity=0.75)
    torch.testing.assert_close(call(made, qkv, metadata, step=1), expected, rtol=0, atol=0)
    assert record.plan is not None
    assert record.plan.density() < 0.9


@pytest.mark.parametrize(
    "metadata",
    [
        pytest.param(None, id="no metadata"),
        pytest.param(AttentionMetadata(), id="no layout"),
        pytest.param(AttentionMetadata(video_layout=VideoTokenLayout(prefix_len=0, latent_grid=(7, 16, 16))), id="layout of other tokens"),
        pytest.param(AttentionMetadata(video_layout=VIDEO, attn_mask=torch.ones(1, 1, TOKENS, TOKENS).tril().bool()), id="mask of pairs"),
    ],
)
def test_what_is_not_known_to_be_a_video_stays_dense(served: Any, configured: Any, metadata: Any) -> None:
    served()
    with configured(attention_config(sparsity=0.75)):
        made = layer()
    qkv = tensors()
    mask = None if metadata is None else metadata.attn_mask
    torch.testing.assert_close(call(made, qkv, metadata, step=1), sdpa(qkv, mask), rtol=1e-5, atol=1e-5)


def test_cross_attention_stays_dense(served: Any, configured: Any) -> None:
    served()
    with configured(attention_config(sparsity=0.75)):
        made = layer("blocks.3.attn2", role="cross")
    query, (_, key, value) = tensors()[0], tensors(77)
    torch.testing.assert_close(call(made, [query, key, value], None, step=1), sdpa([query, key, value]), rtol=1e-5, atol=1e-5)
    # reports are about self-attention
    assert not run_of_process().log_of(made.attention._layer).cells


@pytest.mark.parametrize("degree", ["ring_degree", "allgather_degree"])
def test_ranks_that_split_the_keys_are_refused(served: Any, degree: str) -> None:
    served()
    from vllm_omni.diffusion import config

    impl = SLOT.get_class().get_impl_cls()
    made = type("Config", (), {"parallel_config": type("Parallel", (), {degree: 2})})
    with config.set_current_diffusion_config(made), pytest.raises(UnsupportedCall, match=f"{degree}=2.*use Ulysses"):
        impl(num_heads=HEADS, head_size=HEAD_SIZE, softmax_scale=0.125, backend_kwargs={"sparsity": 0.75})


def test_a_rank_of_ulysses_has_all_tokens_for_some_heads(served: Any, configured: Any) -> None:
    served("rain_fusion_attn")
    with configured(attention_config(sparsity=0.75), ulysses_degree=2, sequence_parallel_size=2):
        made = layer(num_heads=2 * HEADS)
    qkv = tensors()
    expected, _ = our_own("rain_fusion_attn", qkv, TokenLayout((1, 1, *GRID), (1, 1, 1)), sparsity=0.75)
    # what the layer hands on after its all-to-all
    out = call(made, qkv, AttentionMetadata(video_layout=VIDEO), step=1)
    torch.testing.assert_close(out, expected, rtol=0, atol=0)


def test_compiled_layers_see_every_step(served: Any, configured: Any) -> None:
    served("rain_fusion_attn")
    with configured(attention_config(sparsity=0.75, start_step=2)):
        made = layer()
    qkv = tensors()

    def block(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return made.attention.forward(query, key, value, AttentionMetadata(video_layout=VIDEO)) + 1

    compiled = torch.compile(block, backend="eager")
    with set_forward_context():
        for step in range(4):
            set_forward_context_denoise_step_idx(step)
            torch.testing.assert_close(compiled(*qkv), block(*qkv), rtol=0, atol=0)
            is_dense = torch.allclose(compiled(*qkv), sdpa(qkv) + 1, atol=1e-4)
            assert is_dense is (step < 2)


def test_a_run_is_summed_up_when_the_next_one_begins(served: Any, configured: Any, caplog: pytest.LogCaptureFixture) -> None:
    served("rain_fusion_attn")
    with configured(attention_config(sparsity=0.75, start_step=1)):
        made = layer()
    metadata = AttentionMetadata(video_layout=VIDEO)
    caplog.set_level(logging.INFO)
    for step in (0, 1, 2, 0):
        for _ in range(2):
            call(made, tensors(), metadata, step)
    summaries = [record.getMessage() for record in caplog.records if "in attention" in record.getMessage()]
    assert len(summaries) == 1
    assert "rain_fusion_attn: 4 sparse at density 0." in summaries[0]
    assert "2 dense (first steps: 2)" in summaries[0]


def test_orders_of_the_heads_are_chosen_anew_in_every_run(served: Any, configured: Any) -> None:
    served("permuted_sparse_attn")
    with configured(attention_config(sparsity=0.75)):
        made = layer()
    for run in range(2):
        for step in (0, 1):
            call(made, tensors(seed=run), AttentionMetadata(video_layout=VIDEO), step)
        orders = run_of_process().log_of(made.attention._layer).token_orders
        assert sum(orders[3][0].values()) == 1


def test_unknown_arguments_of_a_layer_are_named(served: Any, caplog: pytest.LogCaptureFixture) -> None:
    served()
    SLOT.get_class().get_impl_cls()(num_heads=HEADS, head_size=HEAD_SIZE, softmax_scale=0.125, backend_kwargs={"sparsity": 0.75}, sinks=1)
    assert "makes no use of what layers are given as sinks" in caplog.text


def test_on_ascend_it_says_that_it_took_their_place(served: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    served()
    from vllm_omni.platforms import current_omni_platform
    from vllm_omni.platforms.interface import OmniPlatformEnum

    found = SLOT.get_class()
    monkeypatch.setattr(type(current_omni_platform), "_omni_enum", OmniPlatformEnum.NPU)
    found.validate_available()
    assert "instead of vllm-omni's kernel for Ascend" in caplog.text


def test_a_device_that_is_not_there_is_an_error(served: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    served()
    from vllm_omni.platforms import current_omni_platform

    monkeypatch.setattr(type(current_omni_platform), "device_type", "npu")
    with pytest.raises(BackendUnavailable, match="was asked for on npu"):
        SLOT.get_class().validate_available()
