// Which instruction sets this CPU and its operating system support. Compiled into every shared object, asked through the baseline one.
#pragma once
#include <cstdint>
#include <initializer_list>
#if defined(__x86_64__)
#include <cpuid.h>
#endif

namespace {

// The order of VARIANTS in ditattn/ops/cpu_library.py.
enum : uint32_t { RUNS_BASELINE = 1, RUNS_AVX2 = 2, RUNS_AVX512 = 4, RUNS_AVX512BF16 = 8, RUNS_AMX = 16 };

#if defined(__x86_64__)

struct Leaf {
  uint32_t eax = 0, ebx = 0, ecx = 0, edx = 0;
  Leaf(uint32_t leaf, uint32_t sub) { __get_cpuid_count(leaf, sub, &eax, &ebx, &ecx, &edx); }
};

inline bool all(uint32_t word, std::initializer_list<int> bits) {
  for (int bit : bits) if (!(word >> bit & 1)) return false;
  return true;
}

// What the operating system saves on a context switch; only legal where OSXSAVE is set.
inline uint32_t saved_state() {
  uint32_t low, high;
  __asm__ volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
  return low;
}

inline uint32_t runnable_variants() {
  const Leaf one(1, 0), seven(7, 0), seven_one(7, 1), extended(0x80000001, 0);
  uint32_t found = RUNS_BASELINE;
  if (!all(one.ecx, {27})) return found;  // OSXSAVE
  const uint32_t state = saved_state();
  // FMA, MOVBE, F16C, POPCNT, SSE4.1, SSE4.2, AVX; LZCNT; BMI1, AVX2, BMI2: what x86-64-v3 lets the compiler use
  if (!all(one.ecx, {12, 22, 29, 23, 19, 20, 28}) || !all(extended.ecx, {5}) || !all(seven.ebx, {3, 5, 8}) || (state & 6) != 6) return found;
  found |= RUNS_AVX2;
  // AVX512 F, DQ, CD, BW, VL: x86-64-v4
  if (!all(seven.ebx, {16, 17, 28, 30, 31}) || (state & 0xe6) != 0xe6) return found;
  found |= RUNS_AVX512;
  if (!all(seven_one.eax, {5})) return found;  // AVX512_BF16
  found |= RUNS_AVX512BF16;
  // AMX-BF16, AMX-TILE, and the operating system's two tile states
  if (all(seven.edx, {22, 24}) && (state & 0x60000) == 0x60000) found |= RUNS_AMX;
  return found;
}

#else

inline uint32_t runnable_variants() { return RUNS_BASELINE; }

#endif

}  // namespace
