// target_logprobs: log p(target) of every row of logits at temperature 1, in the sampler's arithmetic: the bits that `sample`
// reports when it draws that token.
#include "row.h"

namespace fastllm {
namespace {

void target_row(const TargetLogprobsArgs& a, int64_t r, Team& team, const RowScratch& s) {
  const float* x = a.logits + r * a.logits_stride;
  const int64_t n = a.vocab, target = a.target[r];
  const Range mine = share(team, (n + kBlock - 1) / kBlock);
  Part& part = s.part[team.rank];
  const Extremes own = extremes(x, n, mine, s.groups);
  part.max = own.max, part.nan = own.nan;
  sync(team);
  float max = -__builtin_inff();
  bool nan = false;
  for (int t = 0; t < team.size; ++t) {
    nan = nan || s.part[t].nan;
    max = s.part[t].max > max ? s.part[t].max : max;
  }
  const bool inside = target >= 0 && target < n;
  if (nan || !(max >= -kLargest) || !inside) {    // no distribution, or no such token
    if (team.rank) return;
    a.logprob[r] = __builtin_nanf("");
    return report(team, inside ? kNotANumber : kIndexOutOfRange);
  }
  part.sum = weigh<false>(x, n, mine, s.groups, max < kLargest ? max : kLargest, 1, nullptr).sum;
  sync(team);
  if (team.rank) return;
  uint64_t sum = 0;
  for (int t = 0; t < team.size; ++t) sum += s.part[t].sum;
  a.logprob[r] = log_probability(x[target], max, sum);
}

}  // namespace

namespace FASTLLM_TIER {

void target_logprobs(const TargetLogprobsArgs& a, Team& team) noexcept {
  for_rows(a.count, a.vocab, team, [&](int64_t r, Team& t, const RowScratch& scratch) { target_row(a, r, t, scratch); });
}

}  // namespace FASTLLM_TIER
}  // namespace fastllm
