// The C interface between the kernels and their Python loader (ditattn/ops/cpu_library.py mirrors these structures field by field).
#pragma once
#include <cstdint>

enum DitattnStatus { DITATTN_OK = 0, DITATTN_NO_MEMORY = 1, DITATTN_BAD_ARGUMENT = 2, DITATTN_INTERRUPTED = 3, DITATTN_NOT_PERMITTED = 4 };
enum DitattnDtype { DITATTN_F32 = 0, DITATTN_BF16 = 1, DITATTN_F16 = 2 };

// [batch, token, head, element]; strides in elements, the last axis is dense.
struct DitattnTensor {
  void* data;
  int64_t batch_stride, token_stride, head_stride;
};

// How a long call stays interruptible: PyEval_SaveThread, PyEval_RestoreThread, PyErr_CheckSignals. The caller holds the GIL.
struct DitattnHost {
  void* (*release)();
  void (*acquire)(void*);
  int (*check_signals)();
};

struct DitattnAttention {
  int64_t struct_bytes;                       // sizeof of the caller's structure, compared before anything else is read
  DitattnTensor query, key, value, out;
  float* lse;                                 // [B, H, S] natural log-sum-exp, or null
  const int32_t *indices, *counts;            // kept key blocks, ascending, and how many of them; null: every block
  int64_t indices_stride[3], counts_stride[3];  // batch, head, query block; 0 where shared
  const int32_t* key_lengths;                 // [B], or null
  const int64_t* order;                       // [S] or [G, S]: token i of the blocks is token order[i] of the tensors; null: token i. Needs S = T
  int32_t batch, heads, key_heads, query_length, key_length, head_dim;
  int32_t dtype;
  int32_t bf16_parts;                         // products of so many bf16 parts of each number, see amx.h; 0: of fp32. fp16 tensors: not 1
  int32_t causal, num_threads;
  float scale;
  int32_t overlapped;                         // with bf16_parts 1 on a tile unit: by the schedule of amx_overlapped.h
  const DitattnHost* host;                    // or null
  int64_t order_stride;                       // from one key head's order to the next; 0 where all share one
  // Means of the key blocks, fp32 [B, N, G, D], which stand in for the blocks that a row drops; null: none. They need a plan and exclude causal.
  DitattnTensor tail_key, tail_value;
  const float* tail_counts;                   // [B, N]: real tokens of each key block
  int64_t tail_counts_stride;                 // batch; 0 where shared
};

struct DitattnBlockMean {
  int64_t struct_bytes;
  DitattnTensor input;
  float* out;                                 // [B, blocks, H, D]
  const int64_t* order;                       // as above
  int32_t batch, length, heads, head_dim, block_size, dtype, num_threads;
  const DitattnHost* host;
  int64_t order_stride, order_group;          // as above, and how many heads share each order
};

struct DitattnKeySummary {
  int64_t struct_bytes;
  DitattnTensor key, value;
  const float* mean_query;                    // [B, G, D]
  float *means, *variances, *value_means;     // [B, G, blocks * 8, D]
  float *tail_key, *tail_value;               // [B, blocks, G, D]
  const int64_t* order;                       // as above
  const int32_t* key_lengths;                 // [B], or null
  int32_t batch, length, heads, head_dim, dtype, num_threads;
  float scale, least_square;                  // the squared length of a mean query counts as this much at least
  const DitattnHost* host;
  int64_t order_stride;                       // as above
};
