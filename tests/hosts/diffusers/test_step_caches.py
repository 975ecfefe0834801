"""Step caches of diffusers and of cache-dit beside `install`: what the report counts, what is left behind, and how old a plan may be."""

from __future__ import annotations

import functools
import itertools
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import nn

import ditattn
import tiny_pipelines
from ditattn.hosts.diffusers.demo_model import find_demo_model
from ditattn.hosts.diffusers.install import self_attention_modules
from ditattn.hosts.diffusers.load import load_pipeline
from ditattn.models import family_of
from pairwise import covering, marks_beyond
from tiny_pipelines import TinyPipeline, few_tokens
from tiny_pipelines.footprint import footprint
from tiny_pipelines.wan import transformer

pytestmark = pytest.mark.usefixtures("one_thread")

SPARSE: dict[str, Any] = {"sparsity": 0.6, "skip_first_steps": 0, "min_tokens": 0}
STEPS = 4


@dataclass
class Cache:
    """A step cache: how it is switched on and off."""

    on: Callable[[TinyPipeline], None]
    off: Callable[[TinyPipeline], None]


def of_diffusers(make: Callable[[TinyPipeline], Any]) -> Cache:
    return Cache(lambda tiny: tiny.pipe.transformer.enable_cache(make(tiny)), lambda tiny: tiny.pipe.transformer.disable_cache())


def block_lists(tiny: TinyPipeline) -> tuple[str, ...]:
    return tuple(name for name, part in tiny.pipe.transformer.named_children() if isinstance(part, nn.ModuleList))


def first_block(_: TinyPipeline) -> Any:
    from diffusers import FirstBlockCacheConfig

    return FirstBlockCacheConfig(threshold=0.5)


def pyramid(tiny: TinyPipeline) -> Any:
    from diffusers import PyramidAttentionBroadcastConfig

    return PyramidAttentionBroadcastConfig(
        spatial_attention_block_skip_range=3,
        spatial_attention_timestep_skip_range=(-1, 2000),
        spatial_attention_block_identifiers=block_lists(tiny),
        current_timestep_callback=lambda: tiny.pipe.current_timestep,
    )


def faster(tiny: TinyPipeline) -> Any:
    from diffusers import FasterCacheConfig

    return FasterCacheConfig(
        spatial_attention_block_skip_range=2,
        spatial_attention_block_identifiers=block_lists(tiny),
        spatial_attention_timestep_skip_range=(-1, 990),
        unconditional_batch_skip_range=2,
        unconditional_batch_timestep_skip_range=(-1, 990),
        low_frequency_weight_update_timestep_range=(-1, 2000),
        high_frequency_weight_update_timestep_range=(-1, 2000),
        # Wan calls its denoiser once for each branch
        is_guidance_distilled=tiny.pipe.__class__.__name__ == "WanPipeline",
        current_timestep_callback=lambda: tiny.pipe.current_timestep,
        tensor_format="BCFHW" if tiny.pipe.__class__.__name__ == "WanPipeline" else "BFCHW",
    )


def mag(_: TinyPipeline) -> Any:
    from diffusers import MagCacheConfig

    return MagCacheConfig(num_inference_steps=STEPS, retention_ratio=0.2, mag_ratios=torch.ones(STEPS), threshold=0.5, max_skip_steps=2)


def taylor(_: TinyPipeline) -> Any:
    from diffusers import TaylorSeerCacheConfig

    # its default pattern ends in "attn", and these layers are called attn1
    return TaylorSeerCacheConfig(cache_interval=3, disable_cache_before_step=1, cache_identifiers=[r".*\.attn1"])


def of_cache_dit(**settings: Any) -> Cache:
    def on(tiny: TinyPipeline) -> None:
        import cache_dit

        config = cache_dit.DBCacheConfig(max_warmup_steps=1, residual_diff_threshold=10.0, **settings)
        cache_dit.enable_cache(tiny.pipe, cache_config=config)

    def off(tiny: TinyPipeline) -> None:
        import cache_dit

        cache_dit.disable_cache(tiny.pipe)

    return Cache(on, off)


