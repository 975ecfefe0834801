"""A denoiser that nobody described runs sparse where dry runs show where its tokens stand, else densely with the reason."""

from __future__ import annotations

import copy
import importlib.util
import itertools
import logging
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import ditattn
from ditattn import models
from ditattn.errors import UnsupportedModel
from ditattn.models import ModelFamily, TokenLayout
from ditattn.models.unlisted import BY_RULE
from ditattn.runtime.stage import DenoisingStage
from home_made import GRID, LATENTS, TEXT, WIDTH, HomeMadeTransformer

pytestmark = pytest.mark.usefixtures("one_thread")

SPARSE = {"sparsity": 0.5, "skip_first_steps": 0, "min_tokens": 0}
NAME = "HomeMadeTransformer"


def inputs(batch: int = 1, seed: int = 0, text: int = TEXT) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    latents = torch.randn(batch, *LATENTS[1:], generator=generator)
    return latents, torch.full((batch,), 500.0), torch.randn(batch, text, WIDTH, generator=generator)


def layouts(monkeypatch: pytest.MonkeyPatch) -> list[TokenLayout | None]:
    """Of every forward that begins from now on."""
    seen: list[TokenLayout | None] = []
    enter = DenoisingStage.enter

    def note(stage: DenoisingStage, *arguments: Any, **named: Any) -> Any:
        forward = enter(stage, *arguments, **named)
        seen.append(forward.layout)
        return forward

    monkeypatch.setattr(DenoisingStage, "enter", note)
    return seen


def run(model: nn.Module, config: dict[str, Any] | None = None, **kinds: Any) -> tuple[Tensor, ditattn.AttentionReport]:
    with ditattn.install(model, "rain_fusion_attn", **{**SPARSE, **(config or {})}) as handle, ditattn.step(0, 2):
        return model(*inputs(**kinds)), handle.report()


SEEN = {
    "raster": (0, 0),
    "text before": (TEXT, 0),
    "text behind": (0, TEXT),
    "text on both sides": (3, 4),
    "class token": (1, 0),
    "padding behind": (0, 32),
}


@pytest.mark.parametrize("arrangement", SEEN)
def test_tokens_are_found_where_they_stand(arrangement: str, monkeypatch: pytest.MonkeyPatch) -> None:
    seen, model = layouts(monkeypatch), HomeMadeTransformer(arrangement)
    native = model(*inputs())
    out, report = run(model)
    (layout,) = seen
    assert layout is not None
    assert (layout.grid, layout.num_prefix_tokens, layout.num_suffix_tokens) == (GRID, *SEEN[arrangement])
    assert report.components[NAME].sparse == 2
    assert 0.4 < report.components[NAME].sparse_density < 0.95
    assert not torch.equal(out, native)
    # every block through the same order, plan and kernel
    everything, report = run(model, {"sparsity": 0.01})
    torch.testing.assert_close(everything, native, rtol=0, atol=1e-5)
    assert report.components[NAME].sparse == 2
    assert torch.equal(model(*inputs()), native)


REFUSED = {
    "rows before frames": "do not stand in raster order of 4 x 16 x 16",
    "columns before rows": "do not stand in raster order of 4 x 16 x 16",
    "backwards": "do not stand in raster order",
    "moved on by one": "do not stand in raster order",
    "two tokens exchanged": "do not stand in raster order",
    "windows of 8 x 8": "do not stand in raster order",
    "even frames first": "do not stand in raster order",
    "text between the frames": "1024 tokens that its latents move do not stand together among the 1031",
    "a token behind every row": "1024 tokens that its latents move do not stand together among the 1088",
    "2 x 2 packed": "its latents move 256 of 256 tokens, and by no known patch are they as many",
    "neighbours averaged": "a token hears of several patches",
    "mean of all added": "a token hears of several patches",
}


