"""Without a word of configuration the documented defaults hold; one of the originals fails there."""

from __future__ import annotations

import logging
import re
from typing import Any

import pytest

import ditattn
import tiny_pipelines
from ditattn.backends.residuals import refreshes
from ditattn.errors import DenseInStrictMode

SPARSE = ["block_sparse_attn", "rain_fusion_attn", "permuted_sparse_attn"]


@pytest.mark.parametrize("backend", SPARSE)
def test_defaults_apply_without_a_configuration(backend: str) -> None:
    tiny = tiny_pipelines.wan()
    with ditattn.install(tiny.pipe, backend) as handle:
        tiny.run(2)
    report = handle.report().components["transformer"]
    assert (report.config["sparsity"], report.config["skip_first_steps"], report.config["min_tokens"]) == (0.75, "auto", "auto")
    assert report.dense_reasons == {"first steps": report.calls // 2, "short sequence": report.calls // 2}
    assert report.calls > 0


@pytest.mark.parametrize("backend", SPARSE)
@pytest.mark.parametrize(("steps", "dense"), [(4, 1), (8, 1), (12, 3)])
def test_runs_of_few_steps_are_sparse_by_default(backend: str, steps: int, dense: int) -> None:
    """As of models distilled to four or eight steps."""
    tiny = tiny_pipelines.wan()
    with ditattn.install(tiny.pipe, backend, min_tokens=0, strict=True) as handle:
        tiny.run(steps)
    report = handle.report().components["transformer"]
    expected = {"first steps": dense}
    if backend == "permuted_sparse_attn" and (more := len(refreshes(0.75, dense, steps).steps)):
        expected["refresh step"] = more
    assert report.dense_reasons == {reason: report.calls * count // steps for reason, count in expected.items()}
    assert report.sparse == report.calls - report.dense


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"skip_first_steps": 10}, r"first steps \(skip_first_steps=10\)"),
        ({"skip_first_steps": 1, "skip_last_steps": 1}, r"first steps \(skip_first_steps=1\)"),
        ({"preset": "ascend"}, r"first steps \(skip_first_steps=10\)"),
        ({"skip_first_steps": 0, "min_tokens": 4096}, r"short sequence \(min_tokens=4096\)"),
        ({"skip_first_steps": 0, "sparsity": 0}, r"sparsity 0 \(sparsity=0.0\)"),
        ({"skip_first_steps": 0, "skip_layers": "0-1"}, r"skipped layer \(skip_layers=0-1\)"),
    ],
)
def test_strict_refuses_a_run_that_is_dense_from_end_to_end(keys: dict[str, Any], message: str) -> None:
    tiny = tiny_pipelines.wan()
    with (
        ditattn.install(tiny.pipe, "rain_fusion_attn", strict=True, **{"min_tokens": 0, **keys}),
        pytest.raises(DenseInStrictMode, match=f"rain_fusion_attn on transformer would run densely in every step: {message}"),
    ):
        tiny.run(2)


def test_a_dense_run_is_said_at_its_end_once(caplog: pytest.LogCaptureFixture) -> None:
    tiny = tiny_pipelines.wan()
    with (
        caplog.at_level(logging.WARNING, "ditattn"),
        ditattn.install(tiny.pipe, "rain_fusion_attn", preset="ascend", min_tokens=0),
    ):
        for _ in range(2):
            tiny.run(3)
            tiny.run(3)
    said = [record.message for record in caplog.records if "self-attention calls of this run" in record.message]
    assert len(said) == 4
    for message in said:
        assert message.startswith("rain_fusion_attn: none of the ")
        assert re.search(r"Dense: first steps \(\d+\); the settings are skip_first_steps=10$", message)


def test_a_sparse_run_is_not_warned_of(caplog: pytest.LogCaptureFixture) -> None:
    tiny = tiny_pipelines.wan()
    with caplog.at_level(logging.WARNING, "ditattn"), ditattn.install(tiny.pipe, "rain_fusion_attn", min_tokens=0):
        tiny.run(4)
    assert "of this run" not in caplog.text
