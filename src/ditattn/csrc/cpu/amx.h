// Attention with bf16 products on CPUs with AMX: the same S^T formulation, with 16 x 16 tiles in place of vectors.
//
// A tile product takes 16 cycles of a unit of its own, and the exponentials of a block cost the vector units about as many cycles as
// its products cost that unit. So the two are interleaved: while the weights of one panel are computed, the tiles work on the
// scores of the next and on the output of the one before, a few instructions of each in turn.
//
// Every operand lies in tiles of 1 KiB (16 rows of 64 bytes), so that a tile load touches 16 consecutive cache lines.
#pragma once
#include "bf16.h"

#include <sys/syscall.h>
#include <unistd.h>

namespace {

inline int permit_tiles() {
  constexpr long ARCH_REQ_XCOMP_PERM = 0x1023, XFEATURE_XTILEDATA = 18;
  return syscall(SYS_arch_prctl, ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA) ? DITATTN_NOT_PERMITTED : DITATTN_OK;
}

struct alignas(64) TileConfig {
  uint8_t palette = 0, start_row = 0, reserved[14] = {};
  uint16_t row_bytes[16] = {};
  uint8_t rows[16] = {};
};

INLINE void load_config(const TileConfig& c) { __asm__ volatile("ldtilecfg %0" ::"m"(c)); }

INLINE void use_full_tiles() {
  TileConfig c;
  c.palette = 1;
  for (int t = 0; t < 8; t++) { c.row_bytes[t] = 64; c.rows[t] = 16; }
  load_config(c);
}

// "memory": tiles are read from what vector code has just written, and the other way round.
template <int T> INLINE void tile_load(const void* p) { __asm__ volatile("tileloadd (%0,%1,1), %%tmm%c2" ::"r"(p), "r"(64L), "i"(T) : "memory"); }
template <int T> INLINE void tile_store(void* p) { __asm__ volatile("tilestored %%tmm%c2, (%0,%1,1)" ::"r"(p), "r"(64L), "i"(T) : "memory"); }
template <int T> INLINE void tile_zero() { __asm__ volatile("tilezero %%tmm%c0" ::"i"(T)); }
template <int C, int A, int B> INLINE void tile_product() {
  __asm__ volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(C), "i"(A), "i"(B));
}

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
  struct Buffers {
    alignas(64) float S[BLOCK / 16 * NV * TILE];
    alignas(64) unit_t P[BLOCK / 32 * NV * TILE];  // [key / 32][lane / 16] tiles of 16 pairs by 16 lanes
    alignas(64) float block_max[PQ], alpha[PQ], offset[PQ];
  };
  struct Scratch {
    Panel panels[PANELS];
    Buffers buffers[2];
  };
  // One panel against one visit, on its way through scores, weights and output.
  struct Flight {
    Buffers* at;
    Panel* panel;
    const Visit* visit;
    int steps, first_lane;  // steps of 32 keys
    bool first, grew;
  };
  static constexpr size_t SCRATCH_BYTES = sizeof(Scratch);

  // torch keeps a tile configuration per thread between its own calls: leave what was found.
  struct Thread {
    TileConfig found;
    Thread() { __asm__ volatile("sttilecfg %0" : "=m"(found)); }
    ~Thread() {
      if (found.palette) load_config(found);
      else __asm__ volatile("tilerelease");
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

  // Weights of 8 keys for 16 lanes: group g of steps * 16.
  INLINE void weigh(Flight& f, int g, __m512 scale) {
    const int s = g / 16, j = g / 4 % 4, quarter = g % 4;
    const float* S = f.at->S + ((2 * s + quarter / 2) * NV + j) * TILE + quarter % 2 * 128;
    unit_t* P = f.at->P + (s * NV + j) * TILE + quarter * 64;
    const __m512 offset = _mm512_load_ps(f.at->offset + 16 * j);
    float* sums = f.panel->softmax.sum + 16 * j;
    __m512 sum = _mm512_setzero_ps();
    UNROLL for (int i = 0; i < 4; i++) {
      const __m512 even = exp2_bf16(_mm512_fmadd_ps(_mm512_load_ps(S + 32 * i), scale, offset));
      const __m512 odd = exp2_bf16(_mm512_fmadd_ps(_mm512_load_ps(S + 32 * i + 16), scale, offset));
      sum = _mm512_add_ps(sum, _mm512_add_ps(even, odd));
      _mm512_store_si512(P + 16 * i, pair_rows(even, odd));
    }
    _mm512_store_ps(sums, _mm512_add_ps(_mm512_load_ps(sums), sum));
  }

  // Takes 16 keys for 16 lanes into the block's maximum.
  INLINE void take_maximum(Flight& f, int tile) {
    const float* S = f.at->S + tile * TILE;
    float* best = f.at->block_max + tile % NV * 16;
    __m512 a = _mm512_load_ps(best), b = _mm512_load_ps(S);
    UNROLL for (int i = 1; i < 16; i += 2) {
      a = _mm512_max_ps(_mm512_load_ps(S + 16 * i), a);
      if (i + 1 < 16) b = _mm512_max_ps(_mm512_load_ps(S + 16 * (i + 1)), b);
    }
    _mm512_store_ps(best, _mm512_max_ps(a, b));
  }

  // O^T *= alpha for 32 elements and 32 lanes.
  INLINE void rescale(const Flight& f, int d32, int j2) {
    UNROLL for (int t = 0; t < 4; t++) {
      float* o = f.panel->O + ((2 * d32 + t / 2) * NV + 2 * j2 + t % 2) * TILE;
      const __m512 alpha = _mm512_load_ps(f.at->alpha + (2 * j2 + t % 2) * 16);
      UNROLL for (int i = 0; i < 16; i++) _mm512_store_ps(o + 16 * i, _mm512_mul_ps(_mm512_load_ps(o + 16 * i), alpha));
    }
  }

  // S^T of one flight; between() runs after every four products.
  template <class Between> INLINE void scores(Flight& f, Between between) {
    const unit_t* K = (const unit_t*)f.visit->key;
    const unit_t* Q = f.panel->Q;
    for (int s = 0; s < f.steps; s++) for (int j2 = 0; j2 < NV / 2; j2++) {
      tile_zero<0>(), tile_zero<1>(), tile_zero<2>(), tile_zero<3>();
      for (int k = 0; k < KS; k++) {
        const unit_t *a = K + (2 * s * KS + k) * TILE, *b = Q + (k * NV + 2 * j2) * TILE;
        four_products(a, a + KS * TILE, b, b + TILE);
        between();
      }
      float* c = f.at->S + (2 * s * NV + 2 * j2) * TILE;
      tile_store<0>(c), tile_store<1>(c + TILE), tile_store<2>(c + NV * TILE), tile_store<3>(c + (NV + 1) * TILE);
    }
  }

  // O^T = O^T * alpha + V^T . P^T of one flight.
  template <class Between> INLINE void accumulate(Flight& f, Between between) {
    const unit_t* V = (const unit_t*)f.visit->value;
    const bool scaled = f.grew && !f.first;
    for (int d32 = 0; d32 < D / 32; d32++) for (int j2 = 0; j2 < NV / 2; j2++) {
      float* c = f.panel->O + (2 * d32 * NV + 2 * j2) * TILE;
      if (scaled) rescale(f, d32, j2);
      if (f.first) tile_zero<0>(), tile_zero<1>(), tile_zero<2>(), tile_zero<3>();
      else tile_load<0>(c), tile_load<1>(c + TILE), tile_load<2>(c + NV * TILE), tile_load<3>(c + (NV + 1) * TILE);
      for (int s = 0; s < f.steps; s++) {
        const unit_t *a = V + (2 * d32 * (BLOCK / 32) + s) * TILE, *b = f.at->P + (s * NV + 2 * j2) * TILE;
        four_products(a, a + BLOCK / 32 * TILE, b, b + TILE);
        between();
      }
      tile_store<0>(c), tile_store<1>(c + TILE), tile_store<2>(c + NV * TILE), tile_store<3>(c + (NV + 1) * TILE);
    }
  }

  // The weights of `now`, interleaved with the scores of `next` and the output of `before`; either may be missing.
  static __attribute__((noinline)) void stage(Flight* before, Flight* now, Flight* next, float scale_log2e) {
    const __m512 scale = _mm512_set1_ps(scale_log2e);
    const int groups = now ? now->steps * 16 : 0;
    const int products = (next ? next->steps * KS * 2 : 0) + (before ? before->steps * KS * 2 : 0);
    int done = 0, due = 0, maxima = 0;
    auto weigh_some = [&] {
      for (due += groups; due >= products && done < groups; due -= products) weigh(*now, done++, scale);
    };
    if (next) scores(*next, weigh_some);
    const bool masked = next && (next->visit->diagonal || next->visit->kv < next->steps * 32);
    const int tiles = next && !masked ? next->steps * 2 * NV : 0;
    for (int i = 0; next && i < PQ; i += 16) _mm512_store_ps(next->at->block_max + i, _mm512_set1_ps(-FLT_MAX));
    if (before) accumulate(*before, [&] {
      if (maxima < tiles) take_maximum(*next, maxima++);
      weigh_some();
    });
    while (maxima < tiles) take_maximum(*next, maxima++);
    while (done < groups) weigh(*now, done++, scale);
    if (masked) mask_scores(next->at->S, TILES_OF_PANEL, next->at->block_max, next->visit->kv, next->visit->diagonal, next->first_lane, next->steps * 32);
    if (!next) return;
    next->grew = next->panel->softmax.grow(next->at->block_max, next->at->alpha, scale_log2e);
    for (int i = 0; i < PQ; i++) next->at->offset[i] = -next->panel->softmax.max[i] * scale_log2e;
  }

  static void attend(const Unit& unit, char* memory) {
    Scratch& t = *(Scratch*)memory;
    // here and not once per thread: between two units a Python signal handler may have run torch's own tile code
    use_full_tiles();
    const float scale_log2e = unit.scale * LOG2E;
    const int panels = (unit.rows + PQ - 1) / PQ, total = panels * unit.num_visits;
    for (int p = 0; p < panels; p++) {
      pack_query(unit, p * PQ, t.panels[p].Q);
      t.panels[p].softmax.reset();
    }
    // Flight i is panel i % panels of visit i / panels. Three are in the air, on two sets of buffers: the scores of flight i + 1 replace
    // those of flight i - 1, which were used up; their weights, maxima and factors are written only after flight i - 1 has landed.
    Flight flights[3];
    for (int i = -1; i <= total; i++) {
      if (i + 1 < total) {
        const int n = (i + 1) / panels, p = (i + 1) % panels;
        const Visit* visit = unit.visits + n;
        flights[(i + 1) % 3] = {&t.buffers[(i + 1) % 2], &t.panels[p], visit, (visit->kv + 31) / 32, p * PQ, n == 0, false};
      }
      Flight* before = i >= 1 ? &flights[(i - 1) % 3] : nullptr;
      Flight* now = i >= 0 && i < total ? &flights[i % 3] : nullptr;
      stage(before, now, i + 1 < total ? &flights[(i + 1) % 3] : nullptr, scale_log2e);
    }
    for (int p = 0; p < panels; p++) write_panel<D>(t.panels[p].O, TILES_OF_PANEL, t.panels[p].softmax, unit, p * PQ);
  }
};

}  // namespace
