// Attention with bf16 products and fp32 sums on CPUs with AVX512_BF16. A unit is 32 bits: a pair of bf16 values, consecutive in the sum.
#pragma once
#include "bf16_parts.h"

namespace {

// 2^x for x <= 0, relative error 7.5e-5 (equi-ripple polynomial on [0, 1)): well below the rounding of a weight to bf16.
// -infinity gives 0, NaN stays NaN.
INLINE __m512 exp2_bf16(__m512 x) {
  const __m512 f = _mm512_reduce_ps(x, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC);  // x - floor(x)
  __m512 p = _mm512_fmadd_ps(f, _mm512_set1_ps(0.0780245215f), _mm512_set1_ps(0.226067156f));
  p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(0.695833564f));
  p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(0.999925196f));
  return _mm512_scalef_ps(p, x);
}

INLINE __m256 exp2_bf16(__m256 x) {
  const __m256 f = _mm256_reduce_ps(x, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC);
  __m256 p = _mm256_fmadd_ps(f, _mm256_set1_ps(0.0780245215f), _mm256_set1_ps(0.226067156f));
  p = _mm256_fmadd_ps(p, f, _mm256_set1_ps(0.695833564f));
  p = _mm256_fmadd_ps(p, f, _mm256_set1_ps(0.999925196f));
  return _mm256_scalef_ps(p, x);
}

// 16 bf16 numbers and 16 others behind them -> their pairs.
INLINE __m512i paired(__m512i halves) {
  alignas(64) static const uint16_t order[32] = {0, 16, 1, 17, 2,  18, 3,  19, 4,  20, 5,  21, 6,  22, 7,  23,
                                                 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31};
  return _mm512_permutexvar_epi16(_mm512_load_si512(order), halves);
}

// Two rows of weights -> one row of pairs.
INLINE __m512i pair_rows(__m512 even, __m512 odd) { return paired((__m512i)_mm512_cvtne2ps_pbh(odd, even)); }
INLINE __m256i pair_rows(__m256 even, __m256 odd) {
  alignas(32) static const uint16_t order[16] = {0, 8, 1, 9, 2, 10, 3, 11, 4, 12, 5, 13, 6, 14, 7, 15};
  return _mm256_permutexvar_epi16(_mm256_load_si256((const __m256i*)order), (__m256i)_mm256_cvtne2ps_pbh(odd, even));
}

template <int HEAD_DIM> struct Bf16Kernel {
  typedef unit_t Number;
  static constexpr int D = HEAD_DIM, D_UNITS = D / 2, KEY_UNITS = BLOCK / 2, PANELS = BLOCK / PQ;
  static constexpr int64_t KEY_STRIDE = D * 2, KEY_BYTES = BLOCK * KEY_STRIDE, VALUE_BYTES = BLOCK * D * 2;
  struct Panel {
    alignas(64) unit_t Q[D_UNITS * PQ];
    alignas(64) float O[D * PQ];
    Softmax softmax;
  };
  struct Scratch {
    Panel panels[PANELS];
    alignas(64) float S[BLOCK * PQ];
    alignas(64) unit_t P[KEY_UNITS * PQ];
  };
  static constexpr size_t SCRATCH_BYTES = sizeof(Scratch);
  struct Thread { ~Thread() {} };  // nothing to set up

  static bool in_place(int dtype, const DitattnTensor& key) {
    return dtype == DITATTN_BF16 && key.token_stride == D;
  }

  static void pack_key(Rows key, int kv, char* out) {
    for (int r = 0; r < BLOCK; r++) for (int d = 0; d < D; d += 32) _mm512_store_si512(out + r * KEY_STRIDE + d * 2, row_bf16(key, r, d, kv));
  }

  // -> [D / 4][64 pairs of keys][4]: four elements of one pair of keys are broadcast one after the other.
  static void pack_value(Rows value, int kv, char* out) {
    for (int s = 0; s < KEY_UNITS; s++) for (int d = 0; d < D; d += 32) {
      const __m512i even = row_bf16(value, 2 * s, d, kv), odd = row_bf16(value, 2 * s + 1, d, kv);
      // 128-bit lane t holds the pairs of elements d + 8t .. d + 8t + 3 (low) and + 4 .. + 7 (high)
      const __m512i halves[2] = {_mm512_unpacklo_epi16(even, odd), _mm512_unpackhi_epi16(even, odd)};
      UNROLL for (int i = 0; i < 8; i++) memcpy(out + (((d / MR + i) * KEY_UNITS) + s) * 16, (const char*)&halves[i % 2] + i / 2 * 16, 16);
    }
  }

  static void pack_query(const Unit& unit, int first_row, unit_t* out) {
    for (int j = 0; j < NV; j++) for (int u = 0; u < D_UNITS; u += 16) {
      vf r[1][16];
      transposed_query<1>(unit, first_row + 16 * j, 2 * u, r);
      UNROLL for (int i = 0; i < 16; i++) *(vf*)(out + (u + i) * PQ + 16 * j) = r[0][i];
    }
  }

  INLINE void tile(vf c[MR][NV], const unit_t* A, int64_t lda, int64_t step, const unit_t* B, int steps) {
    UNROLL for (int i = 0; i < MR; i++) UNROLL for (int j = 0; j < NV; j++) c[i][j] = vf{};
#pragma GCC unroll 2
    for (int k = 0; k < steps; k++) {
      __m512bh b[NV];
      UNROLL for (int j = 0; j < NV; j++) b[j] = (__m512bh)_mm512_load_si512(B + k * PQ + 16 * j);
      UNROLL for (int i = 0; i < MR; i++) {
        const __m512bh a = (__m512bh)_mm512_set1_epi32((int)A[i * lda + k * step]);
        UNROLL for (int j = 0; j < NV; j++) c[i][j] = (vf)_mm512_dpbf16_ps((__m512)c[i][j], a, b[j]);
      }
    }
  }

  // P = 2^((S - max) * scale) in pairs of keys, and the row sums of the unrounded weights.
  static __attribute__((noinline)) const unit_t* weights(Scratch& t, Softmax& s, float scale_log2e, int rows) {
    const float* S = t.S;
    unit_t* P = t.P;
    const __m512 scale = _mm512_set1_ps(scale_log2e);
    __m512 sum[NV], offset[NV];
    UNROLL for (int j = 0; j < NV; j++) {
      sum[j] = _mm512_setzero_ps();
      offset[j] = _mm512_mul_ps(_mm512_load_ps(s.max + 16 * j), _mm512_set1_ps(-scale_log2e));
    }
    for (int r = 0; r < rows; r += 2) UNROLL for (int j = 0; j < NV; j++) {
      const __m512 even = exp2_bf16(_mm512_fmadd_ps(_mm512_load_ps(S + r * PQ + 16 * j), scale, offset[j]));
      const __m512 odd = exp2_bf16(_mm512_fmadd_ps(_mm512_load_ps(S + (r + 1) * PQ + 16 * j), scale, offset[j]));
      sum[j] = _mm512_add_ps(sum[j], _mm512_add_ps(even, odd));
      _mm512_store_si512(P + r / 2 * PQ + 16 * j, pair_rows(even, odd));
    }
    UNROLL for (int j = 0; j < NV; j++) _mm512_store_ps(s.sum + 16 * j, _mm512_add_ps(_mm512_load_ps(s.sum + 16 * j), sum[j]));
    return P;
  }

  static void attend(const Unit& unit, char* scratch) { Panels<Bf16Kernel>::attend(unit, *(Scratch*)scratch); }
};

}  // namespace
