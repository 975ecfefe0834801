"""Runs, their order, the cache of references and the probe, on a tiny pipeline."""

from __future__ import annotations

import json
import os
from dataclasses import replace

import numpy as np
import pytest
import torch

pytest.importorskip("torchmetrics", reason="SSIM and MS-SSIM come from torchmetrics")

from ditattn.compare import measure
from ditattn.compare.cache import ReferenceCache, facts_digest
from ditattn.compare.measure import References, compare
from ditattn.compare.run import WARM_UP_STEPS, run_clip, warm_up
from ditattn.compare.setting import REFERENCE, Clip, expand, setting_names
from ditattn.errors import ConfigError
from ditattn.hosts.diffusers.fingerprint import model_fingerprint
from ditattn.hosts.diffusers.geometry import frames_to_ask
from ditattn.hosts.diffusers.workload import PipelineWorkload
from ditattn.progress import Progress

EVERY_CALL = {"skip_first_steps": 0, "min_tokens": 0}
CLIPS = [Clip("a cat", 1), Clip("a dog", 2)]
FACTS = {
    "model": "tiny",
    "fingerprint": "0",
    "height": 256,
    "width": 256,
    "steps": 2,
    "dtype": "float32",
    "device": "cpu",
    "versions": {"a": "1"},
}


class Heard(Progress):
    """Writes down what it hears."""

    def __init__(self) -> None:
        self.expected: list[int] = []
        self.lines: list[tuple[str, bool]] = []
        self.steps: list[tuple[int, int | None]] = []
        self.ended = 0

    def expect(self, num_runs: int) -> None:
        self.expected.append(num_runs)

    def begin(self, line: str, *, counts: bool = True) -> None:
        self.lines.append((line, counts))

    def step(self, done: int, total: int | None) -> None:
        self.steps.append((done, total))

    def advance(self) -> None:
        self.ended += 1


@pytest.fixture(scope="module")
def compared(workload, tmp_path_factory):
    settings = expand(["rain_fusion_attn"], [{**EVERY_CALL, "skip_layers": "1"}], {"sparsity": [0.0, 0.7]})
    cache = ReferenceCache(tmp_path_factory.mktemp("references"))
    heard = Heard()
    heard_steps = replace(workload, on_step=heard.step)
    return compare(References(heard_steps, cache, FACTS), settings, CLIPS, with_vmaf=False, progress=heard), cache, heard


def test_sparsity_zero_is_the_reference_and_sparse_is_not(compared):
    comparison, _, _ = compared
    whole, sparse = comparison.measured
    # not the same bits: the reference is torch's attention, sparsity 0 the fastest exact kernel of the machine
    assert all(one.scores.psnr > 80 for one in whole)
    assert all(20 < one.scores.psnr < 80 for one in sparse)
    assert [one.runs[0].sparse_density for one in whole] == [None, None]
    # layer 1 is dense, layer 0 is not
    computed = sparse[0].runs[0].densities["transformer"]
    assert [(step, layer) for step, layer, _ in computed] == [(0, 0), (0, 1), (1, 0), (1, 1)]
    assert [share == 1 for _, _, share in computed] == [False, True, False, True]
    density = sparse[0].runs[0].sparse_density
    assert sparse[0].runs[0].overall_density == pytest.approx((density + 1) / 2)
    assert comparison.speed_ups(1)[0] == comparison.reference[0].total_ms / sparse[0].total_ms


def test_names_hold_what_differs(compared):
    assert compared[0].names == ["rain_fusion_attn sparsity=0.0", "rain_fusion_attn sparsity=0.7"]


def test_the_probe_sees_what_runs_saw(compared):
    comparison, _, _ = compared
    readings = {(one.step, one.layer): one for one in comparison.readings[1]}
    computed = {(step, layer): share for step, layer, share in comparison.measured[1][0].runs[0].densities["transformer"]}
    assert readings.keys() == computed.keys()
    # the first cell of a run has the same inputs as in the dense run; mean pooling of others differs a little, its count does not
    assert readings[0, 0].density == pytest.approx(computed[0, 0])
    assert 0 < readings[0, 0].dropped_mass < 1
    assert readings[0, 0].error > 0
    assert (readings[1, 1].error, readings[1, 1].dropped_mass, readings[1, 1].density) == (0, 0, 1)
    assert all(one.error == 0 for one in comparison.readings[0])


