"""Summaries of keys and values, and what it costs to let means stand for blocks: against the formulas spelled out in float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from cases import DEVICES
from ditattn.backends.selection.tail_error import query_groups
from ditattn.errors import UnsupportedCall
from ditattn.ops.pooled_tail import PooledTail
from ditattn.ops.table import CallFacts, explain
from ditattn.ops.tail_estimate import PER_BLOCK, QUERY_GROUPS, SUB_TOKENS, TABLE, KeySummary, key_summary, pure_torch, tail_cost
from ditattn.plan.block_plan import BLOCK_SIZE
from ditattn.plan.bricks import brick_order
from ditattn.plan.token_order import TokenOrder, token_order
from sparse_calls import draw

SCALE = 0.3
NAMES = [
    pytest.param(verdict.implementation.name, device, id=f"{verdict.implementation.name}-{device}")
    for device in DEVICES
    for verdict in explain(TABLE, CallFacts(device, torch.float32, 32))
    if verdict.reason is None
]
every_implementation = pytest.mark.parametrize(("name", "device"), NAMES)


def raster(length: int, device: str = "cpu") -> TokenOrder:
    return token_order("raster", (1, 1, length), device=device)


def drawn(device: str, batch: int, length: int, *heads: int, dim: int = 32) -> list[Tensor]:
    return [draw(batch, length, number, dim, seed=seed).to(device) for seed, number in enumerate(heads)]


def mean_of(q: Tensor, heads: int) -> Tensor:
    return q.float().mean(1).unflatten(1, (heads, -1)).mean(2)


def plain(summary: KeySummary) -> KeySummary:
    """The same with a tail of plain means."""
    counts = summary.counts.unflatten(-1, (-1, PER_BLOCK))
    shares = (counts / counts.sum(-1, keepdim=True).clamp(min=1))[:, None, :, :, None]
    keys, values = ((x.unflatten(2, (-1, PER_BLOCK)) * shares).sum(3).transpose(1, 2) for x in (summary.means, summary.value_means))
    return summary._replace(tail=PooledTail(keys.contiguous(), values.contiguous(), summary.tail.counts))


def costs_of(q: Tensor, k: Tensor, v: Tensor, name: str, order: TokenOrder | None = None, lengths: Tensor | None = None) -> Tensor:
    """With plain means."""
    order = raster(q.shape[1], q.device.type) if order is None else order
    summary = key_summary(mean_of(q, k.shape[2]), k, v, order, lengths, SCALE, implementation=name)
    return tail_cost(query_groups(q, order).means, plain(summary), SCALE, implementation=name)


def spelled_out(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """One head `[S, D]` in float64, group by group and block by block: `[M, N]`."""
    q, k, v = q.double().cpu(), k.double().cpu(), v.double().cpu()
    subs = [(len(x), x.mean(0), y.mean(0), x.var(0, correction=0)) for x, y in zip(k.split(SUB_TOKENS), v.split(SUB_TOKENS), strict=True)]
    whole = [(len(x), x.mean(0), y.mean(0)) for x, y in zip(k.split(BLOCK_SIZE), v.split(BLOCK_SIZE), strict=True)]
    costs = torch.zeros(-(-len(q) // BLOCK_SIZE), len(whole), dtype=torch.float64)
    for m, block in enumerate(q.split(BLOCK_SIZE)):
        groups = list(block.split(BLOCK_SIZE // QUERY_GROUPS))
        groups += [block] * (QUERY_GROUPS - len(groups))
        for group in groups:
            mean = group.mean(0)
            weights = [n * torch.exp(scale * mean @ key + scale**2 / 2 * mean.square() @ var) for n, key, _, var in subs]
            total = sum(weights)
            out = sum(w * value for w, (_, _, value, _) in zip(weights, subs, strict=True)) / total
            for j, (n, key, value) in enumerate(whole):
                mine = range(j * PER_BLOCK, min((j + 1) * PER_BLOCK, len(subs)))
                error = sum(weights[b] * (subs[b][2] - out) for b in mine) - n * torch.exp(scale * mean @ key) * (value - out)
                costs[m, j] += (error / total).square().sum() / QUERY_GROUPS
    return costs


def tolerance(name: str, device: str) -> dict[str, float]:
    """Products in TF32 keep ten bits; the interpreter multiplies in fp32."""
    return {"rtol": 5e-2, "atol": 1e-4} if (name, device) == ("triton", "cuda") else {"rtol": 2e-3, "atol": 1e-8}


@every_implementation
@pytest.mark.parametrize(("batch", "length"), [(1, 256), (1, 300), (1, 517), (2, 90)])
def test_the_estimate_is_the_formula(name: str, device: str, batch: int, length: int) -> None:
    q, k, v = drawn(device, batch, length, 4, 2, 2)
    found = costs_of(q, k, v, name)
    for b in range(batch):
        for h in range(4):
            expected = spelled_out(q[b, :, h], k[b, :, h // 2], v[b, :, h // 2], SCALE)
            torch.testing.assert_close(found[b, h].double().cpu(), expected, **tolerance(name, device))


@every_implementation
@pytest.mark.parametrize("dim", [24, 128])
def test_what_all_keys_and_values_share_changes_nothing(name: str, device: str, dim: int) -> None:
    """A shift of all keys is a factor on all weights, one of all values a shift of the output."""
    # neighbours resemble each other, as they do in videos
    q, k, v = (x.repeat_interleave(10, 1) for x in drawn(device, 1, 30, 2, 2, 2, dim=dim))
    k = k * 4 * dim**-0.5
    found, shifted = costs_of(q, k, v, name), costs_of(q, k + 1, v + 30, name)
    assert float((shifted - found).abs().max()) < 2e-2 * float(found.max())


@every_implementation
def test_padded_keys_count_for_nothing(name: str, device: str) -> None:
    q, k, v = drawn(device, 2, 390, 2, 2, 2)
    lengths = torch.tensor([172, 390], device=device)
    k[0, 172:], v[0, 172:] = torch.nan, torch.inf
    found = key_summary(mean_of(q, 2), k, v, raster(390, device), lengths, SCALE, implementation=name)
    short = key_summary(mean_of(q[:1], 2), k[:1, :172], v[:1, :172], raster(172, device), None, SCALE, implementation=name)
    assert found.tail.counts.tolist() == [[128, 44, 0, 0], [128, 128, 128, 6]]
    assert found.counts.sum(1).tolist() == [172, 390]
    torch.testing.assert_close(found.tail.key[:1, :2], short.tail.key, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(found.tail.value[:1, :2], short.tail.value, rtol=1e-4, atol=1e-4)
    for ours, theirs in zip(found[:3], short[:3], strict=True):
        torch.testing.assert_close(ours[:1, :, : 2 * PER_BLOCK], theirs, rtol=1e-4, atol=1e-5)
    assert all(x.isfinite().all() for x in (*found[:3], found.tail.key, found.tail.value))
    costs = tail_cost(query_groups(q, raster(390, device)).means, found, SCALE, implementation=name)
    alone = tail_cost(query_groups(q[:1], raster(390, device)).means, short, SCALE, implementation=name)
    torch.testing.assert_close(costs[:1, ..., :2], alone, rtol=1e-2, atol=1e-5)
    assert bool((costs[0, ..., 2:] == 0).all())
    assert costs.isfinite().all()


@every_implementation
def test_key_lengths_beyond_the_keys_hide_nothing(name: str, device: str) -> None:
    q, k, v = drawn(device, 2, 140, 2, 2, 2)
    lengths = torch.tensor([145, 140], device=device)
    found = key_summary(mean_of(q, 2), k, v, raster(140, device), lengths, SCALE, implementation=name)
    whole = key_summary(mean_of(q, 2), k, v, raster(140, device), None, SCALE, implementation=name)
    for ours, theirs in zip((*found[:3], found.tail.key), (*whole[:3], whole.tail.key), strict=True):
        torch.testing.assert_close(ours, theirs)


@every_implementation
def test_every_head_has_its_own_order(name: str, device: str) -> None:
    grid = (3, 8, 16)
    q, k, v = drawn(device, 1, 384, 2, 2, 2)
    mean = mean_of(q, 2)
    one, other = (brick_order(brick, grid, device=device) for brick in ((2, 4, 16), (1, 8, 16)))
    both = TokenOrder(torch.stack([one.forward, other.forward]), torch.stack([one.inverse, other.inverse]), one.first_frame, one.video, 384)
    for lengths in (None, torch.tensor([300], device=device)):
        found = key_summary(mean, k, v, both, lengths, SCALE, implementation=name)
        for head, order in enumerate((one, other)):
            part = slice(head, head + 1)
            alone = key_summary(mean[:, part], k[:, :, part], v[:, :, part], order, lengths, SCALE, implementation=name)
            for ours, theirs in zip(found[:3], alone[:3], strict=True):
                torch.testing.assert_close(ours[:, part], theirs, rtol=1e-4, atol=1e-5)
            torch.testing.assert_close(found.tail.key[:, :, part], alone.tail.key, rtol=1e-4, atol=1e-4)
            torch.testing.assert_close(found.tail.value[:, :, part], alone.tail.value, rtol=1e-4, atol=1e-4)


@every_implementation
@pytest.mark.parametrize("shape", [(1, 300), (3, 300), (299,), (2, 301)])
def test_orders_of_other_tokens_or_heads_are_refused(name: str, device: str, shape: tuple[int, ...]) -> None:
    q, k, v = drawn(device, 1, 300, 2, 2, 2)
    index = torch.arange(shape[-1], device=device).expand(shape).contiguous()
    with pytest.raises(UnsupportedCall, match="token order"):
        key_summary(mean_of(q, 2), k, v, TokenOrder(index, index, (0, 0), (0, 300), shape[-1]), None, SCALE, implementation=name)


@every_implementation
def test_autocast_changes_nothing(name: str, device: str) -> None:
    q, k, v = drawn(device, 1, 140, 2, 2, 2)
    plainly = key_summary(mean_of(q, 2), k, v, raster(140, device), None, SCALE, implementation=name)
    with torch.autocast(device, torch.bfloat16):
        found = key_summary(mean_of(q, 2), k, v, raster(140, device), None, SCALE, implementation=name)
    for ours, theirs in zip((*found[:3], found.tail.key), (*plainly[:3], plainly.tail.key), strict=True):
        assert torch.equal(ours, theirs)


@every_implementation
@pytest.mark.parametrize("layout", ["transposed", "strided"])
def test_strides_and_half_types(name: str, device: str, layout: str) -> None:
    q, k, v = drawn(device, 2, 140, 2, 2, 2, dim=64)
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        rounded = [x.to(dtype) for x in (k, v)]
        if layout == "transposed":
            laid = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in rounded]
        else:
            laid = [torch.stack([x, x + 9], -1)[..., 0] for x in rounded]
        found = key_summary(mean_of(q, 2), *laid, raster(140, device), None, SCALE, implementation=name)
        expected = key_summary(mean_of(q, 2), *(x.float() for x in rounded), raster(140, device), None, SCALE, implementation="torch")
        for ours, theirs in zip((*found[:3], found.tail.key), (*expected[:3], expected.tail.key), strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-4)


def sums(mean_query: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """Of one head in float64: every block's logarithm of its whole weight for the mean query `[N]`, and its weighted value `[N, D]`."""
    weights = [(SCALE * block.double() @ mean_query.double()).exp() for block in k.split(BLOCK_SIZE)]
    values = [w @ block.double() / w.sum() for w, block in zip(weights, v.split(BLOCK_SIZE), strict=True)]
    return torch.stack([w.sum().log() for w in weights]), torch.stack(values)