CACHES = {
    "FirstBlockCache": of_diffusers(first_block),
    "PyramidAttentionBroadcast": of_diffusers(pyramid),
    "FasterCache": of_diffusers(faster),
    "MagCache": of_diffusers(mag),
    "TaylorSeer": of_diffusers(taylor),
    "cache-dit": of_cache_dit(Fn_compute_blocks=1, Bn_compute_blocks=0, max_continuous_cached_steps=2),
    "cache-dit, last block too": of_cache_dit(Fn_compute_blocks=1, Bn_compute_blocks=1),
}


def wan() -> TinyPipeline:
    """A call for each branch. Four layers, so that caches skip some that stand between others."""
    return few_tokens(tiny_pipelines.wan(transformer=transformer(num_layers=4)), "wan")


def cogvideox() -> TinyPipeline:
    """Both branches in one call, and attention that does not go through the dispatcher."""
    return few_tokens(tiny_pipelines.cogvideox(num_layers=4), "cogvideox")


def demo() -> TinyPipeline:
    """The model of the package."""
    pipe = load_pipeline(str(find_demo_model().path), dtype=torch.float32, device="cpu")
    return TinyPipeline(pipe, {"prompt": "a red circle", "height": 32, "width": 32, "num_frames": 3, "guidance_scale": 3.0})


MODELS = {"wan": wan, "cogvideox": cogvideox, "demo model": demo}
QUICK = ("wan", "cache-dit, last block too")
# of the class of "wan", but for its size and where its weights come from: with one cache of each package
SAME_CLASS, ITS_CACHES = "demo model", ("PyramidAttentionBroadcast", "cache-dit")


def marks_of(model: str, cache: str) -> list[Any]:
    return [
        *([] if (model, cache) == QUICK else [pytest.mark.slow]),
        *([pytest.mark.long] if model == SAME_CLASS and cache not in ITS_CACHES else []),
    ]


def every_pair_and(further: str, values: Iterable[Any]) -> Any:
    """Parameters of a test: the model, its cache, and one of the values. Two of the three meet in every way, all three under `long`."""
    possible = list(itertools.product(MODELS, CACHES, values))
    chosen = covering([one for one in possible if one[0] != SAME_CLASS or one[1] in ITS_CACHES])
    return pytest.mark.parametrize(
        ("build", "cache", further),
        [
            pytest.param(
                *(MODELS[model], CACHES[name], value),
                id=f"{model}, {name}, {value if isinstance(value, str) else ', '.join(value)}",
                marks=[*marks_of(model, name), *marks_beyond(chosen, (model, name, value))],
            )
            for model, name, value in possible
        ],
    )


every_pair = pytest.mark.parametrize(
    ("build", "cache"),
    [
        pytest.param(build, cache, id=f"{model}, {name}", marks=marks_of(model, name))
        for model, build in MODELS.items()
        for name, cache in CACHES.items()
    ],
)


@dataclass
class Calls:
    """What ran, by the word of the attention processors themselves: how often each layer in each step."""

    counts: Counter[tuple[int, int]] = field(default_factory=Counter)
    timesteps: list[float] = field(default_factory=list)

    def note(self, layer: int) -> None:
        self.counts[len(self.timesteps) - 1, layer] += 1

    def begin(self, _module: nn.Module, _args: Any, kwargs: dict[str, Any]) -> None:
        timestep = float(kwargs["timestep"].max())
        if not self.timesteps or self.timesteps[-1] != timestep:
            self.timesteps.append(timestep)

    def forget(self) -> None:
        self.counts, self.timesteps = Counter(), []


def watched(tiny: TinyPipeline) -> Calls:
    """Replace every self-attention processor of a pipeline by one that notes its calls."""
    calls = Calls()
    denoiser = tiny.pipe.transformer
    denoiser.register_forward_pre_hook(calls.begin, with_kwargs=True)
    family = family_of(denoiser)
    assert family is not None
    for layer, part in enumerate(self_attention_modules(denoiser, family).values()):
        part.processor = _noting(part.processor, functools.partial(calls.note, layer))
    return calls


