"""DenoisingStage without a host: masks, metadata, layers, strictness, threads."""

from __future__ import annotations

import contextlib
import logging
import threading
from collections.abc import Iterator
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from ditattn.backends.base import AttentionBackend
from ditattn.backends.registry import load_backend
from ditattn.errors import ConfigError, DenseInStrictMode, UnsupportedCall
from ditattn.models import ModelFamily, TokenLayout
from ditattn.ops import block_sparse_attention, dense_attention
from ditattn.ops.calls import DenseCall, SparseCall
from ditattn.ops.contract import call_facts
from ditattn.ops.table import choose
from ditattn.plan.token_grids import TokenGrid
from ditattn.runtime import attend as attend_op
from ditattn.runtime import key_padding
from ditattn.runtime.attend import attend
from ditattn.runtime.forward import Forward, running
from ditattn.runtime.metadata import check_layers
from ditattn.runtime.report import ComponentReport
from ditattn.runtime.served_model import ServedModel
from ditattn.runtime.stage import DenoisingStage
from ditattn.runtime.step import StepClock

FRAMES, ROWS, COLUMNS = 3, 16, 16
TEXT = 40
LENGTH = FRAMES * ROWS * COLUMNS + TEXT
SPARSE = {"sparsity": 0.5, "skip_first_steps": 0, "min_tokens": 0}


def _layout(config: Any, arguments: Any) -> TokenLayout:
    return TokenLayout(tuple(arguments["latents"].shape), (1, 2, 2), num_suffix_tokens=TEXT)


FAMILY = ModelFamily("Test", ("TestTransformer",), _layout, r"blocks\.\d+\.attn")
ARGUMENTS = {"latents": torch.empty(1, 4, FRAMES, 2 * ROWS, 2 * COLUMNS), "timestep": 900}


def backend_class(name: str) -> type[AttentionBackend]:
    return load_backend(name)


def served(backend: str = "rain_fusion_attn", num_layers: int = 2, **config: Any) -> ServedModel:
    cls = backend_class(backend)
    values = cls.get_config_cls().from_mapping({**(SPARSE if cls.is_sparse else {}), **config})
    return ServedModel("transformer", FAMILY, None, cls, values, [f"blocks.{i}.attn" for i in range(num_layers)])


def stage_of(model: ServedModel, strict: bool = False) -> DenoisingStage:
    stage = DenoisingStage(StepClock(), strict)
    stage.models.append(model)
    return stage


@contextlib.contextmanager
def forward_of(stage: DenoisingStage, **arguments: Any) -> Iterator[Forward]:
    forward = stage.enter(stage.models[0], {**ARGUMENTS, **arguments})
    try:
        yield forward
    finally:
        stage.leave(forward)


def report_of(stage: DenoisingStage) -> ComponentReport:
    return stage.report().components["transformer"]


def qkv(batch: int = 1, length: int = LENGTH) -> list[Tensor]:
    generator = torch.Generator().manual_seed(5)
    return [torch.randn(batch, length, 2, 32, generator=generator) for _ in range(3)]


def dense(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    return scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, v)), attn_mask=mask).transpose(1, 2)


def first(*counts: int) -> Tensor:
    """bool [B, S]: so many leading keys of every sample are real."""
    return torch.arange(LENGTH) < torch.tensor(counts).unsqueeze(1)


# masks


@pytest.mark.parametrize("form", ["two axes", "four axes", "one for all", "expanded"])
def test_padding_at_the_end_runs_sparse_and_hides_the_padded_keys(form: str) -> None:
    q, k, v = qkv(2)
    mask = first(LENGTH - 15, LENGTH - 15) if form == "one for all" else first(LENGTH, LENGTH - 15)
    forms = {"two axes": mask, "four axes": mask[:, None, None], "one for all": mask[:1, None, None]}
    # over heads and queries, as a model may do before it calls
    given = {**forms, "expanded": mask[:, None, None].expand(-1, 2, LENGTH, -1)}[form]
    # nothing is dropped at 1 % of 7 blocks, so that the sparse kernel must agree with dense attention
    stage = stage_of(served(sparsity=0.01))
    with forward_of(stage):
        out = attend(q, k, v, given)
    torch.testing.assert_close(out, dense(q, k, v, mask[:, None, None]), rtol=0, atol=1e-5)
    assert (report_of(stage).sparse, report_of(stage).dense) == (1, 0)
    k[1, -15:], v[1, -15:] = 9.0, 9.0
    with forward_of(stage):
        assert torch.equal(attend(q, k, v, given)[1], out[1])


