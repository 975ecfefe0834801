"""What the report says about a run."""

from __future__ import annotations

import dataclasses
import json

import pytest
import torch

from ditattn.backends.base import CallRecord
from ditattn.plan.block_plan import BlockPlan
from ditattn.runtime.report import AttentionReport, ComponentLog


def plan(kept: int) -> BlockPlan:
    """512 x 512 tokens in 4 x 4 blocks; every row keeps `kept` of them."""
    mask = torch.zeros(1, 1, 4, 4, dtype=torch.bool)
    mask[..., :kept] = True
    return BlockPlan.from_mask(mask, 512, 512)


@pytest.fixture
def log() -> ComponentLog:
    """Step 0 dense, steps 1 and 2 sparse in layer 0, layer 1 skipped."""
    log = ComponentLog("transformer", "rain_fusion_attn", {"sparsity": 0.5})
    for layer in (0, 1):
        log.add(0, layer, CallRecord("first steps"))
    for step, kept in ((1, 1), (1, 2), (2, 3)):
        log.add(step, 0, CallRecord(None, plan(kept)))
        log.add(step, 1, CallRecord("skipped layer"))
    for step in (0, 0, 1, 2):
        log.note_step(step, 4, "scheduler")
    return log


def test_counts_and_reasons(log: ComponentLog) -> None:
    report = log.report()
    assert (report.calls, report.sparse, report.dense) == (8, 3, 5)
    assert report.dense_reasons == {"skipped layer": 3, "first steps": 2}
    assert list(report.dense_reasons) == ["skipped layer", "first steps"], "the most frequent reason comes first"
    assert report.step_sources == {"scheduler": 4}
    assert (report.steps_run, report.schedule_steps) == (3, 4)
    assert "; 3 of the schedule's 4 steps ran;" in report.sentence()


def test_density_is_a_mean_over_sparse_calls(log: ComponentLog) -> None:
    report = log.report()
    assert report.sparse_density == pytest.approx((0.25 + 0.5 + 0.75) / 3)
    assert report.sparse_density_by_step == {0: None, 1: pytest.approx(0.375), 2: pytest.approx(0.75)}
    assert report.sparse_density_by_layer == {0: pytest.approx(0.5), 1: None}


def test_calls_of_an_unknown_step_count_too() -> None:
    log = ComponentLog("transformer", "rain_fusion_attn", {})
    log.add(None, None, CallRecord(None, plan(1)))
    report = log.report()
    assert (report.sparse, report.sparse_density, report.sparse_density_by_step, report.sparse_density_by_layer) == (1, 0.25, {}, {})


def test_a_report_is_a_picture_of_its_moment(log: ComponentLog) -> None:
    before = log.report()
    log.add(3, 0, CallRecord("last steps"))
    assert before.calls == 8
    assert "last steps" not in before.dense_reasons
    assert log.report().calls == 9


def test_the_sentence_says_what_ran_and_why_not(log: ComponentLog) -> None:
    sentence = log.report().sentence()
    assert sentence.startswith(
        "rain_fusion_attn: 3 sparse at density 0.500 (asked sparsity 0.5) / 5 dense (skipped layer: 3, first steps: 2)"
    )


def test_the_sentence_says_when_forwards_ran_without_us(log: ComponentLog) -> None:
    idle = ComponentLog("transformer", "fa", {})
    assert idle.report().sentence().startswith("fa: no calls;")
    idle.step_sources["scheduler"] += 6
    assert "no calls in 6 forwards; its attention processors or their backend were replaced" in idle.report().sentence()


def test_implementations_are_listed_once(log: ComponentLog) -> None:
    for name in ("torch", "triton", "torch"):
        log.note_implementation("dense_attention", name)
    assert log.report().implementations == {"dense_attention": "torch, triton"}


def test_the_summary_names_every_component(log: ComponentLog) -> None:
    report = AttentionReport({"transformer": log.report()}, {"transformer_2": "Foo is not a known model family"})
    first, second = report.summary().splitlines()
    assert first.startswith("attention (transformer): rain_fusion_attn: 3 sparse")
    assert second == "attention (transformer_2): not served: Foo is not a known model family"
    assert AttentionReport({}, {}).summary() == "attention: no component was served"


def test_reused_plans_are_counted_beside_the_sparse_calls(log: ComponentLog) -> None:
    log.add(2, 0, CallRecord(None, plan(3), reused=True))
    log.add(2, 0, CallRecord(None, plan(3), not_reused="padded keys"))
    report = log.report()
    assert (report.sparse, report.reused_plans, report.not_reused_reasons) == (5, 1, {"padded keys": 1})
    assert report.sparse_density == pytest.approx((0.25 + 0.5 + 3 * 0.75) / 5)
    assert "(asked sparsity 0.5; 1 with a reused plan; no reuse of plans: padded keys: 1)" in report.sentence()
    read = json.loads(json.dumps(AttentionReport({"transformer": report}, {}).as_dict()))["components"]["transformer"]
    assert (read["reused_plans"], read["not_reused_reasons"]) == (1, {"padded keys": 1})


def test_it_survives_json(log: ComponentLog) -> None:
    report = AttentionReport({"transformer": log.report()}, {})
    read = json.loads(json.dumps(report.as_dict()))
    assert read["components"]["transformer"]["dense_reasons"] == {"skipped layer": 3, "first steps": 2}
    assert read["components"]["transformer"]["sparse_density_by_step"] == {"0": None, "1": 0.375, "2": 0.75}
    assert read["attention_ms"] == report.attention_ms


def test_time_is_summed_over_components(log: ComponentLog) -> None:
    with log.stopwatch.measure(torch.device("cpu")):
        sum(range(10000))
    part = log.report()
    assert part.attention_ms > 0
    assert AttentionReport({"a": part, "b": part}, {}).attention_ms == 2 * part.attention_ms


def test_reports_of_ranks_are_put_together(log: ComponentLog) -> None:
    first = log.report()
    log.add(3, 0, CallRecord(None, plan(4)))
    second = dataclasses.replace(log.report(), attention_ms=7.0, communication_ms=3.0, split="rank 1 of 2 (Ulysses 2)")
    merged = AttentionReport.of_ranks([AttentionReport({"transformer": one}, {}) for one in (first, second)])
    report = merged.components["transformer"]
    assert (report.calls, report.sparse, report.dense) == (17, 7, 10)
    assert report.dense_reasons == {"skipped layer": 6, "first steps": 4}
    assert report.sparse_density == pytest.approx((3 * 0.5 + 4 * (0.25 + 0.5 + 0.75 + 1) / 4) / 7)
    assert report.sparse_density_by_step == {0: None, 1: pytest.approx(0.375), 2: pytest.approx(0.75), 3: pytest.approx(1)}
    assert (report.attention_ms, report.communication_ms) == (7.0, 3.0)
    assert merged.summary().endswith("0.01 s in attention, 0.00 s in exchanges; all 2 ranks together, times of the slowest")
