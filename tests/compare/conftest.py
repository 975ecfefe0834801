"""A tiny pipeline as a workload."""

from __future__ import annotations

from pathlib import Path

import pytest

pytest.importorskip("diffusers", reason="comparisons run diffusers pipelines")

import torch

from ditattn.hosts.diffusers.demo_model import RANDOM_MODEL, build_random_model
from ditattn.hosts.diffusers.load import load_pipeline
from ditattn.hosts.diffusers.workload import PipelineWorkload

# 4 frames of 64 x 64 pixels: 1024 tokens, 8 blocks
CALL = {"height": 64, "width": 64, "num_frames": 4, "num_inference_steps": 2, "guidance_scale": 1.0}


@pytest.fixture(scope="session")
def wan_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Wan pipeline like the demo model, with two layers of one head and a small VAE."""
    folder = tmp_path_factory.mktemp("wan")
    sizes = {"num_layers": 2, "num_attention_heads": 1, "attention_head_dim": 32, "ffn_dim": 32}
    recipe = {"transformer": {**RANDOM_MODEL["transformer"], **sizes}, "vae": {**RANDOM_MODEL["vae"], "base_dim": 8}}
    build_random_model(folder, {**RANDOM_MODEL, **recipe})
    return folder


@pytest.fixture(scope="session")
def workload(wan_folder: Path) -> PipelineWorkload:
    pipe = load_pipeline(str(wan_folder), dtype=torch.float32, device="cpu")
    pipe.set_progress_bar_config(disable=True)
    return PipelineWorkload(pipe, lambda prompt: {**CALL, "prompt": prompt})