def test_a_mask_that_hides_nothing_changes_nothing() -> None:
    q, k, v = qkv()
    stage = stage_of(served())
    with forward_of(stage):
        assert torch.equal(attend(q, k, v, first(LENGTH)), attend(q, k, v))
    assert report_of(stage).sparse == 2


def _gaps() -> Tensor:
    mask = first(LENGTH)
    mask[:, 30:50] = False
    return mask[:, None, None]


@pytest.mark.parametrize(
    ("mask", "reason"),
    [
        (_gaps(), "mask with gaps"),
        (~first(20)[:, None, None], "mask with gaps"),
        (torch.linspace(-4, 0, LENGTH).expand(1, 1, 1, LENGTH), "mask that is not key padding"),
        (torch.ones(1, 1, LENGTH, LENGTH, dtype=torch.bool).tril(), "mask that is not key padding"),
    ],
    ids=["gaps", "padding in front", "additive", "a row per query"],
)
def test_other_masks_run_densely_and_exactly_with_the_reason(mask: Tensor, reason: str) -> None:
    q, k, v = qkv()
    stage = stage_of(served())
    with forward_of(stage):
        out = attend(q, k, v, mask)
    torch.testing.assert_close(out, dense(q, k, v, mask), rtol=0, atol=1e-5)
    assert report_of(stage).dense_reasons == {reason: 1}
    with pytest.raises(DenseInStrictMode, match=f"rain_fusion_attn on transformer would run densely in step 0: {reason}"):
        attend_once(stage_of(served(), strict=True), q, k, v, mask)


# text before the video


def text_first(backend: str = "rain_fusion_attn", **config: Any) -> ServedModel:
    model = served(backend, **config)
    model.family = replace(
        FAMILY,
        layout=lambda config, arguments: TokenLayout(tuple(arguments["latents"].shape), (1, 2, 2), num_prefix_tokens=TEXT),
        key_mask=lambda config, arguments: arguments.get("keep"),
    )
    return model


def hidden_text(*counts: int) -> Tensor:
    """bool [B, S]: so many tokens of the text are real, and all of the video."""
    place = torch.arange(LENGTH)
    return (place < torch.tensor(counts).unsqueeze(1)) | (place >= TEXT)


@pytest.mark.parametrize(
    ("backend", "order"),
    [
        ("rain_fusion_attn", "tile"),
        ("rain_fusion_attn", "raster"),
        ("block_sparse_attn", "raster"),
        ("permuted_sparse_attn", "bricks"),
    ],
)
def test_padding_of_a_text_before_the_video_runs_sparse_and_hides_the_padded_keys(backend: str, order: str) -> None:
    q, k, v = qkv(2)
    mask = hidden_text(TEXT, 9)
    stage = stage_of(text_first(backend, sparsity=1e-4, token_order=order), strict=True)
    with forward_of(stage):
        out = attend(q, k, v, mask)
    torch.testing.assert_close(out, dense(q, k, v, mask[:, None, None]), rtol=0, atol=1e-5)
    assert (report_of(stage).sparse, report_of(stage).dense) == (1, 0)
    k[1, 9:TEXT], v[1, 9:TEXT] = 9.0, 9.0
    with forward_of(stage):
        assert torch.equal(attend(q, k, v, mask)[1], out[1])


def test_the_real_text_before_the_video_is_kept_whole() -> None:
    q, k, v = qkv()
    stage = stage_of(text_first(sparsity=0.9, first_frame_sink=False))
    with forward_of(stage):
        out = attend(q, k, v, hidden_text(9))
        k[:, :9] += 1
        moved = (attend(q, k, v, hidden_text(9)) - out).abs().amax((0, 2, 3))
    # every query of the video looks at every real text token
    assert bool((moved[TEXT:] > 1e-6).all())


