"""Runs of the tiny Wan with a sparse backend installed, as several tests need them."""

from __future__ import annotations

from typing import Any

import ditattn
from ditattn.runtime.report import ComponentReport
from tiny_pipelines import TinyPipeline

SPARSE = {"sparsity": 0.6, "skip_first_steps": 0, "min_tokens": 0}
# two CFG branches, two layers
CALLS_PER_STEP = 4


def ran(tiny: TinyPipeline, num_steps: int = 3, backend: str = "rain_fusion_attn", **config: Any) -> ComponentReport:
    with ditattn.install(tiny.pipe, backend, **config) as handle:
        tiny.run(num_steps)
    return handle.report().components["transformer"]
