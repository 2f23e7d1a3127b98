// Walking the columns of a row: whole vectors, then a masked one, with one body for both.
#pragma once
#include "simd.h"

namespace fastllm {
namespace {

struct All {};    // the mask of a whole vector
template <class T> FL_INLINE vf load(const T* p, All) { return load(p); }
template <class T> FL_INLINE void store(T* p, vf a, All) { store(p, a); }
FL_INLINE vf select(All, vf yes, vf) { return yes; }

// A store, or a store past the cache. The tail is never streamed: rows that suit stream() have none.
template <bool past_cache, class T> FL_INLINE void put(T* p, vf a, All) { past_cache ? stream(p, a) : store(p, a); }
template <bool past_cache, class T> FL_INLINE void put(T* p, vf a, vm m) { store(p, a, m); }

// body(i, mask) for every 16 of n columns.
template <class F> FL_INLINE void each(int64_t n, F body) {
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) body(i, All());
  if (i < n) body(i, first(n - i));
}

// acc = add(acc, i, mask) over n columns, in one fixed order whatever surrounds the row: four accumulators hide the latency of
// an addition, and are left to the caller's reduction in pairs.
template <class V, class F, class G> FL_INLINE V chains(int64_t n, V start, F add, G join) {
  constexpr int64_t kChains = 4;
  V acc[kChains] = {start, start, start, start};
  int64_t i = 0;
  for (; i + kChains * kLanes <= n; i += kChains * kLanes)
    for (int64_t c = 0; c < kChains; ++c) acc[c] = add(acc[c], i + c * kLanes, All());
  int64_t c = 0;
  for (; i + kLanes <= n; i += kLanes, ++c) acc[c] = add(acc[c], i, All());
  if (i < n) acc[c] = add(acc[c], i, first(n - i));
  return join(join(acc[0], acc[1]), join(acc[2], acc[3]));
}
template <class F> FL_INLINE float sum_columns(int64_t n, F add) {
  return sum(chains(n, set1(0), add, [](vf a, vf b) { return a + b; }));
}

}  // namespace
}  // namespace fastllm
