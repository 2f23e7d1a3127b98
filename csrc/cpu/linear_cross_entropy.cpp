// linear_cross_entropy: loss of a block of logits, and their gradient in place, while the row is still in cache.
#include "cross_entropy.h"

namespace fastllm {
namespace {

template <bool kCapped> void block(const LinearCrossEntropyArgs& a, Team& team) {
  const Loss loss = loss_of(a);
  const Range rows = share(team, a.rows);
  for (int64_t r = rows.begin; r < rows.end; ++r) {
    float* x = a.logits + r * a.logits_stride;
    const int64_t target = a.target[r];
    const bool ignored = target == a.ignore_index;
    if (ignored || target < 0 || target >= a.vocab) {
      a.loss[r] = ignored ? 0 : __builtin_nanf("");
      if (!ignored) report(team, kIndexOutOfRange);
      if (a.coefficient) zero_row(x, a.vocab);
      continue;
    }
    Stats stats;
    a.loss[r] = forward_row<kCapped>(x, target, loss, stats);
    if (a.coefficient) backward_row<kCapped, false>(x, x, target, stats, a.coefficient[r], loss);
  }
}

}  // namespace

namespace FASTLLM_TIER {

void linear_cross_entropy(const LinearCrossEntropyArgs& a, Team& team) noexcept {
  if (a.softcap != 0)
    block<true>(a, team);
  else
    block<false>(a, team);
}

}  // namespace FASTLLM_TIER
}  // namespace fastllm
