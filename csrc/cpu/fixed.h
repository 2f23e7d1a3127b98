// Softmax in fixed point: the weight of a logit is exp(x - max) as a multiple of 2^-40 in 64 bits, rounded to nearest
// even. Integer sums are associative: the same for any cut of the vocabulary, any thread count, any batch. What every
// reader of these sums needs (sampler, log-probabilities, entropy) is here, so that all of them get the same bits.
//
// The sum of a row stays below 2^63 for up to 2^23 logits.
#pragma once
#include "simd.h"

namespace fastllm {
namespace {

constexpr float kNothing = -33.0f;    // exp(z) and -z exp(z) both round to zero below this
constexpr float kMagic = 12582912.0f;    // 1.5 * 2^23: adding it leaves a value below 2^22, rounded, in the low bits
constexpr float kUnit = 1048576.0f;      // 2^20: weights in vectors are multiples of 2^-20

// N vectors go through exp side by side: its chain of some 20 dependent operations is longer than a processor looks
// ahead.
#define FL_ABREAST for (int i = 0; i < N; ++i)

// x becomes z = scale * (x - max), within [-80, 0]. `max` is finite: a row whose largest logit is +inf passes the
// largest float; its infinities get 0, everything else -80.
template <int N> FL_INLINE void exponents(vf (&x)[N], vf max, vf scale) {
  FL_ABREAST x[i] = x[i] - max;
  FL_ABREAST x[i] = x[i] * scale;
  FL_ABREAST x[i] = fastllm::max(x[i], set1(-80.0f));
  FL_ABREAST x[i] = min(x[i], set1(0));
}

// e = 2^20 exp(z): the value of exp() in simd.h, bit for bit, without what it does for other arguments; the factor
// comes with the exponent. Over every float of [-30, 0] it never falls where z rises, and exp(0) = 1.
template <int N> FL_INLINE void exponentials(const vf (&z)[N], vf (&e)[N]) {
  vf n[N], f[N], square[N];
  vi power[N];
  FL_ABREAST n[i] = z[i] * set1(1.44269504088896341f);
  FL_ABREAST n[i] = n[i] + set1(kMagic + 20);
  FL_ABREAST power[i] = shift_left<23>(as_int(n[i]));
  FL_ABREAST n[i] = n[i] - set1(kMagic + 20);
  FL_ABREAST f[i] = fma(n[i], set1(-0.693359375f), z[i]);
  FL_ABREAST f[i] = fma(n[i], set1(2.12194440e-4f), f[i]);
  FL_ABREAST e[i] = fma(set1(1.9875691500e-4f), f[i], set1(1.3981999507e-3f));
  FL_ABREAST square[i] = f[i] * f[i];
  FL_ABREAST e[i] = fma(e[i], f[i], set1(8.3334519073e-3f));
  FL_ABREAST e[i] = fma(e[i], f[i], set1(4.1665795894e-2f));
  FL_ABREAST e[i] = fma(e[i], f[i], set1(1.6666665459e-1f));
  FL_ABREAST e[i] = fma(e[i], f[i], set1(5.0000001201e-1f));
  FL_ABREAST e[i] = fma(e[i], square[i], f[i]);
  FL_ABREAST e[i] = e[i] + set1(1.0f);
  FL_ABREAST e[i] = as_float(as_int(e[i]) + power[i]);
}

FL_INLINE vf exponent(vf x, vf max, vf scale) {
  vf z[1] = {x};
  exponents(z, max, scale);
  return z[0];
}
FL_INLINE vf weight(vf x, vf max, vf scale) {
  const vf z[1] = {exponent(x, max, scale)};
  vf e[1];
  exponentials(z, e);
  return e[0];
}

// Sums of weights, up to 1024 a lane. e / 2^20 = high 2^-20 + low 2^-40 in integers: the part above 2^-20 comes off
// exactly, and both parts are read from the bits of a sum with kMagic, which takes no conversion. Each addition leaves
// the bits of kMagic behind, to be taken off at the end.
struct Fixed {
  vi high, low;
};
constexpr int32_t kMagicBits = 0x4b400000;
constexpr int64_t kMostSums = 1024;

FL_INLINE Fixed no_weight() { return {seti(0), seti(0)}; }
template <int N> FL_INLINE void add(Fixed& sum, const vf (&e)[N]) {
  const vf magic = set1(kMagic), unit = set1(kUnit);
  vf high[N], low[N];
  FL_ABREAST high[i] = e[i] + magic;
  FL_ABREAST low[i] = high[i] - magic;
  FL_ABREAST low[i] = e[i] - low[i];
  FL_ABREAST low[i] = fma(low[i], unit, magic);
  FL_ABREAST sum.high = sum.high + as_int(high[i]);
  FL_ABREAST sum.low = sum.low + as_int(low[i]);
}
FL_INLINE Fixed plus(Fixed sum, vf e) {
  const vf one[1] = {e};
  add(sum, one);
  return sum;
}
#undef FL_ABREAST

FL_INLINE int64_t sum_of(vi v) {
#if defined(__AVX512F__)
  return _mm512_reduce_add_epi64(_mm512_add_epi64(_mm512_cvtepi32_epi64(_mm512_castsi512_si256(v.v)),
                                                  _mm512_cvtepi32_epi64(_mm512_extracti64x4_epi64(v.v, 1))));
#else
  int32_t t[16];
  storei(t, v);
  int64_t sum = 0;
  for (int32_t x : t) sum += x;
  return sum;
#endif
}

// Total of `count` additions a lane.
FL_INLINE uint64_t total(Fixed s, int64_t count) {
  const vi bias = seti(int32_t(uint32_t(kMagicBits) * uint32_t(count)));
  return uint64_t((sum_of(s.high - bias) << 20) + sum_of(s.low - bias));
}
FL_INLINE uint64_t total(vf e) { return total(plus(no_weight(), e), 1); }

// The weights of one vector.
FL_INLINE void store(uint64_t* p, vf e) {
  int32_t high[16], low[16];
  const Fixed s = plus(no_weight(), e);
  storei(high, s.high - seti(kMagicBits)), storei(low, s.low - seti(kMagicBits));
  for (int i = 0; i < 16; ++i) p[i] = uint64_t((int64_t(high[i]) << 20) + low[i]);
}

// Sum over the vectors v(i), i = 0, 16, ... below n; lanes that do not exist must be 0.
template <class F> FL_INLINE uint64_t sum_weights(int64_t n, F v) {
  uint64_t sum = 0;
  for (int64_t i = 0; i < n;) {
    Fixed part = no_weight();
    int64_t count = 0;
    for (; i < n && count < kMostSums; i += kLanes, ++count) part = plus(part, v(i));
    sum += total(part, count);
  }
  return sum;
}

// Natural logarithm of a positive normal number, error below 2 ulp: x = 2^e m with m in [sqrt(1/2), sqrt(2)), then the
// series of 2 atanh((m - 1) / (m + 1)). Additions, products and one division only: the same bits in every tier.
[[maybe_unused]] inline double natural_log(double x) {
  uint64_t u;
  memcpy(&u, &x, 8);
  int64_t e = int64_t(u >> 52 & 2047) - 1023;
  u = (u & 0xfffffffffffff) | 0x3ff0000000000000;
  double m;
  memcpy(&m, &u, 8);
  if (m > 1.4142135623730951) m *= 0.5, ++e;
  const double s = (m - 1) / (m + 1), z = s * s;
  double p = 1.0 / 23;
  for (int k = 21; k > 0; k -= 2) p = p * z + 1.0 / k;
  // ln2 in two parts: the first ends in 17 zero bits, so that e times it is exact
  return double(e) * 0x1.62e42fefap-1 + (2 * s * p + double(e) * 0x1.cf79abc9e3b3ap-40);
}

// log of a sum of weights
[[maybe_unused]] inline double log_weight(uint64_t sum) { return natural_log(double(sum) * 0x1p-40); }

// log of exp(x - max) / sum, for a logit and the largest of its row. Both in double: the difference is exact but for
// one rounding, whatever their size.
[[maybe_unused]] inline float log_probability(float x, float max, uint64_t sum, double temperature = 1) {
  if (max == __builtin_inff()) {
    if (x < max) return -__builtin_inff();
    return float(-log_weight(sum));
  }
  return float((double(x) - double(max)) / temperature - log_weight(sum));
}

// Entropy in nats from the sum of weights and the sum of weight * (max - x), both in fixed point.
[[maybe_unused]] inline float entropy(uint64_t sum, uint64_t moment) {
  return float(log_weight(sum) + double(moment) / double(sum));
}

}  // namespace
}  // namespace fastllm
