"""The demo model: the same weights every time, whole or not there, and nothing degenerate in it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

pytest.importorskip("diffusers", reason="drives diffusers")

import torch
from safetensors.torch import load_file

from ditattn.errors import ModelNotLoaded
from ditattn.hosts.diffusers import demo_model
from ditattn.hosts.diffusers.demo_model import CAPTION, DEFAULTS, RANDOM_MODEL, build_random_model, find_demo_model, unknown_words
from ditattn.hosts.diffusers.load import load_pipeline


@pytest.fixture
def without_trained(monkeypatch, tmp_path):
    monkeypatch.setattr(demo_model, "TRAINED", tmp_path / "absent")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "ditattn"


def test_the_same_recipe_gives_the_same_weights_and_leaves_the_random_state_alone(tmp_path):
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    build_random_model(tmp_path / "a")
    assert torch.equal(torch.rand(3), expected)
    torch.manual_seed(99)
    build_random_model(tmp_path / "b")
    for name in ("transformer", "vae"):
        weights = "diffusion_pytorch_model.safetensors"
        first, second = (load_file(tmp_path / folder / name / weights) for folder in "ab")
        assert first.keys() == second.keys()
        assert all(torch.equal(first[key], second[key]) for key in first)
    assert (tmp_path / "a" / "model_index.json").read_bytes() == (tmp_path / "b" / "model_index.json").read_bytes()


def test_built_once_then_found(without_trained, monkeypatch):
    first = find_demo_model()
    assert first.random_weights
    assert [path.name for path in without_trained.iterdir()] == [first.path.name]
    monkeypatch.setattr(demo_model, "build_random_model", lambda *a: pytest.fail("built again"))
    assert find_demo_model() == first
    index = json.loads((first.path / "model_index.json").read_text())
    assert index["tokenizer"] == ["transformers", "PreTrainedTokenizerFast"]


def test_an_interrupted_build_leaves_nothing(without_trained, monkeypatch):
    def interrupted(folder: Path) -> None:
        (folder / "model_index.json").write_text("{")
        raise KeyboardInterrupt

    monkeypatch.setattr(demo_model, "build_random_model", interrupted)
    with pytest.raises(KeyboardInterrupt):
        find_demo_model()
    assert list(without_trained.iterdir()) == []


def test_the_loser_of_a_race_takes_the_winner_s_model(without_trained, monkeypatch):
    build = demo_model.build_random_model

    def overtaken(folder: Path) -> None:
        build(folder)
        winner = without_trained / folder.name[1:].rsplit("-", 1)[0]
        build(winner)

    monkeypatch.setattr(demo_model, "build_random_model", overtaken)
    path = find_demo_model().path
    assert [other.name for other in without_trained.iterdir()] == [path.name]


def test_a_cache_that_cannot_be_written(monkeypatch, tmp_path):
    (tmp_path / "file").write_text("")
    monkeypatch.setattr(demo_model, "TRAINED", tmp_path / "absent")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    with pytest.raises(ModelNotLoaded, match="set XDG_CACHE_HOME"):
        find_demo_model()


def test_a_trained_model_comes_first(monkeypatch, tmp_path):
    (tmp_path / "model_index.json").write_text("{}")
    monkeypatch.setattr(demo_model, "TRAINED", tmp_path)
    found = find_demo_model()
    assert (found.path, found.random_weights) == (tmp_path, False)


def test_the_sizes_fill_blocks_exactly_and_no_part_is_zero(tmp_path):
    build_random_model(tmp_path)
    pipe = load_pipeline(str(tmp_path), dtype=torch.float32, device="cpu")
    rows = DEFAULTS["height"] // (pipe.vae_scale_factor_spatial * pipe.transformer.config.patch_size[1])
    assert DEFAULTS["num_frames"] * rows * rows == 4352 == 34 * 128
    assert pipe.transformer.proj_out.weight.std() > 0.01
    latents = torch.randn(1, RANDOM_MODEL["vae"]["z_dim"], 2, 8, 8, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        video = pipe.vae.decode(latents).sample
    assert video.shape == (1, 3, 2, 16, 16)
    assert 0.05 < float(video.std()) < 2


def test_half_precision_keeps_the_vae_in_full(tmp_path):
    build_random_model(tmp_path)
    pipe = load_pipeline(str(tmp_path), dtype=torch.bfloat16, device="cpu")
    assert (pipe.vae.dtype, pipe.transformer.dtype, pipe.text_encoder.dtype) == (torch.float32, torch.bfloat16, torch.bfloat16)


@pytest.mark.parametrize(
    ("caption", "unknown"),
    [
        (CAPTION, []),
        (CAPTION.upper() + "!", []),
        ("", []),
        ("Ein roter Kreis, ein Kreis", ["Ein", "roter", "Kreis", "ein"]),
        ("红色的圆 on a red background", ["红色的圆"]),
    ],
)
def test_words_that_the_demo_model_does_not_know(caption, unknown):
    assert unknown_words(find_demo_model(), caption) == unknown