def test_a_square_mask_is_read_by_what_the_family_knows_of_it() -> None:
    q, k, v = qkv()
    keep = hidden_text(9)
    square = keep[:, None, :, None] & keep[:, None, None, :]
    stage = stage_of(text_first(sparsity=0.01))
    with forward_of(stage, keep=keep):
        out = attend(q, k, v, square)
    assert report_of(stage).sparse == 1
    torch.testing.assert_close(out[keep], dense(q, k, v, square)[keep], rtol=0, atol=1e-5)
    stage = stage_of(text_first(sparsity=0.01))
    with forward_of(stage):
        attend(q, k, v, square)
    assert report_of(stage).dense_reasons == {"mask that is not key padding": 1}


@pytest.mark.parametrize(
    ("backend", "config", "reason"),
    [
        ("rain_fusion_attn", {"skip_first_steps": 1}, "first steps"),
        ("rain_fusion_attn", {"skip_layers": "0"}, "skipped layer"),
        ("torch_sdpa", {}, "mask with gaps"),
    ],
)
def test_dense_calls_with_padding_before_the_video_are_torchs_own(backend: str, config: dict[str, Any], reason: str) -> None:
    q, k, v = qkv()
    mask = hidden_text(9)
    stage = stage_of(text_first(backend, **config))
    with forward_of(stage):
        assert torch.equal(attend(q, k, v, mask), dense(q, k, v, mask[:, None, None]))
    assert report_of(stage).dense_reasons == {reason: 1}


def test_a_mask_that_hides_video_tokens_runs_densely() -> None:
    q, k, v = qkv()
    mask = hidden_text(9)
    mask[:, TEXT + 100] = False
    stage = stage_of(text_first())
    with forward_of(stage):
        attend(q, k, v, mask)
    assert report_of(stage).dense_reasons == {"mask with gaps": 1}


def test_further_grids_move_with_the_video_and_the_text_goes_behind_them() -> None:
    further = TokenGrid(TEXT + FRAMES * ROWS * COLUMNS, (1, ROWS, COLUMNS))
    model = text_first(sparsity=0.01)
    model.family = replace(
        model.family,
        layout=lambda config, arguments: TokenLayout(
            tuple(arguments["latents"].shape), (1, 2, 2), TEXT, further.num_tokens, further_grids=(further,)
        ),
    )
    q, k, v = qkv(2, further.stop)
    place = torch.arange(further.stop)
    mask = (place < torch.tensor([[TEXT], [9]])) | (place >= TEXT)
    stage = stage_of(model, strict=True)
    with forward_of(stage) as forward:
        out = attend(q, k, v, mask)
        moved = forward.masks.video_first(mask, k, forward.metadata)
    torch.testing.assert_close(out, dense(q, k, v, mask[:, None, None]), rtol=0, atol=1e-5)
    assert report_of(stage).sparse == 1
    assert (moved.metadata.num_prefix_tokens, moved.metadata.num_suffix_tokens) == (0, further.num_tokens + TEXT)
    assert moved.metadata.further_grids == (TokenGrid(further.start - TEXT, further.size),)
    assert moved.places[1].tolist() == [*range(TEXT, further.stop), *range(TEXT)]


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("backend", ["rain_fusion_attn", "block_sparse_attn", "permuted_sparse_attn"])
def test_queries_of_the_video_alone_run_sparse_with_the_keys_of_the_text(backend: str, masked: bool) -> None:
    model = text_first(backend, sparsity=1e-4)
    model.family = replace(model.family, text_is_keys_only=True)
    q, k, v = qkv()
    q, mask = q[:, TEXT:], hidden_text(9) if masked else None
    stage = stage_of(model, strict=True)
    with forward_of(stage):
        out = attend(q, k, v, mask)
    torch.testing.assert_close(out, dense(q, k, v, None if mask is None else mask[:, None, None]), rtol=0, atol=1e-5)
    assert (report_of(stage).sparse, report_of(stage).dense) == (1, 0)
    # other lengths are cross-attention, which strictness is not about
    with forward_of(stage):
        attend(q[:, 1:], k, v)
    assert report_of(stage).dense_reasons == {"query and key lengths differ": 1}


