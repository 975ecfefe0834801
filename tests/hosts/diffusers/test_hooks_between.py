"""Whatever stands between a model and its attention is honoured: perturbed attention, skipped layers, caches, device contexts."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from functools import cache
from typing import Any

import pytest
import torch
from diffusers.hooks import (
    FasterCacheConfig,
    FirstBlockCacheConfig,
    HookRegistry,
    LayerSkipConfig,
    MagCacheConfig,
    PyramidAttentionBroadcastConfig,
    TaylorSeerCacheConfig,
    apply_layer_skip,
)
from diffusers.hooks.layer_skip import AttentionProcessorSkipHook
from diffusers.hooks.smoothed_energy_guidance_utils import SmoothedEnergyGuidanceConfig, _apply_smoothed_energy_guidance_hook
from torch import nn
from torch.overrides import TorchFunctionMode

import ditattn
import tiny_pipelines
from ditattn.errors import DenseInStrictMode
from ditattn.hosts.diffusers.install import Installation, self_attention_modules
from ditattn.models import family_of
from pairwise import covering, marks_beyond
from tiny_pipelines import FAMILIES, TinyPipeline, few_tokens

pytestmark = pytest.mark.usefixtures("one_thread")

SPARSE = {"sparsity": 0.6, "skip_first_steps": 0, "min_tokens": 0}
# fp32: another exact kernel sums in another order
OTHER_KERNEL_BOUND = 1e-4
PERTURBED = "torch function mode AttentionScoreSkipFunctionMode"

Change = Callable[[nn.Module], Any]


def run_with(tiny: TinyPipeline, change: Change, order: str, backend: str, **config: Any) -> tuple[torch.Tensor, Installation]:
    """Latents of a pipeline that was changed before or after the installation."""
    if order == "before":
        change(tiny.pipe.transformer)
    with ditattn.install(tiny.pipe, backend, **config) as handle:
        if order == "after":
            change(tiny.pipe.transformer)
        return tiny.run(3), handle


def native_with(tiny: TinyPipeline, change: Change) -> torch.Tensor:
    change(tiny.pipe.transformer)
    return tiny.run(3)


def first_attention(transformer: nn.Module) -> nn.Module:
    family = family_of(transformer)
    assert family is not None
    return next(iter(self_attention_modules(transformer, family).values()))


# guidance that perturbs attention


def perturb(transformer: nn.Module) -> None:
    """What `apply_layer_skip(..., LayerSkipConfig(skip_attention_scores=True))` does, for families that it does not know too."""
    registry = HookRegistry.check_if_exists_or_initialize(first_attention(transformer))
    registry.register_hook(AttentionProcessorSkipHook(None, skip_attention_scores=True), "skip")


@cache
def natively(name: str, *, perturbed: bool) -> torch.Tensor:
    tiny = few_tokens(FAMILIES[name](), name)
    return native_with(tiny, perturb) if perturbed else tiny.run(3)


@pytest.mark.parametrize("order", ["before", "after"])
@pytest.mark.parametrize("name", FAMILIES)
def test_a_perturbed_layer_gives_what_native_gives(name: str, order: str) -> None:
    unperturbed, native = natively(name, perturbed=False), natively(name, perturbed=True)
    out, handle = run_with(few_tokens(FAMILIES[name](), name), perturb, order, "torch_sdpa")
    report = handle.report().components["transformer"]
    assert (native - unperturbed).abs().max() > 1e-3
    assert torch.equal(out, native)
    assert set(report.dense_reasons) == {PERTURBED, "dense backend"}
    # through the sparse kernel, every block kept: the perturbed layer is torch's, and only that one
    out, handle = run_with(few_tokens(FAMILIES[name](), name), perturb, order, "rain_fusion_attn", **{**SPARSE, "sparsity": 0.01})
    report = handle.report().components["transformer"]
    torch.testing.assert_close(out, native, rtol=0, atol=OTHER_KERNEL_BOUND)
    assert report.dense_reasons == {PERTURBED: report.calls // 2}
    assert {layer: density is not None for layer, density in report.sparse_density_by_layer.items()} == {0: False, 1: True}


@pytest.mark.parametrize("order", ["before", "after"])
def test_layer_skip_of_diffusers_itself(order: str) -> None:
    def skip(transformer: nn.Module) -> None:
        apply_layer_skip(transformer, LayerSkipConfig([0], skip_attention=False, skip_attention_scores=True, skip_ff=False))

    native = native_with(few_tokens(tiny_pipelines.qwen_image(), "qwen image"), skip)
    out, _ = run_with(few_tokens(tiny_pipelines.qwen_image(), "qwen image"), skip, order, "torch_sdpa")
    assert torch.equal(out, native)


def test_strict_refuses_a_perturbed_layer() -> None:
    with pytest.raises(DenseInStrictMode, match=f"step 0: {PERTURBED}"):
        run_with(tiny_pipelines.wan(), perturb, "before", "rain_fusion_attn", strict=True, **SPARSE)


@pytest.mark.slow
def test_a_perturbed_layer_of_a_compiled_model() -> None:
    native = native_with(few_tokens(tiny_pipelines.qwen_image(), "qwen image"), perturb)
    tiny = few_tokens(tiny_pipelines.qwen_image(), "qwen image")
    perturb(tiny.pipe.transformer)
    tiny.pipe.transformer.compile_repeated_blocks(backend="eager")
    out, handle = run_with(tiny, lambda _: None, "before", "rain_fusion_attn", **{**SPARSE, "sparsity": 0.01})
    report = handle.report().components["transformer"]
    torch.testing.assert_close(out, native, rtol=0, atol=OTHER_KERNEL_BOUND)
    assert report.dense_reasons == {PERTURBED: report.calls // 2}
    assert {layer: density is not None for layer, density in report.sparse_density_by_layer.items()} == {0: False, 1: True}


class _PassesOn(TorchFunctionMode):
    """Somebody else's mode that changes nothing."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*args, **(kwargs or {}))


