// Runs the CPU library over many small shapes in buffers of exactly the right size, for the sanitizers and for targets without torch. With
// the argument "compare" the smaller results are compared with sums in double, with "compare few" at fewer lengths and head sizes 32 and 128 only,
// as without arguments under the thread sanitizer. Built by test_cpu_builds.py.
#include "library.cpp"

#include <cstdio>
#include <cstdlib>
#include <numeric>
#include <vector>

static std::vector<char> tensor(size_t count, int dtype) {
  std::vector<char> bytes(count * size_of(dtype));
  for (size_t i = 0; i < count; i++) {
    const float value = (rand() % 2001 - 1000) / 500.f;
    uint32_t bits;
    memcpy(&bits, &value, 4);
    const uint16_t half = dtype == DITATTN_BF16 ? bits >> 16 : 0x3000 + rand() % 0x800;
    if (dtype == DITATTN_F32) memcpy(&bytes[4 * i], &value, 4);
    else memcpy(&bytes[2 * i], &half, 2);
  }
  return bytes;
}

static DitattnTensor of(std::vector<char>& data, int tokens, int heads, int dim) {
  return {data.data(), (int64_t)tokens * heads * dim, (int64_t)heads * dim, dim};
}

// All numbers of a tensor [token, head, element] in double.
class Wide {
 public:
  Wide(const DitattnTensor& t, int dtype, int64_t tokens, int heads, int dim) : heads_(heads), dim_(dim) {
    for (int64_t token = 0; token < tokens; token++) for (int head = 0; head < heads; head++) for (int d = 0; d < dim; d++) {
      alignas(64) char one[W * 4] = {};
      memcpy(one, (const char*)t.data + (token * t.token_stride + head * t.head_stride + d) * size_of(dtype), size_of(dtype));
      numbers_.push_back(load_wide(one, dtype)[0]);
    }
  }
  const double* row(int64_t token, int head) const { return &numbers_[(token * heads_ + head) * dim_]; }

 private:
  int heads_, dim_;
  std::vector<double> numbers_;
};

// Largest difference from the definition, over the largest output that values up to 2 can give.
static double error_of(const DitattnAttention& a) {
  const int D = a.head_dim, blocks = (a.key_length + BLOCK - 1) / BLOCK;
  const Wide queries(a.query, a.dtype, a.query_length, a.heads, D), keys(a.key, a.dtype, a.key_length, a.key_heads, D);
  const Wide values(a.value, a.dtype, a.key_length, a.key_heads, D), out(a.out, a.dtype, a.query_length, a.heads, D);
  const int means = a.tail_key.data ? blocks : 0;
  const Wide mean_keys(a.tail_key, DITATTN_F32, means, a.key_heads, D), mean_values(a.tail_value, DITATTN_F32, means, a.key_heads, D);
  double worst = 0;
  for (int h = 0; h < a.heads; h++) for (int i = 0; i < a.query_length; i++) {
    const int row = i / BLOCK, total = a.counts ? a.counts[h * a.counts_stride[1] + row] : blocks;
    const int g = h / (a.heads / a.key_heads);
    const int64_t* order = a.order ? a.order + g * a.order_stride : nullptr;
    const int64_t query = order ? order[i] : i;
    std::vector<double> sum(D);
    double weights = 0;
    const auto meet = [&](const double* key, const double* value, double tokens) {
      double score = 0;
      for (int d = 0; d < D; d++) score += queries.row(query, h)[d] * key[d];
      const double weight = tokens * std::exp(score * a.scale);
      weights += weight;
      for (int d = 0; d < D; d++) sum[d] += weight * value[d];
    };
    for (int n = 0; n < total; n++) {
      const int block = a.indices ? a.indices[h * a.indices_stride[1] + row * a.indices_stride[2] + n] : n;
      for (int j = block * BLOCK; j < std::min((block + 1) * BLOCK, a.key_lengths[0]); j++) {
        if (a.causal && j > i) continue;
        const int64_t key = order ? order[j] : j;
        meet(keys.row(key, g), values.row(key, g), 1);
      }
    }
    for (int n = 0; n < means; n++) {
      const int32_t* kept = a.indices + h * a.indices_stride[1] + row * a.indices_stride[2];
      if (a.tail_counts[n] == 0 || std::find(kept, kept + total, n) != kept + total) continue;
      meet(mean_keys.row(n, g), mean_values.row(n, g), a.tail_counts[n]);
    }
    for (int d = 0; d < D; d++) {
      const double error = std::fabs(out.row(query, h)[d] - (weights ? sum[d] / weights : 0)) / 2;
      if (worst == worst && !(error <= worst)) worst = error;  // a NaN too, which then stays
    }
  }
  return worst;
}

