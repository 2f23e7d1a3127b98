// rope: every head row of q and k rotated by its token's angles, into new contiguous tensors. Bound by memory.
#include "rope.h"

namespace fastllm {
namespace {

template <class T> void run(const RopeArgs& a, Team& team) {
  const Range tokens = share(team, a.batch * a.tokens);
  for (int64_t t = tokens.begin; t < tokens.end; ++t) {
    const int64_t b = t / a.tokens, row = t % a.tokens;
    const float* angle = angles(a.position, a.position_is_int64, b * a.position_batch + row * a.position_row, a.table, a.positions, a.rotary);
    if (!angle) {
      report(team, kIndexOutOfRange);
      continue;
    }
    const T* q = static_cast<const T*>(a.q) + b * a.q_batch + row * a.q_row;
    const T* k = static_cast<const T*>(a.k) + b * a.k_batch + row * a.k_row;
    T* q_out = static_cast<T*>(a.q_out) + t * a.heads * a.dim;
    T* k_out = static_cast<T*>(a.k_out) + t * a.kv_heads * a.dim;
    for (int64_t h = 0; h < a.heads; ++h) rotate(q + h * a.q_head, angle, a.rotary, a.dim, q_out + h * a.dim);
    for (int64_t h = 0; h < a.kv_heads; ++h) rotate(k + h * a.k_head, angle, a.rotary, a.dim, k_out + h * a.dim);
  }
}

}  // namespace

namespace FASTLLM_TIER {

void rope(const RopeArgs& a, Team& team) noexcept {
  with_dtype(a.dtype, [&](auto type) { run<decltype(type)>(a, team); });
}

}  // namespace FASTLLM_TIER
}  // namespace fastllm
