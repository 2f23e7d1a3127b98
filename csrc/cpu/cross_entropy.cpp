// cross_entropy: one read of the logits forward, one read and one write backward; a row belongs to one thread.
#include "cross_entropy.h"

namespace fastllm {
namespace {

template <bool kCapped, class T> void forward(const CrossEntropyArgs& a, Team& team) {
  const Loss loss = loss_of(a);
  const Range rows = share(team, a.rows);
  for (int64_t r = rows.begin; r < rows.end; ++r) {
    Stats stats{0, 0};
    const int64_t target = a.target[r];
    if (target == a.ignore_index) {
      a.loss[r] = 0;
    } else if (target < 0 || target >= a.vocab) {
      a.loss[r] = stats.log_sum = __builtin_nanf("");
      report(team, kIndexOutOfRange);
    } else {
      a.loss[r] = forward_row<kCapped>(static_cast<const T*>(a.logits) + r * a.logits_stride, target, loss, stats);
    }
    a.stats[2 * r] = stats.max, a.stats[2 * r + 1] = stats.log_sum;
  }
}

template <bool kCapped, class T> void backward(const CrossEntropyBackwardArgs& a, Team& team) {
  const Loss loss = loss_of(a);
  const bool past_cache = a.rows * a.vocab * int64_t(sizeof(T)) >= int64_t(4) << 20 && uintptr_t(a.dlogits) % sizeof(T) == 0;
  const Range rows = share(team, a.rows);
  for (int64_t r = rows.begin; r < rows.end; ++r) {
    T* d = static_cast<T*>(a.dlogits) + r * a.vocab;
    const T* x = static_cast<const T*>(a.logits) + r * a.logits_stride;
    const int64_t target = a.target[r];
    const Stats stats{a.stats[2 * r], a.stats[2 * r + 1]};
    const float upstream = a.dloss[r * a.dloss_stride];
    if (target == a.ignore_index || target < 0 || target >= a.vocab)    // the forward refuses the latter
      zero_row(d, a.vocab);
    else if (past_cache)
      backward_row<kCapped, true>(d, x, target, stats, upstream, loss);
    else
      backward_row<kCapped, false>(d, x, target, stats, upstream, loss);
  }
  if (past_cache) fence();
}

}  // namespace

namespace FASTLLM_TIER {

void cross_entropy(const CrossEntropyArgs& a, Team& team) noexcept {
  with_dtype(a.dtype, [&](auto type) {
    if (a.softcap != 0)
      forward<true, decltype(type)>(a, team);
    else
      forward<false, decltype(type)>(a, team);
  });
}
void cross_entropy_backward(const CrossEntropyBackwardArgs& a, Team& team) noexcept {
  with_dtype(a.dtype, [&](auto type) {
    if (a.softcap != 0)
      backward<true, decltype(type)>(a, team);
    else
      backward<false, decltype(type)>(a, team);
  });
}

}  // namespace FASTLLM_TIER
}  // namespace fastllm