@every_implementation
@pytest.mark.parametrize("length", [256, 140, 90])
@pytest.mark.parametrize("times", [1.0, 20.0])
def test_weight_and_value_of_the_tail_are_exact_for_the_mean_query(name: str, device: str, length: int, times: float) -> None:
    k, v = drawn(device, 2, length, 2, 2)
    mean_query = times * draw(2, 2, 1, 32, seed=3)[:, :, 0].to(device)
    tail = key_summary(mean_query, k, v, raster(length, device), None, SCALE, implementation=name).tail
    for b in range(2):
        for h in range(2):
            log_weight, value = sums(mean_query[b, h], k[b, :, h], v[b, :, h])
            found = SCALE * tail.key[b, :, h] @ mean_query[b, h] + tail.counts[0].log()
            torch.testing.assert_close(found.double(), log_weight, rtol=1e-4, atol=1e-4)
            torch.testing.assert_close(tail.value[b, :, h].double(), value, rtol=1e-4, atol=1e-4)


@every_implementation
def test_a_mean_query_that_says_nothing_gives_plain_means(name: str, device: str) -> None:
    k, v = drawn(device, 1, 140, 1, 1)
    for times in (0.0, 1e-4, 1e-8):
        mean_query = times * torch.ones(1, 1, 32, device=device)
        tail = key_summary(mean_query, k, v, raster(140, device), None, SCALE, implementation=name).tail
        for found, x in ((tail.key, k), (tail.value, v)):
            means = torch.stack([block.mean(0) for block in x[0].split(BLOCK_SIZE)])
            torch.testing.assert_close(found[0], means, rtol=0, atol=2e-3)


