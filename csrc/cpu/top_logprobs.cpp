// top_logprobs: the best few tokens of every row with their log-probabilities at temperature 1, in order: larger first,
// lower index first among equals. The arithmetic is the sampler's, so a token that both report has the same bits in
// both.
#include "row.h"

namespace fastllm {
namespace {

void top_row(const TopLogprobsArgs& a, int64_t r, Team& team, const RowScratch& s) {
  const float* x = a.logits + r * a.logits_stride;
  const int64_t n = a.vocab, blocks = (n + kBlock - 1) / kBlock;
  const Range mine = share(team, blocks);
  int64_t* token = a.token + r * a.best;
  float* logprob = a.logprob + r * a.best;
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
  if (nan || !(max >= -kLargest)) {    // no distribution
    if (team.rank) return;
    for (int64_t i = 0; i < a.best; ++i) token[i] = -1, logprob[i] = __builtin_nanf("");
    return report(team, kNotANumber);
  }
  part.sum = weigh<false>(x, n, mine, s.groups, max < kLargest ? max : kLargest, 1, nullptr).sum;
  const float bound = a.best <= blocks * kLanes / 2 ? bound_of_best(s.groups, blocks * kLanes, a.best, max) : -kLargest;
  part.found = collect(x, n, mine, s.groups, bound, s.value + mine.begin * kBlock, s.index + mine.begin * kBlock);
  sync(team);
  if (team.rank) return;
  uint64_t sum = 0;
  for (int t = 0; t < team.size; ++t) sum += s.part[t].sum;
  int64_t found = join(s, team, blocks);
  if (found > a.best) {
    const Cut cut = find_cut<false>(s.value, nullptr, found, uint64_t(a.best), s.work_x, s.work_e);
    found = apply_cut(cut, s.value, s.index, nullptr, found);
  }
  for (int64_t i = 0; i < found; ++i) {    // insertion; equal values stay in order of their index
    const float v = s.value[i];
    int64_t j = i;
    for (; j > 0 && s.work_x[j - 1] < v; --j) s.work_x[j] = s.work_x[j - 1], token[j] = token[j - 1];
    s.work_x[j] = v, token[j] = s.index[i];
  }
  for (int64_t i = 0; i < found; ++i) logprob[i] = log_probability(s.work_x[i], max, sum);
  for (int64_t i = found; i < a.best; ++i) token[i] = -1, logprob[i] = -__builtin_inff();
}

}  // namespace

namespace FASTLLM_TIER {

void top_logprobs(const TopLogprobsArgs& a, Team& team) noexcept {
  for_rows(a.count, a.vocab, team, [&](int64_t r, Team& t, const RowScratch& s) { top_row(a, r, t, s); });
}

}  // namespace FASTLLM_TIER
}  // namespace fastllm
