// Rows of tensors as bf16 numbers. An fp32 number is one of them, rounded, or the sum of several parts, each the rest of those before rounded to
// nearest: 8 more bits per part, so that three parts are the number itself.
#pragma once
#include "panel.h"

namespace {

typedef uint32_t unit_t __attribute__((may_alias));

// 32 elements of a row as bf16.
INLINE __m512i load_bf16x32(const char* p, int dtype) {
  if (dtype == DITATTN_BF16) return _mm512_loadu_si512(p);
  return (__m512i)_mm512_cvtne2ps_pbh(_mm512_loadu_ps((const float*)p + 16), _mm512_loadu_ps((const float*)p));
}

// Elements d .. d+31 of row r as bf16; zero beyond the last row.
INLINE __m512i row_bf16(Rows rows, int r, int d, int num_rows) {
  return r < num_rows ? load_bf16x32(rows.at(r) + d * size_of(rows.dtype), rows.dtype) : _mm512_setzero_si512();
}

// 32 numbers as their parts. What is larger than bf16 can be has an infinite first part, and the rest of an infinity is NaN.
template <int PARTS> INLINE void split(__m512 low, __m512 high, __m512i parts[PARTS]) {
  UNROLL for (int p = 0; p < PARTS; p++) {
    parts[p] = (__m512i)_mm512_cvtne2ps_pbh(high, low);
    low = _mm512_sub_ps(low, (__m512)_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm512_castsi512_si256(parts[p])), 16));
    high = _mm512_sub_ps(high, (__m512)_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm512_extracti64x4_epi64(parts[p], 1)), 16));
  }
}

// As row_bf16, in parts. A single one takes fp32 and bf16 rows, more take every dtype.
template <int PARTS> INLINE void row_parts(Rows rows, int r, int d, int num_rows, __m512i parts[PARTS]) {
  if constexpr (PARTS == 1) {
    parts[0] = row_bf16(rows, r, d, num_rows);
  } else {
    vf low{}, high{};
    if (r < num_rows) {
      const char* p = rows.at(r) + d * size_of(rows.dtype);
      low = load_wide(p, rows.dtype), high = load_wide(p + 16 * size_of(rows.dtype), rows.dtype);
    }
    split<PARTS>((__m512)low, (__m512)high, parts);
  }
}

// Whether one of 32 bf16 numbers is infinite or NaN.
INLINE bool any_infinite(__m512i x) {
  const __m512i exponent = _mm512_set1_epi16(0x7f80);
  return _mm512_cmpeq_epi16_mask(_mm512_and_si512(x, exponent), exponent) != 0;
}

// 16 x 16 units of Q^T, for each part: elements d .. d+31 (as 16 pairs) by the 16 query rows from `row` on; missing rows are zero lanes. Returns
// whether one of them is infinite or NaN.
template <int PARTS> INLINE bool transposed_query(const Unit& unit, int row, int d, vf r[PARTS][16]) {
  const __m512i signs = unit.negate ? _mm512_set1_epi16((short)0x8000) : _mm512_setzero_si512();
  bool infinite = false;
  UNROLL for (int i = 0; i < 16; i++) {
    __m512i parts[PARTS];
    row_parts<PARTS>(unit.query, row + i, d, unit.rows, parts);
    UNROLL for (int p = 0; p < PARTS; p++) r[p][i] = (vf)_mm512_xor_si512(parts[p], signs);
    infinite |= any_infinite(parts[0]);
  }
  UNROLL for (int p = 0; p < PARTS; p++) transpose(r[p]);
  return infinite;
}

}  // namespace
