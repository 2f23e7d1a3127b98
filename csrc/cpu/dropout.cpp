// dropout: the mask is drawn from counters, 64 columns at a time; nothing is stored for the backward.
#include "dropout.h"

namespace fastllm {
namespace {

template <class T> void run(const DropoutArgs& a, Team& team) {
  const Dropout d = dropout_of(a.p, a.seed, a.call, a.threshold);
  const vf scale = set1(d.scale);
  const int64_t blocks = (a.cols + 63) / 64;
  const Range mine = share(team, a.rows * blocks);
  for (int64_t i = mine.begin; i < mine.end; ++i) {
    const int64_t row = i / blocks, block = i % blocks, end = block * 64 + 64 < a.cols ? block * 64 + 64 : a.cols;
    const T* x = static_cast<const T*>(a.x) + row * a.x_stride;
    T* y = static_cast<T*>(a.y) + row * a.cols;
    uint64_t keep = kept(d, row, block);
    int64_t c = block * 64;
    for (; c + kLanes <= end; c += kLanes, keep >>= kLanes) store(y + c, drop(load(x + c), keep, scale));
    if (c < end) store(y + c, drop(load(x + c, first(end - c)), keep, scale), first(end - c));
  }
}

}  // namespace

namespace FASTLLM_TIER {

void dropout(const DropoutArgs& a, Team& team) noexcept {
  with_dtype(a.dtype, [&](auto type) { run<decltype(type)>(a, team); });
}

}  // namespace FASTLLM_TIER
}  // namespace fastllm
