"""`ditattn models`: what it promises about a model is what an installation does, and it needs no weights."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch

import ditattn as package
from ditattn import models
from ditattn.cli.models import compressed
from ditattn.hosts.diffusers.forecast import forecast
from ditattn.hosts.diffusers.load import load_pipeline
from ditattn.models import MODELS, NOT_SERVED


@pytest.fixture
def told(ditattn):
    """What the command says as JSON."""

    def run(*arguments: Any) -> Any:
        done = ditattn("models", *arguments, "--json")
        assert done.status == 0, done.err
        return json.loads(done.out)

    return run


def without_weights(folder: Path, copy: Path) -> Path:
    """As much of a pipeline's folder as may be read."""
    for path in folder.rglob("*.json"):
        if path.name in ("model_index.json", "config.json"):
            target = copy / path.relative_to(folder)
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(path, target)
    return copy


def test_every_family_is_listed_with_its_classes_and_pipelines(told):
    entries = told()
    assert [entry["family"] for entry in entries] == [family.name for family in MODELS]
    for entry, family in zip(entries, MODELS, strict=True):
        assert {*entry["classes"], *entry["missing"]} == set(family.transformer_classes)
        assert entry["notes"] == family.notes
        assert all(hasattr(diffusers, name) for name in entry["pipelines"])
    by_name = {entry["family"]: entry for entry in entries}
    assert {"WanPipeline", "WanImageToVideoPipeline", "WanVideoToVideoPipeline"} <= set(by_name["Wan 2.1, Wan 2.2"]["pipelines"])
    assert "FluxKontextPipeline" in by_name["Flux.1"]["pipelines"]
    assert not by_name["CogVideoX"]["dispatches"]


def test_the_table_names_every_family_and_class(ditattn):
    done = ditattn("models")
    assert done.status == 0
    for family in MODELS:
        assert all(name in done.out for name in family.transformer_classes)


@pytest.mark.parametrize("fixture", ["wan_folder", "wan22_folder", "wan_i2v_folder", "flux_folder"])
def test_what_is_promised_is_what_an_installation_does(told, fixture, request, tmp_path):
    folder = request.getfixturevalue(fixture)
    promised = {one["component"]: one for one in told(without_weights(folder, tmp_path / "copy"))}
    pipe = load_pipeline(str(folder), dtype=torch.float32, device="cpu")
    with package.install(pipe, "rain_fusion_attn") as handle:
        served = {model.name: model for model in handle._stage.models}
    assert promised.keys() == served.keys()
    for name, model in served.items():
        assert promised[name]["model"] == model.log.model
        assert promised[name]["family"] == model.family.name
        assert promised[name]["layers"] == model.layers
        assert promised[name]["head_size"] == model.family.head_size(model.model_config)
        assert promised[name]["backends"]["rain_fusion_attn"] is None


def test_a_folder_with_a_transformer_alone(told, flux_folder):
    (one,) = told(flux_folder / "transformer")
    assert (one["component"], one["family"]) == ("FluxTransformer2DModel", "Flux.1")
    assert one["layers"] == ["transformer_blocks.0.attn", "single_transformer_blocks.0.attn"]
    assert one["num_tokens"] is None


# 1024 x 1024 pixels of 16 x 16 are 4096 tokens; videos: (frames - 1) / 4 + 1 latents of frames, 8 in LTX-Video
DEFAULTS = {
    "WanPipeline": 21 * 30 * 52,
    "HunyuanVideoPipeline": 33 * 45 * 80,
    "LTXPipeline": 21 * 16 * 22,
    "CogVideoXPipeline": 13 * 30 * 45,
    "FluxPipeline": 4096,
    "QwenImagePipeline": 4096,
    "StableDiffusion3Pipeline": 4096,
    "HunyuanImagePipeline": 64 * 64,
    "BriaFiboPipeline": 4096,
}


