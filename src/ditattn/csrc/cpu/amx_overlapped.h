// Attention with bf16 products on CPUs with AMX by another schedule than that of amx.h: while the tile unit multiplies, the vector unit forms weights.
//
// A block of queries is two panels of 64. A job is one panel against one visit (128 keys); jobs alternate between the panels. In every step of the
// loop the tile unit gets the scores of 32 keys x 32 queries of one job and a part of the output of the job before, and after every four products
// comes a piece of the weights of the scores of the step before: a few instructions of the vector unit at a time, which the CPU runs beside them.
//
// That needs weights without waiting for the maximum of the whole job. They are formed relative to a reference, the maximum of the panel's first 32
// keys. A row whose maximum outgrows it by more than 2^8 has its reference raised before its next job, as FlashAttention-4 does it
// (https://arxiv.org/abs/2603.05451). A row that outgrows it by more than 2^24 within a job has that job done again with the true maximum.
// The row sums are those of the rounded weights: a row with one dominating key then gives its value exactly, though its weight is not 1. A
// log-sum-exp is that of the weights before they were rounded, so calls that ask for one also add up what rounding takes away.
#pragma once
#include "amx.h"

namespace {

template <int D> struct OverlappedAmxKernel : AmxKernel<D, 1> {
  using Base = AmxKernel<D, 1>;
  using typename Base::Panel;
  using Base::KS, Base::STEPS, Base::Q_PART, Base::P_PART, Base::BLOCK_PART;
  static constexpr int PIECES = STEPS * NV / 2;             // of scores in a job: 32 keys x 32 queries
  static constexpr int OUTPUTS = D / 32 * NV / 2;           // of output in a job: 32 elements x 32 queries
  static constexpr int PAIRS = 32;                          // vectors of 16 pairs of weights in a piece
  // As many after every four products that all are formed in about the time of the products.
  static constexpr int AT_ONCE = D == 128 ? 4 : D == 32 ? 16 : 8;
  static constexpr int RING = 4, PIECE = 4 * TILE;
  // From the scores of a job to its output, in steps: one for the weights of its last piece, so that all of them are there.
  static constexpr int LAG = PIECES + 1;
  static constexpr float RAISE = 8, AGAIN = 24;             // log2 of how far a maximum may outgrow its reference

  // What a panel has while its jobs run. The reference is the maximum in its Softmax.
  struct RowState {
    alignas(64) float offset[PQ];   // -reference * scale, in log2
    alignas(64) float highest[PQ];  // score of the job
    alignas(64) float missing[PQ];  // from the row sums to those of unrounded weights
    alignas(64) float sum_before[PQ], missing_before[PQ];  // the job
  };
  struct Scratch : Base::Scratch {
    RowState rows[2];
    alignas(64) float ring[RING * PIECE];
  };
  static constexpr size_t SCRATCH_BYTES = sizeof(Scratch);

  template <bool LSE> class Pipeline {
   public:
    Pipeline(Scratch& scratch, const Unit& unit, int visits) : t(scratch), unit(unit), jobs(2 * visits), scale(unit.scale * LOG2E) {}

    void run() {
      for (int step = 0; step < jobs * PIECES + LAG; step++) {
        const int job = step / PIECES, piece = step % PIECES;
        if (job < jobs) score(job, piece);
        if (step >= LAG) {
          const int late = (step - LAG) / PIECES, i = (step - LAG) % PIECES;
          for (int o = i * OUTPUTS / PIECES; o < (i + 1) * OUTPUTS / PIECES; o++) output(late, o);
        }
        if (job < 2 && piece < NV / 2) refer(job, piece);
        if (piece == 0 && job && job <= jobs) finish(job - 1);
        if (piece == 0 && job < jobs) begin(job);
        ready = made;
      }
    }

   private:
    Panel& panel(uint32_t job) const { return t.panels[job % 2]; }
    RowState& rows(uint32_t job) const { return t.rows[job % 2]; }
    unit_t* weights_of(uint32_t job) const { return t.P + job % 2 * (P_PART / VISITS); }
    const Visit& visit(int job) const { return unit.visits[job / 2]; }
    float* slot(uint32_t piece) const { return t.ring + piece % RING * PIECE; }
    // While the first panel meets a visit, the next visit is brought into the second-level cache.
    const Visit* ahead(int job) const { return job % 2 == 0 && job + 2 < jobs ? &visit(job + 2) : nullptr; }

    __attribute__((noinline)) void score(int job, int piece) {
      const int s = piece / (NV / 2), j2 = piece % (NV / 2);
      if (made >= RING * PAIRS) form_weights(made - (RING - 1) * PAIRS);  // of what lies in the slot
      const unit_t *a = (const unit_t*)visit(job).key + 2 * s * KS * TILE, *b = panel(job).Q + 2 * j2 * TILE;
      const char* fetched = ahead(job) ? ahead(job)->key + piece * KS * 1024 : nullptr;
      float* out = slot(made / PAIRS);
      tile_zero<0>(), tile_zero<1>(), tile_zero<2>(), tile_zero<3>();
      UNROLL for (int k = 0; k < KS; k++) {
        four_products<1>(a + k * TILE, a + (KS + k) * TILE, BLOCK_PART, b + k * NV * TILE, b + (k * NV + 1) * TILE, Q_PART);
        form_some();
        if (fetched) fetched = Base::fetch_1k(fetched);
      }
      tile_store<0>(out), tile_store<1>(out + TILE), tile_store<2>(out + 2 * TILE), tile_store<3>(out + 3 * TILE);
      made += PAIRS;
    }

    __attribute__((noinline)) void output(int job, int o) {
      const int d32 = o / (NV / 2), j2 = o % (NV / 2);
      const unit_t *a = (const unit_t*)visit(job).value + 2 * d32 * STEPS * TILE, *b = weights_of(job) + 2 * j2 * TILE;
      const char* fetched = ahead(job) ? ahead(job)->value + o * STEPS * 1024 : nullptr;
      float* c = panel(job).O + (2 * d32 * NV + 2 * j2) * TILE;
      if (job < 2) tile_zero<0>(), tile_zero<1>(), tile_zero<2>(), tile_zero<3>();
      else tile_load<0>(c), tile_load<1>(c + TILE), tile_load<2>(c + NV * TILE), tile_load<3>(c + (NV + 1) * TILE);
      UNROLL for (int s = 0; s < STEPS; s++) {
        four_products<1>(a + s * TILE, a + (STEPS + s) * TILE, BLOCK_PART, b + s * NV * TILE, b + (s * NV + 1) * TILE, P_PART);
        form_some();
        if (fetched) fetched = Base::fetch_1k(fetched);
      }
      Base::store_four(c);
    }

    // The first reference of 32 queries of a panel: their maximum over the piece that was just made, the first of their job.
    void refer(int job, int j2) {
      const float* from = slot(made / PAIRS - 1);
      for (int c = 0; c < 2; c++) {
        const int lane = 16 * (2 * j2 + c);
        float* reference = panel(job).softmax.max + lane;
        __m512 m = _mm512_load_ps(reference);
        for (int key = 0; key < 32; key++) m = _mm512_max_ps(_mm512_load_ps(from + (key / 16 * 2 + c) * TILE + key % 16 * 16), m);
        _mm512_store_ps(reference, m);
        _mm512_store_ps(rows(job).offset + lane, _mm512_mul_ps(m, _mm512_set1_ps(-scale)));
      }
    }

    // Before the weights of a job: references that the panel's job before has outgrown are raised. Its output is complete by now.
    void begin(int job) {
      alignas(64) float best[PQ], alpha[PQ];
      if (job >= 2 && outgrown(job, RAISE, best)) {
        panel(job).softmax.grow(best, alpha, scale);
        Base::rescale(panel(job).O, alpha);
        follow(job, alpha);
      }
      std::fill_n(rows(job).highest, PQ, -FLT_MAX);
      std::copy_n(panel(job).softmax.sum, PQ, rows(job).sum_before);
      std::copy_n(rows(job).missing, PQ, rows(job).missing_before);
    }

    // Before the output of a job: all of its weights, and again where a maximum is too far above its reference.
    void finish(int job) {
      alignas(64) float best[PQ];
      form_weights((job + 1) * PIECES * PAIRS);
      if (outgrown(job, AGAIN, best)) again(job);
    }

    // Whether rows have a maximum more than 2^most above their reference. Those rows' maximum, the others' reference.
    bool outgrown(int job, float most, float* best) const {
      bool any = false;
      for (int i = 0; i < PQ; i++) {
        const float reference = panel(job).softmax.max[i], highest = rows(job).highest[i];
        const bool above = (highest - reference) * scale > most;
        best[i] = above ? highest : reference;
        any |= above;
      }
      return any;
    }

    // Other references, by which the row sums became alpha times as large.
    void follow(int job, const float* alpha) {
      for (int i = 0; i < PQ; i++) {
        rows(job).offset[i] = -panel(job).softmax.max[i] * scale;
        rows(job).missing[i] *= alpha[i];
      }
    }

    // The job's weights with the true maximum, from scores that are computed once more.
    __attribute__((noinline)) void again(int job) {
      alignas(64) float alpha[PQ];
      Softmax& softmax = panel(job).softmax;
      std::copy_n(rows(job).sum_before, PQ, softmax.sum);
      std::copy_n(rows(job).missing_before, PQ, rows(job).missing);
      Base::template scores<1>(visit(job), panel(job).Q, t.S, STEPS, nullptr);
      const bool grew = softmax.grow(rows(job).highest, alpha, scale);
      if (grew && job >= 2) Base::rescale(panel(job).O, alpha);
      Base::weights(t.S, weights_of(job), softmax, scale, STEPS);
      follow(job, alpha);
    }

    void form_weights(uint32_t until) { while (done < until) form_some(); }

    // The next AT_ONCE vectors of pairs of weights, if their scores are there.
    inline __attribute__((always_inline)) void form_some() {
      if (done == ready) return;
      const uint32_t piece = done / PAIRS, pair = done % PAIRS, job = piece / PIECES, s = piece % PIECES / (NV / 2), j2 = piece % (NV / 2);
      const uint32_t c = pair / 16, half = pair / 8 % 2, row = pair % 8;
      const uint32_t lane = 16 * (2 * j2 + c);
      const float* from = slot(piece) + (half * 2 + c) * TILE + row * 32;
      unit_t* to = weights_of(job) + (s * NV + 2 * j2 + c) * TILE + half * 128 + row * 16;
      const __m512 factor = _mm512_set1_ps(scale), offset = _mm512_load_ps(rows(job).offset + lane);
      const __m512bh ones = (__m512bh)_mm512_set1_epi16(0x3f80);
      float *sums = panel(job).softmax.sum + lane, *maxima = rows(job).highest + lane, *missing = rows(job).missing + lane;
      __m512 highest = _mm512_load_ps(maxima), rounded = _mm512_setzero_ps(), exact = _mm512_setzero_ps();
      UNROLL for (int i = 0; i < AT_ONCE; i++) {
        if (AT_ONCE == 16 && i == 8) from += 2 * TILE - 256;  // the second half's tile
        const __m512 even = _mm512_load_ps(from + 32 * i), odd = _mm512_load_ps(from + 32 * i + 16);
        highest = _mm512_max_ps(_mm512_max_ps(even, odd), highest);
        const __m512 weight = exp2_bf16(_mm512_fmadd_ps(even, factor, offset)), next = exp2_bf16(_mm512_fmadd_ps(odd, factor, offset));
        const __m512i pairs = pair_rows(weight, next);
        rounded = _mm512_dpbf16_ps(rounded, (__m512bh)pairs, ones);
        if (LSE) exact = _mm512_add_ps(exact, _mm512_add_ps(weight, next));
        _mm512_store_si512(to + 16 * i, pairs);
      }
      _mm512_store_ps(sums, _mm512_add_ps(_mm512_load_ps(sums), rounded));
      if (LSE) _mm512_store_ps(missing, _mm512_add_ps(_mm512_load_ps(missing), _mm512_sub_ps(exact, rounded)));
      _mm512_store_ps(maxima, highest);
      done += AT_ONCE;
    }

    Scratch& t;
    const Unit& unit;
    const int jobs;
    const float scale;
    uint32_t made = 0, ready = 0, done = 0;  // vectors of pairs: whose scores there are, were there when the step began; that are formed
  };

  // Visits that need nothing between scores and weights, from the first on.
  static int plain_visits(const Unit& unit) {
    int n = 0;
    while (n < unit.num_visits && unit.visits[n].kv == BLOCK && !unit.visits[n].diagonal && !unit.visits[n].bias) n++;
    return n;
  }

  static void attend(const Unit& unit, char* memory) {
    Scratch& t = *(Scratch*)memory;
    const int plain = plain_visits(unit);
    // one panel has no other to alternate with
    if (unit.rows <= PQ || plain < 2) return Base::attend(unit, memory);
    Base::begin(unit, t);
    alignas(64) float reference[2][PQ];
    for (int p = 0; p < 2; p++) std::fill_n(t.rows[p].missing, PQ, 0.f);
    if (unit.lse) Pipeline<true>(t, unit, plain).run();
    else Pipeline<false>(t, unit, plain).run();
    for (int p = 0; p < 2; p++) std::copy_n(t.panels[p].softmax.max, PQ, reference[p]);
    Base::attend_from(unit, t, plain);
    for (int p = 0; p < 2; p++) {
      const Softmax& softmax = t.panels[p].softmax;
      // what is missing is relative to the references before the visits that followed
      for (int i = 0; i < PQ; i++) t.rows[p].missing[i] *= std::exp2((reference[p][i] - softmax.max[i]) * unit.scale * LOG2E);
      write_panel<D>(t.panels[p].O, TILES_OF_PANEL, softmax, unit, p * PQ, t.rows[p].missing);
    }
  }
};

}  // namespace
