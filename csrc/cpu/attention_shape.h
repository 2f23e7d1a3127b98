// What shapes the scores of a row beside scale * q . k: cap, bias, slopes, sink and dropout. A row in one KV tile is
// a vector of scores of which it sees [begin, end); what lies outside is never used.
#pragma once
#include "dropout.h"
#include "soft_cap.h"

namespace fastllm {
namespace {

struct Visible {
  int64_t begin, end;
};

// Where a row of scores stands: head `head` of sequence b at query `query`, whose position is `position`.
struct RowAt {
  int64_t b, head, query, position, dropout_row;
};

struct Shaping {
  float cap;            // 0: none
  const void* bias;     // or null
  int64_t bias_batch, bias_head, bias_query, bias_key, bias_dtype;
  const float *alibi, *sinks;
  Dropout dropout;
  bool drops, scores;    // whether weights are dropped; whether scores are more than a product
};
template <class Args> FL_INLINE Shaping shaping_of(const Args& a) {
  Shaping s = {float(a.softcap), a.bias, a.bias_batch, a.bias_head, a.bias_query, a.bias_key, a.bias_dtype, a.alibi,
               a.sinks, dropout_of(a.p, a.seed, a.call, a.threshold), a.p > 0, false};
  s.scores = s.cap != 0 || s.bias || s.alibi;
  return s;
}

template <class T> FL_INLINE vf widened(const T* x) {    // one element in every lane
  float lanes[kLanes];
  store(lanes, load(x, first(1)));
  return set1(lanes[0]);
}

// x[i] += bias of key base + i, for the keys that the row sees.
template <class T> void add_bias(const Shaping& s, const T* row, int64_t base, Visible keys, float* x) {
  const int64_t p0 = keys.begin / kLanes, p1 = (keys.end + kLanes - 1) / kLanes;
  if (!s.bias_key) {
    const vf same = widened(row);
    for (int64_t p = p0; p < p1; ++p) store(x + p * kLanes, load(x + p * kLanes) + same);
    return;
  }
  for (int64_t p = p0; p < p1; ++p) {
    const T* at = row + base + p * kLanes;
    const int64_t left = keys.end - p * kLanes;    // the bias may end where the keys do
    store(x + p * kLanes, load(x + p * kLanes) + (left >= kLanes ? load(at) : load(at, first(left))));
  }
}

FL_INLINE vf lane_numbers() {
  alignas(64) static const float number[16] = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
  return load(number);
}

// Scores of keys base, base + 1, ...: capped, then with bias or slope. Distances are exact below 2^24.
inline void shape_scores(const Shaping& s, const RowAt& at, int64_t base, Visible keys, float* x) {
  const int64_t p0 = keys.begin / kLanes, p1 = (keys.end + kLanes - 1) / kLanes;
  if (s.cap != 0)
    for (int64_t p = p0; p < p1; ++p) store(x + p * kLanes, soft_cap(load(x + p * kLanes), set1(s.cap)));
  if (s.bias)
    with_dtype(s.bias_dtype, [&](auto element) {
      using T = decltype(element);
      const int64_t row = at.b * s.bias_batch + at.head * s.bias_head + at.query * s.bias_query;
      add_bias(s, static_cast<const T*>(s.bias) + row, base, keys, x);
    });
  if (s.alibi) {
    const vf slope = set1(0 - s.alibi[at.head]);
    for (int64_t p = p0; p < p1; ++p) {
      const vf distance = lane_numbers() + set1(float(base + p * kLanes - at.position));
      store(x + p * kLanes, fma(slope, abs(distance), load(x + p * kLanes)));
    }
  }
}

// Bit i: key base + i is kept, for 64 keys; base is a multiple of 64.
FL_INLINE uint64_t kept_keys(const Shaping& s, const RowAt& at, int64_t base) {
  return kept(s.dropout, at.dropout_row, base / 64);
}

// Weights that dropout takes become zeros; the others keep their value: the result is scaled, once.
inline void drop_weights(const Shaping& s, const RowAt& at, int64_t base, Visible keys, float* x) {
  const int64_t p1 = (keys.end + kLanes - 1) / kLanes;
  for (int64_t p = keys.begin / 64 * 4; p < p1; p += 4) {
    uint64_t keep = kept_keys(s, at, base + p * kLanes);
    for (int64_t i = p; i < p + 4 && i < p1; ++i, keep >>= 16)
      store(x + i * kLanes, select(lanes(uint32_t(keep & 0xffff)), load(x + i * kLanes), set1(0)));
  }
}

}  // namespace
}  // namespace fastllm
