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

// ---- swiglu: y = gate * sigmoid(gate) * up ----------------------------------------------------------------------------
struct SwigluArgs {
  void* y;    // [rows, cols] contiguous
  const void *gate, *up;
  int64_t rows, cols, gate_stride, up_stride, dtype;
};
static inline int64_t work(const SwigluArgs& a) { return a.rows * a.cols * 4; }

struct SwigluBackwardArgs {
  void *dgate, *dup;    // [rows, cols] contiguous
  const void *dy, *gate, *up;
  int64_t rows, cols, dy_stride, gate_stride, up_stride, dtype;
};
static inline int64_t work(const SwigluBackwardArgs& a) { return a.rows * a.cols * 6; }

// ---- embedding: y[t] = weight[ids[t]] ----------------------------------------------------------------------------------
struct EmbeddingArgs {
  void* y;            // [count, cols] contiguous; a row whose id is out of range becomes NaN
  const void* ids;    // [count], read again at every replay
  const void* weight;
  int64_t count, cols, vocabulary, ids_stride, weight_stride, wide_ids, dtype;    // wide_ids: int64 ids, else int32
};
static inline int64_t work(const EmbeddingArgs& a) { return a.count * a.cols; }

struct EmbeddingBackwardArgs {
  void* dweight;    // [vocabulary, cols] contiguous; every row is written once
  const void *dy, *ids;
  int64_t count, cols, vocabulary, dy_stride, ids_stride, wide_ids, dtype;
};
static inline int64_t work(const EmbeddingBackwardArgs& a) { return (a.count + a.vocabulary) * a.cols; }
// The chains of positions that hold the same id (first and next), and the counter that hands out work.
static inline int64_t scratch_bytes(const EmbeddingBackwardArgs& a, int64_t) { return (a.vocabulary + a.count + 8) * 8; }

}  // namespace fastllm
