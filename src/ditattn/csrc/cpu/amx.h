// Attention with bf16 products on CPUs with AMX: the same S^T formulation, with 16 x 16 tiles in place of vectors.
//
// Every operand lies in tiles of 1 KiB (16 rows of 64 bytes), so that a tile load touches 16 consecutive cache lines.
#pragma once
#include "bf16.h"
#include "tiles.h"

namespace {

// Visits that a panel takes in at once: the output is loaded, rescaled and stored once for all of them.
constexpr int VISITS = 2;
constexpr int TILE = 256;                                     // units in a tile
constexpr Layout TILES_OF_PANEL{16, NV * TILE, TILE};         // [row / 16][lane / 16][16][16]

// Tiles 0-3 += (two tiles of A) x (two tiles of B).
INLINE void four_products(const unit_t* a0, const unit_t* a1, const unit_t* b0, const unit_t* b1) {
  tile_load<4>(a0);
  tile_load<6>(b0);
  tile_load<5>(a1);
  tile_load<7>(b1);
  tile_product<0, 4, 6>();
  tile_product<1, 4, 7>();
  tile_product<2, 5, 6>();
  tile_product<3, 5, 7>();
}

template <int D> struct AmxKernel {
  static constexpr int KS = D / 32;        // steps of 32 elements
  static constexpr int64_t KEY_STRIDE = 0;  // unused: keys are always packed
  static constexpr int64_t KEY_BYTES = BLOCK * D * 2, VALUE_BYTES = BLOCK * D * 2;
  static constexpr int PANELS = BLOCK / PQ;
  struct Panel {
    alignas(64) unit_t Q[KS * NV * TILE];   // [D / 32][lane / 16] tiles of 16 pairs by 16 lanes
    alignas(64) float O[D / 16 * NV * TILE];
    Softmax softmax;
  };
  static constexpr int STEPS = BLOCK / 32;  // of 32 keys in a whole block
  struct Scratch {
    Panel panels[PANELS];
    alignas(64) float S[VISITS * BLOCK / 16 * NV * TILE];
    alignas(64) unit_t P[VISITS * STEPS * NV * TILE];  // [key / 32][lane / 16] tiles of 16 pairs by 16 lanes
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
    for (int r = 0; r < BLOCK; r++) for (int d = 0; d < D; d += 32)
      _mm512_store_si512(out + ((r / 16 * KS + d / 32) * 16 + r % 16) * 64, row_bf16(key, r, d, kv));
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
      vf r[16];
      for (int i = 0; i < 16; i++) {
        const int row = 32 * s + 2 * i;
        r[i] = (vf)_mm512_permutex2var_epi16(row_bf16(value, row, d, kv), pick[half], row_bf16(value, row + 1, d, kv));
      }
      transpose(r);
      vf* tile = (vf*)(out + ((d / 16 + half) * (BLOCK / 32) + s) * 1024);
      UNROLL for (int i = 0; i < 16; i++) tile[i] = r[i];
    }
  }

  static void pack_query(const Unit& unit, int first_row, unit_t* out) {
    for (int j = 0; j < NV; j++) for (int k = 0; k < KS; k++) {
      vf r[16];
      transposed_query(unit, first_row + 16 * j, 32 * k, r);
      UNROLL for (int i = 0; i < 16; i++) *(vf*)(out + (k * NV + j) * TILE + i * 16) = r[i];
    }
  }

  INLINE const char* fetch_1k(const char* p) {
    UNROLL for (int i = 0; i < 1024; i += 64) _mm_prefetch(p + i, _MM_HINT_T1);
    return p + 1024;
  }

  INLINE void store_four(float* c) {
    tile_store<0>(c), tile_store<1>(c + TILE), tile_store<2>(c + NV * TILE), tile_store<3>(c + (NV + 1) * TILE);
  }

