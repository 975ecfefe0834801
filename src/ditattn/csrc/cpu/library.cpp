// The shared object of one instruction set: which kernel serves a call, and the C entry points.
// Everything else has internal linkage, so that no code compiled for one instruction set can be merged into another's.
#include "block_mean.h"
#include "checks.h"
#include "f32.h"
#include "key_summary.h"
#if defined(__AVX512BF16__)
#include "bf16.h"
#endif
#if defined(__AMX_BF16__) || defined(DITATTN_EMULATED_TILES)
#define DITATTN_TILES
#include "amx_overlapped.h"
#endif
#include "instruction_sets.h"

#include <new>

#define EXPORT extern "C" __attribute__((visibility("default")))

namespace {

template <int D> int run_attention(DitattnAttention& a) {
  switch (a.bf16_parts) {
    case 0: return Attention<F32Kernel<D>>(a).run();
#if defined(DITATTN_TILES)
    case 1: return a.overlapped ? Attention<OverlappedAmxKernel<D>>(a).run() : Attention<AmxKernel<D, 1>>(a).run();
    case 2: return Attention<AmxKernel<D, 2>>(a).run();
    case 3: return Attention<AmxKernel<D, 3>>(a).run();
#elif defined(__AVX512BF16__)
    case 1: return Attention<Bf16Kernel<D>>(a).run();
#endif
  }
  return DITATTN_BAD_ARGUMENT;
}

int dispatch(DitattnAttention& a) {
  switch (a.head_dim) {
    case 32: return run_attention<32>(a);
    case 64: return run_attention<64>(a);
    case 96: return run_attention<96>(a);
    case 128: return run_attention<128>(a);
  }
  return DITATTN_BAD_ARGUMENT;
}

// No exception may cross the C border.
template <class F> int guarded(F f) {
  try { return f(); } catch (const std::bad_alloc&) { return DITATTN_NO_MEMORY; } catch (...) { return DITATTN_BAD_ARGUMENT; }
}

}  // namespace

EXPORT int ditattn_attention(DitattnAttention* a) {
  if (a->struct_bytes != (int64_t)sizeof *a || a->batch < 1 || a->heads < 1 || a->key_heads < 1 || a->heads % a->key_heads ||
      a->query_length < 1 || a->key_length < 1 || a->num_threads < 1 || a->dtype < DITATTN_F32 || a->dtype > DITATTN_F16 ||
      (a->dtype == DITATTN_F16 && a->bf16_parts == 1) || !std::isfinite(a->scale) || (a->indices == nullptr) != (a->counts == nullptr) ||
      (a->tail_key.data && (!a->tail_value.data || !a->tail_counts || !a->counts || a->causal || a->scale == 0)))
    return DITATTN_BAD_ARGUMENT;
  return guarded([&] { return dispatch(*a); });
}

EXPORT int ditattn_block_mean(DitattnBlockMean* a) {
  if (a->struct_bytes != (int64_t)sizeof *a || a->batch < 1 || a->length < 1 || a->heads < 1 || a->head_dim < 1 || a->block_size < 1 ||
      a->num_threads < 1 || a->dtype < DITATTN_F32 || a->dtype > DITATTN_F16)
    return DITATTN_BAD_ARGUMENT;
  return guarded([&] { return block_mean(*a); });
}

EXPORT int ditattn_key_summary(DitattnKeySummary* a) {
  if (a->struct_bytes != (int64_t)sizeof *a || a->batch < 1 || a->length < 1 || a->heads < 1 || a->head_dim < 1 || a->head_dim > WIDEST ||
      a->num_threads < 1 || a->dtype < DITATTN_F32 || a->dtype > DITATTN_F16 || !std::isfinite(a->scale) || a->scale == 0)
    return DITATTN_BAD_ARGUMENT;
  return guarded([&] { return key_summary(*a); });
}

// DITATTN_OK, or DITATTN_BAD_ARGUMENT where a kernel must not follow the plan.
EXPORT int ditattn_check_plan(const int32_t* indices, const int32_t* counts, int64_t rows, int64_t columns, int64_t blocks) {
  return valid_plan(indices, counts, rows, columns, blocks) ? DITATTN_OK : DITATTN_BAD_ARGUMENT;
}

// DITATTN_OK, or DITATTN_BAD_ARGUMENT where one of the rows is no permutation of 0 .. length - 1.
EXPORT int ditattn_check_order(const int64_t* order, int64_t rows, int64_t length) {
  return guarded([&] { return are_permutations(order, rows, length) ? DITATTN_OK : DITATTN_BAD_ARGUMENT; });
}

// Asks the operating system for what this object needs (AMX tiles); 0 or DITATTN_NOT_PERMITTED.
EXPORT int ditattn_init() {
#if defined(DITATTN_TILES)
  return permit_tiles();
#else
  return DITATTN_OK;
#endif
}

// The largest `bf16_parts` that a call may ask for: 0 without bf16 arithmetic, 1, or 3 with tiles.
EXPORT int ditattn_most_bf16_parts() {
#if defined(DITATTN_TILES)
  return 3;
#elif defined(__AVX512BF16__)
  return 1;
#else
  return 0;
#endif
}

// Bit i: this CPU and operating system can run variant i (see instruction_sets.h).
EXPORT uint32_t ditattn_runnable_variants() { return runnable_variants(); }