@pytest.mark.parametrize("arrangement", REFUSED)
def test_tokens_that_stand_elsewhere_run_densely(arrangement: str, caplog: pytest.LogCaptureFixture) -> None:
    model = HomeMadeTransformer(arrangement)
    native = model(*inputs())
    with caplog.at_level(logging.WARNING, logger="ditattn"):
        out, report = run(model)
    torch.testing.assert_close(out, native, rtol=0, atol=1e-5)
    component = report.components[NAME]
    assert (component.sparse, component.dense_reasons["unknown geometry"]) == (0, 2)
    assert REFUSED[arrangement] in component.model
    assert REFUSED[arrangement] in report.summary()
    assert caplog.text.count(REFUSED[arrangement]) == 1


# what attends within a part of the sequence, and which tokens those parts have
PARTS = {
    ("frames", "frames"): "4 sequences of 256 tokens",
    ("frames", "places"): "4 sequences of 256 tokens",
    ("places", "places"): "256 sequences of 4 tokens",
    ("windows", "windows"): "8 sequences of 128 tokens",
}


@pytest.mark.parametrize("parts", PARTS)
def test_attention_within_parts_of_the_grid_runs_densely(parts: tuple[str, ...]) -> None:
    model = HomeMadeTransformer(parts=parts)
    native = model(*inputs())
    for config in ({}, {"assume_layout": True}):
        out, report = run(model, config)
        torch.testing.assert_close(out, native, rtol=0, atol=1e-5)
        assert report.components[NAME].sparse == 0
        assert PARTS[parts] in report.components[NAME].model


def test_a_layer_that_turns_its_tokens_round_is_seen() -> None:
    out, report = run(HomeMadeTransformer(parts=("", "other way round")))
    assert report.components[NAME].sparse == 0
    assert "the tokens of layers.1.attention do not stand as those of layers.0.attention" in report.components[NAME].model
    assert out.isfinite().all()


def test_whole_layers_run_sparse_beside_layers_of_parts() -> None:
    model = HomeMadeTransformer(parts=("", "frames", "", ""))
    native = model(*inputs())
    _, report = run(model)
    component = report.components[NAME]
    assert component.sparse == 3
    assert component.dense_reasons["token count does not match the grid"] == 1
    everything, _ = run(model, {"sparsity": 0.01})
    torch.testing.assert_close(everything, native, rtol=0, atol=1e-5)


def test_cross_attention_to_as_many_tokens_is_not_taken_for_self_attention() -> None:
    """The modules are alike: only a run tells that the keys do not come from the latents."""
    model = HomeMadeTransformer()
    native = model(*inputs(text=1024))
    out, report = run(model, text=1024)
    torch.testing.assert_close(out, native, rtol=0, atol=1e-5)
    assert report.components[NAME].sparse == 0
    assert "the tokens of layers.0.cross do not stand as those of layers.0.attention" in report.components[NAME].model


def test_samples_of_a_batch() -> None:
    model = HomeMadeTransformer("text before")
    native = model(*inputs(batch=2))
    everything, report = run(model, {"sparsity": 0.01}, batch=2)
    torch.testing.assert_close(everything, native, rtol=0, atol=1e-5)
    assert report.components[NAME].sparse == 2


class Packed(HomeMadeTransformer):
    """Takes patches one by one, as Flux does."""

    def forward(self, hidden_states: Tensor, timestep: Tensor, encoder_hidden_states: Tensor) -> Tensor:
        latents = hidden_states.view(1, 4, 16, 16, 3, 2, 2).permute(0, 4, 1, 2, 5, 3, 6).reshape(LATENTS)
        return super().forward(latents, timestep, encoder_hidden_states)


@pytest.mark.parametrize("config", [{}, {"assume_layout": True}])
def test_packed_latents_run_densely(config: dict[str, Any]) -> None:
    _, timestep, text = inputs()
    model = Packed()
    with ditattn.install(model, "rain_fusion_attn", **SPARSE, **config) as handle, ditattn.step(0, 2):
        model(torch.randn(1, 1024, 12), timestep, text)
    component = handle.report().components["Packed"]
    assert component.sparse == 0
    assert "packed: their shape does not tell frames, rows and columns" in component.model


MIXED = ("neighbours averaged", "mean of all added")


