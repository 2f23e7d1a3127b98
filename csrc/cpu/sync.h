// The team's barrier and its way of sharing work. Everything here has internal linkage: it is compiled once per ISA.
#pragma once
#include <sched.h>

#include "../records.h"

namespace fastllm {
namespace {

inline void relax() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

constexpr int kSpins = 128;    // some microseconds

// Spins, then yields: a step has hundreds of barriers, most of them shorter than a system call, but a waiting thread must not
// burn the core that its partner is to run on, where there are fewer cores than threads, or others at work on them.
[[maybe_unused]] inline void sync(Team& team) {
  if (team.size == 1) return;
  Barrier* b = team.barrier;
  const int32_t phase = __atomic_load_n(&b->phase, __ATOMIC_ACQUIRE);
  if (__atomic_add_fetch(&b->arrived, 1, __ATOMIC_ACQ_REL) == team.size) {
    __atomic_store_n(&b->arrived, 0, __ATOMIC_RELAXED);
    __atomic_store_n(&b->phase, phase + 1, __ATOMIC_RELEASE);
    return;
  }
  for (int spins = 0; __atomic_load_n(&b->phase, __ATOMIC_ACQUIRE) == phase; ++spins) {
    if (spins < kSpins)
      relax();
    else
      sched_yield();
  }
}

struct Range {
  int64_t begin, end;
};

// This thread's contiguous share of n items.
[[maybe_unused]] inline Range share(const Team& team, int64_t n) { return {n * team.rank / team.size, n * (team.rank + 1) / team.size}; }

[[maybe_unused]] inline void report(Team& team, Status status) { __atomic_store_n(team.status, int32_t(status), __ATOMIC_RELAXED); }

}  // namespace
}  // namespace fastllm