def test_layers_of_the_video_alone_have_no_text() -> None:
    model = served()
    model.family = replace(FAMILY, image_only=r"blocks\.0\.attn")
    model = ServedModel(model.name, model.family, None, model.backend, model.config, model.layers)
    stage = stage_of(model, strict=True)
    q, k, v = qkv()
    with forward_of(stage) as forward:
        for layer, length in ((0, LENGTH - TEXT), (1, LENGTH)):
            forward.layer = layer
            attend(*(x[:, :length] for x in (q, k, v)))
        forward.layer = 0
        with pytest.raises(DenseInStrictMode, match="token count does not match the grid"):
            attend(q, k, v)
    assert report_of(stage).sparse == 2


def with_family(model: ServedModel, **facts: Any) -> DenoisingStage:
    model.family = replace(model.family, **facts)
    return stage_of(model)


# calls that differ within a forward


def test_the_tokens_behind_the_video_may_differ_from_call_to_call() -> None:
    stage = with_family(served(), suffix_varies=True)
    with forward_of(stage) as forward:
        for length in (LENGTH - TEXT, LENGTH, LENGTH + 500):
            assert attend(*qkv(length=length)).shape[1] == length
        attend(*qkv(length=LENGTH - TEXT - 1))
    assert report_of(stage).sparse == 3
    assert report_of(stage).dense_reasons == {"token count does not match the grid": 1}
    assert forward.metadata.num_suffix_tokens == TEXT


def test_without_that_another_number_of_tokens_runs_densely() -> None:
    stage = stage_of(served())
    with forward_of(stage):
        attend(*qkv(length=LENGTH + 1))
    assert report_of(stage).dense_reasons == {"token count does not match the grid": 1}


def test_a_call_for_each_sample_counts_as_one_layer() -> None:
    stage = with_family(served(skip_layers="1"), call_per_sample=True)
    with forward_of(stage, latents=torch.empty(2, 4, FRAMES, 2 * ROWS, 2 * COLUMNS)):
        for _ in range(4):
            attend(*qkv())
    assert report_of(stage).dense_reasons == {"skipped layer": 2}
    densities = report_of(stage).sparse_density_by_layer
    assert [layer for layer, density in densities.items() if density is not None] == [0]


def test_each_sample_has_a_plan_of_its_own() -> None:
    stage = with_family(served(plan_refresh_steps=3), call_per_sample=True)
    records = []
    for timestep in (900, 600):
        with forward_of(stage, latents=torch.empty(2, 4, FRAMES, 2 * ROWS, 2 * COLUMNS), timestep=timestep):
            records += [attend(*(part + shift for part in qkv())) for shift in (0.0, 1.0, 0.0, 1.0)]
    assert report_of(stage).reused_plans == 4
    for before, after in zip(records[:4], records[4:], strict=True):
        assert torch.equal(before, after)


def attend_once(stage: DenoisingStage, *arguments: Any) -> Tensor:
    with forward_of(stage):
        return attend(*arguments)


def test_the_mask_of_a_forward_is_read_once(monkeypatch: pytest.MonkeyPatch) -> None:
    reads = []
    read = key_padding._read
    monkeypatch.setattr(key_padding, "_read", lambda *arguments: reads.append(1) or read(*arguments))
    q, k, v = qkv()
    mask, stage = first(LENGTH - 15)[:, None, None], stage_of(served(num_layers=3))
    for _ in range(2):
        with forward_of(stage):
            for _ in range(3):
                attend(q, k, v, mask)
    assert len(reads) == 2


