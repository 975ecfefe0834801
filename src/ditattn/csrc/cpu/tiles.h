// The matrix registers of AMX: 8 tiles of up to 16 rows by 64 bytes per thread, as the few steps that a kernel needs.
//
// With DITATTN_EMULATED_TILES the steps come from a header that is not part of the package (tests/ops/emulated_tiles.h): for tests on CPUs that
// have no AMX. No build of the package sets it.
#pragma once
#include "vec.h"

#include <sys/syscall.h>
#include <unistd.h>

namespace {

struct alignas(64) TileConfig {
  uint8_t palette = 0, start_row = 0, reserved[14] = {};
  uint16_t row_bytes[16] = {};
  uint8_t rows[16] = {};

  // All eight tiles at their full size.
  static TileConfig full() {
    TileConfig c;
    c.palette = 1;
    for (int t = 0; t < 8; t++) { c.row_bytes[t] = 64; c.rows[t] = 16; }
    return c;
  }
};

}  // namespace

#if defined(DITATTN_EMULATED_TILES)
#include "emulated_tiles.h"
#else

namespace {

inline int permit_tiles() {
  constexpr long ARCH_REQ_XCOMP_PERM = 0x1023, XFEATURE_XTILEDATA = 18;
  return syscall(SYS_arch_prctl, ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA) ? DITATTN_NOT_PERMITTED : DITATTN_OK;
}

INLINE void load_config(const TileConfig& c) { __asm__ volatile("ldtilecfg %0" ::"m"(c)); }
// Palette 0 where none is loaded.
INLINE TileConfig loaded_config() {
  TileConfig c;
  __asm__ volatile("sttilecfg %0" : "=m"(c));
  return c;
}
INLINE void release_tiles() { __asm__ volatile("tilerelease"); }

// Tiles in memory are dense: 64 bytes from row to row. "memory": tiles are read from what vector code has just written, and the other way round.
template <int T> INLINE void tile_load(const void* p) {
  __asm__ volatile("tileloadd (%0,%1,1), %%tmm%c2" ::"r"(p), "r"(64L), "i"(T) : "memory");
}
template <int T> INLINE void tile_store(void* p) {
  __asm__ volatile("tilestored %%tmm%c2, (%0,%1,1)" ::"r"(p), "r"(64L), "i"(T) : "memory");
}
template <int T> INLINE void tile_zero() { __asm__ volatile("tilezero %%tmm%c0" ::"i"(T)); }
// C += A . B: rows of A are pairs of bf16, rows of B are the same pairs for 16 columns.
template <int C, int A, int B> INLINE void tile_product() {
  __asm__ volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(C), "i"(A), "i"(B));
}

}  // namespace

#endif
