// Finding the best few of many logits without sorting them. Order: larger first, the lower index first among equals.
//
// A row is read in blocks of 256; the 16 lane maxima of every block are kept. The k-th largest of these maxima is a
// lower bound of the k-th largest logit, and at most a few more logits than k reach it, so that the exact selection
// runs on a short list, whose source are the few blocks that reach the bound.
#pragma once
#include "fixed.h"

namespace fastllm {
namespace {

constexpr int64_t kBlock = kLogitBlock;

// The vector at x, of which `left` elements exist; the rest is `fill`.
FL_INLINE vf load_or(const float* x, int64_t left, float fill) {
  if (left >= kLanes) return load(x);
  if (left <= 0) return set1(fill);
  const vm m = first(left);
  return select(m, load(x, m), set1(fill));
}
// One bit a lane: lanes that exist and reach the bound.
FL_INLINE uint32_t reach(vf v, vf bound) { return bits(v >= bound); }
FL_INLINE uint32_t exist(int64_t left) { return left >= kLanes ? 0xffffu : (1u << left) - 1; }

#if defined(__AVX512F__)
// Writes the lanes of `keep` side by side, 16 lanes in all; returns how many count. Through a register: a compressing
// store to memory is microcode on some processors.
FL_INLINE void append(float* p, vf v, uint32_t keep) { store(p, vf{_mm512_maskz_compress_ps(__mmask16(keep), v.v)}); }
FL_INLINE void append(int32_t* p, vi v, uint32_t keep) {
  storei(p, vi{_mm512_maskz_compress_epi32(__mmask16(keep), v.v)});
}
FL_INLINE bool any_nan(vf a, vf b) { return _mm512_cmp_ps_mask(a.v, b.v, _CMP_UNORD_Q) != 0; }
#else
template <class T, class V> FL_INLINE void append_lanes(T* p, V v, uint32_t keep) {
  T t[16];
  memcpy(t, &v, sizeof t);
  for (; keep; keep &= keep - 1) *p++ = t[__builtin_ctz(keep)];
}
FL_INLINE void append(float* p, vf v, uint32_t keep) { append_lanes(p, v, keep); }
FL_INLINE void append(int32_t* p, vi v, uint32_t keep) { append_lanes(p, v, keep); }
#if defined(__AVX2__)
FL_INLINE bool any_nan(vf a, vf b) {
  const __m256 m = _mm256_or_ps(_mm256_cmp_ps(a.a, b.a, _CMP_UNORD_Q), _mm256_cmp_ps(a.b, b.b, _CMP_UNORD_Q));
  return _mm256_movemask_ps(m) != 0;
}
#else
FL_INLINE bool any_nan(vf a, vf b) { return bits(is_nan(a)) || bits(is_nan(b)); }
#endif
#endif

FL_INLINE float min(vf a) {
  float t[16];
  store(t, a);
  float low = t[0];
  for (int i = 1; i < 16; ++i) low = t[i] < low ? t[i] : low;
  return low;
}

struct Extremes {
  float max, min;
  bool nan;    // then max and min mean nothing
};

// The extremes of the blocks, and their lane maxima: groups[16 b + l] is the largest of lane l in block b.
[[maybe_unused]] Extremes extremes(const float* x, int64_t n, Range blocks, float* groups) {
  vf high = set1(-__builtin_inff()), low = set1(__builtin_inff());
  bool nan = false;
  for (int64_t b = blocks.begin; b < blocks.end; ++b) {
    const float* p = x + b * kBlock;
    const int64_t left = n - b * kBlock;
    vf top = set1(-__builtin_inff()), bottom = set1(__builtin_inff());
    if (left >= kBlock) {
      for (int64_t i = 0; i < kBlock; i += 2 * kLanes) {
        const vf v = load(p + i), w = load(p + i + kLanes);
        nan |= any_nan(v, w);
        top = max(top, max(v, w));
        bottom = min(bottom, min(v, w));
      }
    } else {
      for (int64_t i = 0; i < left; i += kLanes) {
        const vf v = load_or(p + i, left - i, -__builtin_inff()), w = load_or(p + i, left - i, __builtin_inff());
        nan |= any_nan(v, v);
        top = max(top, v);
        bottom = min(bottom, w);
      }
    }
    store(groups + b * kLanes, top);
    high = max(high, top);
    low = min(low, bottom);
  }
  return {max(high), min(low), nan};
}

// A value that at least k of the maxima reach, and not many more: halving between values, so it may stop early where
// logits lie on very different scales; the selection that follows is exact. -(largest float) where fewer than k are
// finite.
[[maybe_unused]] float bound_of_best(const float* groups, int64_t count, int64_t k, float largest) {
  // Maxima of several groups do as well, as long as they are many times k, and are counted sooner.
  constexpr int64_t kFew = 2048;
  float folded[kFew];
  if (count > kFew && k <= kFew / 16) {
    for (int64_t i = 0; i < kFew; i += kLanes) store(folded + i, load(groups + i));
    for (int64_t i = kFew; i < count; i += kLanes) {
      float* p = folded + i % kFew;
      store(p, max(load(p), load(groups + i)));
    }
    groups = folded, count = kFew;
  }
  auto reached = [&](float bound) {
    int64_t total = 0;
    const vf v = set1(bound);
    for (int64_t i = 0; i < count; i += kLanes) total += __builtin_popcount(reach(load(groups + i), v));
    return total;
  };
  const int64_t enough = k + k / 4 + 8;
  float high = largest, low = largest, width = 1;
  for (;; width *= 4) {    // go down until k reach it
    low = largest - width;
    if (!(low > -kLargest)) return -kLargest;
    const int64_t found = reached(low);
    if (found >= k && found <= enough) return low;
    if (found >= k) break;
    high = low;
  }
  for (int step = 0; step < 16; ++step) {
    const float middle = low + (high - low) * 0.5f;
    if (!(middle > low && middle < high)) break;
    const int64_t found = reached(middle);
    (found < k ? high : low) = middle;
    if (found >= k && found <= enough) break;
  }
  return low;
}

// Appends the logits that reach the bound, in order of their index. Writes up to 16 elements past the last, never past
// the blocks' own place.
[[maybe_unused]] int64_t collect(const float* x, int64_t n, Range blocks, const float* groups, float bound,
                                 float* value, int32_t* index) {
  const vf v_bound = set1(bound);
  alignas(64) int32_t t[16];
  for (int32_t i = 0; i < 16; ++i) t[i] = i;
  const vi lane = loadi(t);
  int64_t found = 0;
  for (int64_t b = blocks.begin; b < blocks.end; ++b) {
    if (!reach(load(groups + b * kLanes), v_bound)) continue;
    const int64_t end = n < (b + 1) * kBlock ? n : (b + 1) * kBlock;
    for (int64_t i = b * kBlock; i < end; i += kLanes) {
      const vf v = load_or(x + i, n - i, -__builtin_inff());
      const uint32_t keep = reach(v, v_bound) & exist(n - i);
      if (!keep) continue;
      append(value + found, v, keep);
      append(index + found, lane + seti(int32_t(i)), keep);
      found += __builtin_popcount(keep);
    }
  }
  return found;
}

// The lowest index in the blocks whose logit is `largest`, or -1.
[[maybe_unused]] int64_t find_first(const float* x, int64_t n, Range blocks, const float* groups, float largest) {
  const vf v = set1(largest);
  for (int64_t b = blocks.begin; b < blocks.end; ++b) {
    if (!reach(load(groups + b * kLanes), v)) continue;
    for (int64_t i = b * kBlock;; i += kLanes)
      if (const uint32_t hit = reach(load_or(x + i, n - i, -__builtin_inff()), v)) return i + __builtin_ctz(hit);
  }
  return -1;
}

struct Mass {
  uint64_t sum, moment;    // of weight, and of weight * (max - x)
};

// Weights of the blocks at scale * (x - max). Blocks whose weights all round to zero are left out: that changes
// nothing. sums: where each block's sum goes, or null.
template <bool kMoment>
[[maybe_unused]] Mass weigh(const float* x, int64_t n, Range blocks, const float* groups, float max, float scale,
                            uint64_t* sums) {
#if defined(__AVX512F__)
  constexpr int kAbreast = kMoment ? 4 : 8;
#else
  constexpr int kAbreast = 4;
#endif
  const vf m = set1(max), s = set1(scale), nothing = set1(kNothing);
  Mass mass{0, 0};
  Fixed weights = no_weight(), moments = no_weight();
  int64_t count = 0;    // vectors in them
  auto flush = [&] {
    const uint64_t sum = total(weights, count);
    mass.sum += sum;
    if (kMoment) mass.moment += total(moments, count);
    weights = moments = no_weight(), count = 0;
    return sum;
  };
  for (int64_t b = blocks.begin; b < blocks.end; ++b) {
    if (sums) sums[b] = 0;
    if (!reach((load(groups + b * kLanes) - m) * s, nothing)) continue;
    const float* p = x + b * kBlock;
    const int64_t left = n - b * kBlock;
    auto step = [&](int64_t i, auto at) {
      vf z[kAbreast], e[kAbreast];
      for (int j = 0; j < kAbreast; ++j) z[j] = at(i + j * kLanes);
      exponents(z, m, s);
      exponentials(z, e);
      add(weights, e);
      if (!kMoment) return;
      for (int j = 0; j < kAbreast; ++j) e[j] = e[j] * (set1(0) - z[j]);
      add(moments, e);
    };
    if (left >= kBlock)
      for (int64_t i = 0; i < kBlock; i += kAbreast * kLanes) step(i, [&](int64_t k) { return load(p + k); });
    else
      for (int64_t i = 0; i < kBlock; i += kAbreast * kLanes)
        step(i, [&](int64_t k) { return load_or(p + k, left - k, -__builtin_inff()); });
    count += kBlock / kLanes;
    if (sums)
      sums[b] = flush();
    else if (count == kMostSums)
      flush();
  }
  flush();
  return mass;
}

// ---- on short lists -------------------------------------------------------------------------------------------------
// Keeps x > value, and of those equal to it the first `ties`.
struct Cut {
  float value;
  int64_t ties;
};

// A float as an integer of the same order; both zeros are 0.
FL_INLINE int64_t order(float x) {
  int32_t u;
  memcpy(&u, &x, 4);
  return u < 0 ? -int64_t(u & 0x7fffffff) : u;
}
FL_INLINE float from_order(int64_t k) {
  const uint32_t u = k < 0 ? 0x80000000u | uint32_t(-k) : uint32_t(k);
  float x;
  memcpy(&x, &u, 4);
  return x;
}

// The shortest beginning of the order whose elements (kWeighted: weights e) sum to the target or more; the target is at
// least 1 and at most the total. Halves the range of values and keeps the half that holds the end: about 2n element
// steps on ordinary data, at most 32n. work_x, work_e: room for n + 16.
template <bool kWeighted>
[[maybe_unused]] Cut find_cut(const float* x, const float* e, int64_t n, uint64_t target, float* work_x,
                              float* work_e) {
  uint64_t above = 0;
  for (;;) {
    vf high = set1(-__builtin_inff()), low = set1(__builtin_inff());
    for (int64_t i = 0; i < n; i += kLanes) {
      high = max(high, load_or(x + i, n - i, -__builtin_inff()));
      low = min(low, load_or(x + i, n - i, __builtin_inff()));
    }
    const float top = max(high), bottom = min(low);
    if (!(bottom < top)) {    // one value left: as many of its ties as the target still needs
      const uint64_t missing = target - above;
      if (!kWeighted) return {top, int64_t(missing)};
      uint64_t each[16];
      store(each, set1(e[0]));
      const uint64_t ties = each[0] ? (missing + each[0] - 1) / each[0] : uint64_t(n);
      return {top, int64_t(ties)};
    }
    const int64_t a = order(bottom), b = order(top);
    const float middle = from_order(a + ((b - a) >> 1));
    const vf v_middle = set1(middle);
    uint64_t sum = 0;
    auto larger = [&](int64_t i) { return v_middle < load_or(x + i, n - i, -__builtin_inff()); };
    if (kWeighted)
      sum = sum_weights(n, [&](int64_t i) { return select(larger(i), load_or(e + i, n - i, 0), set1(0)); });
    else
      for (int64_t i = 0; i < n; i += kLanes) sum += uint64_t(__builtin_popcount(bits(larger(i))));
    if (above + sum == target) return {middle, 0};
    const bool upper = above + sum > target;
    if (!upper) above += sum;
    int64_t kept = 0;
    for (int64_t i = 0; i < n; i += kLanes) {
      const vf v = load_or(x + i, n - i, 0);
      const uint32_t above_middle = bits(v_middle < v), keep = (upper ? above_middle : ~above_middle) & exist(n - i);
      const vf w = kWeighted ? load_or(e + i, n - i, 0) : v;
      append(work_x + kept, v, keep);
      if (kWeighted) append(work_e + kept, w, keep);
      kept += __builtin_popcount(keep);
    }
    x = work_x, e = work_e, n = kept;
  }
}

// Drops what the cut does not keep, in place and in order. x, index and (unless null) e have room for n + 16.
[[maybe_unused]] int64_t apply_cut(Cut cut, float* x, int32_t* index, float* e, int64_t n) {
  const vf value = set1(cut.value);
  int64_t kept = 0;
  for (int64_t i = 0; i < n; i += kLanes) {
    const vf v = load_or(x + i, n - i, -__builtin_inff());
    const vi id = loadi(index + i);
    uint32_t keep = bits(value < v);
    uint32_t equal = bits(v >= value) & ~keep & exist(n - i);
    for (; equal && cut.ties > 0; equal &= equal - 1, --cut.ties) keep |= equal & -equal;
    if (e) append(e + kept, load(e + i), keep);
    append(x + kept, v, keep);
    append(index + kept, id, keep);
    kept += __builtin_popcount(keep);
  }
  return kept;
}

}  // namespace
}  // namespace fastllm
