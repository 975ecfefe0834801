"""A denoiser that is split between ranks, seen by one of them: whole sequences whose tokens stand rank by rank."""

from __future__ import annotations

import dataclasses
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from ditattn.backends.registry import load_backend
from ditattn.devices import clock
from ditattn.errors import DenseInStrictMode, UnsupportedCall, UnsupportedModel
from ditattn.models import MODELS, ModelFamily, TokenLayout
from ditattn.models.base import one_stream, prefix_and_rest
from ditattn.plan.split import GatheredRows, GatheredTokens
from ditattn.runtime.attend import attend
from ditattn.runtime.dealing import with_exchange
from ditattn.runtime.forward import Forward
from ditattn.runtime.report import ComponentLog, ComponentReport
from ditattn.runtime.served_model import ServedModel
from ditattn.runtime.split import RankShare, SequenceSplit, rank_share
from ditattn.runtime.stage import DenoisingStage
from ditattn.runtime.step import StepClock

TEXT, FRAMES, ROWS, COLUMNS = 40, 3, 16, 16
VIDEO = FRAMES * ROWS * COLUMNS
ARGUMENTS = {"latents": torch.empty(1, 4, FRAMES, ROWS, COLUMNS), "timestep": 900}
SPLIT = SequenceSplit(2, 1, 0)
SPARSE = {"sparsity": 0.5, "skip_first_steps": 0, "min_tokens": 0}


def _text_behind(config: Any, arguments: Any) -> TokenLayout:
    return TokenLayout(tuple(arguments["latents"].shape), (1, 1, 1), num_suffix_tokens=TEXT)


FAMILY = ModelFamily(
    "Test", ("TestTransformer",), _text_behind, r"blocks\.\d+\.attn", streams=lambda _: (VIDEO, TEXT), num_heads=lambda _: 4
)


def served(
    backend: str,
    split: SequenceSplit | None,
    *tensors: Tensor,
    sparsity: float = 0.5,
    strict: bool = False,
    probe: Any = None,
    token_order: str | None = None,
    **call: Any,
) -> tuple[Tensor, ComponentReport]:
    """One call of a forward that is split so."""
    cls = load_backend(backend)
    keys = {**SPARSE, "sparsity": sparsity, **({} if token_order is None else {"token_order": token_order})}
    values = cls.get_config_cls().from_mapping(keys if cls.is_sparse else {})
    stage = DenoisingStage(StepClock(), strict)
    stage.probe = probe
    stage.models.append(ServedModel("transformer", FAMILY, None, cls, values, ["blocks.0.attn"]))
    forward = stage.enter(stage.models[0], ARGUMENTS, split=split)
    try:
        out = attend(*tensors, **call)
    finally:
        stage.leave(forward)
    return out, stage.report().components["transformer"]


def qkv() -> list[Tensor]:
    generator = torch.Generator().manual_seed(5)
    return [torch.randn(1, VIDEO + TEXT, 2, 32, generator=generator) for _ in range(3)]


GATHERED = GatheredTokens((VIDEO, TEXT), 2)


@pytest.mark.parametrize("backend", ["torch_sdpa", "rain_fusion_attn", "block_sparse_attn", "permuted_sparse_attn"])
@pytest.mark.parametrize("padding", [0, 17])
def test_a_gathered_call_is_the_models(backend: str, padding: int) -> None:
    tensors, tokens = qkv(), GATHERED.tokens()
    mask = (torch.arange(VIDEO + TEXT) < VIDEO + TEXT - padding).view(1, 1, 1, -1) if padding else None
    expected, plain = served(backend, None, *tensors, attn_mask=mask)
    stored = [x[:, tokens] for x in tensors]
    out, report = served(backend, SPLIT, *stored, attn_mask=None if mask is None else mask[..., tokens])
    torch.testing.assert_close(out, expected[:, tokens])
    assert (report.sparse, report.sparse_density, report.dense_reasons) == (plain.sparse, plain.sparse_density, plain.dense_reasons)
    assert report.split == "rank 0 of 2 (Ulysses 2)"