def test_a_mode_that_hands_the_call_on_inside_the_processor_leaves_it_served() -> None:
    """CogVideoX: the mode is entered inside the processor, so it comes before us and hands on."""
    tiny = few_tokens(tiny_pipelines.cogvideox(), "cogvideox")
    processor_cls = type(first_attention(tiny.pipe.transformer).processor)

    class Own(processor_cls):  # type: ignore[misc, valid-type]
        def __call__(
            self,
            attn: Any,
            hidden_states: Any,
            encoder_hidden_states: Any,
            attention_mask: Any = None,
            image_rotary_emb: Any = None,
        ) -> Any:
            with _PassesOn():
                return super().__call__(attn, hidden_states, encoder_hidden_states, attention_mask, image_rotary_emb)

    first_attention(tiny.pipe.transformer).processor = Own()
    _, handle = run_with(tiny, lambda _: None, "before", "rain_fusion_attn", **SPARSE)
    assert handle.report().components["transformer"].dense == 0


@contextlib.contextmanager
def default_device() -> Iterator[None]:
    torch.set_default_device("cpu")
    try:
        yield
    finally:
        torch.set_default_device(None)


@pytest.mark.parametrize("context", [lambda: torch.device("cpu"), default_device], ids=["with torch.device", "set_default_device"])
@pytest.mark.parametrize("name", ["wan", "cogvideox"])
def test_torchs_own_device_contexts_change_nothing(name: str, context: Callable[[], Any]) -> None:
    tiny = few_tokens(FAMILIES[name](), name)
    with ditattn.install(tiny.pipe, "rain_fusion_attn", strict=True, **SPARSE) as handle, context():
        tiny.run(1)
    assert handle.report().components["transformer"].dense == 0


# layers that are skipped, caches


def stack(transformer: nn.Module) -> str:
    return "blocks" if hasattr(transformer, "blocks") else "transformer_blocks"


