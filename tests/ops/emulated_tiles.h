// The steps of csrc/cpu/tiles.h without AMX, for tests of the AMX kernels on any CPU with AVX512_BF16.
//
// They do what Intel's manual says of the instructions (Software Developer's Manual, volume 2: LDTILECFG, TILELOADD, TILESTORED, TILEZERO,
// TDPBF16PS), and end the program with a message where an instruction would fault, or would leave behind what the thread's next user trips over:
//   a step before a configuration is loaded, or on a tile that it does not have        (#UD on the CPU)
//   a configuration that no CPU takes                                                  (#GP)
//   a product of tiles whose rows and columns do not fit, or of a tile with itself      (#UD)
//   a thread that ends with a configuration loaded
// What was in a tile before a configuration was loaded is gone, and what a load does not write is zero, as on the CPU.
#pragma once
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <immintrin.h>

namespace {

[[noreturn]] inline void tile_fault(const char* step, const char* what) {
  fprintf(stderr, "emulated tiles: %s: %s\n", step, what);
  abort();
}

class EmulatedTiles {
 public:
  ~EmulatedTiles() {
    if (config_.palette) tile_fault("end of a thread", "a tile configuration is still loaded");
  }

  const TileConfig& config() const { return config_; }

  void load_config(const TileConfig& c) {
    if (c.palette > 1) tile_fault("ldtilecfg", "the palette must be 0 or 1");
    if (c.palette == 1) check(c);
    config_ = c.palette ? c : TileConfig();
    memset(tiles_, 0, sizeof tiles_);
  }

  void load(int t, const void* p) {
    need(t, "tileloadd");
    memset(tiles_[t], 0, sizeof tiles_[t]);
    for (int row = 0; row < config_.rows[t]; row++) memcpy(tiles_[t][row], (const char*)p + 64 * row, config_.row_bytes[t]);
  }

  void store(int t, void* p) const {
    need(t, "tilestored");
    for (int row = 0; row < config_.rows[t]; row++) memcpy((char*)p + 64 * row, tiles_[t][row], config_.row_bytes[t]);
  }

  void zero(int t) {
    need(t, "tilezero");
    memset(tiles_[t], 0, sizeof tiles_[t]);
  }

  void product(int c, int a, int b) {
    for (int t : {c, a, b}) need(t, "tdpbf16ps");
    if (c == a || c == b || a == b) tile_fault("tdpbf16ps", "the three tiles must be different ones");
    if (config_.rows[a] != config_.rows[c] || config_.row_bytes[b] != config_.row_bytes[c])
      tile_fault("tdpbf16ps", "rows of A and columns of B must be those of C");
    for (int t : {c, a, b}) if (config_.row_bytes[t] % 4) tile_fault("tdpbf16ps", "rows must be whole pairs");
    if (config_.row_bytes[a] / 4 != config_.rows[b]) tile_fault("tdpbf16ps", "A must have as many pairs in a row as B has rows");
    // the instruction does not look at the thread's modes: denormal operands count as zero, denormal results become zero, rounding is to
    // nearest even, and nothing is flagged
    const unsigned int mode = _mm_getcsr();
    _mm_setcsr(0x1f80 | 0x8040);
    multiply(tiles_[c], tiles_[a], tiles_[b], config_.rows[c], config_.rows[b], config_.row_bytes[c]);
    _mm_setcsr(mode);
  }

 private:
  typedef unsigned char Tile[16][64];

  static void check(const TileConfig& c) {
    if (c.start_row) tile_fault("ldtilecfg", "no kernel here starts in the middle of a tile");
    for (unsigned char x : c.reserved) if (x) tile_fault("ldtilecfg", "reserved bytes must be zero");
    for (int t = 0; t < 16; t++) {
      if (t >= 8 && (c.rows[t] || c.row_bytes[t])) tile_fault("ldtilecfg", "there are eight tiles");
      if (c.rows[t] > 16 || c.row_bytes[t] > 64) tile_fault("ldtilecfg", "a tile has at most 16 rows of 64 bytes");
      if (!c.rows[t] != !c.row_bytes[t]) tile_fault("ldtilecfg", "a tile with rows needs columns, and the other way round");
    }
  }

  void need(int t, const char* step) const {
    if (!config_.palette) tile_fault(step, "no tile configuration is loaded");
    if (!config_.rows[t]) tile_fault(step, "the configuration does not have this tile");
  }

  // As the manual orders the sums: the even and the odd elements of all pairs each in a sum of their own that begins with zero and takes one
  // fused multiply-add per pair; then the two are added, then their sum is added to C.
  static __attribute__((noinline)) void multiply(Tile c, const Tile a, const Tile b, int rows, int pairs, int row_bytes) {
    const __m512i high_half = _mm512_set1_epi32((int)0xffff0000);
    const __mmask16 columns = (__mmask16)((1u << row_bytes / 4) - 1);
    for (int m = 0; m < rows; m++) {
      __m512 even = _mm512_setzero_ps(), odd = _mm512_setzero_ps();
      for (int k = 0; k < pairs; k++) {
        unsigned int pair;
        memcpy(&pair, a[m] + 4 * k, 4);
        const __m512i x = _mm512_set1_epi32((int)pair), y = _mm512_loadu_si512(b[k]);
        even = _mm512_fmadd_ps((__m512)_mm512_slli_epi32(x, 16), (__m512)_mm512_slli_epi32(y, 16), even);
        odd = _mm512_fmadd_ps((__m512)_mm512_and_si512(x, high_half), (__m512)_mm512_and_si512(y, high_half), odd);
      }
      const __m512 sum = _mm512_add_ps(_mm512_loadu_ps(c[m]), _mm512_add_ps(even, odd));
      memset(c[m], 0, 64);
      _mm512_mask_storeu_ps(c[m], columns, sum);
    }
    for (int m = rows; m < 16; m++) memset(c[m], 0, 64);
  }

  TileConfig config_;
  alignas(64) Tile tiles_[8] = {};
};

inline EmulatedTiles& emulated_tiles() {
  static thread_local EmulatedTiles tiles;
  return tiles;
}

inline int permit_tiles() { return DITATTN_OK; }
inline void load_config(const TileConfig& c) { emulated_tiles().load_config(c); }
inline TileConfig loaded_config() { return emulated_tiles().config(); }
inline void release_tiles() { emulated_tiles().load_config(TileConfig()); }
template <int T> inline void tile_load(const void* p) { emulated_tiles().load(T, p); }
template <int T> inline void tile_store(void* p) { emulated_tiles().store(T, p); }
template <int T> inline void tile_zero() { emulated_tiles().zero(T); }
template <int C, int A, int B> inline void tile_product() { emulated_tiles().product(C, A, B); }

}  // namespace
