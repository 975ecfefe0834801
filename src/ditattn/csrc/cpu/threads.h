// Work shared by a counter over short-lived threads. Threads are made per call: nothing survives a fork, and no second pool competes with torch's.
#pragma once
#include "abi.h"

#include <atomic>
#include <chrono>
#include <cstdlib>
#include <new>
#include <sys/mman.h>
#include <system_error>
#include <thread>
#include <vector>

namespace {

typedef std::chrono::steady_clock Clock;

class Team {
 public:
  explicit Team(const DitattnHost* host) : host_(host), state_(host ? host->release() : nullptr), polled_(Clock::now()) {}
  ~Team() { if (host_) host_->acquire(state_); }
  Team(const Team&) = delete;

  // body(next) on up to `threads` threads; next() hands out 0, 1, ... total - 1, then -1. The calling thread takes part.
  template <class Body> void run(int threads, int64_t total, Body body) {
    counter_ = 0;
    std::vector<std::thread> others;
    for (int t = 1; t < threads && t < total; t++) {
      // a machine that has no thread left still computes, more slowly
      try { others.emplace_back([&] { body([&] { return take(total); }); }); } catch (const std::system_error&) { break; }
    }
    body([&] { poll(); return take(total); });
    for (auto& other : others) other.join();
  }

  void fail(int status) { int none = DITATTN_OK; status_.compare_exchange_strong(none, status); }
  int status() const { return status_; }

 private:
  int64_t take(int64_t total) {
    if (status_ != DITATTN_OK) return -1;
    const int64_t mine = counter_++;
    return mine < total ? mine : -1;
  }

  // Every 50 ms the calling thread lets Python look for Ctrl-C.
  void poll() {
    if (!host_ || Clock::now() - polled_ < std::chrono::milliseconds(50)) return;
    host_->acquire(state_);
    if (host_->check_signals()) fail(DITATTN_INTERRUPTED);
    state_ = host_->release();
    polled_ = Clock::now();
  }

  const DitattnHost* host_;
  void* state_;
  Clock::time_point polled_;
  std::atomic<int64_t> counter_{0};
  std::atomic<int> status_{DITATTN_OK};
};

// Cache-line aligned memory. Up to two middle-sized pieces are kept for the next call: touching fresh memory costs as much as packing into it.
// They are handed over by exchanging pointers, so that no lock can be left closed in a forked child.
class Memory {
  static constexpr size_t HUGE_PAGE = 2 << 20, LEAST_KEPT = 1 << 20, MOST_KEPT = 32 << 20;
  struct alignas(64) Piece { size_t bytes; };

 public:
  explicit Memory(size_t bytes) : piece_(bytes < LEAST_KEPT ? nullptr : take_kept(bytes)) {
    if (!piece_) piece_ = make(bytes);
  }
  ~Memory() {
    if (piece_ && piece_->bytes >= LEAST_KEPT && piece_->bytes <= MOST_KEPT) for (auto& place : kept()) {
      Piece* none = nullptr;
      if (place.compare_exchange_strong(none, piece_)) return;
    }
    free(piece_);
  }
  Memory(const Memory&) = delete;
  char* get() const { return (char*)(piece_ ? piece_ + 1 : nullptr); }

 private:
  static std::atomic<Piece*> (&kept())[2] {
    static std::atomic<Piece*> places[2];
    return places;
  }

  static Piece* make(size_t bytes) {
    const size_t all = sizeof(Piece) + bytes + 64;
    void* data;
    if (posix_memalign(&data, all >= HUGE_PAGE ? HUGE_PAGE : 64, all)) return nullptr;
#if defined(MADV_HUGEPAGE)
    if (all >= HUGE_PAGE) madvise(data, all, MADV_HUGEPAGE);
#endif
    return new (data) Piece{bytes};
  }

  // A kept piece that is large enough; smaller ones are given back, larger ones will take their place.
  static Piece* take_kept(size_t bytes) {
    for (auto& place : kept()) if (Piece* piece = place.exchange(nullptr)) {
      if (piece->bytes >= bytes) return piece;
      free(piece);
    }
    return nullptr;
  }

  Piece* piece_;
};

}  // namespace