@pytest.mark.parametrize("backend", ["torch_sdpa", "rain_fusion_attn", "block_sparse_attn", "permuted_sparse_attn"])
@pytest.mark.parametrize("padding", [0, 17])
@pytest.mark.parametrize("rank", [0, 1])
def test_a_ranks_queries_see_everybodys_keys(backend: str, padding: int, rank: int) -> None:
    tensors, tokens = qkv(), GATHERED.tokens()
    mask = (torch.arange(VIDEO + TEXT) < VIDEO + TEXT - padding).view(1, 1, 1, -1)
    exact = scaled_dot_product_attention(*(x.transpose(1, 2) for x in tensors), attn_mask=mask).transpose(1, 2)
    q, k, v = (x[:, tokens] for x in tensors)
    part = slice(rank * (VIDEO + TEXT) // 2, (rank + 1) * (VIDEO + TEXT) // 2)
    # it drops no block, and runs sparse all the same
    least = 1e-4 if backend == "permuted_sparse_attn" else 0.01
    masked = {"attn_mask": mask[..., tokens]} if padding else {}
    out, report = served(backend, SequenceSplit(1, 2, rank), q[:, part], k, v, sparsity=least, **masked)
    torch.testing.assert_close(out, exact[:, tokens][:, part])
    assert report.sparse == (backend != "torch_sdpa")
    assert report.split == f"rank {rank} of 2 (ring 2)"


def test_text_and_first_frame_of_a_ranks_queries_stay_whole() -> None:
    q, k, v = (x[:, GATHERED.tokens()] for x in qkv())
    half = (VIDEO + TEXT) // 2
    density = {rank: served("rain_fusion_attn", SequenceSplit(1, 2, rank), q[:, rank * half :][:, :half], k, v)[1] for rank in (0, 1)}
    # of four rows (404 queries in blocks of 128) rank 0 has the first frame in two or more, and both have text in the last
    assert density[0].sparse_density is not None
    assert density[1].sparse_density is not None
    assert density[0].sparse_density > density[1].sparse_density > 0.5


def test_a_mask_with_gaps_stays_with_its_keys() -> None:
    tensors, tokens = qkv(), GATHERED.tokens()
    mask = torch.arange(VIDEO + TEXT).view(1, 1, 1, -1) % 7 > 0
    q, k, v = (x[:, tokens] for x in tensors)
    out, report = served("rain_fusion_attn", SPLIT, q, k, v, attn_mask=mask[..., tokens])
    exact = scaled_dot_product_attention(*(x.transpose(1, 2) for x in tensors), attn_mask=mask).transpose(1, 2)
    torch.testing.assert_close(out, exact[:, tokens])
    assert report.dense_reasons == {"mask with gaps": 1}


@pytest.mark.parametrize("backend", ["rain_fusion_attn", "block_sparse_attn", "permuted_sparse_attn"])
def test_gaps_in_the_text_are_padding_of_a_gathered_call_too(backend: str) -> None:
    tensors, tokens = qkv(), GATHERED.tokens()
    place = torch.arange(VIDEO + TEXT).view(1, 1, 1, -1)
    mask = (place < VIDEO) | (place % 3 > 0)
    expected, plain = served(backend, None, *tensors, attn_mask=mask)
    stored = [x[:, tokens] for x in tensors]
    out, report = served(backend, SPLIT, *stored, attn_mask=mask[..., tokens])
    torch.testing.assert_close(out, expected[:, tokens])
    assert (report.sparse, report.sparse_density) == (plain.sparse, plain.sparse_density)
    assert plain.sparse == 1
    # a rank that keeps its queries has no such order: densely, and counted
    half = (VIDEO + TEXT) // 2
    out, report = served(backend, SequenceSplit(1, 2, 0), stored[0][:, :half], *stored[1:], attn_mask=mask[..., tokens])
    exact = scaled_dot_product_attention(*(x.transpose(1, 2) for x in tensors), attn_mask=mask).transpose(1, 2)
    torch.testing.assert_close(out, exact[:, tokens][:, :half])
    assert report.dense_reasons == {"mask with gaps": 1}


def test_a_row_may_keep_nothing_of_another_ranks_keys(monkeypatch: pytest.MonkeyPatch) -> None:
    """A merge of one call for each rank's keys makes NaN of it."""

    def no_text(_config: Any, arguments: Any) -> TokenLayout:
        return TokenLayout(tuple(arguments["latents"].shape), (1, 1, 1))

    monkeypatch.setitem(globals(), "FAMILY", dataclasses.replace(FAMILY, layout=no_text, streams=lambda _: (VIDEO,)))
    q, k, v = (x[:, :VIDEO] for x in qkv())
    half = VIDEO // 2
    q += 1
    k[:, :half] += 1
    k[:, half:] -= 1
    masks: list[Tensor] = []

    class Look:
        def look(self, forward: Forward, *_: Any) -> None:
            masks.extend(record.plan.to_mask() for record in forward.records if record.plan is not None)

    out, report = served("rain_fusion_attn", SequenceSplit(1, 2, 0), q[:, :half], k, v, probe=Look(), token_order="raster")
    (mask,) = masks
    # three of six blocks of keys are the other rank's
    alone = ~mask[..., 3:].any(-1)
    assert alone[0].any()
    assert report.sparse == 1
    keep = mask.repeat_interleave(128, 2).repeat_interleave(128, 3)[:, :, :half]
    exact = scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q[:, :half], k, v)), attn_mask=keep).transpose(1, 2)
    torch.testing.assert_close(out, exact)