@every_implementation
@pytest.mark.parametrize("scale", [0.0, -0.3])
def test_scales_of_zero_and_below(name: str, device: str, scale: float) -> None:
    q, k, v = drawn(device, 1, 140, 2, 2, 2)
    mean = mean_of(q, 2)
    found = key_summary(mean, k, v, raster(140, device), None, scale, implementation=name)
    expected = key_summary(-mean, k, v, raster(140, device), None, -scale, implementation=name)
    torch.testing.assert_close(found.tail.key, expected.tail.key)
    assert found.tail.key.isfinite().all()
    if scale == 0:
        torch.testing.assert_close(found.tail.key, plain(found).tail.key, rtol=1e-4, atol=1e-5)


@every_implementation
def test_a_block_of_equal_tokens_costs_nothing(name: str, device: str) -> None:
    """Its mean is each of its tokens; a block of unlike values with large scores costs most."""
    q, k, v = drawn(device, 1, 512, 1, 1, 1)
    k[:, 128:256], v[:, 128:256] = k[:, 128:129], v[:, 128:129]
    costs = costs_of(q, k, v, name)
    least = float(costs[..., [0, 2, 3]].min())
    assert least > 1e-6
    assert float(costs[..., 1].max()) < 1e-3 * least + tolerance(name, device)["atol"]