  // S^T of `steps` times 32 keys of one visit. Meanwhile the block at `ahead` is brought into the second-level cache.
  static __attribute__((noinline)) void scores(const Visit& visit, const unit_t* Q, float* S, int steps, const char* ahead) {
    for (int s = 0; s < steps; s++) for (int j2 = 0; j2 < NV / 2; j2++) {
      tile_zero<0>(), tile_zero<1>(), tile_zero<2>(), tile_zero<3>();
      const unit_t *a = (const unit_t*)visit.key + 2 * s * KS * TILE, *b = Q + 2 * j2 * TILE;
      UNROLL for (int k = 0; k < KS; k++) {
        four_products(a + k * TILE, a + (KS + k) * TILE, b + k * NV * TILE, b + (k * NV + 1) * TILE);
        if (ahead) ahead = fetch_1k(ahead);
      }
      store_four(S + (2 * s * NV + 2 * j2) * TILE);
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

  // P = 2^((S - max) * scale) in pairs of keys, and the row sums of the unrounded weights, for `steps` times 32 keys.
  static __attribute__((noinline)) void weights(const float* S, unit_t* P, Softmax& softmax, float scale_log2e, int steps) {
    const __m512 scale = _mm512_set1_ps(scale_log2e);
    for (int j = 0; j < NV; j++) {
      const __m512 offset = _mm512_mul_ps(_mm512_load_ps(softmax.max + 16 * j), _mm512_set1_ps(-scale_log2e));
      __m512 sum = _mm512_load_ps(softmax.sum + 16 * j);
      for (int t = 0; t < 2 * steps; t++) {
        const float* from = S + (t * NV + j) * TILE;
        unit_t* to = P + (t / 2 * NV + j) * TILE + t % 2 * 128;
        __m512 part = _mm512_setzero_ps();
        UNROLL for (int i = 0; i < 8; i++) {
          const __m512 even = exp2_bf16(_mm512_fmadd_ps(_mm512_load_ps(from + 32 * i), scale, offset));
          const __m512 odd = exp2_bf16(_mm512_fmadd_ps(_mm512_load_ps(from + 32 * i + 16), scale, offset));
          part = _mm512_add_ps(part, _mm512_add_ps(even, odd));
          _mm512_store_si512(to + 16 * i, pair_rows(even, odd));
        }
        sum = _mm512_add_ps(sum, part);
      }
      _mm512_store_ps(softmax.sum + 16 * j, sum);
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

  // O^T = or += V^T . P^T over `steps` times 32 keys of consecutive visits.
  static __attribute__((noinline)) void accumulate(const Visit* visits, const unit_t* P, float* O, bool first, int steps, bool fetch, int ahead) {
    for (int d32 = 0; d32 < D / 32; d32++) for (int j2 = 0; j2 < NV / 2; j2++) {
      float* c = O + (2 * d32 * NV + 2 * j2) * TILE;
      if (first) tile_zero<0>(), tile_zero<1>(), tile_zero<2>(), tile_zero<3>();
      else tile_load<0>(c), tile_load<1>(c + TILE), tile_load<2>(c + NV * TILE), tile_load<3>(c + (NV + 1) * TILE);
      for (int s = 0; s < steps; s++) {
        const unit_t* a = (const unit_t*)visits[s / STEPS].value + (2 * d32 * STEPS + s % STEPS) * TILE;
        const unit_t* b = P + (s * NV + 2 * j2) * TILE;
        four_products(a, a + STEPS * TILE, b, b + TILE);
        // this loop touches 1 KiB of a block for every 1 KiB of its values: the same place in the block `ahead` visits on
        if (fetch) fetch_1k(visits[s / STEPS + ahead].value + ((d32 * (NV / 2) + j2) * STEPS + s % STEPS) * 1024);
      }
      store_four(c);
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
      scores(*visit, panel.Q, S, own, fetch ? visit[num_visits].key : nullptr);
      if (visit->bias) add_bias(S, TILES_OF_PANEL, visit->bias, own * 32);
      else if (visit->diagonal || visit->kv < own * 32) mask_scores(S, TILES_OF_PANEL, visit->kv, visit->diagonal, first_lane, own * 32);
      take_maximum(S, best, 2 * own);
      steps += own;
    }
    const bool grew = panel.softmax.grow(best, alpha, scale_log2e);
    weights(t.S, t.P, panel.softmax, scale_log2e, steps);
    if (grew && !first) rescale(panel.O, alpha);
    accumulate(visits, t.P, panel.O, first, steps, fetch, num_visits);
  }

  static void attend(const Unit& unit, char* memory) {
    Scratch& t = *(Scratch*)memory;
    // here and not once per thread: between two units a Python signal handler may have run torch's own tile code
    load_config(TileConfig::full());
    const int panels = (unit.rows + PQ - 1) / PQ;
    for (int p = 0; p < panels; p++) {
      pack_query(unit, p * PQ, t.panels[p].Q);
      t.panels[p].softmax.reset();
    }
    for (int n = 0, number; n < unit.num_visits; n += number) {
      number = together(unit, n);
      const bool fetch = number == VISITS && n + 2 * VISITS <= unit.num_visits;
      for (int p = 0; p < panels; p++)
        attend_some(t, t.panels[p], unit.visits + n, number, n == 0, p == 0 && fetch, unit.scale * LOG2E, p * PQ);
    }
    for (int p = 0; p < panels; p++) write_panel<D>(t.panels[p].O, TILES_OF_PANEL, t.panels[p].softmax, unit, p * PQ);
  }
};

}  // namespace
