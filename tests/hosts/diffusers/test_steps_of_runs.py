"""The step of a forward counts from the beginning of the schedule, whatever pipeline drives the model and wherever its run begins."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable
from typing import Any

import diffusers
import pytest
import torch
from PIL import Image
from torch import Tensor

import ditattn
import tiny_pipelines
from ditattn.hosts.diffusers.driver import driving_scheduler
from ditattn.hosts.diffusers.install import Installation, denoisers
from tiny_pipelines import FAMILIES, few_tokens
from tiny_pipelines.pipeline import TinyPipeline, noise

PIPELINES = {**FAMILIES, "wan 2.2": tiny_pipelines.wan_two_transformers}


def steps_of(handle: Installation) -> set[int | None]:
    """Every step in which attention ran, of all components."""
    return {step for model in handle._stage.models for step, _ in model.log.cells}


@pytest.mark.parametrize("name", PIPELINES)
def test_a_transformer_shared_by_two_pipelines_is_in_the_step_of_the_one_that_runs(name: str) -> None:
    """After `install(pipe)` another pipeline of the same components runs, with a scheduler of its own; pipe's stands still."""
    tiny = few_tokens(PIPELINES[name](), "wan" if name == "wan 2.2" else name)
    tiny.run(2)
    parts = {key: part for key, part in tiny.pipe.components.items() if key != "scheduler"}
    extras = {"boundary_ratio": 0.875} if name == "wan 2.2" else {}
    other = TinyPipeline(type(tiny.pipe)(**parts, scheduler=copy.deepcopy(tiny.pipe.scheduler), **extras), tiny.arguments)
    with ditattn.install(tiny.pipe, "rain_fusion_attn", sparsity=0.6, skip_first_steps=1, min_tokens=0) as handle:
        other.run(3)
        assert steps_of(handle) == {0, 1, 2}
        tiny.run(3)
        assert steps_of(handle) == {0, 1, 2}
    first = handle._stage.models[0]
    assert all(cell.sparse == 0 for (step, _), cell in first.log.cells.items() if step == 0)
    assert first.log.schedule_steps == 3


def _of_the_same_parts(pipeline: str, pipe: Any) -> Any:
    """Another pipeline of diffusers over the components that it takes."""
    cls = getattr(diffusers, pipeline)
    return cls(**{name: part for name, part in pipe.components.items() if name in inspect.signature(cls).parameters})


def _video_to_video(pipeline: str, tiny: TinyPipeline, frames: int) -> Callable[[], Tensor]:
    """A run of ten steps that begins at strength 0.5, from a video of noise."""
    pixels = (noise(frames, tiny.arguments["height"], tiny.arguments["width"], 3) * 40 + 128).clamp(0, 255).byte().numpy()
    arguments = {key: value for key, value in tiny.arguments.items() if key != "num_frames"}
    pipe = _of_the_same_parts(pipeline, tiny.pipe)
    return lambda: TinyPipeline(pipe, {**arguments, "video": [Image.fromarray(frame) for frame in pixels]}).run(10, strength=0.5)


def _image_to_image(pipeline: str, tiny: TinyPipeline) -> Callable[[], Tensor]:
    image = torch.rand(1, 3, tiny.arguments["height"], tiny.arguments["width"])
    pipe = _of_the_same_parts(pipeline, tiny.pipe)
    return lambda: TinyPipeline(pipe, {**tiny.arguments, "image": image}).run(10, strength=0.5)