@every_implementation
@pytest.mark.parametrize("broken", ["query", "key", "value"])
def test_nan_stays(name: str, device: str, broken: str) -> None:
    """What is not a number is kept, so that it reaches the output as in dense attention."""
    q, k, v = drawn(device, 1, 512, 1, 1, 1)
    {"query": q, "key": k, "value": v}[broken][0, 200, 0, 3] = torch.nan
    costs = costs_of(q, k, v, name)
    seen = costs[0, 0, 1] if broken == "query" else costs[0, 0, :, 1]
    assert bool(seen.isnan().all())


def test_chunks_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    q, k, v = drawn("cpu", 1, 700, 4, 4, 4)
    index = torch.stack([torch.randperm(700, generator=torch.Generator().manual_seed(head)) for head in range(4)])
    for order in (raster(700), TokenOrder(index, index.argsort(-1), (0, 0), (0, 700), 700)):
        groups = query_groups(q, order).means
        before = key_summary(mean_of(q, 4), k, v, order, None, SCALE, implementation="torch")
        costs = tail_cost(groups, before, SCALE, implementation="torch")
        with monkeypatch.context() as patch:
            patch.setattr(pure_torch, "CHUNK", 1)
            again = key_summary(mean_of(q, 4), k, v, order, None, SCALE, implementation="torch")
            assert torch.equal(again.variances, before.variances)
            torch.testing.assert_close(tail_cost(groups, again, SCALE, implementation="torch"), costs)


