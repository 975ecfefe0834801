// What every attention kernel shares: packing keys and values once per key head, handing query blocks to threads, reading the plan.
//
// A kernel class provides, for head size D:
//   KEY_BYTES, VALUE_BYTES     size of one packed block
//   SCRATCH_BYTES              working memory of a thread
//   in_place(dtype, tensor)    whether full key blocks are read from the caller's memory
//   pack_key, pack_value       rows of one block -> packed block, rows beyond `kv` zero
//   attend(unit, scratch)      one query block against its visits
//   Thread                     what a thread needs set up while it computes (constructor, destructor)
#pragma once
#include "threads.h"
#include "vec.h"

#include <algorithm>

namespace {

// Consecutive tokens of one head, or in another order: then token r of them is token order[r] of the tensor.
struct Rows {
  char* data;
  int64_t stride;  // bytes
  int dtype;
  const int64_t* order;

  int64_t token(int r) const { return order ? order[r] : r; }
  char* at(int r) const { return data + token(r) * stride; }
};

// A key block as one query block sees it.
struct Visit {
  const char* key;
  int64_t key_stride;  // bytes
  const char* value;   // packed
  int kv;              // real keys, 1..128
  bool diagonal;       // causal and at the query block's own place
};

struct Unit {
  Rows query, out;
  float* lse;          // of token 0 of `out`, or null
  int rows;            // 1..128
  bool negate;         // the scale was negative: use -query
  float scale;         // magnitude
  const Visit* visits;
  int num_visits;
};

template <class Kernel> class Attention {
 public:
  explicit Attention(DitattnAttention& a)
      : a_(a), query_blocks_(blocks(a.query_length)), key_blocks_(blocks(a.key_length)),
        in_place_(!a.order && Kernel::in_place(a.dtype, a.key)), key_slots_(in_place_ ? 1 : key_blocks_) {}

  int run() {
    const int64_t key_heads = (int64_t)a_.batch * a_.key_heads, units = (int64_t)a_.batch * a_.heads * query_blocks_;
    Memory keys(key_heads * key_slots_ * Kernel::KEY_BYTES), values(key_heads * key_blocks_ * Kernel::VALUE_BYTES);
    if (!keys.get() || !values.get()) return DITATTN_NO_MEMORY;
    keys_ = keys.get();
    values_ = values.get();
    schedule_rows();
    Team team(a_.host);
    team.run(a_.num_threads, key_heads * key_blocks_, [&](auto next) { for (int64_t w; (w = next()) >= 0;) pack(w / key_blocks_, w % key_blocks_); });
    team.run(a_.num_threads, units, [&](auto next) {
      Memory scratch(Kernel::SCRATCH_BYTES), visits(key_blocks_ * sizeof(Visit));
      if (!scratch.get() || !visits.get()) return team.fail(DITATTN_NO_MEMORY);
      typename Kernel::Thread thread;
      for (int64_t w; (w = next()) >= 0;) attend(w, (Visit*)visits.get(), scratch.get());
    });
    return team.status();
  }

 private:
  static int blocks(int tokens) { return (tokens + BLOCK - 1) / BLOCK; }

  // Rows of head h from `token` on, in the order of key head g.
  Rows rows(const DitattnTensor& t, int64_t b, int64_t h, int64_t g, int64_t token) const {
    const int size = size_of(a_.dtype);
    const int64_t first = a_.order ? 0 : token;
    char* data = (char*)t.data + (b * t.batch_stride + first * t.token_stride + h * t.head_stride) * size;
    return {data, t.token_stride * size, a_.dtype, a_.order ? a_.order + g * a_.order_stride + token : nullptr};
  }

  int key_head_of(int h) const { return h / (a_.heads / a_.key_heads); }

  int key_length(int b) const { return a_.key_lengths ? std::min(a_.key_lengths[b], a_.key_length) : a_.key_length; }

  int count(int b, int h, int row) const {
    return a_.counts ? a_.counts[b * a_.counts_stride[0] + h * a_.counts_stride[1] + row * a_.counts_stride[2]] : key_blocks_;
  }

  // Values beyond a key length are packed as zeros: their weight is zero, but zero times a NaN in the padding would not be.
  void pack(int64_t key_head, int block) {
    const int b = key_head / a_.key_heads, g = key_head % a_.key_heads, left = key_length(b) - block * BLOCK;
    if (left <= 0) return;
    const int kv = std::min(BLOCK, left), stored = std::min(BLOCK, a_.key_length - block * BLOCK);
    Kernel::pack_value(rows(a_.value, b, g, g, (int64_t)block * BLOCK), kv, values_ + (key_head * key_blocks_ + block) * Kernel::VALUE_BYTES);
    // a short last block is always packed, so that kernels may read whole blocks
    if (!in_place_ || stored < BLOCK)
      Kernel::pack_key(rows(a_.key, b, g, g, (int64_t)block * BLOCK), kv, keys_ + (key_head * key_slots_ + (in_place_ ? 0 : block)) * Kernel::KEY_BYTES);
  }

  // Within a head the long rows come first: the last units of the call are short, and no thread waits long for another.
  void schedule_rows() {
    const int64_t heads = (int64_t)a_.batch * a_.heads;
    schedule_.resize(heads * query_blocks_);
    for (int64_t bh = 0; bh < heads; bh++) {
      const auto first = schedule_.begin() + bh * query_blocks_;
      for (int i = 0; i < query_blocks_; i++) first[i] = i;
      const int b = bh / a_.heads, h = bh % a_.heads;
      auto work = [&](int row) { return a_.causal ? std::min(row + 1, count(b, h, row)) : count(b, h, row); };
      std::stable_sort(first, first + query_blocks_, [&](int x, int y) { return work(x) > work(y); });
    }
  }

  int list_visits(int b, int h, int row, Visit* visits) const {
    const int64_t g = key_head_of(h), key_head = (int64_t)b * a_.key_heads + g;
    const int32_t* kept = a_.indices ? a_.indices + b * a_.indices_stride[0] + h * a_.indices_stride[1] + row * a_.indices_stride[2] : nullptr;
    const int length = key_length(b), total = count(b, h, row);
    int found = 0;
    for (int i = 0; i < total; i++) {
      const int block = kept ? kept[i] : i, kv = std::min(BLOCK, length - block * BLOCK);
      if (kv <= 0 || (a_.causal && block > row)) break;  // blocks ascend
      const bool direct = in_place_ && a_.key_length - block * BLOCK >= BLOCK;
      const Rows own = rows(a_.key, b, g, g, (int64_t)block * BLOCK);
      const char* packed = keys_ + (key_head * key_slots_ + (in_place_ ? 0 : block)) * Kernel::KEY_BYTES;
      const char* value = values_ + (key_head * key_blocks_ + block) * Kernel::VALUE_BYTES;
      visits[found++] = {direct ? own.data : packed, direct ? own.stride : Kernel::KEY_STRIDE, value, kv, a_.causal && block == row};
    }
    return found;
  }

  void attend(int64_t w, Visit* visits, char* scratch) {
    const int64_t bh = w / query_blocks_;
    const int b = bh / a_.heads, h = bh % a_.heads, row = schedule_[w];
    Unit unit;
    unit.query = rows(a_.query, b, h, key_head_of(h), (int64_t)row * BLOCK);
    unit.out = rows(a_.out, b, h, key_head_of(h), (int64_t)row * BLOCK);
    unit.lse = a_.lse ? a_.lse + bh * a_.query_length + (a_.order ? 0 : (int64_t)row * BLOCK) : nullptr;
    unit.rows = std::min(BLOCK, a_.query_length - row * BLOCK);
    unit.negate = a_.scale < 0;
    unit.scale = std::fabs(a_.scale);
    unit.visits = visits;
    unit.num_visits = list_visits(b, h, row, visits);
    if (unit.num_visits) Kernel::attend(unit, scratch);
    else write_nothing(unit);
  }

  void write_nothing(const Unit& unit) const {
    for (int r = 0; r < unit.rows; r++) {
      memset(unit.out.at(r), 0, (size_t)a_.head_dim * size_of(a_.dtype));
      if (unit.lse) unit.lse[unit.out.token(r)] = -INFINITY;
    }
  }

  DitattnAttention& a_;
  const int query_blocks_, key_blocks_;
  const bool in_place_;
  const int64_t key_slots_;  // packed key blocks per head: all of them, or the short last one
  char *keys_ = nullptr, *values_ = nullptr;
  std::vector<int32_t> schedule_;
};

}  // namespace
