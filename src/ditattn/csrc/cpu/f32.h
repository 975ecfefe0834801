// Attention with fp32 arithmetic and no intrinsics: every instruction set, every input dtype.
#pragma once
#include "panel.h"

namespace {

template <int HEAD_DIM> struct F32Kernel {
  typedef float Number;
  static constexpr int D = HEAD_DIM, D_UNITS = D, KEY_UNITS = BLOCK;
  static constexpr int64_t KEY_STRIDE = D * 4, KEY_BYTES = BLOCK * KEY_STRIDE, VALUE_BYTES = BLOCK * D * 4;
  static constexpr int PANELS = BLOCK / PQ;
  struct Panel {
    alignas(64) float Q[D * PQ], O[D * PQ];
    Softmax softmax;
  };
  struct Scratch {
    Panel panels[PANELS];
    alignas(64) float S[BLOCK * PQ];
  };
  static constexpr size_t SCRATCH_BYTES = sizeof(Scratch);
  struct Thread { ~Thread() {} };  // nothing to set up

  // Rows that lie far apart share few cache sets and many pages: packing them once is cheaper than reading them many times.
  static bool in_place(int dtype, const DitattnTensor& key) { return dtype == DITATTN_F32 && key.token_stride == D; }

  static void pack_key(Rows key, int kv, char* out) {
    for (int r = 0; r < BLOCK; r++) for (int d = 0; d < D; d += W)
      *(vf*)(out + r * KEY_STRIDE + d * 4) = r < kv ? load_wide(key.at(r) + d * size_of(key.dtype), key.dtype) : vf{};
  }

  // -> [D / 4][128][4]: four elements of one key are broadcast one after the other.
  static void pack_value(Rows value, int kv, char* out) {
    for (int r = 0; r < BLOCK; r++) for (int d = 0; d < D; d += W) {
      const vf x = r < kv ? load_wide(value.at(r) + d * size_of(value.dtype), value.dtype) : vf{};
      UNROLL for (int i = 0; i < W; i += MR) memcpy(out + (((d + i) / MR) * BLOCK + r) * MR * 4, (const float*)&x + i, MR * 4);
    }
  }

  // -> Q^T[D][PQ]
  static void pack_query(const Unit& unit, int first_row, float* out) {
    for (int j = 0; j < NV; j++) for (int d = 0; d < D; d += W) {
      vf r[W];
      for (int i = 0; i < W; i++) {
        const int row = first_row + j * W + i;
        r[i] = row < unit.rows ? load_wide(unit.query.at(row) + d * size_of(unit.query.dtype), unit.query.dtype) : vf{};
        if (unit.negate) r[i] = -r[i];
      }
      transpose(r);
      UNROLL for (int i = 0; i < W; i++) *(vf*)(out + (d + i) * PQ + j * W) = r[i];
    }
  }

  INLINE void tile(vf c[MR][NV], const float* A, int64_t lda, int64_t step, const float* B, int steps) {
    UNROLL for (int i = 0; i < MR; i++) UNROLL for (int j = 0; j < NV; j++) c[i][j] = vf{};
    for (int k = 0; k < steps; k++) {
      const vf* b = (const vf*)(B + k * PQ);
      UNROLL for (int i = 0; i < MR; i++) {
        const vf a = splat(A[i * lda + k * step]);
        UNROLL for (int j = 0; j < NV; j++) c[i][j] += a * b[j];
      }
    }
  }

  // S -> 2^((S - max) * scale), in place, and the row sums. The difference first: it is exact where it matters.
  static __attribute__((noinline)) const float* weights(Scratch& t, Softmax& s, float scale_log2e, int rows) {
    float* S = t.S;
    vf sum[NV], max[NV];
    UNROLL for (int j = 0; j < NV; j++) { sum[j] = vf{}; max[j] = ((const vf*)s.max)[j]; }
    for (int r = 0; r < rows; r++) UNROLL for (int j = 0; j < NV; j++) {
      vf* x = (vf*)(S + r * PQ) + j;
      *x = exp2v((*x - max[j]) * splat(scale_log2e));
      sum[j] += *x;
    }
    UNROLL for (int j = 0; j < NV; j++) ((vf*)s.sum)[j] += sum[j];
    return S;
  }

  static void attend(const Unit& unit, char* scratch) { Panels<F32Kernel>::attend(unit, *(Scratch*)scratch); }
};

}  // namespace
