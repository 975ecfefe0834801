// Float vectors of the target's own width, through the vector extensions of GCC and Clang: the same source serves AVX-512, AVX2, SSE and NEON.
#pragma once
#include "abi.h"

#include <cfloat>
#include <cmath>
#include <cstring>
#include <utility>
#if defined(__x86_64__)
#include <immintrin.h>
#endif

#define UNROLL _Pragma("GCC unroll 16")
#define INLINE static inline __attribute__((always_inline))

namespace {

// W lanes in a vector; NV vectors in a row of the register tile, so that 4 * NV accumulators and NV + 1 operands fit the registers.
#if defined(__AVX512F__)
constexpr int W = 16, NV = 4;
#elif defined(__AVX__)
constexpr int W = 8, NV = 2;
#elif defined(__aarch64__)
constexpr int W = 4, NV = 4;
#else
constexpr int W = 4, NV = 2;
#endif

constexpr int MR = 4;          // broadcast rows of a register tile
constexpr int PQ = W * NV;     // query rows (lanes) of a panel
constexpr int BLOCK = 128;     // tokens in a query block and in a key block
constexpr float LOG2E = 1.44269504088896f, LN2 = 0.693147180559945f;

typedef float vf __attribute__((vector_size(W * 4), may_alias));
typedef float vfu __attribute__((vector_size(W * 4), may_alias, aligned(1)));
typedef int32_t vi __attribute__((vector_size(W * 4), may_alias));
typedef uint32_t vu __attribute__((vector_size(W * 4), may_alias));
typedef uint16_t vh __attribute__((vector_size(W * 2), may_alias, aligned(1)));

INLINE vf splat(float x) { return x - (vf){}; }

// NaN in b survives, NaN in a does not.
INLINE vf vmax(vf a, vf b) { return a > b ? a : b; }

constexpr int size_of(int dtype) { return dtype == DITATTN_F32 ? 4 : 2; }

// fp16 by integer arithmetic, for targets and compilers without a type for it. No step takes or makes an fp32 denormal, which a process may
// have told the CPU to flush.
INLINE vf widen_half(vu half) {
  const vu magnitude = (half & 0x7fff) << 13, exponent = magnitude & (0x7c00 << 13), moved = magnitude + ((127 - 15) << 23);
  const vf smallest = (vf)(vu{} + (113 << 23)), denormal = (vf)(moved + (1 << 23)) - smallest;
  const vu x = exponent == 0 ? (vu)denormal : exponent == (0x7c00 << 13) ? moved + ((128 - 16) << 23) : moved;
  return (vf)(x | (half & 0x8000) << 16);
}

INLINE vu narrow_half(vu x) {
  const vu sign = x & 0x80000000u, magnitude = x ^ sign;
  const vu huge = magnitude > (255u << 23) ? vu{} + 0x7e00 : vu{} + 0x7c00;
  // adding 1/2 leaves a denormal's bits, rounded to nearest even, at the low end
  const vu half = vu{} + (126 << 23), denormal = (vu)((vf)magnitude + (vf)half) - half;
  const vu normal = (magnitude - ((127 - 15) << 23) + 0xfff + ((magnitude >> 13) & 1)) >> 13;
  const vu narrow = magnitude >= (143u << 23) ? huge : magnitude < (113u << 23) ? denormal : normal;
  return narrow | sign >> 16;
}

// W elements of any dtype, widened.
INLINE vf load_wide(const char* p, int dtype) {
  if (dtype == DITATTN_F32) return *(const vfu*)p;
  if (dtype == DITATTN_BF16) return (vf)(__builtin_convertvector(*(const vh*)p, vu) << 16);
#if defined(__AVX512F__)
  return (vf)_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)p));
#elif defined(__F16C__)
  return (vf)_mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)p));
#else
  return widen_half(__builtin_convertvector(*(const vh*)p, vu));
#endif
}

// W floats rounded to nearest even into any dtype.
INLINE void store_narrow(char* p, int dtype, vf x) {
  if (dtype == DITATTN_F32) {
    *(vfu*)p = x;
  } else if (dtype == DITATTN_BF16) {
    const vu bits = (vu)x, rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
    *(vh*)p = __builtin_convertvector(x == x ? rounded : (vu)(vi{} + 0x7fc0), vh);
  } else {
#if defined(__AVX512F__)
    _mm256_storeu_si256((__m256i*)p, _mm512_cvtps_ph((__m512)x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
#elif defined(__F16C__)
    _mm_storeu_si128((__m128i*)p, _mm256_cvtps_ph((__m256)x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
#else
    *(vh*)p = __builtin_convertvector(narrow_half((vu)x), vh);
#endif
  }
}

// 2^x for x <= 0, relative error 7.5e-8 (equi-ripple polynomial on [-1/2, 1/2]). Below -127 and at -infinity exactly 0; NaN stays NaN.
// Adding 1.5 * 2^23 + 127 rounds to an integer and leaves it, biased as an exponent, in the low mantissa bits.
INLINE vf exp2v(vf x) {
  const float magic = 12582912.f + 127.f;
  x = vmax(splat(-127.f), x);
  const vf t = x + splat(magic), f = x - (t - splat(magic));
  vf p = splat(1.32764668e-3f);
  p = p * f + splat(9.67554129e-3f);
  p = p * f + splat(5.55071329e-2f);
  p = p * f + splat(0.240221197f);
  p = p * f + splat(0.693146967f);
  p = p * f + splat(1.00000007f);
  return p * (vf)((vi)t << 23);
}

template <int S, int... I> INLINE void butterfly(vf& a, vf& b, std::integer_sequence<int, I...>) {
  const vf x = a, y = b;
  a = __builtin_shufflevector(x, y, (I & S ? W + I - S : I)...);
  b = __builtin_shufflevector(x, y, (I & S ? W + I : I + S)...);
}

template <int S> INLINE void transpose_stage(vf r[W]) {
  UNROLL for (int i = 0; i < W; i++)
    if (!(i & S)) butterfly<S>(r[i], r[i + S], std::make_integer_sequence<int, W>{});
}

// W x W matrix of 32-bit units, in registers.
INLINE void transpose(vf r[W]) {
  if constexpr (W >= 16) transpose_stage<8>(r);
  if constexpr (W >= 8) transpose_stage<4>(r);
  transpose_stage<2>(r);
  transpose_stage<1>(r);
}

}  // namespace