// Permutations without a pattern, one after the other.
static std::vector<int64_t> shuffled(int tokens, int orders) {
  std::vector<int64_t> all;
  for (int n = 0; n < orders; n++) {
    std::vector<int64_t> order(tokens);
    std::iota(order.begin(), order.end(), 0);
    for (int i = tokens - 1; i > 0; i--) std::swap(order[i], order[rand() % (i + 1)]);
    all.insert(all.end(), order.begin(), order.end());
  }
  return all;
}

// What a thread that calls a kernel has in its tile registers is as it was when the call ends: another's configuration, or none.
class KeptTiles {
#if defined(DITATTN_TILES)
  TileConfig found_;

 public:
  explicit KeptTiles(bool loaded) {
    if (loaded) found_.palette = 1, found_.rows[0] = 3, found_.row_bytes[0] = 12, load_config(found_);
  }
  ~KeptTiles() { release_tiles(); }
  bool changed() const {
    const TileConfig now = loaded_config();
    return memcmp(&now, &found_, sizeof now) != 0;
  }
#else
 public:
  explicit KeptTiles(bool) {}
  bool changed() const { return false; }
#endif
};

// Of the arithmetic that a dtype may be multiplied in, one after the other from call to call.
static int next_parts(int dtype) {
  static int turn = 0;
  const int most = ditattn_most_bf16_parts();
  std::vector<int> possible{0};
  if (dtype == DITATTN_BF16) possible = {std::min(most, 1)};
  for (int parts = dtype == DITATTN_F32 ? 1 : 2; parts <= most && dtype != DITATTN_BF16; parts++) possible.push_back(parts);
  return possible[turn++ % possible.size()];
}

// With single bf16 numbers on a tile unit: by which schedule, one after the other from call to call. The overlapped one is for calls without
// a log-sum-exp, and takes another way where a score lies far above those of the first keys: then scores are large, of numbers that bf16 has.
static void next_schedule(DitattnAttention& a) {
  static int turn = 0;
  constexpr float scales[] = {0.1f, 0.1f, 1, 4};
  if (a.bf16_parts != 1 || ditattn_most_bf16_parts() < 2 || !(++turn % 4)) return;
  a.overlapped = 1;
  a.lse = nullptr;
  if (a.dtype == DITATTN_BF16 && !a.tail_key.data) a.scale = scales[turn % 4];
}

static bool compare = false;
static int compared = 0;

