"""Selection and sparse calls never wait for the device: nothing reads a tensor's value, so a whole step can be queued or captured."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from ditattn.backends.base import AttentionBackend
from ditattn.backends.permuted_sparse_attn import PermutedSparseAttentionBackend
from ditattn.backends.rain_fusion_attn import RainFusionAttentionBackend
from ditattn.backends.selection import antidiagonal, mean_pool
from ditattn.ops.block_sparse_attention import block_sparse_attention_with_lse
from ditattn.packages import TRITON
from ditattn.plan.block_plan import BlockPlan
from ditattn.plan.token_order import token_order
from sparse_calls import SPARSE_BACKENDS, call, draw

SELECTORS = {"mean_pool": mean_pool.select, "antidiagonal": antidiagonal.select}
READERS = {"aten::_local_scalar_dense", "aten::nonzero", "aten::equal", "aten::is_nonzero", "aten::unique_dim", "aten::_unique2"}


class NoReading(TorchDispatchMode):
    """Fails where a value travels to the host. What happens inside the package's own operations is not seen."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        assert func._schema.name not in READERS, f"{func} reads a value from the device"
        return func(*args, **(kwargs or {}))


class NoSending(TorchDispatchMode):
    """Fails where a tensor goes from one device to another: without pinned memory the host waits for the device there as well."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if func._schema.name in ("aten::_to_copy", "aten::copy_"):
            devices = {x.device for x in (*args, result) if isinstance(x, Tensor)}
            assert len(devices) == 1, f"{func} copies between {devices}"
        return result


def valueless(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """A tensor of torch's meta device: it has no values, and whatever asks for one raises."""
    return torch.empty(*shape, dtype=dtype, device="meta")


def test_the_check_notices_a_read() -> None:
    with NoReading(), pytest.raises(AssertionError, match="reads a value"):
        int(torch.ones(3).sum())
    for read in (Tensor.tolist, Tensor.item, Tensor.nonzero):
        with pytest.raises((RuntimeError, NotImplementedError), match="meta"):
            read(valueless(1))


@pytest.mark.parametrize("backend", SPARSE_BACKENDS, ids=lambda backend: backend.name)
def test_a_whole_sparse_call_reads_nothing(backend: type[AttentionBackend]) -> None:
    grid = (2, 9, 20)
    tensors = [draw(1, 360, 2, 32, seed=i) for i in range(3)]
    # the order of a grid is made once, on the host
    call(backend, *tensors, grid)
    with NoReading():
        out, record = call(backend, *tensors, grid)
    assert record.plan is not None
    assert bool(out.isfinite().all())


@pytest.mark.parametrize("suffix", [0, 40])
def test_a_sparse_step_of_permuted_attention_reads_and_sends_nothing(suffix: int) -> None:
    """Once the orders are chosen."""
    grid = (2, 9, 20)
    impl = PermutedSparseAttentionBackend.get_impl_cls()(2, 32)
    metadata = PermutedSparseAttentionBackend.get_builder_cls()().build(
        current_timestep=20, num_steps=50, raw_latent_shape=(1, 4, *grid), patch_size=1, sparsity=0.5, num_suffix_tokens=suffix
    )
    tensors = [draw(1, 360 + suffix, 2, 32, seed=i) for i in range(3)]
    first = impl.forward(*tensors, metadata)
    with NoReading(), NoSending():
        again = impl.forward(*tensors, metadata)
    assert torch.equal(again, first)


@pytest.mark.parametrize("lengths", [None, "key lengths"])
@pytest.mark.parametrize("selector", SELECTORS)
def test_selection_runs_on_a_device_without_values(selector: str, lengths: str | None) -> None:
    order = token_order("tile", (3, 10, 18))
    query, key = valueless(2, 540, 4, 64), valueless(2, 540, 2, 64)
    protected = order.protected_blocks(128, True, "meta")
    key_lengths = None if lengths is None else valueless(2, dtype=torch.int64)
    plan = SELECTORS[selector](query, key, scale=0.1, sparsity=0.5, protected=protected, key_lengths=key_lengths)
    assert plan.density_tensor().shape == ()
    out, lse = block_sparse_attention_with_lse(query, key, key, plan, key_lengths=key_lengths)
    assert (plan.indices.shape, plan.counts.shape) == ((2, 4, 5, 5), (2, 4, 5))
    assert {x.device.type for x in (plan.indices, plan.counts, out, lse)} == {"meta"}
    assert (out.shape, lse.shape) == ((2, 540, 4, 64), (2, 4, 540))


@pytest.mark.parametrize(("selector", "options"), [("mean_pool", {}), ("antidiagonal", {}), ("antidiagonal", {"causal": True})])
def test_selection_sends_nothing_to_the_device(selector: str, options: dict[str, bool]) -> None:
    query, protected = valueless(1, 540, 2, 64), valueless(5, dtype=torch.bool)
    with NoSending(), pytest.raises(AssertionError, match="copies between"):
        torch.ones(3).to("meta")
    with NoSending():
        SELECTORS[selector](query, query, scale=0.1, sparsity=0.5, protected=protected, **options)


@pytest.mark.skipif(TRITON.missing(), reason=TRITON.sentence())
@pytest.mark.parametrize("causal", [False, True])
def test_the_start_order_of_the_triton_kernel_reads_nothing(causal: bool) -> None:
    from ditattn.ops.block_sparse_attention.triton import start_order

    order = start_order(valueless(1, 3, 7, dtype=torch.int32), 2, 3, causal)
    assert (order.shape, order.dtype, order.device.type) == ((42,), torch.int32, "meta")


def test_selection_compiles_into_one_graph() -> None:
    """No graph break, and the plan is the same as without the compiler."""

    def plan_tensors(query: Tensor, key: Tensor, protected: Tensor) -> tuple[Tensor, Tensor]:
        plan = mean_pool.select(query, key, scale=0.1, sparsity=0.5, protected=protected)
        return plan.indices, plan.counts

    query, key = draw(1, 700, 2, 32), draw(1, 700, 2, 32, seed=1)
    protected = torch.tensor([True, False, False, False, False, False])
    compiled = torch.compile(plan_tensors, backend="eager", fullgraph=True)
    for ours, theirs in zip(compiled(query, key, protected), plan_tensors(query, key, protected), strict=True):
        assert torch.equal(ours, theirs)


def test_a_plan_of_a_mask_has_a_width_that_no_value_decides() -> None:
    sparse, full = torch.zeros(1, 1, 4, 4, dtype=torch.bool), torch.ones(1, 1, 4, 4, dtype=torch.bool)
    assert BlockPlan.from_mask(sparse, 512, 512).indices.shape == BlockPlan.from_mask(full, 512, 512).indices.shape


def test_rain_fusion_needs_no_new_graph_in_the_next_step() -> None:
    """The same shapes in another step give plans of the same shapes: nothing for a compiler or a captured graph to notice."""
    shapes = []
    for step, seed in ((20, 0), (21, 5)):
        record = call(
            RainFusionAttentionBackend, *(draw(1, 360, 2, 32, seed=seed + i) for i in range(3)), (2, 9, 20), current_timestep=step
        )[1]
        assert record.plan is not None
        shapes.append((record.plan.indices.shape, record.plan.counts.shape))
    assert shapes[0] == shapes[1]