@pytest.mark.parametrize(("arguments", "problem"), [({"dropout_p": 0.1}, "dropout"), ({"attn_mask": object()}, "must be a tensor")])
def test_what_cannot_be_honoured_is_refused(arguments: dict[str, Any], problem: str) -> None:
    with forward_of(stage_of(served())), pytest.raises(UnsupportedCall, match=problem):
        attend(*qkv(), **arguments)


# metadata


def test_metadata_is_built_once_per_step_and_shared() -> None:
    model = served()
    stage, built = stage_of(model), []
    build = model.builder.build
    model.builder = SimpleNamespace(build=lambda **facts: built.append(facts) or build(**facts))  # type: ignore[assignment]
    seen = []
    for timestep in (900, 900, 600, 600):
        with forward_of(stage, timestep=timestep) as forward:
            seen.append(forward.metadata)
    assert seen[0] is seen[1]
    assert seen[2] is seen[3]
    assert [facts["current_timestep"] for facts in built] == [0, 1]
    assert built[0]["raw_latent_shape"] == (1, 4, FRAMES, 2 * ROWS, 2 * COLUMNS)
    assert seen[0].latent_shape == (FRAMES, ROWS, COLUMNS)
    assert (seen[0].num_prefix_tokens, seen[0].num_suffix_tokens) == (0, TEXT)


def test_metadata_follows_the_tokens_of_a_branch() -> None:
    stage = stage_of(served())
    grids = []
    for latents in (ARGUMENTS["latents"], torch.empty(1, 4, 1, 64, 64), ARGUMENTS["latents"]):
        with forward_of(stage, latents=latents) as forward:
            grids.append(forward.metadata.latent_shape)
    assert grids == [(3, 16, 16), (1, 32, 32), (3, 16, 16)]


def test_shares_of_steps_become_numbers() -> None:
    model = served(skip_first_steps="30%", skip_last_steps="10%", skip_layers="0-1")
    stage = DenoisingStage(StepClock(lambda: SimpleNamespace(timesteps=range(7))))
    stage.models.append(model)
    with forward_of(stage) as forward:
        metadata = forward.metadata
    assert (metadata.num_steps, metadata.skip_first_steps, metadata.skip_last_steps) == (7, 3, 1)
    assert metadata.skip_layers == {0, 1}


@pytest.mark.parametrize("latents", [None, torch.empty(3), torch.empty(1, 4, 3, 32, 1)])
def test_arguments_of_an_unknown_form_run_densely_with_the_reason(latents: Any) -> None:
    q, k, v = qkv()
    stage = stage_of(served())
    with forward_of(stage, latents=latents):
        out = attend(q, k, v)
    torch.testing.assert_close(out, dense(q, k, v), rtol=0, atol=1e-5)
    assert report_of(stage).dense_reasons == {"unknown geometry": 1}
    with pytest.raises(DenseInStrictMode, match="unknown geometry"), forward_of(stage_of(served(), strict=True), latents=latents):
        attend(q, k, v)


@pytest.mark.parametrize(
    ("lengths", "reason"), [((LENGTH - 1,) * 2, "token count does not match the grid"), ((LENGTH, 77), "query and key lengths differ")]
)
def test_calls_that_do_not_fit_the_grid_run_densely(lengths: tuple[int, int], reason: str) -> None:
    q, (_, k, v) = qkv(length=lengths[0])[0], qkv(length=lengths[1])
    stage = stage_of(served())
    with forward_of(stage):
        out = attend(q, k, v)
    torch.testing.assert_close(out, dense(q, k, v), rtol=0, atol=1e-5)
    assert report_of(stage).dense_reasons == {reason: 1}


def test_strict_accepts_what_was_asked_for() -> None:
    stage = stage_of(served(skip_first_steps=1, skip_layers="1"), strict=True)
    q, k, v = qkv()
    for timestep in (900, 600):
        with forward_of(stage, timestep=timestep):
            attend(q, k, v)
            attend(q, k, v)
    assert report_of(stage).dense_reasons == {"first steps": 2, "skipped layer": 1}
    assert report_of(stage).sparse == 1


# layers


