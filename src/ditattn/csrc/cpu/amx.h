// Attention with bf16 products on CPUs with AMX: the same S^T formulation, with 16 x 16 tiles in place of vectors.
//
// Every operand lies in tiles of 1 KiB (16 rows of 64 bytes), so that a tile load touches 16 consecutive cache lines.
//
// PARTS 1: tensors and weights are rounded to bf16. PARTS 2 and 3: fp32 tensors and weights as sums of that many bf16 parts (bf16_parts.h), for
// products that are nearly those of fp32; 3 and 6 tile products take the place of one ("bf16x3", "bf16x6").
#pragma once
#include "bf16.h"
#include "tiles.h"

namespace {

// Visits that a panel takes in at once: the output is loaded, rescaled and stored once for all of them.
constexpr int VISITS = 2;
constexpr int TILE = 256;                                     // units in a tile
constexpr Layout TILES_OF_PANEL{16, NV * TILE, TILE};         // [row / 16][lane / 16][16][16]

// Which parts of two operands are multiplied: those whose numbers sum to less than PARTS. The others are smaller than the last bit of the last part.
// Each pair shares a part with the one before, so that only two tiles are loaded for it. The first SMALL pairs are summed over all steps before the
// others: added to a sum that has its full size, they would cost a rounding of that size at every step.
template <int PARTS> struct Pairs;
template <> struct Pairs<1> { static constexpr int SMALL = 0, COUNT = 1, A[COUNT] = {0}, B[COUNT] = {0}; };
template <> struct Pairs<2> { static constexpr int SMALL = 0, COUNT = 3, A[COUNT] = {1, 0, 0}, B[COUNT] = {0, 0, 1}; };
template <> struct Pairs<3> { static constexpr int SMALL = 5, COUNT = 6, A[COUNT] = {2, 1, 1, 0, 0, 0}, B[COUNT] = {0, 0, 1, 1, 2, 0}; };

// Tiles 0-3 += (two tiles of A) x (two tiles of B), for pairs FROM .. TO - 1 of their parts, which lie `a_part` and `b_part` units apart.
template <int PARTS, int FROM = Pairs<PARTS>::SMALL, int TO = Pairs<PARTS>::COUNT>
INLINE void four_products(const unit_t* a0, const unit_t* a1, int a_part, const unit_t* b0, const unit_t* b1, int b_part) {
  using Parts = Pairs<PARTS>;
  UNROLL for (int i = FROM; i < TO; i++) {
    const int a = Parts::A[i], b = Parts::B[i];
    const bool new_a = i == FROM || a != Parts::A[i - 1], new_b = i == FROM || b != Parts::B[i - 1];
    if (new_a) tile_load<4>(a0 + a * a_part);
    if (new_b) tile_load<6>(b0 + b * b_part);
    if (new_a) tile_load<5>(a1 + a * a_part);
    if (new_b) tile_load<7>(b1 + b * b_part);
    tile_product<0, 4, 6>();
    tile_product<1, 4, 7>();
    tile_product<2, 5, 6>();
    tile_product<3, 5, 7>();
  }
}

template <int D, int PARTS> struct AmxKernel {
  static constexpr int KS = D / 32;         // steps of 32 elements
  static constexpr int STEPS = BLOCK / 32;  // of 32 keys in a whole block
  // From a part to the next, in units: of a packed block of keys or values, of Q and of P.
  static constexpr int BLOCK_PART = BLOCK * D / 2, Q_PART = KS * NV * TILE, P_PART = VISITS * STEPS * NV * TILE;
  static constexpr int64_t KEY_STRIDE = 0;  // unused: keys are always packed
  // Behind the parts of the keys lies whether one of them is infinite or NaN.
  static constexpr int64_t VALUE_BYTES = PARTS * BLOCK_PART * 4, KEY_BYTES = VALUE_BYTES + (PARTS > 1 ? 64 : 0);
  static constexpr int PANELS = BLOCK / PQ;
  struct Panel {
    alignas(64) unit_t Q[PARTS * Q_PART];   // [D / 32][lane / 16] tiles of 16 pairs by 16 lanes
    alignas(64) float O[D / 16 * NV * TILE];
    Softmax softmax;
    bool infinite;                          // a query element is infinite or NaN
  };
  struct Scratch {
    Panel panels[PANELS];
    alignas(64) float S[VISITS * BLOCK / 16 * NV * TILE];
    alignas(64) unit_t P[PARTS * P_PART];   // [key / 32][lane / 16] tiles of 16 pairs by 16 lanes
  };
  static constexpr size_t SCRATCH_BYTES = sizeof(Scratch);

  // torch keeps a tile configuration per thread between its own calls: leave what was found.
  struct Thread {
    const TileConfig found = loaded_config();
    ~Thread() {
      if (found.palette) load_config(found);
      else release_tiles();
    }
  };

  static bool in_place(int, const DitattnTensor&) { return false; }

  // -> [key / 16][D / 32] tiles of 16 keys by 32 elements
  static void pack_key(Rows key, int kv, char* out) {
    bool infinite = false;
    for (int r = 0; r < BLOCK; r++) for (int d = 0; d < D; d += 32) {
      __m512i parts[PARTS];
      row_parts<PARTS>(key, r, d, kv, parts);
      char* row = out + ((r / 16 * KS + d / 32) * 16 + r % 16) * 64;
      UNROLL for (int p = 0; p < PARTS; p++) _mm512_store_si512(row + p * BLOCK_PART * 4, parts[p]);
      if (PARTS > 1) infinite |= any_infinite(parts[0]);
    }
    if (PARTS > 1) out[VALUE_BYTES] = infinite;
  }

  // -> V^T as [D / 16][key / 32] tiles of 16 elements by 32 keys
  static void pack_value(Rows value, int kv, char* out) {
    alignas(64) uint16_t low[32], high[32];
    for (int i = 0; i < 16; i++) {
      low[2 * i] = i, low[2 * i + 1] = 32 + i;
      high[2 * i] = 16 + i, high[2 * i + 1] = 48 + i;
    }
    const __m512i pick[2] = {_mm512_load_si512(low), _mm512_load_si512(high)};
    for (int s = 0; s < BLOCK / 32; s++) for (int d = 0; d < D; d += 32) for (int half = 0; half < 2; half++) {
      vf r[PARTS][16];
      for (int i = 0; i < 16; i++) {
        const int row = 32 * s + 2 * i;
        __m512i even[PARTS], odd[PARTS];
        row_parts<PARTS>(value, row, d, kv, even), row_parts<PARTS>(value, row + 1, d, kv, odd);
        UNROLL for (int p = 0; p < PARTS; p++) r[p][i] = (vf)_mm512_permutex2var_epi16(even[p], pick[half], odd[p]);
      }
      UNROLL for (int p = 0; p < PARTS; p++) {
        transpose(r[p]);
        vf* tile = (vf*)(out + p * BLOCK_PART * 4 + ((d / 16 + half) * (BLOCK / 32) + s) * 1024);
        UNROLL for (int i = 0; i < 16; i++) tile[i] = r[p][i];
      }
    }
  }

  static void pack_query(const Unit& unit, int first_row, Panel& panel) {
    panel.infinite = false;
    for (int j = 0; j < NV; j++) for (int k = 0; k < KS; k++) {
      vf r[PARTS][16];
      const bool infinite = transposed_query<PARTS>(unit, first_row + 16 * j, 32 * k, r);
      if (PARTS > 1) panel.infinite |= infinite;
      UNROLL for (int p = 0; p < PARTS; p++) UNROLL for (int i = 0; i < 16; i++)
        *(vf*)(panel.Q + p * Q_PART + (k * NV + j) * TILE + i * 16) = r[p][i];
    }
  }

  INLINE const char* fetch_1k(const char* p) {
    UNROLL for (int i = 0; i < 1024; i += 64) _mm_prefetch(p + i, _MM_HINT_T1);
    return p + 1024;
  }

  INLINE void store_four(float* c) {
    tile_store<0>(c), tile_store<1>(c + TILE), tile_store<2>(c + NV * TILE), tile_store<3>(c + (NV + 1) * TILE);
  }

  // S^T of `steps` times 32 keys of one visit, of the first USED parts. Meanwhile the block at `ahead` is brought into the second-level cache.
  template <int USED> static __attribute__((noinline)) void scores(const Visit& visit, const unit_t* Q, float* S, int steps, const char* ahead) {
    for (int s = 0; s < steps; s++) for (int j2 = 0; j2 < NV / 2; j2++) {
      tile_zero<0>(), tile_zero<1>(), tile_zero<2>(), tile_zero<3>();
      const unit_t *a = (const unit_t*)visit.key + 2 * s * KS * TILE, *b = Q + 2 * j2 * TILE;
      if (Pairs<USED>::SMALL) UNROLL for (int k = 0; k < KS; k++)
        four_products<USED, 0, Pairs<USED>::SMALL>(a + k * TILE, a + (KS + k) * TILE, BLOCK_PART, b + k * NV * TILE, b + (k * NV + 1) * TILE, Q_PART);
      UNROLL for (int k = 0; k < KS; k++) {
        four_products<USED>(a + k * TILE, a + (KS + k) * TILE, BLOCK_PART, b + k * NV * TILE, b + (k * NV + 1) * TILE, Q_PART);
        if (ahead) UNROLL for (int p = 0; p < PARTS; p++) ahead = fetch_1k(ahead);
      }
      store_four(S + (2 * s * NV + 2 * j2) * TILE);
    }
  }

  // Infinities have no further parts, and what these add to their scores is NaN: there the first parts alone say what the score is.
  static __attribute__((noinline)) void settle_infinities(const Visit& visit, const unit_t* Q, float* S, int steps) {
    alignas(64) float first[BLOCK / 16 * NV * TILE];
    scores<1>(visit, Q, first, steps, nullptr);
    constexpr int NAN_OR_INFINITE = 0x99;
    for (int i = 0; i < steps * 2 * NV * TILE; i += 16) {
      const __m512 s = _mm512_load_ps(S + i);
      _mm512_store_ps(S + i, _mm512_mask_load_ps(s, _mm512_fpclass_ps_mask(s, NAN_OR_INFINITE), first + i));
    }
  }

  // Each lane's maximum over `tiles` times 16 keys, on top of what is in `best`.
  static __attribute__((noinline)) void take_maximum(const float* S, float* best, int tiles) {
    for (int j = 0; j < NV; j++) {
      __m512 m[4];
      UNROLL for (int i = 0; i < 4; i++) m[i] = _mm512_load_ps(best + 16 * j);
      for (int t = 0; t < tiles; t++) UNROLL for (int i = 0; i < 16; i++)
        m[i % 4] = _mm512_max_ps(_mm512_load_ps(S + (t * NV + j) * TILE + 16 * i), m[i % 4]);
      _mm512_store_ps(best + 16 * j, _mm512_max_ps(_mm512_max_ps(m[0], m[1]), _mm512_max_ps(m[2], m[3])));
    }
  }

  // 2^((S - max) * scale), as accurately as its parts are. For several the difference comes first: it is exact where it matters.
  INLINE __m512 weight(__m512 score, __m512 max, __m512 scale, __m512 offset) {
    if constexpr (PARTS == 1) return exp2_bf16(_mm512_fmadd_ps(score, scale, offset));
    else return (__m512)exp2v((vf)_mm512_mul_ps(_mm512_sub_ps(score, max), scale));
  }

  // P = weights in pairs of keys, and the row sums of the unrounded weights, for `steps` times 32 keys.
  static __attribute__((noinline)) void weights(const float* S, unit_t* P, Softmax& softmax, float scale_log2e, int steps) {
    const __m512 scale = _mm512_set1_ps(scale_log2e);
    for (int j = 0; j < NV; j++) {
      const __m512 max = _mm512_load_ps(softmax.max + 16 * j), offset = _mm512_mul_ps(max, _mm512_set1_ps(-scale_log2e));
      // several parts: what is new is summed on its own, as in accumulate
      const __m512 before = _mm512_load_ps(softmax.sum + 16 * j);
      __m512 sum = PARTS > 1 ? _mm512_setzero_ps() : before;
      for (int t = 0; t < 2 * steps; t++) {
        const float* from = S + (t * NV + j) * TILE;
        unit_t* to = P + (t / 2 * NV + j) * TILE + t % 2 * 128;
        __m512 part = _mm512_setzero_ps();
        UNROLL for (int i = 0; i < 8; i++) {
          const __m512 even = weight(_mm512_load_ps(from + 32 * i), max, scale, offset);
          const __m512 odd = weight(_mm512_load_ps(from + 32 * i + 16), max, scale, offset);
          part = _mm512_add_ps(part, _mm512_add_ps(even, odd));
          __m512i parts[PARTS];
          split<PARTS>(even, odd, parts);
          UNROLL for (int p = 0; p < PARTS; p++) _mm512_store_si512(to + p * P_PART + 16 * i, paired(parts[p]));
        }
        sum = _mm512_add_ps(sum, part);
      }
      _mm512_store_ps(softmax.sum + 16 * j, PARTS > 1 ? _mm512_add_ps(before, sum) : sum);
    }
  }

  // O^T *= alpha
  static __attribute__((noinline)) void rescale(float* O, const float* alpha) {
    for (int j = 0; j < NV; j++) {
      const __m512 factor = _mm512_load_ps(alpha + 16 * j);
      for (int d = 0; d < D / 16; d++) UNROLL for (int i = 0; i < 16; i++) {
        float* o = O + (d * NV + j) * TILE + 16 * i;
        _mm512_store_ps(o, _mm512_mul_ps(_mm512_load_ps(o), factor));
      }
    }
  }

  // O^T = or += V^T . P^T over `steps` times 32 keys of consecutive visits. A single part adds to an output that was rescaled before. Several are
  // summed on their own and then added to the output times alpha: a smaller fp32 error over many blocks.
  static __attribute__((noinline)) void accumulate(const Visit* visits, const unit_t* P, float* O, const float* alpha, bool first, int steps,
                                                   bool fetch, int ahead) {
    for (int d32 = 0; d32 < D / 32; d32++) for (int j2 = 0; j2 < NV / 2; j2++) {
      float* c = O + (2 * d32 * NV + 2 * j2) * TILE;
      if (first || PARTS > 1) tile_zero<0>(), tile_zero<1>(), tile_zero<2>(), tile_zero<3>();
      else tile_load<0>(c), tile_load<1>(c + TILE), tile_load<2>(c + NV * TILE), tile_load<3>(c + (NV + 1) * TILE);
      const auto values = [&](int s) { return (const unit_t*)visits[s / STEPS].value + (2 * d32 * STEPS + s % STEPS) * TILE; };
      if (Pairs<PARTS>::SMALL) for (int s = 0; s < steps; s++) {
        const unit_t *a = values(s), *b = P + (s * NV + 2 * j2) * TILE;
        four_products<PARTS, 0, Pairs<PARTS>::SMALL>(a, a + STEPS * TILE, BLOCK_PART, b, b + TILE, P_PART);
      }
      for (int s = 0; s < steps; s++) {
        const unit_t *a = values(s), *b = P + (s * NV + 2 * j2) * TILE;
        four_products<PARTS>(a, a + STEPS * TILE, BLOCK_PART, b, b + TILE, P_PART);
        // this loop touches 1 KiB of a block for every 1 KiB of its values: the same place in the block `ahead` visits on
        if (fetch) UNROLL for (int p = 0; p < PARTS; p++)
          fetch_1k(visits[s / STEPS + ahead].value + p * BLOCK_PART * 4 + ((d32 * (NV / 2) + j2) * STEPS + s % STEPS) * 1024);
      }
      if (first || PARTS == 1) {
        store_four(c);
      } else {
        alignas(64) float sums[(NV + 2) * TILE];
        store_four(sums);
        for (int row = 0; row < 2; row++) for (int j = 0; j < 2; j++) {
          const __m512 factor = _mm512_load_ps(alpha + 32 * j2 + 16 * j);
          UNROLL for (int i = 0; i < TILE; i += 16) {
            float* o = c + (row * NV + j) * TILE + i;
            _mm512_store_ps(o, _mm512_fmadd_ps(_mm512_load_ps(o), factor, _mm512_load_ps(sums + (row * NV + j) * TILE + i)));
          }
        }
      }
    }
  }

  // How many visits from n on a panel takes in at once. A short one is the last of them, so that the keys of all lie gapless in S and P.
  static int together(const Unit& unit, int n) {
    int number = 1;
    while (number < VISITS && n + number < unit.num_visits && unit.visits[n + number - 1].kv == BLOCK) number++;
    return number;
  }

  // One panel against a few visits, of which only the last can be short or diagonal.
  // `fetch`: as many visits follow; their keys and values, which come from far, are fetched during this work.
  static void attend_some(Scratch& t, Panel& panel, const Visit* visits, int num_visits, bool first, bool fetch, float scale_log2e,
                          int first_lane) {
    alignas(64) float best[PQ], alpha[PQ];
    for (int i = 0; i < PQ; i++) best[i] = -FLT_MAX;
    int steps = 0;
    for (const Visit* visit = visits; visit < visits + num_visits; visit++) {
      const int own = (visit->kv + 31) / 32;
      float* S = t.S + 2 * steps * NV * TILE;
      scores<PARTS>(*visit, panel.Q, S, own, fetch ? visit[num_visits].key : nullptr);
      if (PARTS > 1 && (panel.infinite || visit->key[VALUE_BYTES])) settle_infinities(*visit, panel.Q, S, own);
      if (visit->bias) add_bias(S, TILES_OF_PANEL, visit->bias, own * 32);
      else if (visit->diagonal || visit->kv < own * 32) mask_scores(S, TILES_OF_PANEL, visit->kv, visit->diagonal, first_lane, own * 32);
      take_maximum(S, best, 2 * own);
      steps += own;
    }
    const bool grew = panel.softmax.grow(best, alpha, scale_log2e);
    weights(t.S, t.P, panel.softmax, scale_log2e, steps);
    if (PARTS == 1 && grew && !first) rescale(panel.O, alpha);
    accumulate(visits, t.P, panel.O, alpha, first, steps, fetch, num_visits);
  }

  // Panels from their queries on.
  static void begin(const Unit& unit, Scratch& t) {
    // here and not once per thread: between two units a Python signal handler may have run torch's own tile code
    load_config(TileConfig::full());
    for (int p = 0; p * PQ < unit.rows; p++) {
      pack_query(unit, p * PQ, t.panels[p]);
      t.panels[p].softmax.reset();
    }
  }

  // Every panel against the visits from n on.
  static void attend_from(const Unit& unit, Scratch& t, int n) {
    for (int number; n < unit.num_visits; n += number) {
      number = together(unit, n);
      const bool fetch = number == VISITS && n + 2 * VISITS <= unit.num_visits;
      for (int p = 0; p * PQ < unit.rows; p++)
        attend_some(t, t.panels[p], unit.visits + n, number, n == 0, p == 0 && fetch, unit.scale * LOG2E, p * PQ);
    }
  }

  static void write(const Unit& unit, const Scratch& t) {
    for (int p = 0; p * PQ < unit.rows; p++) write_panel<D>(t.panels[p].O, TILES_OF_PANEL, t.panels[p].softmax, unit, p * PQ);
  }

  static void attend(const Unit& unit, char* memory) {
    Scratch& t = *(Scratch*)memory;
    begin(unit, t);
    attend_from(unit, t, 0);
    write(unit, t);
  }
};

}  // namespace
