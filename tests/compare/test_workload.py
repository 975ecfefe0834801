"""Comparison and tuning of a workload that is no pipeline at all: they know what `Workload` says and nothing of a host."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("torchmetrics", reason="SSIM comes from torchmetrics")

from ditattn.backends.setting import Setting, StepCache
from ditattn.compare.measure import References, compare
from ditattn.compare.record import comparison_record
from ditattn.compare.run import WARM_UP_STEPS
from ditattn.compare.setting import REFERENCE, Clip, expand, setting_names, with_step_caches
from ditattn.compare.workload import Rendered, Workload
from ditattn.runtime.probe import CellReading
from ditattn.runtime.report import AttentionReport
from ditattn.tune.candidate import Candidate, Target
from ditattn.tune.objective import Objective, probe

CLIPS = [Clip("a cat", 1), Clip("a dog", 2)]


class Invented(Workload):
    """Noise by seed; sparsity adds to every pixel and takes time off."""

    device = torch.device("cpu")
    takes_num_inference_steps = True

    def __init__(self) -> None:
        self.rendered: list[tuple[Setting, Clip, dict[str, Any]]] = []

    def render(self, setting: Setting, clip: Clip, **changes: Any) -> Rendered:
        self.rendered.append((setting, clip, changes))
        sparsity = setting.keys.get("sparsity", 0.0)
        frames = np.random.default_rng(clip.seed).integers(0, 200, (2, 32, 32, 3)) + round(10 * sparsity)
        densities = {"denoiser": [(0, 0, 1.0), (1, 0, 1 - sparsity)]}
        return Rendered(frames.astype(np.uint8), {"generate": 100 * (1 - sparsity / 2)}, [], AttentionReport({}, {}), densities)

    def probe(self, settings: Sequence[Setting], clip: Clip) -> list[list[CellReading]]:
        return [[CellReading("denoiser", 0, 0, one.keys["sparsity"], 0.0, 1 - one.keys["sparsity"], 1.0, 2.0)] for one in settings]


def test_a_comparison_needs_no_pipeline() -> None:
    workload = Invented()
    found = compare(References(workload, None), expand(["rain_fusion_attn"], [], {"sparsity": [0.2, 0.8]}), CLIPS, with_vmaf=False)
    record = comparison_record(found, {})
    assert [round(setting["statistics"]["speed_up"]["median"], 3) for setting in record["settings"]] == [1.111, 1.667]
    assert [setting["statistics"]["overall_density"]["median"] for setting in record["settings"]] == pytest.approx([0.9, 0.6])
    assert [one[0].error for one in found.readings or []] == [0.2, 0.8]
    # three warm-ups of few steps, the sparse ones sparse from the first step on; then every setting on every clip
    short = [(setting.keys, changes) for setting, _, changes in workload.rendered[:3]]
    steps = {"num_inference_steps": WARM_UP_STEPS}
    assert short[0] == ({}, steps)
    assert short[1:] == [({"sparsity": sparsity, "skip_first_steps": 0, "skip_last_steps": 0}, steps) for sparsity in (0.2, 0.8)]
    assert [changes for _, _, changes in workload.rendered[3:]] == [{}] * 6


def test_a_cache_runs_alone_and_beside_every_setting_and_is_probed_once() -> None:
    class Probed(Invented):
        def probe(self, settings: Sequence[Setting], clip: Clip) -> list[list[CellReading]]:
            self.probed = list(settings)
            return super().probe([Setting.parse("rain_fusion_attn", {"sparsity": 0.0, **one.keys}) for one in settings], clip)

    workload, sparse = Probed(), expand(["rain_fusion_attn"], [], {"sparsity": [0.2, 0.8]})
    settings = with_step_caches([REFERENCE, *sparse], [StepCache("one", {"threshold": 0.1}), StepCache("two")])
    found = compare(References(workload, None), settings, CLIPS, with_vmaf=False)
    assert found.names == [
        *("torch_sdpa + one", "torch_sdpa + two"),
        *("rain_fusion_attn sparsity=0.2", "rain_fusion_attn sparsity=0.2 + one", "rain_fusion_attn sparsity=0.2 + two"),
        *("rain_fusion_attn sparsity=0.8", "rain_fusion_attn sparsity=0.8 + one", "rain_fusion_attn sparsity=0.8 + two"),
    ]
    assert [one.keys.get("sparsity") for one in workload.probed] == [None, 0.2, 0.8]
    assert [one[0].error for one in found.readings or []] == [0.0] * 2 + [0.2] * 3 + [0.8] * 3
    caches = [setting["step_cache"] for setting in comparison_record(found, {})["settings"]]
    assert caches[:3] == [{"name": "one", "keys": {"threshold": 0.1}}, {"name": "two", "keys": {}}, None]


def test_names_say_in_which_keys_caches_of_a_name_differ() -> None:
    caches = [StepCache("one", {"threshold": 0.1, "steps": 3}), StepCache("one", {"threshold": 0.2, "steps": 3})]
    assert setting_names(with_step_caches([], caches)) == ["torch_sdpa + one threshold=0.1", "torch_sdpa + one threshold=0.2"]
    beside = with_step_caches([Setting.parse("rain_fusion_attn", {"sparsity": 0.5, "min_tokens": 0})], caches[:1])
    assert setting_names(beside)[1:] == ["rain_fusion_attn sparsity=0.5,min_tokens=0", "rain_fusion_attn sparsity=0.5,min_tokens=0 + one"]
    assert with_step_caches([REFERENCE], []) == [REFERENCE]


def test_tuning_needs_no_pipeline() -> None:
    references, setting = References(Invented(), None), Setting.parse("rain_fusion_attn", {"min_tokens": 0})
    objective = Objective(references, setting, list(CLIPS), Target(psnr=35))
    objective.prepare(anew=True)
    bold, careful = objective(Candidate(0.8)), objective(Candidate(0.2))
    assert (bold.meets, careful.meets) == (False, True)
    assert careful.time_share == pytest.approx(0.9)
    assert objective.setting.keys == {"min_tokens": 0}, "a candidate changes a copy"
    assert [one.error for some in probe(references, setting, CLIPS[0]).values() for one in some] == [0.3, 0.6, 0.8, 0.95]
