"""Reuse of plans in one layer, for both sparse backends: what a reused plan computes, and what forbids it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import judge
import oracle
from ditattn.backends.base import AttentionBackend, AttentionImpl, CallRecord
from ditattn.plan.reuse import ForwardId
from ditattn.plan.token_order import token_order
from sparse_calls import SPARSE_BACKENDS, draw

GRID = (6, 16, 16)
LENGTH = 6 * 16 * 16
COND, UNCOND = ForwardId(0, "cond"), ForwardId(0, "uncond")
backends = pytest.mark.parametrize("backend", SPARSE_BACKENDS, ids=lambda b: b.name)


class Layer:
    """One layer of a backend, and the plans that it made."""

    def __init__(self, backend: type[AttentionBackend], monkeypatch: pytest.MonkeyPatch, **settings: Any) -> None:
        self.settings = {"sparsity": 0.6, "skip_first_steps": 0, "patch_size": 1, "token_order": "tile", **settings}
        self.backend, self.records, self.made = backend, [], 0
        self.impl: AttentionImpl = backend.get_impl_cls()(2, 32, observer=self.records.append)
        make = self.impl.plan

        def counting(*arguments: Any) -> Any:
            self.made += 1
            return make(*arguments)

        monkeypatch.setattr(self.impl, "plan", counting)

    def __call__(self, qkv: list[Tensor], step: int | None, forward_id: ForwardId = COND, **changes: Any) -> tuple[Tensor, CallRecord]:
        facts = {**self.settings, "raw_latent_shape": (1, 4, *GRID), "current_timestep": step, "forward_id": forward_id, **changes}
        metadata = self.backend.get_builder_cls()().build(**facts)
        out = self.impl.forward(*qkv, metadata)
        return out, self.records[-1]


def inputs(seed: int = 0, batch: int = 1, length: int = LENGTH, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    return [draw(batch, length, 2, 32, seed=3 * seed + i, dtype=dtype) for i in range(3)]


@backends
def test_a_reused_plan_is_that_of_the_earlier_step_and_the_output_is_exact_for_it(
    backend: type[AttentionBackend], monkeypatch: pytest.MonkeyPatch
) -> None:
    layer = Layer(backend, monkeypatch, plan_refresh_steps=2)
    _, first = layer(inputs(0), 0)
    q, k, v = inputs(1)
    out, second = layer([q, k, v], 1)
    assert (first.reused, second.reused, layer.made) == (False, True, 1)
    assert second.plan is first.plan
    own = layer([q, k, v], 2)[1].plan
    assert layer.made == 2
    assert not torch.equal(own.to_mask(), first.plan.to_mask()), "these tokens would have picked other blocks"
    order = token_order("tile", GRID)
    exact = order.undo(oracle.attention(order.apply(q), order.apply(k), order.apply(v), plan=first.plan)[0])
    assert judge.relative_error(out, exact) < 2e-6


@backends
def test_the_same_tokens_give_the_same_output_with_and_without_reuse(
    backend: type[AttentionBackend], monkeypatch: pytest.MonkeyPatch
) -> None:
    qkv = inputs()
    fresh, reusing = Layer(backend, monkeypatch), Layer(backend, monkeypatch, plan_refresh_steps=3, share_plan_between_branches=True)
    for step in range(3):
        for forward_id in (COND, UNCOND):
            assert torch.equal(fresh(qkv, step, forward_id)[0], reusing(qkv, step, forward_id)[0])
    assert (fresh.made, reusing.made) == (6, 1)


CHANGES: dict[str, dict[str, Any]] = {
    "sparsity": {"sparsity": 0.5},
    "order": {"token_order": "raster"},
    "first frame": {"first_frame_sink": False},
    "grid of as many tokens": {"raw_latent_shape": (1, 4, 6, 8, 32)},
    "run": {"forward_id": ForwardId(1, "cond")},
    "prefix": {"raw_latent_shape": (1, 4, 5, 16, 16), "num_prefix_tokens": 256},
    "suffix": {"raw_latent_shape": (1, 4, 5, 16, 16), "num_suffix_tokens": 256},
}


@backends
@pytest.mark.parametrize("changed", CHANGES)
def test_another_setting_or_geometry_makes_a_plan(backend: type[AttentionBackend], changed: str, monkeypatch: pytest.MonkeyPatch) -> None:
    layer = Layer(backend, monkeypatch, plan_refresh_steps=9)
    layer(inputs(), 0)
    assert not layer(inputs(), 1, **CHANGES[changed])[1].reused
    assert layer.made == 2


@pytest.mark.parametrize("setting", [{"threshold": 0.9}, {"keep_sink": False}, {"keep_recent": False}], ids=str)
def test_the_settings_of_the_estimator_count(setting: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    layer = Layer(SPARSE_BACKENDS[0], monkeypatch, plan_refresh_steps=9)
    layer(inputs(), 0)
    assert not layer(inputs(), 1, **setting)[1].reused


@backends
@pytest.mark.parametrize("other", [inputs(batch=2), inputs(dtype=torch.bfloat16)], ids=["batch", "dtype"])
def test_other_tensors_make_a_plan(backend: type[AttentionBackend], other: list[Tensor], monkeypatch: pytest.MonkeyPatch) -> None:
    layer = Layer(backend, monkeypatch, plan_refresh_steps=9)
    layer(inputs(), 0)
    assert not layer(other, 1)[1].reused


@backends
def test_padding_that_the_host_does_not_know_and_unknown_steps_make_a_plan_and_say_so(
    backend: type[AttentionBackend], monkeypatch: pytest.MonkeyPatch
) -> None:
    layer = Layer(backend, monkeypatch, plan_refresh_steps=9, share_plan_between_branches=True)
    lengths = torch.tensor([LENGTH - 9])
    for step in (0, 1):
        assert layer(inputs(), step, key_lengths=lengths)[1].not_reused == "key lengths known to the device only"
    for forward_id in (COND, UNCOND):
        assert layer(inputs(), None, forward_id)[1].not_reused == "step unknown"
    assert layer.made == 4
    # a padded call leaves nothing behind for a whole one
    assert not layer(inputs(), 2)[1].reused
    assert layer(inputs(), 3)[1].not_reused is None


@backends
def test_padding_that_the_host_knows_serves_where_it_is_the_same(backend: type[AttentionBackend], monkeypatch: pytest.MonkeyPatch) -> None:
    layer = Layer(backend, monkeypatch, plan_refresh_steps=9, share_plan_between_branches=True)

    def padded(length: int) -> dict[str, Any]:
        return {"key_lengths": torch.tensor([length]), "known_key_lengths": (length,)}

    first = layer(inputs(), 0, **padded(LENGTH - 9))[1]
    assert layer(inputs(), 0, UNCOND, **padded(LENGTH - 9))[1].plan is first.plan
    assert layer(inputs(), 1, **padded(LENGTH - 9))[1].plan is first.plan
    for changed in (padded(LENGTH - 300), {}):
        assert not layer(inputs(), 1, UNCOND, **changed)[1].reused


@backends
def test_the_end_of_a_run_releases_the_plan(backend: type[AttentionBackend], monkeypatch: pytest.MonkeyPatch) -> None:
    layer = Layer(backend, monkeypatch, plan_refresh_steps=9)
    layer(inputs(), 0)
    layer.impl.end_run()
    assert not layer(inputs(), 1)[1].reused
