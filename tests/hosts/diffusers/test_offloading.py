"""Offloaded models: the weights are elsewhere when a backend is chosen, and come when a part of the model runs."""

from __future__ import annotations

import pytest
import torch
from accelerate import cpu_offload
from accelerate.hooks import AlignDevicesHook, SequentialHook, add_hook_to_module, remove_hook_from_module
from torch import nn

import ditattn
import tiny_pipelines
from ditattn.errors import DitattnError
from ditattn.hosts.diffusers.execution import execution_device
from tiny_pipelines import FAMILIES, few_tokens
from tiny_pipelines.footprint import footprint
from tiny_pipelines.wan import transformer

pytestmark = pytest.mark.usefixtures("one_thread")

SPARSE = {"sparsity": 0.6, "skip_first_steps": 0, "min_tokens": 0}
CPU = torch.device("cpu")


@pytest.mark.shows("offloading")
@pytest.mark.parametrize("name", FAMILIES)
def test_sequential_offloading(name: str) -> None:
    """What `enable_sequential_cpu_offload` does, which asks for an accelerator itself: every weight is on meta until its module runs."""
    tiny = few_tokens(FAMILIES[name](), name)
    with ditattn.install(tiny.pipe, "rain_fusion_attn", **SPARSE):
        expected = tiny.run(2)
    native = tiny.run(2)
    for part in tiny.pipe.components.values():
        if isinstance(part, nn.Module):
            cpu_offload(part, CPU, offload_buffers=len(part._parameters) > 0)
    assert next(tiny.pipe.transformer.parameters()).device.type == "meta"
    assert torch.equal(tiny.run(2), native)
    before = footprint(tiny.pipe)
    with ditattn.install(tiny.pipe, "rain_fusion_attn", strict=True, **SPARSE) as handle:
        assert torch.equal(tiny.run(2), expected)
    assert handle.report().components["transformer"].dense == 0
    assert footprint(tiny.pipe) == before
    assert torch.equal(tiny.run(2), native)


@pytest.mark.parametrize("later", [False, True], ids=["before", "after"])
def test_offloading_that_comes_after_the_installation(later: bool) -> None:
    tiny = few_tokens(tiny_pipelines.wan(), "wan")
    native = tiny.run(1)
    if not later:
        cpu_offload(tiny.pipe.transformer, CPU)
    with ditattn.install(tiny.pipe, "torch_sdpa") as handle:
        if later:
            cpu_offload(tiny.pipe.transformer, CPU)
        torch.testing.assert_close(tiny.run(1), native, rtol=0, atol=1e-5)
    assert handle.report().components["transformer"].calls == 4


def test_the_hook_of_the_root_comes_before_those_of_its_parts() -> None:
    model = transformer()
    assert execution_device(model) == CPU
    add_hook_to_module(model.blocks[0], AlignDevicesHook(execution_device="meta"))
    assert execution_device(model) == torch.device("meta")
    add_hook_to_module(model, SequentialHook(AlignDevicesHook(io_same_device=True), AlignDevicesHook(execution_device="cpu")))
    assert execution_device(model) == CPU
    remove_hook_from_module(model, recurse=True)


def test_group_offloading_tells_the_device_it_brings_the_weights_to() -> None:
    model = transformer()
    model.enable_group_offload(onload_device=CPU, offload_device=CPU, offload_type="leaf_level")
    model.to_empty(device="meta")
    assert execution_device(model) == CPU


def test_weights_that_are_nowhere_are_refused_in_one_sentence() -> None:
    with torch.device("meta"):
        model = transformer()
    with pytest.raises(DitattnError, match="meta"):
        ditattn.install(model, "rain_fusion_attn")
