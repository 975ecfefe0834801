"""sglang's own Wan transformer, whole, in a denoising stage of sglang's: dense as its SDPA, and really sparse where that is asked for."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from functools import cache
from typing import Any

import pytest
import torch
from sglang.multimodal_gen.runtime.platforms import AttentionBackendEnum
from torch import Tensor

from ditattn.hosts.sglang.serving import serving
from hosts.sglang.server import LATENTS, STEPS, forward_of, request
from hosts.sglang.tiny_wan import CALLS, LAYERS, TEXT, denoised, reference_norms, tiny_wan

Serve = Callable[..., Any]
NOW = {"skip_first_steps": 1, "min_tokens": 0}


@pytest.fixture(autouse=True)
def _reference_norms() -> Iterator[None]:
    with reference_norms():
        yield


@pytest.fixture
def native(serve: Serve) -> Tensor:
    """By sglang's SDPA, made once."""
    return _native(serve)


@cache
def _native(serve: Serve) -> Tensor:
    return denoised(serve("torch_sdpa"))


def test_every_self_attention_layer_is_ours_and_no_other(serve: Serve) -> None:
    serve("rain_fusion_attn")
    found = {
        name: module.backend
        for name, module in tiny_wan().named_modules()
        if isinstance(getattr(module, "backend", None), AttentionBackendEnum)
    }
    ours = [name for name, backend in found.items() if backend is AttentionBackendEnum.RAIN_FUSION_ATTN]
    assert ours == [f"blocks.{number}.attn1" for number in range(LAYERS)]
    assert {found[name] for name in found.keys() - set(ours)} == {AttentionBackendEnum.TORCH_SDPA}
    assert serving().stage.models[0].layers == ours


@pytest.mark.parametrize(
    ("name", "config"),
    [
        ("laser_attn", {}),
        ("rain_fusion_attn", {"sparsity": 0}),
        ("block_sparse_attn", {"skip_layers": "0-2"}),
        ("rain_fusion_attn", {"skip_first_steps": 4}),
    ],
)
def test_dense_is_sglangs_own(serve: Serve, native: Tensor, name: str, config: dict[str, Any]) -> None:
    keys = {} if name == "laser_attn" else {"min_tokens": 0, "sparsity": 0.75, **config}
    torch.testing.assert_close(denoised(serve(name, **keys)), native, atol=1e-4, rtol=1e-4)
    report = serving().last_report.components["transformer"]
    assert (report.backend, report.sparse, report.dense) == (name, 0, CALLS)


@pytest.mark.parametrize(
    ("name", "backend"), [("rain_fusion_attn", None), ("block_sparse_attn", None), ("rain_fusion_attn", "permuted_sparse_attn")]
)
def test_sparse_really_is(serve: Serve, native: Tensor, name: str, backend: str | None) -> None:
    config = {"sparsity": 0.75, **NOW, **({"backend": backend} if backend else {})}
    out = denoised(serve(name, **config))
    assert out.isfinite().all()
    assert (out - native).abs().max() > 1e-3
    report = serving().last_report.components["transformer"]
    assert (report.backend, report.calls, report.dense_reasons) == (backend or name, CALLS, {"first steps": 2 * LAYERS})
    assert report.sparse == CALLS - 2 * LAYERS
    assert report.sparse_density < 0.8
    assert report.step_sources == {"sglang": 2 * STEPS}
    assert (report.steps_run, report.schedule_steps) == (STEPS, STEPS)
    assert report.token_grids == {"4x16x24": 2 * STEPS}
    assert [density is None for density in report.sparse_density_by_step.values()] == [True, False, False, False]
    assert list(report.sparse_density_by_layer) == list(range(LAYERS))


def test_a_report_ends_every_denoising_stage_but_those_of_a_warm_up(serve: Serve, caplog: pytest.LogCaptureFixture) -> None:
    server_args = serve("rain_fusion_attn", sparsity=0.75, **NOW)
    with caplog.at_level(logging.INFO, logger="sglang.multimodal_gen.ditattn"):
        denoised(server_args, is_warmup=True)
        assert not caplog.records
        denoised(server_args)
        denoised(server_args)
    messages = [record.getMessage() for record in caplog.records]
    assert len(messages) == 2
    for message in messages:
        assert message.startswith(f"attention (transformer): rain_fusion_attn: {CALLS - 2 * LAYERS} sparse at density 0.")
        assert f"{2 * LAYERS} dense (first steps: {2 * LAYERS})" in message


def test_a_stage_that_fails_leaves_nothing_behind(serve: Serve) -> None:
    server_args = serve("rain_fusion_attn", sparsity=0.75, **NOW)
    with pytest.raises(AttributeError):
        denoised(server_args, latents=None)
    denoised(server_args)
    assert serving().last_report.components["transformer"].calls == CALLS


def test_runs_that_are_dense_for_the_most_part_end_with_a_warning(serve: Serve, caplog: pytest.LogCaptureFixture) -> None:
    denoised(serve("rain_fusion_attn", min_tokens=0))
    # said when the first branch of the last step ends
    assert f"none of the {CALLS - LAYERS} self-attention calls of this run were sparse" in caplog.text
    assert "skip_first_steps=10" in caplog.text


def test_half_precision(serve: Serve) -> None:
    """As on a GPU: weights and latents in bfloat16."""
    server_args = serve("rain_fusion_attn", sparsity=0.75, **NOW)
    model = tiny_wan().to(torch.bfloat16)
    batch = request()
    outs = []
    for step in (0, 1):
        with forward_of(step, batch, server_args):
            outs.append(
                model(torch.ones(LATENTS, dtype=torch.bfloat16), [torch.ones(1, 7, TEXT, dtype=torch.bfloat16)], torch.tensor([500.0]))
            )
    assert outs[0].dtype == torch.bfloat16
    report = serving().end_of_stage().components["transformer"]
    assert (report.sparse, report.dense) == (LAYERS, LAYERS)
