// rope: every head row of q and k rotated by its token's angles, into new contiguous tensors. Bound by memory.
#include "rope.h"

namespace fastllm {
namespace {

template <class T> struct Heads {    // q or k
  const T* x;
  T* out;
  int64_t heads, batch, row, head;    // strides of x
};

template <bool interleaved, bool past_cache, class T> void turn(const RopeArgs& a, Team& team, const Heads<T>& h) {
  const Range tokens = share(team, a.batch * a.tokens);
  const float sign = a.inverse ? -1.0f : 1.0f;
  for (int64_t t = tokens.begin; t < tokens.end; ++t) {
    const int64_t b = t / a.tokens, row = t % a.tokens, at = b * a.position_batch + row * a.position_row;
    const float* angle = angles(a.position, a.position_is_int64, at, a.table, a.positions, a.rotary);
    if (!angle) {
      report(team, kIndexOutOfRange);
      continue;
    }
    const T* x = h.x + b * h.batch + row * h.row;
    T* out = h.out + t * h.heads * a.dim;
    for (int64_t i = 0; i < h.heads; ++i, x += h.head, out += a.dim)
      interleaved ? rotate_pairs<past_cache>(x, angle, a.rotary, a.dim, out, sign) : rotate<past_cache>(x, angle, a.rotary, a.dim, out, sign);
  }
  if (past_cache) fence();
}

template <bool interleaved, class T> void turn(const RopeArgs& a, Team& team, const Heads<T>& h) {
  const bool whole = interleaved || a.rotary % (2 * kLanes) == 0;    // every vector lies where stream() may write
  const bool past_cache = whole && streams(h.out, a.batch * a.tokens * h.heads, a.dim * int64_t(sizeof(T)));
  past_cache ? turn<interleaved, true>(a, team, h) : turn<interleaved, false>(a, team, h);
}

template <class T> void run(const RopeArgs& a, Team& team) {
  const Heads<T> q = {static_cast<const T*>(a.q), static_cast<T*>(a.q_out), a.heads, a.q_batch, a.q_row, a.q_head};
  const Heads<T> k = {static_cast<const T*>(a.k), static_cast<T*>(a.k_out), a.kv_heads, a.k_batch, a.k_row, a.k_head};
  const Heads<T> both[2] = {q, k};
  for (const Heads<T>& h : both) a.interleaved ? turn<true>(a, team, h) : turn<false>(a, team, h);
}

}  // namespace

namespace FASTLLM_TIER {

void rope(const RopeArgs& a, Team& team) noexcept {
  with_dtype(a.dtype, [&](auto type) { run<decltype(type)>(a, team); });
}

}  // namespace FASTLLM_TIER
}  // namespace fastllm