def test_layers_are_counted_where_no_hook_names_them() -> None:
    stage = stage_of(served(num_layers=3, skip_layers="1"))
    q, k, v = qkv()
    with forward_of(stage):
        for _ in range(3):
            attend(q, k, v)
    assert {layer: density is None for layer, density in report_of(stage).sparse_density_by_layer.items()} == {0: False, 1: True, 2: False}


def test_a_named_layer_counts_whatever_was_called_before() -> None:
    # block caches skip whole blocks
    stage = stage_of(served(num_layers=3, skip_layers="2"))
    with forward_of(stage) as forward:
        forward.layer = 2
        attend(*qkv())
    assert report_of(stage).dense_reasons == {"skipped layer": 1}


def test_without_counting_a_call_outside_the_layers_is_not_self_attention() -> None:
    model = served()
    model.layers_by_count = False
    stage = stage_of(model)
    q, k, v = qkv()
    with forward_of(stage):
        torch.testing.assert_close(attend(q, k, v), dense(q, k, v), rtol=0, atol=1e-5)
    assert report_of(stage).dense_reasons == {"not self-attention of the denoiser": 1}


def test_layers_that_do_not_exist_are_refused() -> None:
    config = served(skip_layers="0,7-8").config
    with pytest.raises(ConfigError, match="skip_layers names 7, 8, but transformer has self-attention layers 0-1"):
        check_layers(config, 2, "transformer")
    check_layers(config, 9, "transformer")
    check_layers(served("fa").config, 0, "transformer")
    with pytest.raises(ConfigError, match=r"skip_layers names 2, 3, \.\.\., 99, but"):
        check_layers(served(skip_layers="0-99").config, 2, "transformer")


def test_orders_of_layers_that_do_not_exist_are_refused() -> None:
    config = served("permuted_sparse_attn", head_bricks=["2x8x8", "", "2x8x8"]).config
    with pytest.raises(ConfigError, match="head_bricks names 2, but transformer has self-attention layers 0-1"):
        check_layers(config, 2, "transformer")
    check_layers(config, 3, "transformer")


# forwards


def test_there_is_no_forward_before_and_after() -> None:
    stage = stage_of(served())
    assert running() is None
    with contextlib.suppress(ZeroDivisionError), forward_of(stage) as forward:
        assert running() is forward
        raise ZeroDivisionError
    assert running() is None


def test_forwards_nest() -> None:
    outer, inner = stage_of(served()), stage_of(served())
    with forward_of(outer) as first_forward:
        with forward_of(inner) as second_forward:
            assert running() is second_forward
        assert running() is first_forward


def test_a_forward_that_was_never_left_is_forgotten_and_its_run_too() -> None:
    stage = stage_of(served())
    stage.enter(stage.models[0], ARGUMENTS)
    with forward_of(stage, timestep=600) as forward:
        assert forward.step.index == 0
    assert running() is None


def test_a_call_outside_every_forward_is_dense_and_warns_once(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attend_op._local, "warned_stray", False, raising=False)
    q, k, v = qkv()
    mask = first(LENGTH - 15)
    with caplog.at_level(logging.WARNING, logger="ditattn"):
        for _ in range(2):
            torch.testing.assert_close(attend(q, k, v, mask), dense(q, k, v, mask[:, None, None]), rtol=0, atol=1e-5)
    assert caplog.text.count("outside a denoiser's forward") == 1


def test_a_call_that_failed_and_is_made_again_counts_once() -> None:
    stage = stage_of(served(skip_first_steps=1))
    query, key, value = qkv()

    def full(*_: Any) -> Tensor:
        raise torch.OutOfMemoryError

    with forward_of(stage) as forward:
        forward.layer, forward.native = 0, full
        with pytest.raises(torch.OutOfMemoryError):
            attend(query, key, value, torch.randn(LENGTH, LENGTH))
        forward.native = lambda: torch.zeros_like(query)
        attend(query, key, value, torch.randn(LENGTH, LENGTH))
    assert report_of(stage).calls == 1