// `orders`: none, one for all heads, or one for each of as many key heads. `tail`: with means of the key blocks.
static int attend(int dim, int dtype, int queries, int keys, bool sparse, bool causal, int orders, bool tail) {
  const int key_heads = std::max(orders, 1), heads = 2 * key_heads, rows = (queries + 127) / 128, blocks = (keys + 127) / 128;
  auto q = tensor((size_t)queries * heads * dim, dtype), k = tensor((size_t)keys * key_heads * dim, dtype), v = tensor((size_t)keys * key_heads * dim, dtype);
  auto out = tensor((size_t)queries * heads * dim, dtype);
  std::vector<float> lse(heads * queries);
  std::vector<int32_t> indices(heads * rows * blocks, -1), counts(heads * rows), lengths{keys > 3 ? keys - 2 : keys};
  for (int i = 0; i < heads * rows; i++) {
    counts[i] = i % (blocks + 1);
    for (int n = 0; n < counts[i]; n++) indices[i * blocks + n] = blocks - counts[i] + n;
  }
  DitattnAttention a;
  memset(&a, 0, sizeof a);
  a.struct_bytes = sizeof a;
  a.query = of(q, queries, heads, dim), a.key = of(k, keys, key_heads, dim), a.value = of(v, keys, key_heads, dim), a.out = of(out, queries, heads, dim);
  a.lse = lse.data();
  a.key_lengths = lengths.data();
  a.batch = 1, a.heads = heads, a.key_heads = key_heads, a.query_length = queries, a.key_length = keys, a.head_dim = dim;
  a.dtype = dtype, a.causal = causal, a.num_threads = 2, a.scale = 0.1f;
  a.bf16_parts = next_parts(dtype);
  const std::vector<int64_t> order = shuffled(queries, orders);
  if (orders) a.order = order.data(), a.order_stride = orders > 1 ? queries : 0;
  if (sparse) {
    a.indices = indices.data(), a.counts = counts.data();
    a.indices_stride[1] = rows * blocks, a.indices_stride[2] = blocks, a.counts_stride[1] = rows, a.counts_stride[2] = 1;
  }
  if (sparse && ditattn_check_plan(indices.data(), counts.data(), heads * rows, blocks, blocks) != DITATTN_OK) return 1;
  if (orders && ditattn_check_order(order.data(), orders, queries) != DITATTN_OK) return 1;
  auto mean_keys = tensor((size_t)blocks * key_heads * dim, DITATTN_F32), mean_values = tensor((size_t)blocks * key_heads * dim, DITATTN_F32);
  std::vector<float> tokens(blocks);
  for (int n = 0; n < blocks; n++) tokens[n] = n % 5 == 4 ? 0 : 1 + n % 128;
  if (tail) {
    a.tail_key = of(mean_keys, blocks, key_heads, dim), a.tail_value = of(mean_values, blocks, key_heads, dim);
    a.tail_counts = tokens.data();
  }
  next_schedule(a);
  const KeptTiles tiles(causal);
  if (ditattn_attention(&a) != DITATTN_OK) return 1;
  if (tiles.changed()) return printf("the call left another tile configuration than it found\n"), 1;
  if (!compare || (int64_t)queries * keys * dim > (a.overlapped ? 70 * 514 * 128 : 65 * 254 * 64)) return 0;
  compared++;
  const double by_parts[] = {2e-6, 2e-2, 2e-5, 2e-6}, by_dtype[] = {0, 2e-2, 2e-3};
  const double allowed = std::max(by_parts[a.bf16_parts], by_dtype[dtype]), error = error_of(a);
  if (!(error <= allowed)) printf("D %d dtype %d parts %d overlapped %d S %d T %d sparse %d causal %d orders %d tail %d: error %g\n", dim, dtype, a.bf16_parts, a.overlapped, queries, keys, sparse, causal, orders, tail, error);
  return !(error <= allowed);
}

static int mean(int dim, int dtype, int tokens, int orders) {
  const int heads = 6;
  auto x = tensor((size_t)tokens * heads * dim, dtype);
  std::vector<float> out((tokens + 127) / 128 * heads * dim);
  DitattnBlockMean a;
  memset(&a, 0, sizeof a);
  a.struct_bytes = sizeof a;
  a.input = of(x, tokens, heads, dim);
  a.out = out.data();
  const std::vector<int64_t> order = shuffled(tokens, orders);
  if (orders) a.order = order.data(), a.order_stride = orders > 1 ? tokens : 0, a.order_group = heads / orders;
  a.batch = 1, a.length = tokens, a.heads = heads, a.head_dim = dim, a.block_size = 128, a.dtype = dtype, a.num_threads = 2;
  return ditattn_block_mean(&a) != DITATTN_OK;
}

