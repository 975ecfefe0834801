"""Our record of signatures, and what the installed packages themselves refuse."""

from __future__ import annotations

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from ascend_calls import BLOCK_SPARSE, LASER
from ditattn.ops.block_sparse_attention import ascend
from ditattn.ops.dense_attention import ascend as dense_ascend
from npu import operators


@pytest.mark.parametrize("name", ["la", "rainfusionattention", "ada_block_sparse_attention", "sparse_block_estimate"])
def test_recorded_signatures_are_those_of_the_operators_relative(name: str) -> None:
    """sgl-kernel-npu's operators come from mindiesd, whose package carries its own signatures."""
    recorded = torch._C.parse_schema(name + operators.ATTENTIONS[name])
    installed = getattr(torch.ops.mindiesd, name).default._schema
    assert str(recorded) == str(installed).removeprefix("mindiesd::")


@pytest.mark.parametrize("name", [*BLOCK_SPARSE, *LASER])
def test_every_provider_finds_its_operator(name: str) -> None:
    provider = getattr(ascend if name in BLOCK_SPARSE else dense_ascend, name)
    assert provider.probe() is None
    assert provider.operator.namespace in str(provider.operator.load())


def test_an_older_operator_of_the_same_name_is_not_mistaken() -> None:
    """mindiesd once called the operator with counts block_sparse_attention, as the one with a mask is called now."""
    counted = ascend.COUNTED_MINDIESD.operator
    found = counted.__class__(**{**vars(counted), "names": ("block_sparse_attention",)})
    assert "has no torch.ops.mindiesd.block_sparse_attention that takes sparse_count_table" in (found.why_not() or "")


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"block_shape": [128, 64]}, "multiple of 128"),
        ({"inner_precise": 1}, "inner_precise must be 0"),
        ({"inner_precise": 4}, "inner_precise must be 0"),
    ],
)
def test_what_torch_npu_refuses(change: dict[str, object], says: str) -> None:
    """The rules that our adapters keep are really there, also that Ascend 950's mode is not open to bfloat16."""
    with FakeTensorMode():
        q = torch.empty(256, 2, 64, dtype=torch.bfloat16, device="npu")
        mask = torch.empty(1, 2, 2, 2, dtype=torch.int8, device="npu")
        options = {"block_shape": [128, 128], "inner_precise": 0, "actual_seq_lengths": [256], "actual_seq_lengths_kv": [256], **change}
        with pytest.raises(RuntimeError, match=says):
            torch.ops.npu.npu_block_sparse_attention(q, q, q, mask, num_key_value_heads=2, **options)
