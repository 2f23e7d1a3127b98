// What the CPU kernels, the CUDA kernels and the bindings share: plain records and nothing that needs a library.
//
// An argument record has 8-byte fields only (pointer, int64_t, double), so that one generic binding fills every record
// from Python and a plan stores it as bytes. Strides and sizes count elements; a null pointer means "absent".
#pragma once
#include <stddef.h>
#include <stdint.h>

namespace fastllm {

enum DType : int64_t { kFloat32 = 0, kBFloat16 = 1, kFloat16 = 2, kS8 = 3, kE4M3 = 4 };    // the last two: pages alone

// What a kernel reports besides its outputs. Everything else is validated before a kernel is entered.
enum Status : int32_t { kOk = 0, kIndexOutOfRange = 1, kNotANumber = 2 };

// Threads that run one kernel together. Every kernel is SPMD: it is entered by `size` threads, takes its own share of the
// work by `rank`, and may meet the others at a barrier. `scratch` is shared by the team, 64-byte aligned, uninitialised.
struct Barrier {
  alignas(64) int32_t arrived;
  alignas(64) int32_t phase;
};
struct Team {
  int32_t rank, size;
  Barrier* barrier;
  char* scratch;
  int32_t* status;
};

// How this processor reads memory fastest: runs side by side in a thread, and bytes to prefetch ahead in each (cpu/registry.cpp).
struct Streaming {
  int64_t streams, ahead;
};
extern const Streaming streaming;

// Defaults, overloaded beside the records that need more.
template <class Args> int64_t scratch_bytes(const Args&, int64_t /*threads*/) { return 0; }

}  // namespace fastllm
