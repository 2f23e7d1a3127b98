// kv_append of a few tokens on a GPU, 16 bits, into pages of keys [16][dim]: a thread turns one pair of elements of a head, or two
// that no position turns, and copies two of the values. The bits are those of csrc/cpu/rope.h: every rounding is stated.
//
// In a captured step it begins while the projection before it runs, which writes neither where tokens stand nor their angles.
#include "../records/kv_append.h"
#include "mma.cuh"

namespace fastllm {
namespace {

constexpr int kThreads = 128;

template <bool kHalf> __device__ __forceinline__ uint16_t narrow(float v) { return uint16_t(pack<kHalf>(v, 0.0f)); }

template <bool kHalf> __global__ void __launch_bounds__(kThreads) append_kernel(const KvAppendArgs a) {
  next_may_begin();
  const int dim = int(a.dim), half = int(a.rotary) / 2, pairs = (dim + 1) / 2;
  const int64_t item = int64_t(blockIdx.x) * kThreads + threadIdx.x, row = item / pairs, heads = a.heads + a.kv_heads;
  const int64_t token = row / heads < a.tokens ? row / heads : a.tokens - 1, head = row % heads;
  const int i = int(item % pairs);
  const int64_t position = a.position_is_int64 ? static_cast<const int64_t*>(a.position)[token]
                                               : static_cast<const int32_t*>(a.position)[token];
  const int64_t slot = a.slot[token];
  const bool known = position >= 0 && position < a.positions, turns = i < half;
  const float* angle = a.table + (known ? position : 0) * a.rotary;
  const float cosine = turns && known ? angle[i] : not_a_number(), sine = turns && known ? angle[half + i] : not_a_number();
  wait_for_previous();
  if (row / heads >= a.tokens) return;

  const bool of_q = head < a.heads;
  if (!of_q && (slot < 0 || slot >= a.pages * kPage)) return;
  const int64_t kv_head = head - a.heads, page = slot / kPage, place = kv_head * kPage * dim + slot % kPage * dim;
  const uint16_t* x = of_q ? static_cast<const uint16_t*>(a.q) + token * a.q_row + head * a.q_head
                           : static_cast<const uint16_t*>(a.k) + token * a.k_row + kv_head * a.k_head;
  uint16_t* out = of_q ? static_cast<uint16_t*>(a.q_out) + (token * a.heads + head) * dim
                       : static_cast<uint16_t*>(a.k_pages) + page * a.k_page + place;
  if (turns) {
    const float first = wide<kHalf>(x[i]), second = wide<kHalf>(x[half + i]);
    out[i] = narrow<kHalf>(fmaf(first, cosine, -(second * sine)));
    out[half + i] = narrow<kHalf>(fmaf(first, sine, second * cosine));
  } else {
    for (int at = 2 * i; at < 2 * i + 2 && at < dim; ++at) out[at] = x[at];    // past the table's width
  }
  if (of_q) return;
  const uint16_t* v = static_cast<const uint16_t*>(a.v) + token * a.v_row + kv_head * a.v_head;
  uint16_t* to = static_cast<uint16_t*>(a.v_pages) + page * a.v_page + place;
  for (int at = 2 * i; at < 2 * i + 2 && at < dim; ++at) to[at] = v[at];
}

}  // namespace

int kv_append(const KvAppendArgs& a, char*, void* stream) {
  if (a.dtype == kFloat32 || a.dtype != a.page_dtype || a.scales) return int(cudaErrorInvalidValue);
  const int64_t items = a.tokens * (a.heads + a.kv_heads) * ((a.dim + 1) / 2), blocks = (items + kThreads - 1) / kThreads;
  const auto kernel = a.dtype == kFloat16 ? append_kernel<true> : append_kernel<false>;
  return launch_with(weights_rest(), kernel, blocks, kThreads, 0, 1, stream, a);
}

}  // namespace fastllm
