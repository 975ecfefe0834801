"""A family is one file: a toy one, made here as such a file would make it, is known wherever a fact about it counts."""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import ditattn
from ditattn import models
from ditattn.errors import ConfigError, UnsupportedHeadSize
from ditattn.hosts.diffusers.call import call_pipeline, frame_rate
from ditattn.hosts.diffusers.demo_model import RANDOM_MODEL, build_random_model
from ditattn.hosts.diffusers.geometry import check_geometry, frames_to_ask, size_multiples
from ditattn.hosts.diffusers.load import load_pipeline
from ditattn.models import ModelFamily, TokenLayout

NOTICE = "your frames will be rounded"


def toy_layout(config: Any, arguments: Mapping[str, Any]) -> TokenLayout:
    return TokenLayout(tuple(arguments["x"].shape), (1, 2, 2))


def whole_latents(num_frames: int, factor: int) -> int:
    """Toy pipelines count latents, and make `factor` frames of each."""
    if num_frames % factor:
        raise ConfigError(f"num_frames must be a multiple of {factor}, not {num_frames}")
    return num_frames // factor


TOY = ModelFamily(
    name="Toy",
    transformer_classes=("ToyTransformer",),
    layout=toy_layout,
    self_attention=r"attn",
    head_size=lambda config: config.width_of_a_head,
    frame_rate=lambda pipeline_config: 50 if pipeline_config.smooth else 12,
    size_multiple=20,
    frames_to_ask=whole_latents,
    full_precision_vaes=frozenset({"AutoencoderKLWan"}),
    untrue_notices={"toy.pipeline": NOTICE},
)


class ToyTransformer(nn.Module):
    def __init__(self, width_of_a_head: int = 40) -> None:
        super().__init__()
        self.config = SimpleNamespace(patch_size=(1, 2, 2), width_of_a_head=width_of_a_head)
        self.attn = nn.Linear(2, 2)
        self.attn.processor = SimpleNamespace(_attention_backend=None)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x


class ToyPipeline:
    """As much of a pipeline as the facts are about."""

    device = torch.device("cpu")
    config = SimpleNamespace(smooth=False)
    vae_scale_factor_spatial = 8
    vae_scale_factor_temporal = 4

    def __init__(self, transformer: nn.Module | None = None) -> None:
        self.transformer = ToyTransformer() if transformer is None else transformer

    @property
    def components(self) -> dict[str, nn.Module]:
        return {"transformer": self.transformer}

    def __call__(self, prompt: str, num_frames: int = 1, output_type: str = "pil") -> Any:
        logging.getLogger("toy.pipeline").warning(NOTICE)
        logging.getLogger("toy.pipeline").warning("what is true stays")
        return SimpleNamespace(frames=[np.zeros((num_frames * self.vae_scale_factor_temporal, 4, 4, 3))])


@pytest.fixture
def _toy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(models, "MODELS", (*models.MODELS, TOY))


def compiled(module: nn.Module) -> nn.Module:
    return torch.compile(module, backend="eager")


@pytest.mark.usefixtures("_toy")
@pytest.mark.parametrize("wrap", [lambda module: module, compiled], ids=["plain", "compiled"])
def test_rates_and_sizes(wrap: Any) -> None:
    pipe = ToyPipeline(wrap(ToyTransformer()))
    assert frame_rate(pipe) == 12
    assert size_multiples(pipe) == (80, 80)
    check_geometry(pipe, {"height": 160, "width": 80})
    with pytest.raises(ConfigError, match="width must be a multiple of 80, not 96; nearest: 80 or 160"):
        check_geometry(pipe, {"height": 160, "width": 96})
    assert frames_to_ask(pipe, 8) == 2
    with pytest.raises(ConfigError, match="a multiple of 4, not 9"):
        frames_to_ask(pipe, 9)
    pipe.config = SimpleNamespace(smooth=True)
    assert frame_rate(pipe) == 50


@pytest.mark.usefixtures("_toy")
def test_a_call_makes_the_frames_that_were_asked_for_and_logs_nothing_untrue(caplog: pytest.LogCaptureFixture) -> None:
    frames, _ = call_pipeline(ToyPipeline(), {"prompt": "a", "num_frames": 8}, seed=0)
    assert len(frames) == 8
    assert [record.getMessage() for record in caplog.records if record.name == "toy.pipeline"] == ["what is true stays"]
    assert not logging.getLogger("toy.pipeline").filters


@pytest.mark.usefixtures("_toy")
def test_the_head_size_decides_whether_a_backend_can_serve() -> None:
    with pytest.raises(UnsupportedHeadSize, match="not 41"):
        ditattn.install(ToyPipeline(ToyTransformer(41)), "laser_attn")
    with ditattn.install(ToyPipeline(ToyTransformer(64)), "laser_attn") as handle:
        assert handle.report().components["transformer"].backend == "laser_attn"


def test_its_vae_is_loaded_in_full_precision(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    build_random_model(tmp_path, {**RANDOM_MODEL, "transformer": {**RANDOM_MODEL["transformer"], "num_layers": 1}})
    for families, expected in (((), torch.bfloat16), ((TOY,), torch.float32)):
        monkeypatch.setattr(models, "MODELS", families)
        pipe = load_pipeline(str(tmp_path), dtype=torch.bfloat16, device="cpu")
        assert (pipe.vae.dtype, pipe.text_encoder.dtype) == (expected, torch.bfloat16)


def test_unknown_it_has_the_defaults_of_every_model() -> None:
    pipe = ToyPipeline()
    assert frame_rate(pipe) == 24
    assert size_multiples(pipe) == (16, 16)
    assert frames_to_ask(pipe, 9) == 9


def test_other_folders_name_no_family() -> None:
    classes = {name for family in models.MODELS for name in (*family.transformer_classes, *family.full_precision_vaes)}
    package = Path(ditattn.__file__).parent
    # the demo model is built from a family's classes, which is what it is; ComfyUI has classes of its own by the same names
    others = [path for path in package.rglob("*.py") if path.parent.name not in ("models", "comfyui") and path.name != "demo_model.py"]
    naming = {path.name: found for path in others if (found := classes & set(re.findall(r"\w+", path.read_text())))}
    assert naming == {}
