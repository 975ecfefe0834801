// Means of blocks of tokens, fp32 sums, one pass over the input.
#pragma once
#include "attention.h"

namespace {

// sum[i] += row[i]
INLINE void add_row(float* sum, const char* row, int dtype, int n) {
  const int size = size_of(dtype);
  int i = 0;
  for (; i + W <= n; i += W) *(vfu*)(sum + i) = *(vfu*)(sum + i) + load_wide(row + i * size, dtype);
  if (i == n) return;
  alignas(64) char last[W * 4] = {};
  memcpy(last, row + i * size, (size_t)(n - i) * size);
  const vf x = load_wide(last, dtype);
  for (int k = 0; i + k < n; k++) sum[i + k] += x[k];
}

int block_mean(const DitattnBlockMean& a) {
  const int blocks = (a.length + a.block_size - 1) / a.block_size, size = size_of(a.dtype);
  const int64_t width = (int64_t)a.heads * a.head_dim;
  // where all heads of a token lie side by side, a token is one row
  const bool own_orders = a.order && a.order_stride;
  const bool dense_heads = !own_orders && (a.input.head_stride == a.head_dim || a.heads == 1);
  Team team(a.host);
  team.run(a.num_threads, (int64_t)a.batch * blocks, [&](auto next) {
    for (int64_t w; (w = next()) >= 0;) {
      const int64_t b = w / blocks, first = w % blocks * a.block_size;
      const int tokens = std::min<int64_t>(a.block_size, a.length - first);
      float* out = a.out + w * width;
      std::fill(out, out + width, 0.f);
      const char* base = (const char*)a.input.data + b * a.input.batch_stride * size;
      for (int h = 0; h < (dense_heads ? 1 : a.heads); h++) for (int t = 0; t < tokens; t++) {
        const int64_t* order = own_orders ? a.order + h / a.order_group * a.order_stride : a.order;
        const int64_t token = order ? order[first + t] : first + t;
        add_row(out + (int64_t)h * a.head_dim, base + (token * a.input.token_stride + h * a.input.head_stride) * size, a.dtype,
                dense_heads ? (int)width : a.head_dim);
      }
      for (int64_t i = 0; i < width; i++) out[i] /= (float)tokens;
    }
  });
  return team.status();
}

}  // namespace
