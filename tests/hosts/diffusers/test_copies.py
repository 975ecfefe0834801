"""Copies and pickles of a served model: plain models that no installation knows, in every family."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import ditattn
import tiny_pipelines
from ditattn.hosts.diffusers.install import denoisers
from tiny_pipelines import FAMILIES, few_tokens
from tiny_pipelines.footprint import HOOK_TABLES, footprint
from tiny_pipelines.pipeline import TinyPipeline

SPARSE = {"sparsity": 0.6, "skip_first_steps": 0, "min_tokens": 0}


def pickled(module: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(module, file)
    file.seek(0)
    loaded: nn.Module = torch.load(file, weights_only=False)
    return loaded


def traces(module: nn.Module) -> list[str]:
    """Paths of what an installation leaves on a module."""
    found = [path for path, part in module.named_modules() if "__getstate__" in vars(part) or hasattr(part, "_diffusers_hook")]
    found += [path for path, part in module.named_modules() if any(getattr(part, name) for name in HOOK_TABLES)]
    processors = [(path, part.processor) for path, part in module.named_modules() if hasattr(part, "processor")]
    found += [path for path, processor in processors if "ditattn" in f"{type(processor)} {vars(processor)}"]
    return found


@pytest.mark.parametrize("copied", [copy.deepcopy, pickled], ids=["deepcopy", "pickle"])
@pytest.mark.parametrize("name", FAMILIES)
def test_a_copy_of_a_served_model_is_plain(name: str, copied: Callable[[Any], Any]) -> None:
    tiny = few_tokens(FAMILIES[name](), name)
    native = tiny.run(2)
    before = footprint(tiny.pipe)
    with ditattn.install(tiny.pipe, "rain_fusion_attn", **SPARSE) as handle:
        copies = {part: copied(module) for part, module in denoisers(tiny.pipe).items()}
        calls = {part: report.calls for part, report in handle.report().components.items()}
        twin = TinyPipeline(type(tiny.pipe)(**{**tiny.pipe.components, **copies}), tiny.arguments)
        assert all(traces(module) == [] for module in copies.values())
        assert torch.equal(twin.run(2), native)
        assert {part: report.calls for part, report in handle.report().components.items()} == calls
        with ditattn.install(twin.pipe, "block_sparse_attn", **SPARSE) as second:
            twin.run(2)
        assert next(iter(second.report().components.values())).sparse > 0
        # the original is still served
        assert not torch.equal(tiny.run(2), native)
    assert footprint(tiny.pipe) == before
    # the original is undone, and the copy needs nothing of it
    assert torch.equal(twin.run(2), native)


def test_other_hooks_of_diffusers_are_copied() -> None:
    tiny = tiny_pipelines.wan()
    tiny.pipe.transformer.enable_layerwise_casting(storage_dtype=torch.float16, compute_dtype=torch.float32)
    others = {path for path, part in tiny.pipe.transformer.named_modules() if hasattr(part, "_diffusers_hook")}
    with ditattn.install(tiny.pipe, "rain_fusion_attn", **SPARSE):
        twin = copy.deepcopy(tiny.pipe.transformer)
    assert {path for path, part in twin.named_modules() if hasattr(part, "_diffusers_hook")} == others


def test_a_hook_of_the_users_own_is_copied() -> None:
    tiny = tiny_pipelines.wan()
    tiny.pipe.transformer.register_forward_pre_hook(print)
    with ditattn.install(tiny.pipe, "rain_fusion_attn", **SPARSE):
        twin = copy.deepcopy(tiny.pipe.transformer)
    assert list(twin._forward_pre_hooks.values()) == [print]
