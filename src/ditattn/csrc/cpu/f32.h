// Attention with fp32 arithmetic and no intrinsics: every instruction set, every input dtype.
#pragma once
#include "panel.h"

namespace {

template <int D> struct F32Kernel {
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

  // c[4][PQ] = A . B. A: four rows with stride lda, step along the sum; B: [steps][PQ].
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

  // S^T of `rows` keys (a multiple of 4) and each lane's maximum.
  static __attribute__((noinline)) void scores(const Visit& visit, const float* Q, float* S, float* block_max, int rows) {
    const float* K = (const float*)visit.key;
    const int64_t stride = visit.key_stride / 4;
    vf best[NV];
    UNROLL for (int j = 0; j < NV; j++) best[j] = splat(-FLT_MAX);
    for (int r = 0; r < rows; r += MR) {
      vf c[MR][NV];
      tile(c, K + r * stride, stride, 1, Q, D);
      UNROLL for (int i = 0; i < MR; i++) UNROLL for (int j = 0; j < NV; j++) {
        ((vf*)(S + (r + i) * PQ))[j] = c[i][j];
        best[j] = vmax(c[i][j], best[j]);
      }
    }
    UNROLL for (int j = 0; j < NV; j++) ((vf*)block_max)[j] = best[j];
  }

  // S -> 2^((S - max) * scale), in place, and the row sums. The difference first: it is exact where it matters.
  static __attribute__((noinline)) void weights(float* S, Softmax& s, float scale_log2e, int rows) {
    vf sum[NV], max[NV];
    UNROLL for (int j = 0; j < NV; j++) { sum[j] = vf{}; max[j] = ((const vf*)s.max)[j]; }
    for (int r = 0; r < rows; r++) UNROLL for (int j = 0; j < NV; j++) {
      vf* x = (vf*)(S + r * PQ) + j;
      *x = exp2v((*x - max[j]) * splat(scale_log2e));
      sum[j] += *x;
    }
    UNROLL for (int j = 0; j < NV; j++) ((vf*)s.sum)[j] += sum[j];
  }

  // O^T = O^T * alpha + V^T . P^T. The block is summed on its own and then added: a smaller fp32 error over many blocks.
  static __attribute__((noinline)) void accumulate(const float* V, const float* P, float* O, const float* alpha, bool first, int keys) {
    for (int d = 0; d < D; d += MR) {
      vf c[MR][NV];
      tile(c, V + d * BLOCK, 1, MR, P, keys);
      UNROLL for (int i = 0; i < MR; i++) UNROLL for (int j = 0; j < NV; j++) {
        vf* o = (vf*)(O + (d + i) * PQ) + j;
        *o = first ? c[i][j] : *o * ((const vf*)alpha)[j] + c[i][j];
      }
    }
  }

  static void attend(const Unit& unit, char* memory) {
    Scratch& t = *(Scratch*)memory;
    const float scale_log2e = unit.scale * LOG2E;
    const int panels = (unit.rows + PQ - 1) / PQ;
    for (int p = 0; p < panels; p++) {
      pack_query(unit, p * PQ, t.panels[p].Q);
      t.panels[p].softmax.reset();
    }
    for (int n = 0; n < unit.num_visits; n++) {
      const Visit& visit = unit.visits[n];
      const int rows = (visit.kv + MR - 1) / MR * MR;
      for (int p = 0; p < panels; p++) {
        Panel& panel = t.panels[p];
        alignas(64) float block_max[PQ], alpha[PQ];
        scores(visit, panel.Q, t.S, block_max, rows);
        if (visit.diagonal || visit.kv < rows) {
          mask_scores(t.S, ROWS_OF_PANEL, visit.kv, visit.diagonal, p * PQ, rows);
          find_maximum(t.S, block_max, rows);
        }
        panel.softmax.grow(block_max, alpha, scale_log2e);
        weights(t.S, panel.softmax, scale_log2e, rows);
        accumulate((const float*)visit.value, t.S, panel.O, alpha, n == 0, rows);
      }
    }
    for (int p = 0; p < panels; p++) write_panel<D>(t.panels[p].O, ROWS_OF_PANEL, t.panels[p].softmax, unit, p * PQ);
  }
};

}  // namespace