def skipping(**which: bool) -> Change:
    return lambda transformer: apply_layer_skip(transformer, LayerSkipConfig([0], fqn=stack(transformer), **which))


def cached(make: Callable[[], Any]) -> Change:
    return lambda transformer: transformer.enable_cache(make())


def smoothed(transformer: nn.Module) -> None:
    _apply_smoothed_energy_guidance_hook(transformer, SmoothedEnergyGuidanceConfig([0], fqn=stack(transformer)), 1.0)


STACKS = ("blocks", "transformer_blocks", "single_transformer_blocks")
BROADCAST: dict[str, Any] = {
    "spatial_attention_block_skip_range": 2,
    "spatial_attention_timestep_skip_range": (-1, 2000),
    "spatial_attention_block_identifiers": STACKS,
    "current_timestep_callback": lambda: 500,
}
FASTER: dict[str, Any] = {
    "spatial_attention_block_skip_range": 2,
    "spatial_attention_block_identifiers": STACKS,
    # not the first step, which has nothing to approximate from
    "spatial_attention_timestep_skip_range": (-1, 950),
    "temporal_attention_timestep_skip_range": (-1, 2000),
    "unconditional_batch_timestep_skip_range": (-1, 2000),
    "low_frequency_weight_update_timestep_range": (-1, 2000),
    "high_frequency_weight_update_timestep_range": (-1, 2000),
    "is_guidance_distilled": True,
}


def faster(transformer: nn.Module) -> None:
    timesteps: list[float] = []
    transformer.register_forward_pre_hook(lambda _module, _args, named: timesteps.append(float(named["timestep"].max())), with_kwargs=True)
    transformer.enable_cache(
        FasterCacheConfig(**FASTER, current_timestep_callback=lambda: 1000 if timesteps[-1] == max(timesteps) else 500)
    )


# hook -> how to switch it on, and the families for which diffusers itself can
HOOKS: dict[str, tuple[Change, set[str]]] = {
    "skip a block": (skipping(), {"wan", "hunyuan video", "ltx video", "cogvideox"}),
    "skip feed-forward": (skipping(skip_attention=False), set(FAMILIES)),
    "smoothed energy": (smoothed, {"wan", "hunyuan video", "qwen image", "cogvideox"}),
    "first block cache": (cached(lambda: FirstBlockCacheConfig(threshold=0.5)), set(FAMILIES)),
    "pyramid attention broadcast": (cached(lambda: PyramidAttentionBroadcastConfig(**BROADCAST)), set(FAMILIES)),
    "FasterCache": (faster, set(FAMILIES)),
    "TaylorSeer": (cached(lambda: TaylorSeerCacheConfig(cache_interval=2, disable_cache_before_step=1)), set(FAMILIES)),
    "MagCache": (
        cached(lambda: MagCacheConfig(num_inference_steps=4, retention_ratio=0.25, mag_ratios=torch.ones(4), threshold=0.5)),
        set(FAMILIES),
    ),
}


HOOKED = [(hook, name, order) for hook, (_, names) in HOOKS.items() for name in FAMILIES if name in names for order in ("before", "after")]
SOME = covering(HOOKED)


@pytest.mark.parametrize(
    ("hook", "name", "order"),
    [
        pytest.param(*one, marks=[*([] if one[1] in ("wan", "cogvideox") else [pytest.mark.slow]), *marks_beyond(SOME, one)])
        for one in HOOKED
    ],
)
def test_hooks_of_diffusers_give_what_native_gives(hook: str, name: str, order: str) -> None:
    change, _ = HOOKS[hook]
    native = native_with(few_tokens(FAMILIES[name](), name), change)
    tiny = few_tokens(FAMILIES[name](), name)
    out, handle = run_with(tiny, change, order, "torch_sdpa")
    assert torch.equal(out, native)
    assert handle.report().components["transformer"].calls > 0
    # the hook outlives the installation
    assert torch.equal(tiny.run(3), native)
