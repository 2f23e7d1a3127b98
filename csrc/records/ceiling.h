// ceilings: what the machine can do at best; threads share the lines, each runs a peak whole
#pragma once
#include "../common.h"

namespace fastllm {

struct ReadBandwidthArgs {
  int32_t* sum;    // += the 32-bit lanes of data, wrapping: proof that everything was read
  const void* data;
  int64_t lines, streams, prefetch;    // 64-byte lines; runs read side by side in a thread; bytes ahead
};
static inline int64_t work(const ReadBandwidthArgs& a) { return a.lines * 16; }

struct PeakArgs {
  double* result;         // [threads]: keeps the arithmetic alive
  int64_t* operations;    // += operations done (a multiply and an add count two)
  int64_t iterations;
  double factor, term;
};
static inline int64_t work(const PeakArgs&) { return int64_t(1) << 40; }    // always on every thread

}  // namespace fastllm
