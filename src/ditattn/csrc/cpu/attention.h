// What every attention kernel shares: packing keys and values once per key head, handing query blocks to threads, reading the plan.
// The means of a pooled tail are packed as further key blocks, which a query block visits last.
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
  const float* bias;   // [128], added to every query's score of a key, -infinity for keys that are hidden; null: nothing
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
        tail_blocks_(a.tail_key.data ? blocks(key_blocks_) : 0), in_place_(!a.order && Kernel::in_place(a.dtype, a.key)),
        own_slots_(in_place_ ? 1 : key_blocks_), key_slots_(own_slots_ + tail_blocks_), value_slots_(key_blocks_ + tail_blocks_) {}

  int run() {
    const int64_t key_heads = (int64_t)a_.batch * a_.key_heads, units = (int64_t)a_.batch * a_.heads * query_blocks_;
    Memory keys(key_heads * key_slots_ * Kernel::KEY_BYTES), values(key_heads * value_slots_ * Kernel::VALUE_BYTES);
    if (!keys.get() || !values.get()) return DITATTN_NO_MEMORY;
    keys_ = keys.get();
    values_ = values.get();
    schedule_rows();
    list_biases();
    Team team(a_.host);
    team.run(a_.num_threads, key_heads * value_slots_, [&](auto next) { for (int64_t w; (w = next()) >= 0;) pack(w / value_slots_, w % value_slots_); });
    team.run(a_.num_threads, units, [&](auto next) {
      Memory scratch(Kernel::SCRATCH_BYTES), visits(value_slots_ * sizeof(Visit)), bias(tail_blocks_ * BLOCK * sizeof(float));
      if (!scratch.get() || !visits.get() || !bias.get()) return team.fail(DITATTN_NO_MEMORY);
      typename Kernel::Thread thread;
      for (int64_t w; (w = next()) >= 0;) attend(w, (Visit*)visits.get(), (float*)bias.get(), scratch.get());
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

  const int32_t* kept_blocks(int b, int h, int row) const {
    return a_.indices ? a_.indices + b * a_.indices_stride[0] + h * a_.indices_stride[1] + row * a_.indices_stride[2] : nullptr;
  }

  char* packed_key(int64_t key_head, int64_t slot) const { return keys_ + (key_head * key_slots_ + slot) * Kernel::KEY_BYTES; }
  char* packed_value(int64_t key_head, int64_t slot) const { return values_ + (key_head * value_slots_ + slot) * Kernel::VALUE_BYTES; }

  // Values beyond a key length are packed as zeros: their weight is zero, but zero times a NaN in the padding would not be.
  void pack(int64_t key_head, int block) {
    if (block >= key_blocks_) return pack_tail(key_head, block - key_blocks_);
    const int b = key_head / a_.key_heads, g = key_head % a_.key_heads, left = key_length(b) - block * BLOCK;
    if (left <= 0) return;
    const int kv = std::min(BLOCK, left), stored = std::min(BLOCK, a_.key_length - block * BLOCK);
    Kernel::pack_value(rows(a_.value, b, g, g, (int64_t)block * BLOCK), kv, packed_value(key_head, block));
    // a short last block is always packed, so that kernels may read whole blocks
    if (!in_place_ || stored < BLOCK)
      Kernel::pack_key(rows(a_.key, b, g, g, (int64_t)block * BLOCK), kv, packed_key(key_head, in_place_ ? 0 : block));
  }

  // 128 means as if they were the tokens of one more key block.
  void pack_tail(int64_t key_head, int chunk) {
    const int b = key_head / a_.key_heads, g = key_head % a_.key_heads, first = chunk * BLOCK, kv = std::min(BLOCK, key_blocks_ - first);
    Kernel::pack_value(means(a_.tail_value, b, g, first), kv, packed_value(key_head, key_blocks_ + chunk));
    Kernel::pack_key(means(a_.tail_key, b, g, first), kv, packed_key(key_head, own_slots_ + chunk));
  }

  static Rows means(const DitattnTensor& t, int64_t b, int64_t g, int64_t first) {
    char* data = (char*)t.data + (b * t.batch_stride + first * t.token_stride + g * t.head_stride) * sizeof(float);
    return {data, t.token_stride * (int64_t)sizeof(float), DITATTN_F32, nullptr};
  }

  // What n tokens add to the score of their mean: log n. Scores are scaled later, so it is divided by the scale here.
  void list_biases() {
    if (!tail_blocks_) return;
    const int64_t row = (int64_t)tail_blocks_ * BLOCK;
    biases_.assign((a_.tail_counts_stride ? a_.batch : 1) * row, -INFINITY);
    for (int64_t i = 0; i < (int64_t)biases_.size(); i++) if (i % row < key_blocks_) {
      const float tokens = a_.tail_counts[i / row * a_.tail_counts_stride + i % row];
      if (tokens > 0) biases_[i] = std::log(tokens) / std::fabs(a_.scale);
    }
  }

  // Long rows come first, in classes of a factor of two over all heads: the last units of the call are short, and no thread waits long for
  // another. Within a class the rows of a head stay together and meet their keys in the caches, again the long ones first.
  void schedule_rows() {
    struct Entry { int64_t unit, head; int length; };
    std::vector<Entry> entries;
    entries.reserve((int64_t)a_.batch * a_.heads * query_blocks_);
    for (int b = 0; b < a_.batch; b++) for (int h = 0; h < a_.heads; h++) for (int row = 0; row < query_blocks_; row++) {
      const int kept = count(b, h, row);
      entries.push_back({(int64_t)entries.size(), (int64_t)b * a_.heads + h, a_.causal ? std::min(row + 1, kept) : kept});
    }
    auto length_class = [](int length) { return length ? 32 - __builtin_clz(length) : 0; };
    std::stable_sort(entries.begin(), entries.end(), [&](const Entry& x, const Entry& y) {
      const int cx = length_class(x.length), cy = length_class(y.length);
      return cx != cy ? cx > cy : x.head != y.head ? x.head < y.head : x.length > y.length;
    });
    for (const Entry& entry : entries) schedule_.push_back(entry.unit);
  }

  int list_visits(int b, int h, int row, Visit* visits) const {
    const int64_t g = key_head_of(h), key_head = (int64_t)b * a_.key_heads + g;
    const int32_t* kept = kept_blocks(b, h, row);
    const int length = key_length(b), total = count(b, h, row);
    int found = 0;
    for (int i = 0; i < total; i++) {
      const int block = kept ? kept[i] : i, kv = std::min(BLOCK, length - block * BLOCK);
      if (kv <= 0 || (a_.causal && block > row)) break;  // blocks ascend
      const bool direct = in_place_ && a_.key_length - block * BLOCK >= BLOCK;
      const Rows own = rows(a_.key, b, g, g, (int64_t)block * BLOCK);
      const char *packed = packed_key(key_head, in_place_ ? 0 : block), *value = packed_value(key_head, block);
      visits[found++] = {direct ? own.data : packed, direct ? own.stride : Kernel::KEY_STRIDE, value, kv, a_.causal && block == row, nullptr};
    }
    return found;
  }

  // The means of the blocks that the row drops, as further visits; `bias` hides those of kept and of empty blocks.
  int list_tail(int b, int h, int row, Visit* visits, float* bias) const {
    const int64_t key_head = (int64_t)b * a_.key_heads + key_head_of(h), columns = (int64_t)tail_blocks_ * BLOCK;
    const float* all = biases_.data() + (a_.tail_counts_stride ? b * columns : 0);
    const int32_t* kept = kept_blocks(b, h, row);
    std::copy(all, all + columns, bias);
    for (int i = 0, total = count(b, h, row); i < total; i++) bias[kept[i]] = -INFINITY;
    int found = 0;
    for (int chunk = 0; chunk < tail_blocks_; chunk++, bias += BLOCK) {
      int kv = BLOCK;
      while (kv > 0 && bias[kv - 1] == -INFINITY) kv--;
      const char *key = packed_key(key_head, own_slots_ + chunk), *value = packed_value(key_head, key_blocks_ + chunk);
      if (kv) visits[found++] = {key, Kernel::KEY_STRIDE, value, kv, false, bias};
    }
    return found;
  }

  void attend(int64_t w, Visit* visits, float* bias, char* scratch) {
    const int64_t bh = schedule_[w] / query_blocks_;
    const int b = bh / a_.heads, h = bh % a_.heads, row = schedule_[w] % query_blocks_;
    Unit unit;
    unit.query = rows(a_.query, b, h, key_head_of(h), (int64_t)row * BLOCK);
    unit.out = rows(a_.out, b, h, key_head_of(h), (int64_t)row * BLOCK);
    unit.lse = a_.lse ? a_.lse + bh * a_.query_length + (a_.order ? 0 : (int64_t)row * BLOCK) : nullptr;
    unit.rows = std::min(BLOCK, a_.query_length - row * BLOCK);
    unit.negate = a_.scale < 0;
    unit.scale = std::fabs(a_.scale);
    unit.visits = visits;
    unit.num_visits = list_visits(b, h, row, visits);
    if (tail_blocks_) unit.num_visits += list_tail(b, h, row, visits + unit.num_visits, bias);
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
  const int tail_blocks_;    // blocks of 128 means
  const bool in_place_;
  // Packed blocks per head. Of keys: all of them, or the short last one, then those of means. Of values: all of them, then those of means.
  const int64_t own_slots_, key_slots_, value_slots_;
  char *keys_ = nullptr, *values_ = nullptr;
  std::vector<int64_t> schedule_;  // (batch, head, query block) as one number, in the order of work
  std::vector<float> biases_;  // [B or 1, tail_blocks_, 128]
};

}  // namespace
