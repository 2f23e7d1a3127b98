// What this machine can do at best, the yardstick of every benchmark: how fast memory is read, how many fp32 FMAs and how
// many 8-bit products a second. Not ops: `fastllm bench` runs them beside the kernels, in the same seconds.
#include "simd.h"

namespace fastllm {
namespace {

#if defined(__AVX512F__)
constexpr int64_t kPeakChains = 12;    // two ports and four or five cycles of latency: 8 to 10 chains keep them busy
#elif defined(__AVX2__)
constexpr int64_t kPeakChains = 5;    // a vf is two registers of the 16
#else
constexpr int64_t kPeakChains = 2;    // a vf is four
#endif

// Sums the 32-bit lanes of `lines` lines, read as kStreams runs side by side. One run per thread may keep too few cache
// misses in flight to fill the memory bus; the prefetch crosses page borders, which the hardware's does not.
template <int64_t kStreams> vi sum_lines(const char* data, int64_t lines, int64_t prefetch) {
  const int64_t run = lines / kStreams * 64;
  vi acc[4] = {seti(0), seti(0), seti(0), seti(0)};
  for (int64_t at = 0; at < run; at += 64)
    for (int64_t s = 0; s < kStreams; ++s) {
      const char* p = data + s * run + at;
      __builtin_prefetch(p + prefetch);
      acc[s % 4] = acc[s % 4] + loadi(p);
    }
  for (int64_t i = lines / kStreams * kStreams; i < lines; ++i) acc[0] = acc[0] + loadi(data + i * 64);
  return (acc[0] + acc[1]) + (acc[2] + acc[3]);
}

}  // namespace

namespace FASTLLM_TIER {

void read_bandwidth(const ReadBandwidthArgs& a, Team& team) noexcept {
  const Range lines = share(team, a.lines);
  const char* data = static_cast<const char*>(a.data) + lines.begin * 64;
  const int64_t n = lines.end - lines.begin;
  const vi total = a.streams <= 1   ? sum_lines<1>(data, n, a.prefetch)
                   : a.streams <= 4 ? sum_lines<4>(data, n, a.prefetch)
                   : a.streams <= 8 ? sum_lines<8>(data, n, a.prefetch)
                                    : sum_lines<16>(data, n, a.prefetch);
  int32_t lanes[kLanes];
  storei(lanes, total);
  for (const int32_t lane : lanes) __atomic_fetch_add(a.sum, lane, __ATOMIC_RELAXED);    // wraps: any order, one value
}

void fma_peak(const PeakArgs& a, Team& team) noexcept {
  const vf factor = set1(float(a.factor)), term = set1(float(a.term));
  vf chain[kPeakChains];
  for (int64_t c = 0; c < kPeakChains; ++c) chain[c] = set1(float(c));
  for (int64_t i = 0; i < a.iterations; ++i)
    for (auto& x : chain) x = fma(x, factor, term);
  vf total = chain[0];
  for (int64_t c = 1; c < kPeakChains; ++c) total = total + chain[c];
  a.result[team.rank] = double(sum(total));
  __atomic_fetch_add(a.operations, a.iterations * kPeakChains * kLanes * 2, __ATOMIC_RELAXED);
}

void dot_peak(const PeakArgs& a, Team& team) noexcept {
  vi weights = seti(int32_t(a.factor)), activations[kPeakChains], chain[kPeakChains];
  for (int64_t c = 0; c < kPeakChains; ++c) chain[c] = seti(0), activations[c] = seti(int32_t(a.term) + int32_t(c));
  for (int64_t i = 0; i < a.iterations; ++i, weights = weights + seti(1))    // or AVX2's products leave the loop
    for (int64_t c = 0; c < kPeakChains; ++c) chain[c] = dot4(chain[c], weights, activations[c]);
  vi total = chain[0];
  for (int64_t c = 1; c < kPeakChains; ++c) total = total + chain[c];
  int32_t lanes[kLanes];
  storei(lanes, total);
  a.result[team.rank] = double(lanes[0]);
  __atomic_fetch_add(a.operations, a.iterations * kPeakChains * kLanes * 8, __ATOMIC_RELAXED);
}

}  // namespace FASTLLM_TIER
}  // namespace fastllm