def _noting(processor: Any, note: Callable[[], None]) -> Any:
    cls = type(processor)

    class Noting(cls):  # type: ignore[misc, valid-type]
        @functools.wraps(cls.__call__)
        def __call__(self, *args: Any, **kwargs: Any) -> Any:
            note()
            return super().__call__(*args, **kwargs)

    twin = Noting.__new__(Noting)
    vars(twin).update(vars(processor))
    return twin


def counted(handle: Any) -> dict[tuple[int | None, int | None], int]:
    return {key: cell.sparse + cell.dense for key, cell in handle._stage.models[0].log.cells.items()}


@functools.cache
def plain(build: Callable[[], TinyPipeline], num_steps: int) -> torch.Tensor:
    """What a model makes natively, without a cache."""
    return build().run(num_steps)


@pytest.mark.shows("step caches")
@every_pair_and("first", ["cache", "install"])
def test_steps_and_layers_are_those_that_ran(build: Callable[[], TinyPipeline], cache: Cache, first: str) -> None:
    """With a dense backend the cache decides what it decides natively; the result is the same, and so is every count."""
    alone = build()
    calls = watched(alone)
    cache.on(alone)
    native = alone.run(STEPS)
    # cache-dit changes the class of the pipeline
    cache.off(alone)
    assert not torch.equal(native, plain(build, STEPS)), "the cache skipped nothing"
    for backend, settings in (("torch_sdpa", {}), ("rain_fusion_attn", {**SPARSE, "skip_layers": "2", "skip_first_steps": 1})):
        tiny = build()
        seen = watched(tiny)
        if first == "cache":
            cache.on(tiny)
        with ditattn.install(tiny.pipe, backend, **settings) as handle:
            if first == "install":
                cache.on(tiny)
            out = tiny.run(STEPS)
        assert counted(handle) == seen.counts
        if settings:
            cells = handle._stage.models[0].log.cells
            assert {key for key, cell in cells.items() if cell.dense} == {key for key in cells if key[0] == 0 or key[1] == 2}
        else:
            assert torch.equal(out, native)
            assert seen.counts == calls.counts
        cache.off(tiny)


ORDERS = [
    ("cache on", "install", "cache off", "remove"),
    ("cache on", "install", "remove", "cache off"),
    ("install", "cache on", "cache off", "remove"),
    ("install", "cache on", "remove", "cache off"),
]


@functools.cache
def left_by(build: Callable[[], TinyPipeline], name: str) -> dict[str, Any]:
    """The footprint that a cache leaves behind without us: empty registries of hooks, attributes of cache-dit's."""
    alone = build()
    CACHES[name].on(alone)
    alone.run(1)
    CACHES[name].off(alone)
    return footprint(alone.pipe)


@functools.cache
def one_of_both(build: Callable[[], TinyPipeline], name: str | None) -> torch.Tensor:
    """What a model makes with the cache of this name and without us, or (None) with us and without a cache."""
    tiny = build()
    if name is None:
        with ditattn.install(tiny.pipe, "rain_fusion_attn", **SPARSE):
            return tiny.run(2)
    CACHES[name].on(tiny)
    made = tiny.run(2)
    CACHES[name].off(tiny)
    return made


