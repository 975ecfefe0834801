"""Without a word of configuration the documented defaults hold; one of the originals fails there."""

from __future__ import annotations

import pytest

import ditattn
import tiny_pipelines


@pytest.mark.parametrize("backend", ["block_sparse_attn", "rain_fusion_attn"])
def test_defaults_apply_without_a_configuration(backend: str) -> None:
    tiny = tiny_pipelines.wan()
    with ditattn.install(tiny.pipe, backend) as handle:
        tiny.run(2)
    report = handle.report().components["transformer"]
    assert (report.config["sparsity"], report.config["skip_first_steps"], report.config["min_tokens"]) == (0.2, 10, 4096)
    # two steps lie within the ten dense ones
    assert report.dense_reasons == {"first steps": report.calls}
    assert report.calls > 0