def test_settings_take_turns(compared):
    _, _, heard = compared
    runs = [line for line, _ in heard.lines if line.startswith("clip")]
    assert [line.partition(": ")[2].split()[0] for line in runs] == [
        *("torch_sdpa", "rain_fusion_attn", "rain_fusion_attn"),
        *("rain_fusion_attn", "rain_fusion_attn", "torch_sdpa"),
    ]
    assert sorted(measure._order(3, 2, 2)) == sorted([(which, clip) for which in range(3) for clip in range(2)] * 2)


def test_progress_hears_every_run_and_step(compared):
    _, _, heard = compared
    # three settings, two clips, and the probe; warm-ups and metrics are no runs
    assert heard.expected == [7]
    assert heard.ended == sum(counts for _, counts in heard.lines) == 7
    assert [line for line, counts in heard.lines if not counts] == [
        *("warm up: torch_sdpa (reference)", "warm up: rain_fusion_attn sparsity=0.0", "warm up: rain_fusion_attn sparsity=0.7"),
        "metrics",
    ]
    assert heard.steps == [(1, 2), (2, 2)] * 10


def test_a_second_comparison_takes_the_reference_from_the_cache(compared, workload, monkeypatch):
    comparison, cache, _ = compared
    again = References(workload, cache, FACTS)
    monkeypatch.setattr(measure, "run_clip", lambda *_: pytest.fail("the reference was run again"))
    second = compare(again, [], CLIPS, repeats=3, probe=False)
    assert [len(one.runs) for one in second.reference] == [1, 1], "one run was measured, whatever is asked for now"
    assert all(one.runs[0].cached for one in second.reference)
    for first, found in zip(comparison.reference, second.reference, strict=True):
        assert not first.runs[0].cached
        np.testing.assert_array_equal(first.runs[0].frames, found.runs[0].frames)
        known = json.loads(json.dumps({**vars(first.runs[0]), "frames": None, "cached": True}))
        assert {**vars(found.runs[0]), "frames": None} == known


@pytest.mark.parametrize(
    "changed",
    [
        *({key: "other"} for key in FACTS),
        {"versions": {"a": "2"}},
        {"guidance_scale": 3.0},
        {"prompt": "a cat "},
        {"seed": 3},
    ],
    ids=str,
)
def test_any_changed_fact_misses(compared, workload, changed):
    _, cache, _ = compared
    facts = {**FACTS, "prompt": "a cat", "seed": 1}
    assert cache.find(facts) is not None
    assert cache.find({**facts, **changed}) is None
    assert facts_digest(dict(reversed(facts.items()))) == facts_digest(facts)


@pytest.mark.parametrize("damage", ["garbage", "truncated", "empty"])
def test_a_damaged_entry_is_made_again(workload, tmp_path, damage):
    references = References(workload, ReferenceCache(tmp_path / "deep" / "cache"), FACTS)
    made = references.make(CLIPS[0])
    place = next((tmp_path / "deep" / "cache").iterdir())
    frames = place / "frames.npz"
    frames.write_bytes({"garbage": b"half", "truncated": frames.read_bytes()[:-100], "empty": b""}[damage])
    assert references.find(CLIPS[0]) is None
    references.make(CLIPS[0])
    np.testing.assert_array_equal(references.find(CLIPS[0]).frames, made.frames)
    assert len(list((tmp_path / "deep" / "cache").iterdir())) == 1


def test_the_cache_forgets_what_was_used_longest_ago(compared, tmp_path):
    run = compared[0].reference[0].runs[0]
    cache = ReferenceCache(tmp_path)
    facts = [{"number": number} for number in range(4)]
    for number in range(3):
        cache.keep(facts[number], run)
        os.utime(tmp_path / facts_digest(facts[number]), (number, number))
    size = sum(file.stat().st_size for file in (tmp_path / facts_digest(facts[0])).iterdir())
    # the oldest one is used, so the second one goes
    assert cache.find(facts[0]) is not None
    cache.max_bytes = 3 * size + size // 2
    cache.keep(facts[3], run)
    assert [cache.find(one) is not None for one in facts] == [True, False, True, True]
    cache.max_bytes = 0
    cache.keep(facts[1], run)
    assert [cache.find(one) is not None for one in facts] == [False, True, False, False]