@pytest.mark.parametrize("pipeline", DEFAULTS)
def test_tokens_at_the_size_that_a_pipeline_makes_by_default(pipeline):
    (one,) = forecast(pipeline)
    assert one.num_tokens == DEFAULTS[pipeline]
    assert {"height", "width"} <= set(one.size)


def test_the_lines_of_a_model_that_is_served(ditattn):
    lines = ditattn("models", "FluxPipeline").out.splitlines()
    assert lines[0] == "transformer: FluxTransformer2DModel: served as Flux.1"
    assert lines[1] == "  layers: 57 of self-attention: transformer_blocks.0-18.attn, single_transformer_blocks.0-37.attn"
    assert "  tokens by default: 4096 of 1024 x 1024 pixels, text left out" in lines


def test_a_head_size_that_no_sparse_kernel_takes_is_told(told):
    (one,) = told("AuraFlowTransformer2DModel")
    assert one["head_size"] == 256
    assert one["backends"]["torch_sdpa"] is None
    assert one["backends"]["rain_fusion_attn"] == "rain_fusion_attn supports head sizes 32, 64, 96, 128, not 256"


def test_a_model_that_is_not_served_and_why(told, ditattn):
    (one,) = told("DiTTransformer2DModel")
    assert (one["family"], one["layers"], one["reason"]) == (None, [], NOT_SERVED["DiTTransformer2DModel"])
    assert ditattn("models", "DiTTransformer2DModel").out == f"DiTTransformer2DModel: not served: {one['reason']}\n"


def test_a_model_that_nobody_described(ditattn, monkeypatch):
    """As a class of a later diffusers would be."""
    monkeypatch.setattr(models, "MODELS", ())
    lines = ditattn("models", "WanTransformer3DModel").out.splitlines()
    assert lines[0] == "WanTransformer3DModel: unlisted: by rule"
    assert lines[1] == "  layers: 40 of self-attention: blocks.0-39.attn1"
    assert lines[2] == "  head size: 128"
    assert lines[-1] == (
        "  notes: where its tokens stand is seen by dry runs when it first runs, and what cannot be seen runs densely; "
        "its configuration tells a patch of 1 x 2 x 2"
    )


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ("NoSuchModel", "'NoSuchModel' is no class of diffusers"),
        ("StableDiffusionPipeline", "StableDiffusionPipeline has no component named transformer"),
        ("./nowhere", "no such folder: ./nowhere"),
        ("AutoencoderKL", "AutoencoderKL: not served: it is of no known family"),
    ],
)
def test_what_is_no_model_is_refused_in_one_line(ditattn, model, message):
    done = ditattn("models", model)
    assert message in done.out + done.err
    if done.status:
        assert len(done.error_lines) == 1


def test_of_a_model_on_the_hub_only_two_kinds_of_files_are_asked_for(told, wan22_folder, monkeypatch):
    asked = []

    def download(repo: str, *, filename: str, subfolder: str | None = None, **_: Any) -> str:
        asked.append((repo, filename))
        return str(wan22_folder / (subfolder or "") / filename)

    monkeypatch.setattr("diffusers.configuration_utils.hf_hub_download", download)
    found = told("owner/wan")
    assert [one["component"] for one in found] == ["transformer", "transformer_2"]
    assert set(asked) == {("owner/wan", "model_index.json"), ("owner/wan", "config.json")}


@pytest.mark.parametrize(
    ("paths", "shown"),
    [
        ([], ""),
        (["attn"], "attn"),
        (["blocks.0.attn"], "blocks.0.attn"),
        (["blocks.0.attn", "blocks.1.attn", "blocks.2.attn"], "blocks.0-2.attn"),
        (["a.0.attn", "a.0.attn2", "a.1.attn", "b.0", "b.1"], "a.0-1.attn, a.0.attn2, b.0-1"),
        (["a.0.x", "a.2.x", "a.3.x"], "a.0.x, a.2-3.x"),
    ],
)
def test_paths_are_shown_as_runs_of_numbers(paths, shown):
    assert compressed(paths) == shown
