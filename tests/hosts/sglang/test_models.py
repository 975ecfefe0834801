"""Models of sglang beside Wan: where their sequences have text, and that their self-attention is sparse."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from sglang.multimodal_gen.runtime.disaggregation.roles import RoleType
from sglang.multimodal_gen.runtime.managers.forward_context import set_forward_context
from sglang.multimodal_gen.runtime.pipelines_core.stages.base import PipelineStage
from torch import Tensor

from ditattn.hosts.sglang.serving import Layer, serving
from ditattn.models import TokenLayout
from hosts.sglang.server import STEPS, metadata_of
from hosts.sglang.tiny_models import MODELS, latents_and_texts, one_forward, prepared
from hosts.sglang.tiny_wan import reference_norms

Serve = Callable[..., Any]


def outside_of_grids(layout: TokenLayout) -> set[int]:
    grids = [range(layout.num_prefix_tokens, layout.num_prefix_tokens + layout.num_video_tokens)]
    grids += [range(grid.start, grid.stop) for grid in layout.further_grids]
    return set(range(layout.num_tokens)).difference(*grids)


@pytest.mark.parametrize("name", MODELS)
def test_sparse_with_the_text_where_the_model_has_it(serve: Serve, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    model, (latents, texts) = MODELS[name], latents_and_texts(MODELS[name])
    seen: list[tuple[Tensor, TokenLayout | None]] = []
    called = Layer.__call__

    def spy(layer: Layer, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        out = called(layer, query, key, value)
        seen.append((key.clone(), serving()._forwards["transformer"].forward.layout))
        return out

    with reference_norms():
        expected = one_forward(model, "torch_sdpa", {}, latents, texts[0])
        dense = one_forward(model, "rain_fusion_attn", {"sparsity": 0}, latents, texts[0])
        monkeypatch.setattr(Layer, "__call__", spy)
        sparse = [one_forward(model, "rain_fusion_attn", {"sparsity": 0.75}, latents, text) for text in texts]
    tolerance = 0.05 if model.dtype is torch.bfloat16 else 1e-4
    torch.testing.assert_close(dense, expected, atol=tolerance, rtol=1e-4)
    assert (sparse[0] - dense).abs().max() > 1e-3
    report = serving().end_of_stage().components["transformer"]
    calls = len(seen) // 2
    assert report.token_grids == {model.grid: 1}
    assert (report.sparse, report.dense) == (calls - model.others, model.others)
    # another text changes only the text's keys in the first layer that sees both
    changes = [
        (layout, (key != other).flatten(2).any(-1)[0])
        for (key, layout), (other, _) in zip(seen[:calls], seen[calls:], strict=True)
        if layout is not None and layout.num_tokens == key.shape[1]
    ]
    layout, changed = next((one for one in changes if outside_of_grids(one[0])), changes[0])
    references = set(range(layout.num_tokens - model.references, layout.num_tokens))
    assert set(changed.nonzero().flatten().tolist()) == outside_of_grids(layout) - references


class OneForward(PipelineStage):
    """A denoising stage whose forward is in a context that does not say which request it is for, as that of LTX-2."""

    @property
    def role_affinity(self) -> RoleType:
        return RoleType.DENOISER

    def forward(self, batch: Any, server_args: Any) -> Any:
        with set_forward_context(current_timestep=1, attn_metadata=metadata_of(1, batch, server_args)):
            batch.run()
        return batch


def test_a_context_without_a_request_is_that_of_the_stage_that_runs(serve: Serve) -> None:
    model, (latents, texts) = MODELS["ltx_2"], latents_and_texts(MODELS["ltx_2"])
    with reference_norms():
        server_args, batch, made = prepared(model, "rain_fusion_attn", {"skip_first_steps": "25%", "sparsity": 0.75, "min_tokens": 0})
        batch.run = lambda: model.run(made, latents, texts[0])
        OneForward()(batch, server_args)
    report = serving().last_report.components["transformer"]
    assert (report.sparse, report.schedule_steps, report.token_grids) == (2, STEPS, {model.grid: 1})
    # each block has its own number, although all have one prefix; every other layer hears audio alone
    assert [layer for layer, density in report.sparse_density_by_layer.items() if density is not None] == [0, 2]