@pytest.mark.parametrize("arrangement", MIXED)
def test_a_layout_that_cannot_be_seen_may_be_assumed(arrangement: str, monkeypatch: pytest.MonkeyPatch) -> None:
    seen, model = layouts(monkeypatch), HomeMadeTransformer(arrangement)
    native = model(*inputs())
    out, report = run(model, {"assume_layout": True})
    (layout,) = seen
    assert layout is not None
    assert (layout.grid, layout.num_tokens) == (GRID, 1024)
    assert report.components[NAME].sparse == 2
    assert "assumed to be a grid of 4 x 16 x 16 in raster order, as you asked" in report.summary()
    assert not torch.equal(out, native)


@pytest.mark.parametrize("arrangement", [name for name in REFUSED if name not in MIXED])
def test_what_was_seen_to_be_untrue_is_not_assumed(arrangement: str) -> None:
    _, report = run(HomeMadeTransformer(arrangement), {"assume_layout": True})
    assert report.components[NAME].sparse == 0


class Remembers(HomeMadeTransformer):
    """Takes an object that its forward changes."""

    def forward(self, latents: Tensor, timestep: Tensor, encoder_hidden_states: Tensor, memory: Any = None) -> Tensor:
        memory.calls += 1
        return super().forward(latents, timestep, encoder_hidden_states)


class Memory:
    calls = 0


def test_a_forward_that_may_change_what_it_is_given_is_not_run_dry() -> None:
    model, memory = Remembers(), Memory()
    with ditattn.install(model, "rain_fusion_attn", **SPARSE) as handle, ditattn.step(0, 2):
        model(*inputs(), memory=memory)
    assert memory.calls == 1
    assert "its argument memory is a Memory, which a dry run might change" in handle.report().components["Remembers"].model
    with ditattn.install(model, "rain_fusion_attn", assume_layout=True, **SPARSE) as handle, ditattn.step(0, 2):
        model(*inputs(), memory=memory)
    assert handle.report().components["Remembers"].sparse == 2


def test_dry_runs_leave_the_random_numbers_alone() -> None:
    class Noisy(HomeMadeTransformer):
        def forward(self, latents: Tensor, timestep: Tensor, encoder_hidden_states: Tensor) -> Tensor:
            torch.rand(5)
            return super().forward(latents, timestep, encoder_hidden_states)

    model = Noisy()
    torch.manual_seed(3)
    model(*inputs())
    expected = torch.rand(3)
    torch.manual_seed(3)
    with ditattn.install(model, "rain_fusion_attn", **SPARSE), ditattn.step(0, 2):
        model(*inputs())
    assert torch.equal(torch.rand(3), expected)


def test_every_kind_of_forward_is_looked_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    model, calls = HomeMadeTransformer("text before"), []
    forward = HomeMadeTransformer.forward
    monkeypatch.setattr(
        HomeMadeTransformer,
        "forward",
        lambda self, latents, timestep, encoder_hidden_states: calls.append(1) or forward(self, latents, timestep, encoder_hidden_states),
    )
    counts = []
    with ditattn.install(model, "rain_fusion_attn", **SPARSE) as handle:
        for index, text in enumerate((TEXT, TEXT, 5, TEXT, 5)):
            with ditattn.step(index, 5):
                model(*inputs(seed=index, text=text))
            counts.append(len(calls))
    runs = [after - before for before, after in itertools.pairwise([0, *counts])]
    # three whole runs, two for each of the ten bits of 1024 tokens, and the pipeline's own
    assert runs == [24, 1, 24, 1, 1]
    assert handle.report().components[NAME].sparse == 10


def test_a_dense_backend_needs_no_dry_run(monkeypatch: pytest.MonkeyPatch) -> None:
    model = HomeMadeTransformer("windows of 8 x 8")
    native = model(*inputs())
    with ditattn.install(model, "torch_sdpa") as handle:
        torch.testing.assert_close(model(*inputs()), native, rtol=0, atol=1e-5)
    component = handle.report().components[NAME]
    # cross-attention looks like self-attention here, and is dense as well
    assert (component.dense, component.sparse) == (4, 0)
    assert component.model == f"{NAME}, {BY_RULE}"


