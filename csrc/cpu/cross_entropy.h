// One row of a cross-entropy, for logits that a caller gives (cross_entropy) and for those of a block that we made ourselves
// (linear_cross_entropy): the same bits in both.
#pragma once
#include "fixed.h"
#include "soft_cap.h"

namespace fastllm {
namespace {

struct Loss {
  int64_t vocab, ignore_index;
  float smoothing, softcap, z_loss;
};
template <class Args> FL_INLINE Loss loss_of(const Args& a) {
  return {a.vocab, a.ignore_index, float(a.smoothing), float(a.softcap), float(a.z_loss)};
}

struct Stats {
  float max, log_sum;    // kept apart: their sum would lose what lies below an ulp of the largest logit
};

constexpr int64_t kSpan = 1024;    // logits that are read twice, the second time from L1
constexpr int kAbreast = 4;        // vectors side by side: exp is a long chain of dependent operations

template <bool kCapped, class T> FL_INLINE vf logit(const T* x, vf cap) { return kCapped ? soft_cap(load(x), cap) : load(x); }
template <bool kCapped, class T> FL_INLINE vf logit(const T* x, vf cap, vm m) {
  return kCapped ? soft_cap(load(x, m), cap) : load(x, m);
}

// Largest logit, log-sum and (smoothing) sum of the row in one read of memory. The sum is carried from span to span at the
// largest logit so far; the order of additions is the row's own. A NaN anywhere, +inf, or nothing above -inf: a NaN log-sum.
template <bool kCapped, class T> Stats read_row(const T* x, const Loss& l, double& total) {
  const vf cap = set1(l.softcap), lowest = set1(-__builtin_inff());
  float largest = -__builtin_inff();
  vf sum[kAbreast], plain[kAbreast];
  FL_UNROLL
  for (int c = 0; c < kAbreast; ++c) sum[c] = plain[c] = set1(0);
  alignas(64) float capped[kCapped ? kSpan : 16];
  for (int64_t begin = 0; begin < l.vocab; begin += kSpan) {
    const int64_t n = l.vocab - begin < kSpan ? l.vocab - begin : kSpan, even = n / (kAbreast * kLanes) * (kAbreast * kLanes);
    vf top[kAbreast];
    FL_UNROLL
    for (int c = 0; c < kAbreast; ++c) top[c] = lowest;
    for (int64_t i = 0; i < even; i += kAbreast * kLanes)
      FL_UNROLL
      for (int c = 0; c < kAbreast; ++c) {
        const vf v = logit<kCapped>(x + begin + i + c * kLanes, cap);
        if (kCapped) store(capped + i + c * kLanes, v);
        top[c] = max(v, top[c]);
        if (l.smoothing != 0) plain[c] = plain[c] + v;
      }
    for (int64_t i = even; i < n; i += kLanes) {
      const vm m = first(n - i);
      const vf v = logit<kCapped>(x + begin + i, cap, m);
      if (kCapped) store(capped + i, v);
      top[0] = max(select(m, v, lowest), top[0]);
      if (l.smoothing != 0) plain[0] = plain[0] + select(m, v, set1(0));
    }
    const float highest = max(max(max(top[0], top[1]), max(top[2], top[3])));
    if (highest > largest) {
      const vf shrink = exp_not_positive(set1(largest - highest));
      FL_UNROLL
      for (int c = 0; c < kAbreast; ++c) sum[c] = sum[c] * shrink;
      largest = highest;
    }
    // before the first logit above -inf there is nothing to subtract, and every exponential is zero
    const vf offset = set1(largest > -__builtin_inff() ? largest : 0.0f);
    for (int64_t i = 0; i < even; i += kAbreast * kLanes)
      FL_UNROLL
      for (int c = 0; c < kAbreast; ++c) {
        const vf v = kCapped ? load(capped + i + c * kLanes) : load(x + begin + i + c * kLanes);
        sum[c] = sum[c] + exp_not_positive(v - offset);
      }
    for (int64_t i = even; i < n; i += kLanes) {
      const vm m = first(n - i);
      const vf v = kCapped ? load(capped + i) : load(x + begin + i, m);
      sum[0] = sum[0] + exp_not_positive(select(m, v, lowest) - offset);
    }
  }
  total = double(fastllm::sum((plain[0] + plain[1]) + (plain[2] + plain[3])));
  const float all = fastllm::sum((sum[0] + sum[1]) + (sum[2] + sum[3]));
  const bool defined = all >= 1 && all <= kLargest && largest <= kLargest;
  return {largest, defined ? float(natural_log(double(all))) : __builtin_nanf("")};
}

template <bool kCapped, class T> FL_INLINE float one_logit(const T* x, const Loss& l) {
  float lane[16];
  store(lane, logit<kCapped>(x, set1(l.softcap), first(1)));
  return lane[0];
}

// (1 - s)(logsumexp - x_target) + s (logsumexp - mean) + z logsumexp^2, in double: the largest logit cancels first.
template <bool kCapped, class T> float forward_row(const T* x, int64_t target, const Loss& l, Stats& stats) {
  double total = 0;
  stats = read_row<kCapped>(x, l, total);
  const double s = double(l.smoothing), max = double(stats.max), log_sum = double(stats.log_sum);
  double loss = (1 - s) * (max - double(one_logit<kCapped>(x + target, l))) + log_sum;
  if (l.smoothing != 0) loss += s * (max - total / double(l.vocab));
  if (l.z_loss != 0) loss += double(l.z_loss) * (max + log_sum) * (max + log_sum);
  return float(loss);
}

// d = upstream * ((1 + 2 z logsumexp) p - smoothing / vocab - (1 - smoothing) [target]), times the cap's slope. d may be x.
template <bool kCapped, bool kStream, class T>
void backward_row(T* d, const T* x, int64_t target, Stats stats, float upstream, const Loss& l) {
  const float weight = upstream * (1 + 2 * l.z_loss * (stats.max + stats.log_sum));
  const vf cap = set1(l.softcap), offset = set1(stats.max);
  const vf scale = set1(weight) * exp(set1(-stats.log_sum)), shift = set1(-upstream * l.smoothing / float(l.vocab));
  const vf slope = set1(1 / l.softcap);
  auto gradient = [&](vf v, vf hit) {
    const vf g = fma(exp_not_positive(v - offset), scale, shift) - hit;
    if (!kCapped) return g;
    const vf y = v * slope;
    return g * (set1(1) - y * y);
  };
  float at_target[16];
  store(at_target, gradient(logit<kCapped>(x + target, cap, first(1)), set1(upstream * (1 - l.smoothing))));
  const vf none = set1(0);
  int64_t i = 0;
  auto masked = [&](int64_t n) {
    const vm m = first(n);
    store(d + i, gradient(logit<kCapped>(x + i, cap, m), none), m);
    i += n < kLanes ? n : kLanes;
  };
  constexpr int64_t kBytes = kLanes * sizeof(T);
  if (kStream) {    // up to the first aligned vector
    const int64_t head = (kBytes - int64_t(uintptr_t(d) % kBytes)) % kBytes / int64_t(sizeof(T));
    if (head) masked(head < l.vocab ? head : l.vocab);
  }
  for (; i + kAbreast * kLanes <= l.vocab; i += kAbreast * kLanes) {
    vf g[kAbreast];
    FL_UNROLL
    for (int c = 0; c < kAbreast; ++c) g[c] = gradient(logit<kCapped>(x + i + c * kLanes, cap), none);
    FL_UNROLL
    for (int c = 0; c < kAbreast; ++c)
      if (kStream)
        stream(d + i + c * kLanes, g[c]);
      else
        store(d + i + c * kLanes, g[c]);
  }
  while (i < l.vocab) masked(l.vocab - i);
  store(d + target, load(at_target), first(1));
}

template <class T> void zero_row(T* d, int64_t n) { memset(d, 0, size_t(n) * sizeof(T)); }

}  // namespace
}  // namespace fastllm
