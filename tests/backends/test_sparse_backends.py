"""What both sparse backends promise: exactness, schedules, protection of text and first frame, honest records."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

import judge
import oracle
from ditattn.backends.base import AttentionBackend
from ditattn.backends.config import SparseAttentionConfig
from ditattn.backends.sparse import Reason, SparseAttentionMetadata, SparseAttentionMetadataBuilder
from ditattn.errors import ConfigError
from ditattn.plan.token_order import token_order
from sparse_calls import SPARSE_BACKENDS, call, draw

GRID = (3, 24, 20)
LENGTH = 3 * 24 * 20
backends = pytest.mark.parametrize("backend", SPARSE_BACKENDS, ids=lambda b: b.name)


@backends
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("token_order_name", ["tile", "raster"])
def test_output_is_exact_attention_over_the_recorded_plan(
    backend: type[AttentionBackend], dtype: torch.dtype, token_order_name: str
) -> None:
    """Order, plan, kernel and inverse order together: the float64 oracle on the plan that the record shows."""
    q, k, v = (draw(2, LENGTH, heads, 32, seed=i, dtype=dtype) for i, heads in enumerate((4, 2, 2)))
    out, record = call(backend, q, k, v, GRID, token_order=token_order_name)
    assert record.reason is None
    assert out.dtype == dtype
    order = token_order(token_order_name, GRID)
    exact = order.undo(oracle.attention(order.apply(q), order.apply(k), order.apply(v), plan=record.plan)[0])
    assert judge.relative_error(out, exact) < 4 * torch.finfo(dtype).eps
    assert 0 < record.plan.density() < 1


@backends
@pytest.mark.parametrize("prefix", [0, 77])
@pytest.mark.parametrize("suffix", [0, 130])
def test_keeping_everything_equals_dense(backend: type[AttentionBackend], prefix: int, suffix: int) -> None:
    """A sparsity too small to drop one block of 12: the whole sparse road runs and must change nothing."""
    length = LENGTH + prefix + suffix
    q, k, v = (draw(1, length, 2, 32, seed=i) for i in range(3))
    extra: dict[str, Any] = {"num_prefix_tokens": prefix, "num_suffix_tokens": suffix}
    if "block_sparse" in backend.name:
        # floor instead of ceiling: 0.001 drops one block, but the nucleus at a hair below 1 with sparsity 0 drops none of these
        extra |= {"threshold": 1 - 1e-7, "sparsity": 0.0}
    else:
        extra |= {"sparsity": 0.001}
    out, record = call(backend, q, k, v, GRID, **extra)
    assert record.reason is None
    assert record.plan.density() == pytest.approx(1.0)
    assert judge.relative_error(out, oracle.attention(q, k, v)[0]) < 2e-6


@backends
def test_sparsity_zero_is_dense(backend: type[AttentionBackend]) -> None:
    q, k, v = (draw(1, LENGTH, 2, 32, seed=i) for i in range(3))
    out, record = call(backend, q, k, v, GRID, sparsity=0.0)
    assert record.reason == Reason.SPARSITY_ZERO
    assert judge.relative_error(out, oracle.attention(q, k, v)[0]) < 2e-6


SCHEDULES = [
    ({"current_timestep": 9}, Reason.FIRST_STEPS),
    ({"current_timestep": 10}, None),
    ({"current_timestep": 0, "skip_first_steps": 0}, None),
    ({"current_timestep": 18, "num_steps": 20, "skip_last_steps": 2}, Reason.LAST_STEPS),
    ({"current_timestep": 17, "num_steps": 20, "skip_last_steps": 2}, None),
    ({"current_timestep": 25, "num_steps": 20}, None),
    ({"current_timestep": 17, "num_steps": None, "skip_last_steps": 2}, Reason.STEPS_UNKNOWN),
    ({"num_steps": None, "skip_first_steps": "20%"}, Reason.STEPS_UNKNOWN),
    ({"num_steps": None}, Reason.STEPS_UNKNOWN),
    ({"current_timestep": None}, Reason.STEP_UNKNOWN),
    ({"current_timestep": None, "skip_first_steps": 0}, None),
    ({"skip_layers": "3", "layer_index": 3}, Reason.SKIPPED_LAYER),
    ({"skip_layers": "3", "layer_index": 4}, None),
    ({"skip_layers": "3"}, Reason.LAYER_UNKNOWN),
    ({"min_tokens": LENGTH + 1}, Reason.SHORT),
    ({"min_tokens": LENGTH}, None),
    ({"raw_latent_shape": None}, Reason.UNKNOWN_GEOMETRY),
    ({"num_suffix_tokens": 1}, Reason.TOKEN_COUNT),
]


@backends
@pytest.mark.parametrize(("fields", "reason"), SCHEDULES)
def test_when_it_runs_densely(backend: type[AttentionBackend], fields: dict[str, Any], reason: str | None) -> None:
    q, k, v = (draw(1, LENGTH, 1, 32, seed=i) for i in range(3))
    out, record = call(backend, q, k, v, GRID, **fields)
    assert record.reason == reason
    assert (record.plan is None) == (reason is not None)
    if reason is not None:
        assert judge.relative_error(out, oracle.attention(q, k, v)[0]) < 2e-6


@backends
def test_other_key_lengths_run_densely(backend: type[AttentionBackend]) -> None:
    q, k, v = draw(1, LENGTH, 1, 32), draw(1, 77, 1, 32, seed=1), draw(1, 77, 1, 32, seed=2)
    out, record = call(backend, q, k, v, GRID)
    assert record.reason == Reason.UNEQUAL_LENGTHS
    assert judge.relative_error(out, oracle.attention(q, k, v)[0]) < 2e-6


@backends
@pytest.mark.parametrize("token_order_name", ["tile", "raster"])
@pytest.mark.parametrize(("prefix", "suffix"), [(77, 0), (0, 130), (200, 61), (128, 0)])
def test_text_blocks_are_whole(backend: type[AttentionBackend], token_order_name: str, prefix: int, suffix: int) -> None:
    """Every block with a text token, the seam included, attends to all and is attended by all."""
    length = prefix + LENGTH + suffix
    q, k, v = (draw(1, length, 2, 32, seed=i) for i in range(3))
    _, record = call(backend, q, k, v, GRID, token_order=token_order_name, sparsity=0.8, num_prefix_tokens=prefix, num_suffix_tokens=suffix)
    order = token_order(token_order_name, GRID, prefix, suffix)
    tokens = torch.arange(length) if order.forward is None else order.forward
    is_text = (tokens < prefix) | (tokens >= prefix + LENGTH)
    mask = record.plan.to_mask()
    for block in range(mask.shape[-1]):
        if is_text[block * 128 : (block + 1) * 128].any():
            assert bool(mask[..., block].all())
            assert bool(mask[..., block, :].all())
    assert record.plan.density() < 1


@backends
def test_text_decides_over_its_seam(backend: type[AttentionBackend]) -> None:
    """If text keys carry nearly all mass, the sparse output equals the dense one although 80 % is dropped."""
    prefix = 77
    q, k, v = (draw(1, prefix + LENGTH, 2, 32, seed=i) for i in range(3))
    q[..., 0] = 6.0
    k[:, :prefix, :, 0], k[:, prefix:, :, 0] = 30.0, 0.0
    out, record = call(backend, q, k, v, GRID, sparsity=0.8, num_prefix_tokens=prefix)
    assert record.plan.density() < 0.8
    assert judge.relative_error(out, oracle.attention(q, k, v)[0]) < 1e-4


@backends
@pytest.mark.parametrize("sink", [True, False])
def test_first_frame_sink(backend: type[AttentionBackend], sink: bool) -> None:
    grid = (8, 16, 16)
    q, k, v = (draw(1, 2048, 1, 32, seed=i) for i in range(3))
    _, record = call(backend, q, k, v, grid, sparsity=0.9, first_frame_sink=sink)
    mask = record.plan.to_mask()
    assert bool(mask[..., :2, :].all() and mask[..., :2].all()) is sink


@backends
def test_a_single_frame_has_no_first_frame_rule(backend: type[AttentionBackend]) -> None:
    q, k, v = (draw(1, 2048, 1, 32, seed=i) for i in range(3))
    _, record = call(backend, q, k, v, (1, 32, 64), sparsity=0.75)
    assert record.plan.density() < 0.5


@backends
@pytest.mark.parametrize("grid", [(1, 1, 1), (1, 5, 7), (5, 3, 2), (2, 8, 40), (3, 40, 3), (1, 30, 52), (2, 13, 29)])
def test_any_grid_runs(backend: type[AttentionBackend], grid: tuple[int, int, int]) -> None:
    length = grid[0] * grid[1] * grid[2]
    q, k, v = (draw(2, length, 1, 32, seed=i) for i in range(3))
    out, record = call(backend, q, k, v, grid)
    assert record.reason is None
    order = token_order("tile" if "rain" in backend.name else "raster", grid)
    exact = order.undo(oracle.attention(order.apply(q), order.apply(k), order.apply(v), plan=record.plan)[0])
    assert judge.relative_error(out, exact) < 2e-6


@backends
def test_key_lengths_hide_padded_text(backend: type[AttentionBackend]) -> None:
    """Padded keys at the end, different per batch element, never reach a real query's output."""
    suffix = 40
    q, k, v = (draw(2, LENGTH + suffix, 2, 32, seed=i) for i in range(3))
    lengths = torch.tensor([LENGTH + 9, LENGTH + suffix])
    fields = {"num_suffix_tokens": suffix, "sparsity": 0.8, "key_lengths": lengths}
    out, record = call(backend, q, k, v, GRID, **fields)
    assert record.reason is None
    k[0, LENGTH + 9 :] = 1e4
    v[0, LENGTH + 9 :] = 1e4
    poisoned, _ = call(backend, q, k, v, GRID, **fields)
    assert torch.allclose(out[0, :LENGTH], poisoned[0, :LENGTH], atol=1e-6)