def test_strict_refuses_it() -> None:
    with pytest.raises(UnsupportedModel, match="HomeMadeTransformer is not a known model family: without strict it is served by rule"):
        ditattn.install(HomeMadeTransformer(), "rain_fusion_attn", strict=True)


class Convolutional(nn.Module):
    """A denoiser without attention."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Conv2d(4, 4, 3)

    def forward(self, sample: Tensor, timestep: Tensor) -> Tensor:
        return self.inner(sample)


class TwoSizes(Convolutional):
    """Its layers have heads of 32 and of 16."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = HomeMadeTransformer().layers
        self.layers[1].attention.num_heads = 4


LEFT_ALONE = {
    "no module in it makes queries and keys of one input": Convolutional,
    "its heads must be of one size; found 16, 32 in layers.0.attention, layers.0.cross": TwoSizes,
    "its forward takes no timestep, so it is no denoiser": partial(nn.Linear, 2, 2),
}


@pytest.mark.parametrize("reason", LEFT_ALONE)
def test_what_no_rule_serves_is_left_alone(reason: str, caplog: pytest.LogCaptureFixture) -> None:
    model = LEFT_ALONE[reason]()
    with caplog.at_level(logging.WARNING, logger="ditattn"), ditattn.install(model, "rain_fusion_attn") as handle:
        assert reason in handle.report().not_served[type(model).__name__]
    assert f"{type(model).__name__} is not a known model family" in caplog.text


def test_a_copy_of_a_served_one_is_plain() -> None:
    model = HomeMadeTransformer()
    native = model(*inputs())
    with ditattn.install(model, "rain_fusion_attn", **SPARSE) as handle, ditattn.step(0, 2):
        twin = copy.deepcopy(model)
        assert torch.equal(twin(*inputs()), native)
        assert handle.report().components[NAME].calls == 0
    assert all("forward" not in vars(part) for whole in (model, twin) for part in whole.modules())


def test_compiled_afterwards_it_runs_as_before() -> None:
    model = HomeMadeTransformer("text before")
    with ditattn.install(model, "rain_fusion_attn", **SPARSE) as handle, ditattn.step(0, 2):
        eager = model(*inputs())
        compiled = torch.compile(model, backend="aot_eager")(*inputs())
    torch.testing.assert_close(compiled, eager, rtol=0, atol=1e-5)
    assert handle.report().components[NAME].sparse == 4


def from_file(text: str, folder: Path) -> ModelFamily:
    """The family of a file with this text."""
    (folder / "my_family.py").write_text(text)
    spec = importlib.util.spec_from_file_location("my_family", folder / "my_family.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.FAMILY


@pytest.mark.parametrize("arrangement", SEEN)
def test_the_file_that_the_log_begins_is_one_of_a_family(
    arrangement: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    model = HomeMadeTransformer(arrangement)
    with caplog.at_level(logging.WARNING, logger="ditattn"):
        by_rule, _ = run(model)
    (record,) = [record for record in caplog.records if "may start so" in record.getMessage()]
    start = record.getMessage().partition(":\n")[2]
    assert len(start.splitlines()) <= 10
    family = from_file(start, tmp_path)
    assert (family.name, family.transformer_classes) == (NAME, (NAME,))
    monkeypatch.setattr(models, "MODELS", (family,))
    seen = layouts(monkeypatch)
    with ditattn.install(model, "rain_fusion_attn", **SPARSE, strict=True) as handle, ditattn.step(0, 2):
        # cross-attention is torch's own here, which by rule a dense kernel served
        torch.testing.assert_close(model(*inputs()), by_rule, rtol=0, atol=1e-5)
    (layout,) = seen
    assert layout is not None
    assert (layout.grid, layout.num_prefix_tokens, layout.num_suffix_tokens) == (GRID, *SEEN[arrangement])
    assert handle.report().components[NAME].model == NAME