static int summary(int dim, int dtype, int tokens, int orders) {
  const int heads = 6, blocks = (tokens + 127) / 128;
  auto k = tensor((size_t)tokens * heads * dim, dtype), v = tensor((size_t)tokens * heads * dim, dtype);
  std::vector<float> query(heads * dim, 0.1f), fine[3], coarse[2];
  for (auto& x : fine) x.resize((size_t)heads * blocks * 8 * dim);
  for (auto& x : coarse) x.resize((size_t)heads * blocks * dim);
  const std::vector<int32_t> lengths{tokens > 3 ? tokens - 2 : tokens};
  const std::vector<int64_t> order = shuffled(tokens, orders);
  DitattnKeySummary a;
  memset(&a, 0, sizeof a);
  a.struct_bytes = sizeof a;
  a.key = of(k, tokens, heads, dim), a.value = of(v, tokens, heads, dim), a.mean_query = query.data();
  a.means = fine[0].data(), a.variances = fine[1].data(), a.value_means = fine[2].data();
  a.tail_key = coarse[0].data(), a.tail_value = coarse[1].data();
  if (orders) a.order = order.data(), a.order_stride = orders > 1 ? tokens : 0;
  if (tokens % 2) a.key_lengths = lengths.data();
  a.batch = 1, a.length = tokens, a.heads = heads, a.head_dim = dim, a.dtype = dtype, a.num_threads = 2, a.scale = 0.1f, a.least_square = 1e-6f;
  return ditattn_key_summary(&a) != DITATTN_OK;
}

int main(int argc, char**) {
  compare = argc > 1;
  const bool few = argc > 2;
  if (ditattn_init()) return 2;
  int runs = 0, bad = 0;
  // threads share rows, heads and blocks alike at every length: a race shows at a few of them, an access outside only at its own tail
#ifdef __SANITIZE_THREAD__
  constexpr bool threads_only = true;
#else
  constexpr bool threads_only = false;
#endif
  std::vector<int> dims{32, 64, 96, 128}, query_lengths{1, 63, 65, 129, 190}, key_lengths{1, 2, 3, 33, 127, 128, 129, 200, 254, 385};
  if (threads_only || few) dims = {32, 128}, query_lengths = {65, 190}, key_lengths = {3, 129, 254, 385};
  for (int dtype : {0, 1, 2}) {
    for (int dim : dims) for (int queries : query_lengths) for (int keys : key_lengths)
      for (int mode = 0; mode < 5; mode++, runs++) bad += attend(dim, dtype, queries, keys, mode == 4 || mode & 1, mode & 2, 0, mode == 4);
    for (int dim : dims) for (int tokens : {1, 65, 129, 254}) for (int sparse : {0, 1, 2}) for (int orders : {1, 2})
      runs++, bad += attend(dim, dtype, tokens, tokens, sparse, false, orders, sparse == 2);
    if (dtype == DITATTN_BF16) for (int dim : dims) for (int turn = 0; turn < 4; turn++)
      runs++, bad += attend(dim, dtype, 70, 514, false, false, 0, false);
    for (int keys : {127 * 128 + 5, 129 * 128}) runs++, bad += attend(32, dtype, 66, keys, true, false, 0, true);
    for (int dim : {1, 5, 31, 128}) for (int tokens : {1, 127, 128, 300}) for (int orders : {0, 1, 3}) runs++, bad += mean(dim, dtype, tokens, orders);
    for (int dim : {1, 5, 31, 128}) for (int tokens : {1, 17, 128, 301}) for (int orders : {0, 1, 6}) runs++, bad += summary(dim, dtype, tokens, orders);
  }
  printf("%d runs, %d compared, %d bad\n", runs, compared, bad);
  return bad != 0;
}
