// What the CPU kernels, the CUDA kernels and the bindings share: plain records and nothing that needs a library.
//
// An argument record has 8-byte fields only (pointer, int64_t, double), so that one generic binding fills every record
// from Python and a plan stores it as bytes. Strides and sizes count elements; a null pointer means "absent".
#pragma once
#include <stddef.h>
#include <stdint.h>

namespace fastllm {

enum DType : int64_t { kFloat32 = 0, kBFloat16 = 1, kFloat16 = 2 };

// What a kernel reports besides its outputs. Everything else is validated before a kernel is entered.
enum Status : int32_t { kOk = 0, kIndexOutOfRange = 1 };

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

// Defaults, overloaded beside the records that need more.
template <class Args> int64_t scratch_bytes(const Args&, int64_t /*threads*/) { return 0; }

// ---- rms_norm: s = x + residual; rstd = 1/sqrt(mean(s^2) + eps); y = s * rstd * weight -------------------------------
struct RmsNormArgs {
  void *y, *s;    // [rows, cols] contiguous; s is null when there is no residual
  float* rstd;    // [rows] or null
  const void *x, *residual, *weight;
  int64_t rows, cols, x_stride, residual_stride, dtype;
  double eps;
};
static inline int64_t work(const RmsNormArgs& a) { return a.rows * a.cols * 2; }

struct RmsNormBackwardArgs {
  void* dx;          // [rows, cols] contiguous
  float* dweight;    // [cols]
  const void *dy, *ds, *s, *weight;    // ds: gradient that reaches s beside the norm, or null
  const float* rstd;
  int64_t rows, cols, dy_stride, ds_stride, s_stride, dtype;
};
static inline int64_t work(const RmsNormBackwardArgs& a) { return a.rows * a.cols * 4; }
static inline int64_t scratch_bytes(const RmsNormBackwardArgs& a, int64_t threads) { return threads * (a.cols + 16) * 4; }

// ---- ceilings: what the machine can do at best; threads share the lines, each runs a peak whole ----------------------
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