@pytest.mark.parametrize("backend", ["rain_fusion_attn", "block_sparse_attn"])
def test_a_plan_serves_no_other_rank_of_the_same_sizes(backend: str) -> None:
    """Ranks are processes of their own, and yet: a denoiser that is split in the middle of a run makes its plans anew."""
    cls = load_backend(backend)
    config = cls.get_config_cls().from_mapping({**SPARSE, "plan_refresh_steps": 100})
    stage = DenoisingStage(StepClock())
    stage.models.append(ServedModel("transformer", FAMILY, None, cls, config, ["blocks.0.attn"]))
    tensors = [x[:, GATHERED.tokens()] for x in qkv()]
    half = (VIDEO + TEXT) // 2
    parts = [slice(None), slice(None), slice(None), slice(0, half), slice(half, None), slice(half, None)]
    splits = [None, SPLIT, SequenceSplit(2, 1, 1), SequenceSplit(1, 2, 0), SequenceSplit(1, 2, 1), SequenceSplit(1, 2, 1)]
    reused = []
    for step, (split, part) in enumerate(zip(splits, parts, strict=True)):
        forward = stage.enter(stage.models[0], {**ARGUMENTS, "timestep": 900 - 10 * step}, split=split)
        attend(tensors[0][:, part], *tensors[1:])
        stage.leave(forward)
        reused.append(stage.report().components["transformer"].reused_plans)
    assert reused == [0, 0, 0, 0, 0, 1]


@pytest.mark.parametrize("backend", ["torch_sdpa", "rain_fusion_attn"])
def test_a_call_that_nobody_gathered_is_refused(backend: str) -> None:
    q, k, v = (x[:, : (VIDEO + TEXT) // 2] for x in qkv())
    with pytest.raises(UnsupportedCall, match=f"{(VIDEO + TEXT) // 2} of {VIDEO + TEXT} tokens"):
        served(backend, SPLIT, q, k, v)


def test_tokens_that_ranks_cannot_share_equally_are_refused_before_the_first_call() -> None:
    with pytest.raises(UnsupportedCall, match=r"cannot share 40 tokens equally.*ulysses_anything"):
        served("torch_sdpa", SequenceSplit(3, 1, 0), *qkv())
    out, _ = served("torch_sdpa", SequenceSplit(3, 1, 0, even=False), *qkv())
    assert out.isfinite().all()


def test_a_family_that_says_nothing_of_its_streams_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(globals(), "FAMILY", dataclasses.replace(FAMILY, streams=None))
    with pytest.raises(UnsupportedModel, match="Test is not served under context parallelism"):
        served("torch_sdpa", SPLIT, *qkv())


def test_a_model_that_is_never_right_when_split_is_refused_with_the_reason() -> None:
    (hunyuan,) = (family for family in MODELS if family.name == "HunyuanVideo")
    config = SimpleNamespace(num_attention_heads=4, image_condition_type="token_replace")
    with pytest.raises(
        UnsupportedModel, match="HunyuanVideo is not served under context parallelism with image_condition_type='token_replace'"
    ):
        rank_share(SPLIT, hunyuan, config, None)
    config.image_condition_type = "latent_concat"
    assert rank_share(SPLIT, hunyuan, config, None).heads is not None


def test_streams_of_a_text_in_front_and_a_reference_behind() -> None:
    layout = TokenLayout((1, 4, 1, 30, 44), (1, 1, 1), 10, 256)
    assert prefix_and_rest(layout) == (10, 30 * 44 + 256)
    assert one_stream(layout) == (10 + 30 * 44 + 256,)


def test_families_whose_tokens_are_known_to_be_split_have_joint_layers_alone() -> None:
    """Layers of the image alone have other streams, and masks that a model makes anew are not split with the tokens."""
    known = [family for family in MODELS if family.streams is not None]
    assert {"Flux.2", "ChronoEdit"} < {family.name for family in known}
    for family in known:
        assert family.image_only is None
        assert family.key_mask(None, {"attention_mask": torch.ones(1, 3)}) is None


def test_tokens_that_others_have_split_are_counted_as_such(monkeypatch: pytest.MonkeyPatch) -> None:
    q, k, v = (x[:, : (VIDEO + TEXT) // 2] for x in qkv())
    assert served("rain_fusion_attn", None, q, k, v)[1].dense_reasons == {"token count does not match the grid": 1}
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)
    (reason,) = served("rain_fusion_attn", None, q, k, v)[1].dense_reasons
    assert "split between processes that are not known here" in reason
    with pytest.raises(DenseInStrictMode, match="split between processes"):
        served("rain_fusion_attn", None, q, k, v, strict=True)


def test_what_a_method_exchanges_within_a_call_is_time_of_the_exchange_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    now_s = 0.0

    def exchange_rows(x: Tensor, _to_each: list[int], _from_each: list[int]) -> Tensor:
        nonlocal now_s
        now_s += 3.0
        return x

    monkeypatch.setattr(clock.time, "perf_counter", lambda: now_s)
    split = SequenceSplit(1, 2, 0, exchange_rows=exchange_rows)
    share, log = RankShare(rows=GatheredRows(GatheredTokens((8,), 2), 0, 1)), ComponentLog("transformer", "permuted_sparse_attn", {})
    rows = with_exchange(share, split, log).rows
    assert rows is not None
    assert rows.exchange is not None
    with log.stopwatch.measure(torch.device("cpu")):
        now_s += 1.0
        rows.exchange(torch.zeros(1, 4, 1, 8), [2, 2], [2, 2])
    assert (log.stopwatch.total_ms(), log.communication.total_ms()) == (1e3, 3e3)
    # it is no part of what a step's metadata are known by
    assert rows == share.rows