def test_a_run_is_the_pipelines_own_and_measures_its_memory(workload):
    run = run_clip(workload, REFERENCE, CLIPS[0])
    generator = torch.Generator("cpu").manual_seed(CLIPS[0].seed)
    arguments = {**workload.arguments("a cat"), "num_frames": frames_to_ask(workload.pipe, 4)}
    frames = workload.pipe(**arguments, generator=generator, output_type="np").frames[0]
    np.testing.assert_array_equal(run.frames, (frames * 255).round().astype(np.uint8))
    assert run.overall_density == 1
    assert run.total_ms == pytest.approx(sum(run.stages_ms.values()))
    if run.peak_memory_mb is None:
        pytest.skip("this machine does not tell the peak of the resident set")
    assert 50 < run.peak_memory_mb < 1e5
    assert "resident" in run.memory_counts


def test_fingerprints_follow_the_content(tmp_path):
    (tmp_path / "unet").mkdir()
    (tmp_path / "unet" / "weights").write_bytes(b"abc")
    first = model_fingerprint(str(tmp_path))
    assert model_fingerprint(str(tmp_path)) == first
    (tmp_path / "unet" / "weights").write_bytes(b"abd")
    assert model_fingerprint(str(tmp_path)) != first
    (tmp_path / "unet" / "weights").write_bytes(b"abc")
    assert model_fingerprint(str(tmp_path)) == first
    (tmp_path / "unet" / "weights").rename(tmp_path / "unet" / "other")
    assert model_fingerprint(str(tmp_path)) != first


def test_expansion_of_settings():
    settings = expand(["rain_fusion_attn", "block_sparse_attn"], [{"min_tokens": 0}], {"sparsity": [0.5, 0.9], "token_order": ["tile"]})
    assert [(one.backend, one.config.sparsity) for one in settings] == [
        *(("rain_fusion_attn", 0.5), ("rain_fusion_attn", 0.9)),
        *(("block_sparse_attn", 0.5), ("block_sparse_attn", 0.9)),
    ]
    assert setting_names(settings)[0] == "rain_fusion_attn sparsity=0.5"
    assert setting_names(expand(["fa"], [], {})) == ["fa"]
    assert len(expand(["fa", "fa"], [], {})) == 1
    with pytest.raises(ConfigError, match="--grid"):
        expand(["rain_fusion_attn"], [{"sparsity": 0.5}], {"sparsity": [0.6]})


def test_a_backend_goes_without_the_keys_that_only_another_one_has():
    backends = ["rain_fusion_attn", "block_sparse_attn", "fa"]
    settings = expand(backends, [{"threshold": 0.9}], {"sparsity": [0.5, 0.9]})
    assert [(one.backend, one.keys) for one in settings] == [
        ("rain_fusion_attn", {"sparsity": 0.5}),
        ("rain_fusion_attn", {"sparsity": 0.9}),
        ("block_sparse_attn", {"sparsity": 0.5, "threshold": 0.9}),
        ("block_sparse_attn", {"sparsity": 0.9, "threshold": 0.9}),
        ("fa", {}),
    ]
    assert setting_names(settings)[-1] == "fa"
    # nobody's key is refused
    with pytest.raises(ConfigError, match="rain_fusion_attn: unknown key 'sparsty'"):
        expand(["rain_fusion_attn", "fa"], [{"sparsty": 1}], {})


def test_a_warm_up_is_short_where_the_number_of_steps_is_left_to_the_pipeline(workload):
    def arguments(prompt):
        return {key: value for key, value in workload.arguments(prompt).items() if key != "num_inference_steps"}

    steps = []
    hook = workload.pipe.transformer.register_forward_hook(lambda *_: steps.append(1))
    try:
        warm_up(PipelineWorkload(workload.pipe, arguments), REFERENCE, CLIPS[0])
    finally:
        hook.remove()
    assert len(steps) == WARM_UP_STEPS
