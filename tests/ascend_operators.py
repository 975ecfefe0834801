"""Ascend's attention operators as their documentation describes them, on the CPU, with the operators' own argument names.

Each refuses what its documentation forbids, so that a call that would be wrong on the device fails here. Sources, read in 2026-11:
op-plugin `docs/zh/custom_APIs/torch_npu/torch_npu-npu_block_sparse_attention.md`, CANN ops-transformer `aclnnBlockSparseAttention.md` and
`aclnnRainFusionAttention.md`, sgl-kernel-npu `csrc/attentions` (README, `plugin/*.cpp`) and MindIE-SD `csrc/plugin/register_ops.cpp`.
"""

from __future__ import annotations

import torch
from torch import Tensor

NO_PADDING = 2**31 - 1
BLOCK = 128


def demand(condition: bool, what: str) -> None:
    if not condition:
        raise RuntimeError(f"the operator forbids: {what}")


# --- Laser ------------------------------------------------------------------------------------------------------------------------------


def laser(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    atten_mask: Tensor | None = None,
    alibi_mask: Tensor | None = None,
    drop_mask: Tensor | None = None,
    scale_value: float = 1.0,
    head_num: int = 2,
    input_layout: str = "BNSD",
    keep_prob: float = 1.0,
    pre_tokens: int = NO_PADDING,
    next_tokens: int = 1,
    is_highPrecision: bool = True,
) -> tuple[Tensor, Tensor]:
    """`[B, N, S, 128]` fp16 -> log-sum-exp and output, both fp32.

    Scores are stored in fp16 before they are scaled; the last `pre_tokens` key columns are overwritten with -60000.
    """
    demand(query.dtype == key.dtype == value.dtype == torch.float16, f"{query.dtype}")
    demand(input_layout == "BNSD" and query.shape[1] == head_num, "a head count that is not axis 1")
    demand(query.shape[3] == 128, f"head size {query.shape[3]}")
    demand(query.shape[2] % 256 == 0 and key.shape[2] == query.shape[2], f"lengths {query.shape[2]} and {key.shape[2]}")
    demand(all(x.is_contiguous() for x in (query, key, value)), "strided operands")
    demand(all(mask is None for mask in (atten_mask, alibi_mask, drop_mask)), "masks, which it ignores")
    demand(pre_tokens == NO_PADDING or 0 < pre_tokens < 256, f"pre_tokens {pre_tokens}")
    key, value = (x.repeat_interleave(head_num // key.shape[1], 1).float() for x in (key, value))
    scores = (query.float() @ key.transpose(-1, -2)).half().float() * scale_value
    if pre_tokens != NO_PADDING:
        scores[..., -pre_tokens:] = -60000.0
    return scores.logsumexp(-1), scores.softmax(-1) @ value


# --- block-sparse operators -------------------------------------------------------------------------------------------------------------


def attend(query: Tensor, key: Tensor, value: Tensor, keep: Tensor, scale: float, softmax_dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """`[N, S, D]` against `[N2, T, D]` under a token mask `[N, S, T]` -> output, log-sum-exp. Weights are rounded to the values' dtype."""
    key, value = (x.repeat_interleave(query.shape[0] // x.shape[0], 0) for x in (key, value))
    scores = (scale * (query.float() @ key.float().transpose(-1, -2))).masked_fill(~keep, -torch.inf)
    lse = scores.logsumexp(-1)
    weights = (scores - scores.amax(-1, keepdim=True)).to(softmax_dtype).exp()
    total = weights.float().sum(-1, keepdim=True)
    return ((weights.to(value.dtype).float() @ value.float()) / total).to(query.dtype), lse


def tokens(blocks: Tensor, rows: int, columns: int) -> Tensor:
    """A block mask `[..., M, N]` as a token mask `[..., rows, columns]`."""
    return blocks.bool().repeat_interleave(BLOCK, -2)[..., :rows, :].repeat_interleave(BLOCK, -1)[..., :columns]


def _check_halves(query: Tensor, key: Tensor, value: Tensor, head_dims: tuple[int, ...]) -> None:
    demand(query.dtype == key.dtype == value.dtype and query.dtype in (torch.float16, torch.bfloat16), f"{query.dtype}")
    demand(query.shape[-1] == key.shape[-1] and query.shape[-1] in head_dims, f"head size {query.shape[-1]}")
    demand(all(x.is_contiguous() for x in (query, key, value)), "strided operands")


def _check_group(group: int) -> None:
    demand(0 < group < 128 and 128 % group == 0, f"{group} query heads per key head")


def _elements(query: Tensor, key: Tensor, value: Tensor, layout: str, query_lengths: list[int], key_lengths: list[int]):
    """(query, key, value) of every batch element, `[N, S, D]`, cut to its length."""
    if layout == "TND":
        demand(query.shape[0] == sum(query_lengths) and key.shape[0] == sum(key_lengths), "lengths that do not add up")
        parts = (query.split(query_lengths), key.split(key_lengths), value.split(key_lengths))
        yield from ((q.transpose(0, 1), k.transpose(0, 1), v.transpose(0, 1)) for q, k, v in zip(*parts, strict=True))
        return
    for b, (num_queries, num_keys) in enumerate(zip(query_lengths, key_lengths, strict=True)):
        demand(0 < num_queries <= query.shape[2] and 0 < num_keys <= key.shape[2], "lengths beyond the tensors")
        yield query[b, :, :num_queries], key[b, :, :num_keys], value[b, :, :num_keys]


def masked(generation: str, query: Tensor, key: Tensor, value: Tensor, block_sparse_mask: Tensor, block_shape: list[int], **options):
    """BlockSparseAttention on an SoC of `generation`."""
    layout = options["q_input_layout"]
    query_lengths, key_lengths = options["actual_seq_lengths"], options["actual_seq_lengths_kv"]
    demand(layout == options["kv_input_layout"] and layout in ("TND", "BNSD"), f"layout {layout}")
    demand(list(block_shape) == [BLOCK, BLOCK], f"block shape {block_shape}")
    demand(options["inner_precise"] == (4 if generation == "A5" else 0), f"inner_precise {options['inner_precise']} on {generation}")
    demand((query_lengths is None) == (key_lengths is None), "one kind of lengths only")
    _check_halves(query, key, value, (64, 128))
    heads, key_heads = query.shape[1], options["num_key_value_heads"]
    demand(key.shape[1] == key_heads, "a number of key heads that is not that of the keys")
    _check_group(heads // key_heads)
    longest = (max(query_lengths), max(key_lengths)) if layout == "TND" else (query.shape[2], key.shape[2])
    shape = (len(query_lengths), heads, -(-longest[0] // BLOCK), -(-longest[1] // BLOCK))
    demand(tuple(block_sparse_mask.shape) == shape and block_sparse_mask.dtype == torch.int8, f"mask {tuple(block_sparse_mask.shape)}")
    demand(bool(block_sparse_mask.any(-1).all()), "rows without a block: undocumented")
    outs, lses = [], []
    for b, (q, k, v) in enumerate(_elements(query, key, value, layout, query_lengths, key_lengths)):
        out, lse = attend(q, k, v, tokens(block_sparse_mask[b], q.shape[1], k.shape[1]), options["scale_value"], torch.float32)
        outs.append(out)
        lses.append(lse.unsqueeze(-1))
    if layout == "TND":
        outs, lses = ([torch.cat([x.transpose(0, 1) for x in parts])] for parts in (outs, lses))
        return outs[0].contiguous(), lses[0].contiguous()
    return torch.stack(outs), torch.stack(lses)


def indexed(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    select_idx: Tensor,
    select_num_idx: Tensor,
    blockshape: list[int],
    attn_mask: Tensor | None = None,
    actual_seq_qlen: list[int] | None = None,
    actual_seq_kvlen: list[int] | None = None,
    block_table: Tensor | None = None,
    q_input_layout: str = "TND",
    kv_input_layout: str = "TND",
    head_num: int = 1,
    mask_type: int = 0,
    scale: float = 1.0,
    inner_precise: int = 1,
    block_size: int = 0,
) -> tuple[Tensor, Tensor]:
    """RainFusionAttention. Rows of the index list are the query blocks of all batch elements, one element after another."""
    demand(q_input_layout == kv_input_layout == "TND" and query.ndim == 3, "layouts other than TND")
    demand(attn_mask is None and block_table is None and mask_type == 0 and block_size == 0, "masks and tables")
    demand(list(blockshape) == [BLOCK, BLOCK] and inner_precise == 0, "other blocks or an fp16 softmax")
    demand(actual_seq_qlen is not None and actual_seq_kvlen is not None, "missing lengths")
    _check_halves(query, key, value, (64, 128))
    heads = query.shape[1]
    demand(key.shape[1] == head_num, "a head_num that is not that of the keys")
    _check_group(heads // head_num)
    rows = [-(-length // BLOCK) for length in actual_seq_qlen]
    columns = -(-max(actual_seq_kvlen) // BLOCK)
    demand(tuple(select_idx.shape) == (sum(rows), heads, columns) and select_idx.dtype == torch.int64, f"indices {tuple(select_idx.shape)}")
    demand(tuple(select_num_idx.shape) == (sum(rows), heads) and select_num_idx.dtype == torch.int64, "counts of another shape")
    demand(bool((select_num_idx > 0).all()), "rows without a block: undocumented")
    used = torch.arange(columns) < select_num_idx.unsqueeze(-1)
    demand(bool((select_idx[~used] == -1).all()), "unused entries other than -1")
    demand(bool(((select_idx[..., 1:] > select_idx[..., :-1]) | ~used[..., 1:]).all()), "indices that do not ascend")
    blocks = torch.zeros(sum(rows), heads, columns + 1, dtype=torch.bool)
    blocks = blocks.scatter(-1, torch.where(used, select_idx, columns), True)[..., :columns]
    parts = zip(_elements(query, key, value, "TND", actual_seq_qlen, actual_seq_kvlen), blocks.split(rows), strict=True)
    outs = [attend(q, k, v, tokens(b.transpose(0, 1), q.shape[1], k.shape[1]), scale, torch.float32)[0] for (q, k, v), b in parts]
    return torch.cat([out.transpose(0, 1) for out in outs]).contiguous(), query.new_empty(0)


def counted(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    sparse_mask: Tensor,
    sparse_count_table: Tensor,
    input_layout: str = "BNSD",
    sparse_size: int = 128,
    num_heads: int = 1,
    num_key_value_heads: int = 1,
    scale_value: float = 1.0,
    causal: bool = True,
    inner_precise: int = 1,
    pre_tokens: int = 214748647,
    next_tokens: int = 0,
    actual_seq_lengths: list[int] | None = None,
    actual_seq_lengths_kv: list[int] | None = None,
) -> Tensor:
    """Ada block-sparse attention. fp16 computes its softmax in fp16, bf16 in fp32."""
    demand(input_layout == "BNSD" and sparse_size == BLOCK and inner_precise == 1 and not causal, "other layouts, blocks or modes")
    demand(actual_seq_lengths is None and actual_seq_lengths_kv is None, "lengths")
    _check_halves(query, key, value, (64, 128))
    demand(query.shape[1] == num_heads and key.shape[1] == num_key_value_heads, "head counts that are not those of the tensors")
    batch, heads, length, _ = query.shape
    columns = -(-key.shape[2] // BLOCK)
    shape = (batch, heads, -(-length // BLOCK), -(-columns // 32) * 32)
    demand(tuple(sparse_mask.shape) == shape and sparse_mask.dtype == torch.int8, f"mask {tuple(sparse_mask.shape)}")
    demand(not bool(sparse_mask[..., columns:].any()), "padded columns that are not zero")
    demand(sparse_count_table.dtype == torch.int32 and torch.equal(sparse_count_table.long(), sparse_mask.long().sum(-1)), "stale counts")
    demand(bool((sparse_count_table > 0).all()), "rows without a block")
    softmax_dtype = torch.float16 if query.dtype == torch.float16 else torch.float32
    keep = tokens(sparse_mask[..., :columns], length, key.shape[2])
    return torch.stack([attend(query[b], key[b], value[b], keep[b], scale_value, softmax_dtype)[0] for b in range(batch)])


def estimate(
    query: Tensor,
    key: Tensor,
    actual_seq_lengths: list[int] | None = None,
    actual_seq_lengths_kv: list[int] | None = None,
    input_layout: str = "BNSD",
    stride: int = 8,
    sparse_size: int = 128,
    num_heads: int = 1,
    num_key_value_heads: int = 1,
    scale_value: float = 1.0,
    threshold: float = 1.0,
    causal: bool = True,
    keep_sink: bool = True,
    keep_recent: bool = True,
    row_sparse: float = 1.0,
) -> tuple[Tensor, Tensor]:
    """The estimator, not causal: folded scores, fp32 softmax rounded to fp16, block sums, a cut-off that keeps near-ties."""
    demand(input_layout == "BNSD" and sparse_size == BLOCK and stride == 8 and not causal, "other layouts or blocks")
    demand(actual_seq_lengths is None and actual_seq_lengths_kv is None and keep_sink and keep_recent, "lengths, free columns")
    demand(query.dtype == key.dtype and query.dtype in (torch.float16, torch.bfloat16) and query.is_contiguous(), "operands")
    demand(query.shape[1] == num_heads and key.shape[1] == num_key_value_heads, "head counts that are not those of the tensors")
    demand(query.shape[2] == key.shape[2] and key.shape[2] % stride == 0, "unequal lengths or a tail of keys")
    batch, _, length, dim = query.shape
    columns, folds = -(-length // BLOCK), length // stride
    key = key.repeat_interleave(num_heads // num_key_value_heads, 1)
    q = query.float().view(batch, num_heads, folds, stride, dim).flip(3).flatten(3)
    k = key.float().view(batch, num_heads, folds, stride, dim).flatten(3)
    weights = (scale_value * (q @ k.transpose(-1, -2))).softmax(-1).half().float()
    missing = columns * BLOCK // stride - folds
    blocks = torch.nn.functional.pad(weights, (0, missing, 0, missing)).view(batch, num_heads, columns, 16, columns, 16).sum((3, 5))
    mask = torch.zeros(batch, num_heads, columns, -(-columns // 32) * 32, dtype=torch.int8)
    scores = blocks.clone()
    scores[..., 0] = scores[..., -1] = 0
    ranked = scores.sort(-1, descending=True).values
    for place in [(b, h, r) for b in range(batch) for h in range(num_heads) for r in range(columns)]:
        mask[place][:columns] = (scores[place] > _cut(ranked[place], threshold, row_sparse) - 1e-5).to(torch.int8)
    mask[..., 0] = mask[..., columns - 1] = 1
    return mask, mask.sum(-1, dtype=torch.int32)


def _cut(ranked: Tensor, threshold: float, row_sparse: float) -> float:
    """The score of the last kept block of one row."""
    columns, guard = ranked.numel(), 0.0
    kept = columns
    if threshold < 1:
        kept = int((ranked.cumsum(0) < threshold * ranked.sum()).sum()) + 1
        guard = float(ranked[min(kept, columns) - 1])
    limit = float(torch.tensor(row_sparse) * columns)
    if kept > limit and columns >= 10:
        demand(int(limit) >= 1, "a share that rounds down to no block: it reads outside the array")
        guard = float(ranked[int(limit) - 1])
    return guard
