// What selection and tail know of keys and values: means and variances of 16 tokens, and the mean of a block as a query weighs it. One pass.
#pragma once
#include "attention.h"

namespace {

constexpr int SUB = 16, SUBS = BLOCK / SUB, WIDEST = 128;

// [16][D] in fp32; what is behind the head's last element up to a whole vector is zero.
struct SubBlock {
  alignas(64) float rows[SUB][WIDEST];

  void load(const DitattnTensor& x, const int64_t* tokens, int n, int64_t start, int dtype, int dim) {
    const int size = size_of(dtype);
    for (int t = 0; t < n; t++) {
      const char* row = (const char*)x.data + (start + tokens[t] * x.token_stride) * size;
      int i = 0;
      for (; i + W <= dim; i += W) *(vf*)(rows[t] + i) = load_wide(row + i * size, dtype);
      if (i == dim) continue;
      alignas(64) char last[W * 4] = {};
      memcpy(last, row + i * size, (size_t)(dim - i) * size);
      *(vf*)(rows[t] + i) = load_wide(last, dtype);
    }
  }
};

// A vector of one head, padded like the rows.
struct Row {
  alignas(64) float x[WIDEST] = {};

  // to `dim` floats, times a factor, plus another row times another
  void store(float* out, int dim, float factor, const Row& other, float other_factor) const {
    for (int i = 0; i < dim; i++) out[i] = x[i] * factor + other.x[i] * other_factor;
  }
};

INLINE float dot(const float* a, const float* b, int padded) {
  vf sum{};
  for (int i = 0; i < padded; i += W) sum += *(const vf*)(a + i) * *(const vf*)(b + i);
  float total = 0;
  for (int k = 0; k < W; k++) total += sum[k];
  return total;
}

// total = total * decay + sum of weights[t] * rows[t]
INLINE void weigh(Row& total, float decay, const SubBlock& from, const float* weights, int n, int padded) {
  for (int i = 0; i < padded; i += W) {
    vf sum = *(vf*)(total.x + i) * splat(decay);
    for (int t = 0; t < n; t++) sum += splat(weights[t]) * *(const vf*)(from.rows[t] + i);
    *(vf*)(total.x + i) = sum;
  }
}

// The softmax of a block's scores with the mean query, a sub-block at a time.
struct WeightedBlock {
  Row key, value;
  float peak = -INFINITY, total = 0;

  void add(const SubBlock& k, const SubBlock& v, const Row& query, float scale, int n, int padded) {
    alignas(64) float scores[SUB];
    std::fill(scores, scores + SUB, -INFINITY);
    float higher = peak;
    for (int t = 0; t < n; t++) {
      scores[t] = scale * dot(k.rows[t], query.x, padded);
      if (scores[t] > higher) higher = scores[t];
    }
    for (int i = 0; i < SUB; i += W) *(vf*)(scores + i) = exp2v((*(vf*)(scores + i) - splat(higher)) * splat(LOG2E));
    const float decay = std::exp(peak - higher);
    total *= decay;
    for (int t = 0; t < n; t++) total += scores[t];
    weigh(key, decay, k, scores, n, padded);
    weigh(value, decay, v, scores, n, padded);
    peak = higher;
  }
};

void summarize_block(const DitattnKeySummary& a, int b, int g, int block, const Row& query, float square, SubBlock& k, SubBlock& v) {
  const int dim = a.head_dim, padded = (dim + W - 1) / W * W, blocks = (a.length + BLOCK - 1) / BLOCK;
  const int limit = a.key_lengths ? std::min(std::max(a.key_lengths[b], 0), a.length) : a.length;
  const int64_t* order = a.order ? a.order + g * a.order_stride : nullptr;
  const int64_t key_start = b * a.key.batch_stride + g * a.key.head_stride, value_start = b * a.value.batch_stride + g * a.value.head_stride;
  WeightedBlock weighted;
  int64_t fine = (((int64_t)b * a.heads + g) * blocks + block) * SUBS * dim;
  for (int first = block * BLOCK, part = 0; part < SUBS; part++, first += SUB, fine += dim) {
    const int n = std::min(std::max(limit - first, 0), SUB);
    if (!n) {
      for (float* out : {a.means, a.variances, a.value_means}) std::fill(out + fine, out + fine + dim, 0.f);
      continue;
    }
    int64_t tokens[SUB];
    for (int t = 0; t < n; t++) tokens[t] = order ? order[first + t] : first + t;
    k.load(a.key, tokens, n, key_start, a.dtype, dim);
    v.load(a.value, tokens, n, value_start, a.dtype, dim);
    Row mean, variance, value_mean;
    for (int i = 0; i < padded; i += W) {
      vf keys{}, values{}, squares{};
      for (int t = 0; t < n; t++) keys += *(vf*)(k.rows[t] + i), values += *(vf*)(v.rows[t] + i);
      const vf center = keys / splat((float)n);
      for (int t = 0; t < n; t++) squares += (*(vf*)(k.rows[t] + i) - center) * (*(vf*)(k.rows[t] + i) - center);
      *(vf*)(mean.x + i) = center, *(vf*)(value_mean.x + i) = values / splat((float)n), *(vf*)(variance.x + i) = squares / splat((float)n);
    }
    memcpy(a.means + fine, mean.x, dim * sizeof(float));
    memcpy(a.variances + fine, variance.x, dim * sizeof(float));
    memcpy(a.value_means + fine, value_mean.x, dim * sizeof(float));
    weighted.add(k, v, query, a.scale, n, padded);
  }
  const int64_t coarse = (((int64_t)b * blocks + block) * a.heads + g) * dim;
  const int count = std::min(std::max(limit - block * BLOCK, 0), BLOCK);
  // the tail's key has the weight of the whole block for the mean query: what is missing is added along it
  const float share = count ? 1 / weighted.total : 0;
  const float weight = weighted.peak + std::log(weighted.total) - a.scale * share * dot(weighted.key.x, query.x, padded);
  const float along = count ? (weight - std::log((float)count)) / (a.scale * std::max(square, a.least_square)) : 0;
  weighted.key.store(a.tail_key + coarse, dim, share, query, along);
  weighted.value.store(a.tail_value + coarse, dim, share, query, 0);
}

int key_summary(const DitattnKeySummary& a) {
  const int blocks = (a.length + BLOCK - 1) / BLOCK, padded = (a.head_dim + W - 1) / W * W;
  Team team(a.host);
  team.run(a.num_threads, (int64_t)a.batch * blocks, [&](auto next) {
    SubBlock k, v;
    for (int64_t w; (w = next()) >= 0;) {
      const int b = w / blocks;
      for (int g = 0; g < a.heads; g++) {
        Row query;
        memcpy(query.x, a.mean_query + ((int64_t)b * a.heads + g) * a.head_dim, a.head_dim * sizeof(float));
        summarize_block(a, b, g, w % blocks, query, dot(query.x, query.x, padded), k, v);
      }
    }
  });
  return team.status();
}

}  // namespace