def test_shapes_without_values() -> None:
    q, k, v = drawn("cpu", 2, 300, 4, 2, 2)
    real = key_summary(mean_of(q, 2), k, v, raster(300), None, SCALE)
    costs = tail_cost(query_groups(q, raster(300)).means, real, SCALE)
    with FakeTensorMode() as mode:
        q, k, v = (mode.from_tensor(x) for x in (q, k, v))
        order = TokenOrder(None, None, (0, 0), (0, 300), 300)
        fake = key_summary(mean_of(q, 2), k, v, order, None, SCALE)
        assert [x.shape for x in (*fake[:4], fake.tail.key)] == [x.shape for x in (*real[:4], real.tail.key)]
        assert tail_cost(query_groups(q, order).means, fake, SCALE).shape == costs.shape == (2, 4, 3, 3)


def test_values_and_lengths_that_do_not_fit_are_refused() -> None:
    q, k, v = drawn("cpu", 1, 300, 2, 2, 2)
    for value, lengths, text in (
        (v.half(), None, "value must be torch.float32"),
        (v[:, 1:], None, r"value must be .* \[1, 300, 2, 32\]"),
        (v, torch.tensor([100.5]), "key_lengths must be int32 or int64"),
        (v, torch.tensor([100, 200]), r"key_lengths must be .* \[1\]"),
    ):
        with pytest.raises(UnsupportedCall, match=text):
            key_summary(mean_of(q, 2), k, value, raster(300), lengths, SCALE)


WRONG_SUMMARIES = {
    "mean query of another dtype": (
        {"mean_query": torch.zeros(2, 2, 32).bfloat16()},
        r"mean_query must be float32 \[2, 2, 32\] .* not torch.bfloat16",
    ),
    "mean query of another batch": ({"mean_query": torch.zeros(1, 2, 32)}, r"mean_query must be float32 \[2, 2, 32\] .* \[1, 2, 32\]"),
    "mean query of other heads": ({"mean_query": torch.zeros(2, 1, 32)}, r"mean_query must be float32 \[2, 2, 32\]"),
    "mean query elsewhere": ({"mean_query": torch.zeros(2, 2, 32, device="meta")}, "mean_query must be .* on cpu, not .* on meta"),
    "value elsewhere": ({"value": torch.zeros(2, 300, 2, 32, device="meta")}, "value must be .* on cpu like key, not .* on meta"),
    "value of another shape": ({"value": torch.zeros(2, 301, 2, 32)}, r"value must be .* \[2, 300, 2, 32\]"),
    "key lengths elsewhere": (
        {"key_lengths": torch.zeros(2, dtype=torch.int32, device="meta")},
        "key_lengths must be .* on cpu, not .* on meta",
    ),
    "no order": ({"order": None}, "order must be a TokenOrder, not None"),
    "scale": ({"scale": float("nan")}, "scale must be finite"),
}


@every_implementation
@pytest.mark.parametrize("what", WRONG_SUMMARIES)
def test_a_summary_refuses_what_does_not_fit_together(name: str, device: str, what: str) -> None:
    """A compiled kernel would read beside the tensors."""
    if device != "cpu":
        pytest.skip("the wrong tensors are on the CPU")
    q, k, v = drawn(device, 2, 300, 2, 2, 2)
    given = {"mean_query": mean_of(q, 2), "key": k, "value": v, "order": raster(300), "key_lengths": None, "scale": SCALE}
    changed, text = WRONG_SUMMARIES[what]
    with pytest.raises(UnsupportedCall, match=text):
        key_summary(**{**given, **changed}, implementation=name)  # type: ignore[arg-type]


@every_implementation
@pytest.mark.parametrize("shape", [(1, 4, 6, 32), (2, 3, 6, 32), (2, 4, 5, 32), (2, 4, 6, 31), (2, 0, 6, 32), (4, 6, 32)])
def test_costs_are_refused_for_groups_of_another_shape(name: str, device: str, shape: tuple[int, ...]) -> None:
    q, k, v = drawn(device, 2, 300, 2, 2, 2)
    summary = key_summary(mean_of(q, 2), k, v, raster(300, device), None, SCALE, implementation="torch")
    with pytest.raises(UnsupportedCall, match="groups must be"):
        tail_cost(torch.zeros(shape, device=device), summary, SCALE, implementation=name)