@backends
def test_batch_elements_get_their_own_plans(backend: type[AttentionBackend]) -> None:
    """The merged original uses the first element's mask for all."""
    q, k, v = (draw(2, LENGTH, 1, 32, seed=i) for i in range(3))
    out, record = call(backend, q, k, v, GRID, sparsity=0.8)
    assert not torch.equal(record.plan.to_mask()[0], record.plan.to_mask()[1])
    alone, _ = call(backend, q[1:], k[1:], v[1:], GRID, sparsity=0.8)
    assert torch.equal(out[1:], alone)


@backends
@pytest.mark.parametrize("head_size", [16, 20, 72, 88, 256])
def test_heads_that_no_kernel_multiplies_run_sparse_all_the_same(backend: type[AttentionBackend], head_size: int) -> None:
    """Kernels pad them, plain torch takes the others; a density of 1 is dense attention with the scale of the true size."""
    q, k, v = (draw(1, LENGTH, 2, head_size, seed=i) for i in range(3))
    everything, record = call(backend, q, k, v, GRID, sparsity=1e-4)
    assert record.reason is None
    exact = scaled_dot_product_attention(*(x.transpose(1, 2).double() for x in (q, k, v))).transpose(1, 2)
    torch.testing.assert_close(everything.double(), exact, rtol=0, atol=1e-5)
    less, record = call(backend, q, k, v, GRID, sparsity=0.8)
    assert record.plan is not None
    assert record.plan.density() < 0.9
    assert not torch.equal(less, everything)