def test_threads_have_their_own_forwards() -> None:
    together = threading.Barrier(2)
    stages = [stage_of(served(skip_first_steps=steps)) for steps in (0, 1)]
    inputs = qkv()

    def run(stage: DenoisingStage) -> None:
        for timestep in (900, 600):
            with forward_of(stage, timestep=timestep) as forward:
                together.wait(30)
                assert running() is forward
                attend(*inputs)
                together.wait(30)

    threads = [threading.Thread(target=run, args=(stage,)) for stage in stages]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [report_of(stage).dense_reasons for stage in stages] == [{}, {"first steps": 1}]
    assert [report_of(stage).sparse for stage in stages] == [2, 1]


def test_the_report_tells_which_implementations_served() -> None:
    for name, ops in (("rain_fusion_attn", {"block_sparse_attention", "dense_attention"}), ("torch_sdpa", {"dense_attention"})):
        stage = stage_of(served(name))
        with forward_of(stage):
            attend(*qkv())
        assert set(report_of(stage).implementations) == ops
        query, key, _ = qkv()
        best = choose(dense_attention.TABLE, call_facts(query, key)).name
        assert report_of(stage).implementations["dense_attention"] == ("torch" if name == "torch_sdpa" else best)


# the choice of implementations


@pytest.mark.parametrize("backend", ["torch_sdpa", "laser_attn", "rain_fusion_attn"])
def test_implementations_are_chosen_once_per_layer_and_kind_of_call(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []
    for cls in (DenseCall, SparseCall):
        original = cls.facts
        monkeypatch.setattr(cls, "facts", lambda self, original=original: asked.append(1) or original(self))
    stage = stage_of(served(backend))
    counts = []
    for length in (LENGTH, LENGTH, LENGTH - 40, LENGTH, LENGTH - 40):
        with forward_of(stage):
            attend(*qkv(length=length))
            attend(*qkv(length=length))
        counts.append(len(asked))
    assert counts[0] > 0
    assert counts[1] == counts[0], "the second step meets no new kind of call"
    assert counts[0] < counts[2] == counts[3] == counts[4], "another length is another kind, and both are kept"


def test_inside_the_stages_operation_no_other_one_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    q, k, v = qkv()
    expected = dense(q, k, v)
    for op in (dense_attention, block_sparse_attention):
        monkeypatch.setattr(op, "_op", lambda *_: pytest.fail("an operation inside an operation"))
    stage = stage_of(served(skip_layers="1"))
    with forward_of(stage) as forward:
        for layer in (0, 1, None):
            forward.layer = layer
            forward.model.layers_by_count = False
            out = attend(q, k, v)
    torch.testing.assert_close(out, expected, rtol=0, atol=1e-5)
    assert report_of(stage).sparse == 1
    assert report_of(stage).dense_reasons == {"skipped layer": 1, "not self-attention of the denoiser": 1}


@pytest.mark.parametrize("layer", [0, None])
def test_autocast_casts_before_the_call_and_changes_nothing_inside(layer: int | None) -> None:
    results = []
    for enabled in (False, True):
        given = qkv() if enabled else tuple(x.bfloat16() for x in qkv())
        stage = stage_of(served())
        stage.models[0].layers_by_count = False
        with forward_of(stage) as forward, torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
            forward.layer = layer
            results.append(attend(*given))
    assert results[0].dtype == torch.bfloat16
    assert torch.equal(*results)


@pytest.mark.parametrize("layer", [0, None])
@pytest.mark.parametrize(
    ("change", "text"),
    [
        (lambda q, k, v: (q[0], k, v), r"must be \[B, S, H, D\]"),
        (lambda q, k, v: (q, k, v[:, 1:]), "must have the same shape"),
        (lambda q, k, v: (q, k.double(), v), "must share a dtype"),
    ],
)
def test_tensors_that_do_not_fit_are_refused_every_time(layer: int | None, change: Any, text: str) -> None:
    stage = stage_of(served("torch_sdpa"))
    stage.models[0].layers_by_count = False
    for _ in range(2):
        with forward_of(stage) as forward:
            forward.layer = layer
            with pytest.raises(UnsupportedCall, match=text):
                attend(*change(*qkv()))
