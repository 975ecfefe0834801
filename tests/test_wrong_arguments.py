"""Arguments of wrong types: one sentence with the argument's name, what was given, and what would work; never an error from inside."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

import ditattn
import tiny_pipelines
from ditattn.errors import ConfigError, DitattnError, UnknownBackend, UnsupportedCall
from ditattn.ops.pooled_tail import PooledTail
from ditattn.plan.token_order import TokenOrder

Q = torch.randn(1, 300, 2, 64)
PLAN = ditattn.BlockPlan.full(300, 300)
BLOCKS = torch.ones(1, 2, 3, 3, dtype=torch.bool)

# by argument: values of wrong types, and what the sentence says of them
TENSORS = {
    "numpy": (Q.numpy(), "must be a torch.Tensor, not numpy.ndarray: torch.from_numpy makes one"),
    "list": ([1.0], r"must be a torch.Tensor, not list \[1.0\]: torch.tensor makes one"),
    "None": (None, "must be a torch.Tensor, not None"),
    "number": (3, "must be a torch.Tensor, not int 3"),
    "sparse": (Q.to_sparse(), r"must be a dense tensor, not one of layout torch.sparse_coo: \w+.to_dense\(\) makes one"),
    "nested": (
        torch.nested.nested_tensor([torch.randn(3, 2, 64)]),
        "must be a dense tensor, not a nested tensor: torch.nested.to_padded_tensor",
    ),
}
OPTIONAL_TENSORS = {name: case for name, case in TENSORS.items() if name != "None"}
FLAGS = {"text": ("no", "must be True or False, not str 'no'"), "tensor": (torch.tensor(True), "True or False, not torch.Tensor")}
SCALES = {
    "text": ("1", "scale must be a number or None, not str '1'"),
    "complex": (1j, "not complex 1j"),
    "list": ([1], "not list"),
    "one for each head": (torch.ones(2), "scale must be one number or None, not torch.Tensor"),
    "array": (np.ones(2), "scale must be one number or None, not numpy.ndarray"),
    "without a value": (torch.tensor(1.0, device="meta"), "scale must be one number or None, not torch.Tensor"),
}
NAMES = {
    "number": (3, "implementation must be a name, several in a list, or None, not int 3"),
    "numbers": ([3], r"implementation must be a name, several in a list, or None, not list \[3\]"),
    "set": ({"torch"}, "not set {'torch'}"),
}
ATTENTION = {
    **dict.fromkeys(("query", "key", "value"), TENSORS),
    "key_lengths": OPTIONAL_TENSORS,
    "causal": FLAGS,
    "scale": SCALES,
    "implementation": NAMES,
}
MASKS = {
    **OPTIONAL_TENSORS,
    "whole numbers": (torch.ones(300, 300, dtype=torch.long), r"must be bool \(True is kept\) or floating .* not torch.int64"),
    "other size": (torch.ones(7, 300), r"must be broadcastable to \[B, H, S, T\] = \[1, 2, 300, 300\], not \[7, 300\]"),
    "five axes": (torch.ones(1, 1, 1, 300, 300), "must be broadcastable"),
    "elsewhere": (torch.ones(300, 300, device="meta"), "must be on cpu as the query is, not on meta"),
}
PLANS = {
    "block mask": (BLOCKS, "plan must be a BlockPlan, not torch.Tensor: BlockPlan.from_mask makes one"),
    "None": (None, "not None"),
    "int64": (
        replace(PLAN, indices=PLAN.indices.long()),
        "bad BlockPlan: indices and counts must be int32, not torch.int64 and torch.int32",
    ),
    "lists": (replace(PLAN, counts=[[[3, 3, 3]]]), "bad BlockPlan: counts must be a torch.Tensor, not list"),
    "elsewhere": (replace(PLAN, counts=PLAN.counts.to("meta")), "bad BlockPlan: .* on one device, not on cpu and meta"),
    "three axes": (replace(PLAN, indices=PLAN.indices[0], counts=PLAN.counts[0]), r"bad BlockPlan: .* must be \[B, H, M, K\]"),
    "no columns": (replace(PLAN, indices=PLAN.indices[..., :0]), "bad BlockPlan: indices need at least one column"),
    "fraction": (
        replace(PLAN, key_length=300.0),
        "bad BlockPlan: lengths and block size must be positive whole numbers, not 300, 300.0, 128",
    ),
    "empty blocks": (replace(PLAN, block_size=0), "bad BlockPlan: .* must be positive whole numbers, not 300, 300, 0"),
}
TOKENS = torch.arange(300)
INDICES = {
    "alone": (TOKENS, None, "the token order has no inverse: forward and inverse are both None, or undo each other"),
    "inverse alone": (None, TOKENS, "the token order has no forward"),
    "int32": (TOKENS.int(), TOKENS.int(), r"token order's forward must be int64 \[300\] or \[G, 300\] .* not torch.int32 \[300\]"),
    "of other tokens": (TOKENS[:200], TOKENS[:200], r"token order's forward must be int64 \[300\] .* not torch.int64 \[200\]"),
    "three axes": (TOKENS[None, None], TOKENS[None, None], r"not torch.int64 \[1, 1, 300\]"),
    "unlike halves": (TOKENS, TOKENS.expand(2, -1), r"token order's inverse must be .* not torch.int64 \[2, 300\]"),
}
ORDERS = {
    "numbers": (TOKENS, "order must be a TokenOrder, not torch.Tensor"),
    **{what: (TokenOrder(*halves, (0, 0), (0, 300), 300), text) for what, (*halves, text) in INDICES.items()},
}
MEANS = PooledTail.of(Q, Q)
TAILS = {
    "number": (3, "tail must be a PooledTail, not int 3: PooledTail.of makes one of key and value"),
    "without means": (replace(MEANS, value=None), "the tail's value must be a torch.Tensor, not None"),
    "without counts": (replace(MEANS, counts=[128, 128, 44]), "the tail's counts must be a torch.Tensor, not list"),
}
SIZES = {
    "text": ("128", "block_size must be a positive whole number, not str '128'"),
    "fraction": (128.0, "not float 128.0"),
    "flag": (True, "not bool True"),
    "zero": (0, "not int 0"),
}
MASKS_OF_BLOCKS = {
    **TENSORS,
    "floating": (BLOCKS.float(), "must be bool, True where the block is kept, not torch.float32"),
}


def dense(**changed: Any) -> object:
    return ditattn.dense_attention(**{"query": Q, "key": Q, "value": Q, **changed})


def sparse(**changed: Any) -> object:
    return ditattn.block_sparse_attention(**{"query": Q, "key": Q, "value": Q, "plan": PLAN, **changed})


def mean(**changed: Any) -> object:
    return ditattn.block_mean(**{"x": Q, **changed})


def from_mask(**changed: Any) -> object:
    return ditattn.BlockPlan.from_mask(**{"mask": BLOCKS, "query_length": 300, "key_length": 300, **changed})


def full(**changed: Any) -> object:
    return ditattn.BlockPlan.full(**{"query_length": 300, "key_length": 300, **changed})


LENGTHS = {
    "text": ("300", "must be a positive whole number, not str '300'"),
    "fraction": (300.0, "must be a positive whole number, not float 300.0"),
    "negative": (-1, "must be a positive whole number, not int -1"),
}

CALLS: dict[str, tuple[Callable[..., object], dict[str, dict[str, tuple[Any, str]]]]] = {
    "dense_attention": (dense, {**ATTENTION, "attn_mask": MASKS}),
    "block_sparse_attention": (sparse, {**ATTENTION, "plan": PLANS, "order": ORDERS, "tail": TAILS}),
    "block_mean": (mean, {"x": TENSORS, "block_size": SIZES, "order": ORDERS, "implementation": NAMES}),
    "BlockPlan.full": (full, {"query_length": LENGTHS, "key_length": LENGTHS, "block_size": SIZES}),
    "BlockPlan.from_mask": (from_mask, {"mask": MASKS_OF_BLOCKS, "block_size": SIZES}),
}


@pytest.mark.parametrize(
    ("function", "argument", "what"),
    [(function, argument, what) for function, (_, wrong) in CALLS.items() for argument, values in wrong.items() for what in values],
)
def test_wrong_types_are_named(function: str, argument: str, what: str) -> None:
    call, wrong = CALLS[function]
    call()
    value, text = wrong[argument][what]
    with pytest.raises(UnsupportedCall, match=text) as caught:
        call(**{argument: value})
    assert argument in str(caught.value).replace("BlockPlan", "plan")
    assert "\n" not in str(caught.value)


def test_numbers_of_other_libraries_are_numbers() -> None:
    expected = dense(scale=0.5)
    assert torch.equal(dense(scale=np.float64(0.5)), expected)
    assert torch.equal(dense(scale=torch.tensor(0.5)), expected)
    assert torch.equal(dense(scale=1), dense(scale=1.0))


@pytest.mark.parametrize(
    ("call", "error", "text"),
    [
        (lambda pipe: ditattn.install(pipe, 3), UnknownBackend, "'3'"),
        (lambda pipe: ditattn.install(pipe, "fa", components=["transformer"]), ConfigError, r"components must be a mapping .* not list"),
        (lambda pipe: ditattn.install(pipe, "fa", strict="no"), ConfigError, "strict must be True or False, not str 'no'"),
        (lambda pipe: ditattn.install(type(pipe), "fa"), ConfigError, "not type"),
        (lambda pipe: ditattn.install(pipe, "rain_fusion_attn", sparsity=[0.5]), ConfigError, "sparsity"),
        (lambda _: ditattn.register(strict=1), ConfigError, "strict must be True or False, not int 1"),
        (lambda _: ditattn.step("first").__enter__(), ConfigError, "step: index must be a whole number, not str 'first'"),
        (lambda _: ditattn.step(1, 5.0).__enter__(), ConfigError, "step: num_steps must be a whole number, not float 5.0"),
    ],
)
def test_wrong_requests_are_named(call: Callable[[Any], object], error: type[DitattnError], text: str) -> None:
    with pytest.raises(error, match=text):
        call(tiny_pipelines.wan().pipe)