@backends
@pytest.mark.parametrize(("skip", "sparsity"), [(-1, 0.5), (0, 1.0), (3, -0.1), (-2, 2.0)])
def test_builder_refuses_and_names_both_values(backend: type[AttentionBackend], skip: int, sparsity: float) -> None:
    with pytest.raises(ConfigError, match=rf"skip_first_steps={skip}.*sparsity={sparsity}"):
        backend.get_builder_cls()().build(
            current_timestep=0, raw_latent_shape=(1, 4, 3, 8, 8), patch_size=1, skip_first_steps=skip, sparsity=sparsity
        )


@backends
def test_sparsity_zero_warns_once(
    backend: type[AttentionBackend], caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The original warns at every step."""
    monkeypatch.setattr(SparseAttentionMetadataBuilder, "warned_at_zero", False)
    with caplog.at_level(logging.WARNING, "ditattn"):
        for step in range(5):
            backend.get_builder_cls()().build(current_timestep=step, raw_latent_shape=(1, 4, 3, 8, 8), patch_size=1, sparsity=0.0)
    assert [record.levelname for record in caplog.records] == ["WARNING"]


@backends
def test_builder_divides_the_latents_by_the_patch(backend: type[AttentionBackend]) -> None:
    build = backend.get_builder_cls()().build
    metadata = build(current_timestep=1, raw_latent_shape=(2, 16, 21, 60, 104), patch_size=(1, 2, 2))
    assert metadata.latent_shape == (21, 30, 52)
    assert build(current_timestep=1, raw_latent_shape=(2, 16, 21, 60, 104), patch_size=2).latent_shape == (21, 30, 52)
    assert (metadata.sparsity, metadata.config.skip_first_steps) == (0.75, "auto")
    with pytest.raises(ConfigError, match="smaller than one patch"):
        build(current_timestep=1, raw_latent_shape=(2, 16, 21, 1, 104), patch_size=(1, 2, 2))


@backends
def test_same_input_same_bits(backend: type[AttentionBackend]) -> None:
    q, k, v = (draw(1, LENGTH, 2, 64, seed=i, dtype=torch.bfloat16) for i in range(3))
    assert torch.equal(call(backend, q, k, v, GRID)[0], call(backend, q, k, v, GRID)[0])


@backends
def test_scale_is_used_for_selection_and_attention(backend: type[AttentionBackend]) -> None:
    q, k, v = (draw(1, LENGTH, 1, 32, seed=i) for i in range(3))
    out, record = call(backend, q, k, v, GRID, scale=0.5, token_order="raster")
    assert judge.relative_error(out, oracle.attention(q, k, v, scale=0.5, plan=record.plan)[0]) < 2e-6


@backends
@pytest.mark.parametrize("order", ["tile", "raster"])
@pytest.mark.parametrize("real", [200, 512, 520])
def test_padding_in_the_video_hides_the_same_tokens_in_every_order(backend: type[AttentionBackend], order: str, real: int) -> None:
    """512 video tokens and 16 of text, and a sparsity that drops nothing here: the result is dense attention's."""
    tensors = [draw(1, 528, 2, 32, seed=i) for i in range(3)]
    lengths = torch.tensor([real])
    padding = {"key_lengths": lengths, "known_key_lengths": (real,), "num_suffix_tokens": 16}
    out, record = call(backend, *tensors, (2, 16, 16), sparsity=0.01, token_order=order, **padding)
    assert record.reason == (Reason.PADDED_VIDEO if order == "tile" and real < 512 else None)
    assert judge.relative_error(out, oracle.attention(*tensors, key_lengths=lengths)[0]) < 2e-6


@backends
def test_metadata_holds_the_configuration_and_reads_like_it(backend: type[AttentionBackend]) -> None:
    """Parsed once: the very object that was given, and its keys as attributes."""
    config = backend.get_config_cls().from_mapping({"sparsity": 0.75, "skip_first_steps": "20%", "skip_layers": "1"})
    metadata = backend.get_builder_cls()().build(current_timestep=1, config=config, num_steps=12)
    assert metadata.config is config
    assert {key: getattr(metadata, key) for key in ("sparsity", "min_tokens", "token_order")} == {
        key: getattr(config, key) for key in ("sparsity", "min_tokens", "token_order")
    }
    assert (metadata.skip_first_steps, metadata.skip_last_steps, metadata.skip_layers) == (3, 0, {1})
    with pytest.raises(AttributeError, match="has no attribute 'sparsty'"):
        _ = metadata.sparsty
    with pytest.raises(TypeError, match="sparsty"):
        backend.get_builder_cls()().build(current_timestep=0, sparsty=0.5)


class NearestConfig(SparseAttentionConfig):
    reach: int = 2


@dataclass(frozen=True, kw_only=True)
class NearestMetadata(SparseAttentionMetadata):
    reach: int = 0


def test_keys_of_another_package_reach_its_metadata_with_and_without_a_field() -> None:
    config = NearestConfig.from_mapping({"reach": 5})
    for metadata_cls in (SparseAttentionMetadata, NearestMetadata):
        builder = type("Builder", (SparseAttentionMetadataBuilder,), {"metadata_cls": metadata_cls, "config_cls": NearestConfig})()
        assert builder.build(current_timestep=0, config=config).reach == 5
        assert builder.build(current_timestep=0, reach=7).reach == 7