@every_pair_and("order", ORDERS)
def test_nothing_is_left_behind(build: Callable[[], TinyPipeline], cache: Cache, order: tuple[str, ...]) -> None:
    """Whatever is switched on and off first, the model computes what it computed, to the bit, and holds nothing of ours; and when one of
    the two is off, what the other one alone computes."""
    name = next(name for name, one in CACHES.items() if one is cache)
    # made first: cache-dit changes the class of a pipeline, and so every other pipeline of that class
    remaining = one_of_both(build, name if order[2] == "remove" else None)
    tiny = build()
    handle: Any = None
    for what in order:
        if what == "install":
            handle = ditattn.install(tiny.pipe, "rain_fusion_attn", **SPARSE)
        elif what == "remove":
            handle.remove()
        else:
            {"cache on": cache.on, "cache off": cache.off}[what](tiny)
        if what == order[1]:
            assert not torch.equal(tiny.run(2), plain(build, 2))
        if what == order[2]:
            assert torch.equal(tiny.run(2), remaining)
    assert torch.equal(tiny.run(2), plain(build, 2))
    expected = left_by(build, name)
    left = footprint(tiny.pipe)
    for path, part in left.items():
        if path != "dispatcher":
            assert part["attributes"] == expected[path]["attributes"], path
            assert part["hooks"] == expected[path]["hooks"], path
            assert bool(part["processor attributes"]) == bool(expected[path]["processor attributes"]), path
    assert left["dispatcher"] == expected["dispatcher"]


REFRESH = 2


@dataclass
class PlansInUse:
    """A probe: in which steps each plan of each layer served."""

    steps: dict[int, list[tuple[int, int | None]]] = field(default_factory=dict)
    plans: list[Any] = field(default_factory=list)

    def look(self, forward: Any, layer: int | None, *_: Any) -> None:
        (record,) = forward.records
        if record.plan is not None:
            # held, so that no other plan gets its identity
            self.plans.append(record.plan)
            self.steps.setdefault(id(record.plan), []).append((forward.step.index, layer))


@every_pair
def test_a_reused_plan_is_no_older_than_it_says(build: Callable[[], TinyPipeline], cache: Cache) -> None:
    """Steps in which a cache skips a layer count: its plan ages by the steps of the run, not by the calls of the layer."""
    tiny = build()
    cache.on(tiny)
    probe = PlansInUse()
    with ditattn.install(tiny.pipe, "rain_fusion_attn", plan_refresh_steps=REFRESH, **SPARSE) as handle:
        handle.watch(probe)
        tiny.run(STEPS)
        report = handle.report().components["transformer"]
    cache.off(tiny)
    assert report.sparse == len(probe.plans) > 0
    for served in probe.steps.values():
        assert max(step for step, _ in served) - min(step for step, _ in served) < REFRESH
        assert len({layer for _, layer in served}) == 1


def test_a_branch_that_a_cache_leaves_out_lends_its_plan_to_no_other() -> None:
    """Mochi makes a call for each sample; FasterCache leaves out the first of two, below the root, so the second is then the only one."""
    from diffusers import FasterCacheConfig

    tiny = tiny_pipelines.mochi()
    prompts = tiny.arguments["encoder_attention_mask"]
    # texts of one length: nothing but their place tells the samples apart
    prompts[:] = prompts[0]
    calls = watched(tiny)
    tiny.pipe.transformer.enable_cache(
        FasterCacheConfig(
            unconditional_batch_skip_range=2,
            unconditional_batch_timestep_skip_range=(-1, 2000),
            spatial_attention_block_skip_range=1,
            spatial_attention_block_identifiers=("transformer_blocks",),
            low_frequency_weight_update_timestep_range=(-1, 2000),
            high_frequency_weight_update_timestep_range=(-1, 2000),
            current_timestep_callback=lambda: 500,
            tensor_format="BCFHW",
        )
    )
    probe = PlansInUse()
    with ditattn.install(tiny.pipe, "rain_fusion_attn", plan_refresh_steps=4, **SPARSE) as handle:
        handle.watch(probe)
        tiny.run(4)
    counts = Counter(place for served in probe.steps.values() for place in served)
    assert {step: counts[step, 1] for step in range(4)} == {0: 2, 1: 1, 2: 2, 3: 1}
    assert calls.counts.total() == 4 * 2
    for served in probe.steps.values():
        steps = {step for step, _ in served}
        assert steps <= {0, 2} or len(steps) == 1, "a plan of the left-out branch, or of nobody knows which, served again"