RUNS: dict[str, Callable[[], tuple[TinyPipeline, Callable[[], Any]]]] = {
    "wan": lambda: (tiny := few_tokens(tiny_pipelines.wan(), "wan"), _video_to_video("WanVideoToVideoPipeline", tiny, 5)),
    "cogvideox": lambda: (
        tiny := few_tokens(tiny_pipelines.cogvideox(), "cogvideox"),
        _video_to_video("CogVideoXVideoToVideoPipeline", tiny, 5),
    ),
    "flux": lambda: (tiny := few_tokens(tiny_pipelines.flux(), "flux"), _image_to_image("FluxImg2ImgPipeline", tiny)),
    "qwen image": lambda: (
        tiny := few_tokens(tiny_pipelines.qwen_image(), "qwen image"),
        _image_to_image("QwenImageImg2ImgPipeline", tiny),
    ),
}


@pytest.mark.parametrize("name", RUNS)
def test_a_run_that_begins_in_the_middle_is_in_the_later_steps(name: str) -> None:
    tiny, run = RUNS[name]()
    with ditattn.install(tiny.pipe, "rain_fusion_attn", sparsity=0.6, skip_first_steps=6, min_tokens=0) as handle:
        run()
    assert steps_of(handle) == {5, 6, 7, 8, 9}
    report = next(iter(handle.report().components.values()))
    assert (report.steps_run, report.schedule_steps) == (5, 10)
    assert "5 of the schedule's 10 steps ran" in report.sentence()
    # only step 5 is one of the first six, whose noise level is what skip_first_steps is about
    assert {step for (step, _), cell in handle._stage.models[0].log.cells.items() if cell.sparse} == {6, 7, 8, 9}


INPAINTING = {
    "flux": ("FluxInpaintPipeline", tiny_pipelines.flux),
    "qwen image": ("QwenImageInpaintPipeline", tiny_pipelines.qwen_image),
}


@pytest.mark.parametrize("name", INPAINTING)
def test_inpainting_changes_what_the_mask_shows_in_the_later_steps(name: str) -> None:
    """What the mask hides is the given picture's own latents in the end, whoever serves the attention."""
    pipeline, build = INPAINTING[name]
    tiny = build()
    height, width = tiny.arguments["height"], tiny.arguments["width"]
    right_half = (torch.arange(width) >= width // 2).float().expand(1, 1, height, width)
    picture = torch.rand(1, 3, height, width, generator=torch.Generator().manual_seed(0))
    inpaint = TinyPipeline(_of_the_same_parts(pipeline, tiny.pipe), {**tiny.arguments, "image": picture, "mask_image": right_half})
    native = inpaint.run(10, strength=0.5)
    with ditattn.install(inpaint.pipe, "rain_fusion_attn", sparsity=0.6, skip_first_steps=6, min_tokens=0) as handle:
        out = inpaint.run(10, strength=0.5)
    assert steps_of(handle) == {5, 6, 7, 8, 9}
    assert {step for (step, _), cell in handle._stage.models[0].log.cells.items() if cell.sparse} == {6, 7, 8, 9}
    # 30 x 44 tokens, packed
    changed = (out != native).any(-1).reshape(30, 44)
    assert changed[:, 22:].all()
    assert not changed[:, :22].any()
    assert torch.equal(inpaint.run(10, strength=0.5), native)


def test_a_loop_of_the_users_own_beside_a_pipeline_that_has_run() -> None:
    """The pipeline's scheduler stands at its end; the loop steps none."""
    tiny = few_tokens(tiny_pipelines.wan(), "wan")
    tiny.run(3)
    transformer = tiny.pipe.transformer
    with ditattn.install(tiny.pipe, "rain_fusion_attn", sparsity=0.6, skip_first_steps=1, min_tokens=0) as handle, torch.no_grad():
        for timestep in (950.0, 500.0):
            transformer(
                hidden_states=noise(1, 16, 5, 28, 40),
                timestep=torch.tensor([timestep]),
                encoder_hidden_states=noise(1, 16, tiny.pipe.text_encoder.config.d_model),
            )
    assert steps_of(handle) == {0, 1}


def test_no_pipeline_on_the_stack_is_no_driver() -> None:
    assert driving_scheduler(next(iter(denoisers(tiny_pipelines.wan().pipe).values()))) is None
