// Steps that do not depend on the arithmetic: masks, running maximum, output. A panel is PQ query rows, one per vector lane.
//
// S^T formulation: scores are S^T[key][query], the output is O^T[element][query]. Row maximum, row sum and rescaling are lane-wise:
// no horizontal reductions. The last key rows are fewer rows, missing query rows are zero lanes: no mask registers.
#pragma once
#include "attention.h"

namespace {

// Where element (row, lane) of a panel matrix lies: tiles of 16 rows and W lanes. In units of 32 bits.
struct Layout {
  int row, row16, vector;  // steps: next row within 16, next 16 rows, next W lanes
};
constexpr Layout ROWS_OF_PANEL{PQ, 16 * PQ, W};     // [row][PQ]
INLINE int at(Layout l, int row, int vector) { return (row / 16) * l.row16 + (row % 16) * l.row + vector * l.vector; }

struct Softmax {
  alignas(64) float max[PQ];
  alignas(64) float sum[PQ];

  // The smallest finite float: a first score of -infinity then has weight 0 instead of NaN.
  void reset() {
    for (int i = 0; i < PQ; i++) { max[i] = -FLT_MAX; sum[i] = 0; }
  }

  // Takes the maximum of a new block; alpha becomes the factor on what was summed before. Returns whether any lane grew. Lanes that did not grow get a factor of exactly 1: the polynomial's
  // 2^0 is 1 + 7e-8, which would add up. No tolerance: with a lagging maximum the dominating weight is not exactly 1 in bf16.
  bool grow(const float* block_max, float* alpha, float scale_log2e) {
    bool grew = false;
    for (int j = 0; j < NV; j++) {
      const vf old = ((vf*)max)[j], now = vmax(((const vf*)block_max)[j], old);
      const vi bigger = now > old;
      ((vf*)max)[j] = now;
      ((vf*)alpha)[j] = bigger ? exp2v((old - now) * splat(scale_log2e)) : splat(1.f);
      ((vf*)sum)[j] *= ((vf*)alpha)[j];
      for (int i = 0; i < W; i++) grew |= bigger[i] != 0;
    }
    return grew;
  }
};

// Scores of keys that a lane must not see become -infinity: rows kv.. of a short block, and on the diagonal the keys after the query.
// Padding has logit 0 and must not enter the maximum: with strongly negative logits every real weight would underflow.
inline __attribute__((noinline)) void mask_scores(float* S, Layout layout, int kv, bool diagonal, int first_lane, int rows) {
  for (int r = diagonal ? 0 : kv; r < rows; r++) for (int j = 0; j < NV; j++) {
    vf* s = (vf*)(S + at(layout, r, j));
    vi hidden = {};
    if (r >= kv) hidden = ~hidden;
    else for (int i = 0; i < W; i++) hidden[i] = first_lane + j * W + i < r ? -1 : 0;
    *s = hidden ? splat(-INFINITY) : *s;
  }
}

// Adds each key's bias to its scores. A hidden key's score becomes -infinity whatever it was: it may be NaN.
inline __attribute__((noinline)) void add_bias(float* S, Layout layout, const float* bias, int rows) {
  for (int r = 0; r < rows; r++) for (int j = 0; j < NV; j++) {
    vf* s = (vf*)(S + at(layout, r, j));
    *s = bias[r] == -INFINITY ? splat(-INFINITY) : *s + splat(bias[r]);
  }
}

// Each lane's maximum over `rows` keys, where the scores were masked after they were computed.
inline __attribute__((noinline)) void find_maximum(const float* S, float* block_max, int rows) {
  for (int j = 0; j < NV; j++) {
    vf best = splat(-FLT_MAX);
    for (int r = 0; r < rows; r++) best = vmax(((const vf*)(S + r * PQ))[j], best);
    ((vf*)block_max)[j] = best;
  }
}

// O^T / sum -> rows of the caller's output; log-sum-exp where asked for, with `missing` added to the sums.
template <int D> void write_panel(const float* O, Layout layout, const Softmax& s, const Unit& unit, int first_row, const float* missing = nullptr) {
  const int rows = std::min(PQ, unit.rows - first_row);
  const int size = size_of(unit.out.dtype);
  for (int j = 0; j * W < rows; j++) {
    const vf inverse = splat(1.f) / ((const vf*)s.sum)[j];
    for (int d = 0; d < D; d += W) {
      vf r[W];
      UNROLL for (int i = 0; i < W; i++) r[i] = *(const vf*)(O + at(layout, d + i, j)) * inverse;
      transpose(r);
      for (int i = 0; i < W && j * W + i < rows; i++)
        store_narrow(unit.out.at(first_row + j * W + i) + (int64_t)d * size, unit.out.dtype, r[i]);
    }
  }
  if (unit.lse) for (int i = 0; i < rows; i++)
    unit.lse[unit.out.token(first_row + i)] = s.max[i] * unit.scale + std::log(s.sum[i] + (missing ? missing[i] : 0));
}

// What the kernels of the vector units share: one visit after the other, each against every panel of the query block. A kernel K provides
//   D, Number                  head size; what its operands are made of: units of 32 bits
//   D_UNITS, KEY_UNITS         units in a row of keys, and in a column of a block's values
//   Panel, Scratch             with Q, O, softmax; with panels, S, and the weights
//   pack_query, weights        query rows -> Q; S -> weights and their sums, returns where the weights lie
//   tile                       c[4][PQ] = A . B. A: four rows with stride lda, step along the sum; B: [units][PQ]
template <class K> struct Panels {
  using Number = typename K::Number;

  // S^T of `rows` keys (a multiple of 4) and each lane's maximum.
  static __attribute__((noinline)) void scores(const Visit& visit, const Number* Q, float* S, float* block_max, int rows) {
    const Number* keys = (const Number*)visit.key;
    const int64_t stride = visit.key_stride / 4;
    vf best[NV];
    UNROLL for (int j = 0; j < NV; j++) best[j] = splat(-FLT_MAX);
    for (int r = 0; r < rows; r += MR) {
      vf c[MR][NV];
      K::tile(c, keys + r * stride, stride, 1, Q, K::D_UNITS);
      UNROLL for (int i = 0; i < MR; i++) UNROLL for (int j = 0; j < NV; j++) {
        ((vf*)(S + (r + i) * PQ))[j] = c[i][j];
        best[j] = vmax(c[i][j], best[j]);
      }
    }
    UNROLL for (int j = 0; j < NV; j++) ((vf*)block_max)[j] = best[j];
  }

  // O^T = O^T * alpha + V^T . P^T. The block is summed on its own and then added: a smaller fp32 error over many blocks.
  static __attribute__((noinline)) void accumulate(const Number* V, const Number* P, float* O, const float* alpha, bool first, int units) {
    for (int d = 0; d < K::D; d += MR) {
      vf c[MR][NV];
      K::tile(c, V + d * K::KEY_UNITS, 1, MR, P, units);
      UNROLL for (int i = 0; i < MR; i++) UNROLL for (int j = 0; j < NV; j++) {
        vf* o = (vf*)(O + (d + i) * PQ) + j;
        *o = first ? c[i][j] : *o * ((const vf*)alpha)[j] + c[i][j];
      }
    }
  }

  static void attend(const Unit& unit, typename K::Scratch& t) {
    const float scale_log2e = unit.scale * LOG2E;
    const int panels = (unit.rows + PQ - 1) / PQ;
    for (int p = 0; p < panels; p++) {
      K::pack_query(unit, p * PQ, t.panels[p].Q);
      t.panels[p].softmax.reset();
    }
    for (int n = 0; n < unit.num_visits; n++) {
      const Visit& visit = unit.visits[n];
      const int rows = (visit.kv + MR - 1) / MR * MR;
      for (int p = 0; p < panels; p++) {
        auto& panel = t.panels[p];
        alignas(64) float block_max[PQ], alpha[PQ];
        scores(visit, panel.Q, t.S, block_max, rows);
        if (visit.diagonal || visit.kv < rows || visit.bias) {
          if (visit.bias) add_bias(t.S, ROWS_OF_PANEL, visit.bias, rows);
          else mask_scores(t.S, ROWS_OF_PANEL, visit.kv, visit.diagonal, p * PQ, rows);
          find_maximum(t.S, block_max, rows);
        }
        panel.softmax.grow(block_max, alpha, scale_log2e);
        const Number* P = K::weights(t, panel.softmax, scale_log2e, rows);
        accumulate((const Number*)visit.value, P, panel.O, alpha, n == 0, rows * K::KEY_UNITS / BLOCK);
      }
    }
    for (int p = 0; p < panels; p++) write_panel<K::D>(t.panels[p].O, ROWS_OF_PANEL, t.panels[p].softmax, unit, p * PQ);
  }
};

}  // namespace
