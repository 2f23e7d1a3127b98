// token_logprobs: log p(target) and the entropy of softmax(logits / temperature) on the first `kept` tokens of the sampler's
// order, in the sampler's arithmetic; their gradient overwrites the logits. A row belongs to one thread.
#include "row.h"

namespace fastllm {
namespace {

// The distribution of a row. listed: it is over the `kept` tokens in scratch.value and scratch.index, else over all.
struct Distribution {
  float top, scale;    // weights are exp(scale * (x - top))
  Mass mass;
  int64_t kept;
  bool listed;
};

Mass weigh_list(const float* x, int64_t n, vf top, vf scale) {
  const auto e = [&](int64_t i) { return weight(load_or(x + i, n - i, -__builtin_inff()), top, scale); };
  const auto exists = [&](int64_t i, vf v) { return n - i >= kLanes ? v : select(first(n - i), v, set1(0)); };
  return {sum_weights(n, [&](int64_t i) { return exists(i, e(i)); }), sum_weights(n, [&](int64_t i) {
            return exists(i, e(i) * (set1(0) - exponent(load_or(x + i, n - i, 0), top, scale)));
          })};
}

Distribution distribution(const float* x, int64_t n, int64_t kept, float max, float temperature, const RowScratch& s) {
  const float inverse = 1 / temperature;
  Distribution d{max < kLargest ? max : kLargest, inverse < kLargest ? inverse : kLargest, {0, 0}, n, kept < n};
  const int64_t blocks = (n + kBlock - 1) / kBlock;
  if (!d.listed) {
    d.mass = weigh<true>(x, n, {0, blocks}, s.groups, d.top, d.scale, nullptr);
    return d;
  }
  const float bound = kept <= blocks * kLanes / 2 ? bound_of_best(s.groups, blocks * kLanes, kept, max) : -kLargest;
  d.kept = collect(x, n, {0, blocks}, s.groups, bound, s.value, s.index);
  if (d.kept > kept) {
    const Cut cut = find_cut<false>(s.value, nullptr, d.kept, uint64_t(kept), s.work_x, s.work_e);
    d.kept = apply_cut(cut, s.value, s.index, nullptr, d.kept);
  }
  d.mass = weigh_list(s.value, d.kept, set1(d.top), set1(d.scale));
  return d;
}

// With z = (x - max) / temperature and p = exp(z) / S: d log p(target) = [target] - p and d entropy = -p (log p + entropy), each
// times its upstream gradient and divided by the temperature. A weight below the fixed point's smallest has none.
struct Gradient {
  vf top, scale, to_p, log_sum, entropy, dlogprob, dentropy, over;

  FL_INLINE_MEMBER vf operator()(vf x) const {
    const vf z = exponent(x, top, scale);
    const vf e[1] = {z};
    vf w[1];
    exponentials(e, w);
    const vf p = select(set1(-79.0f) < z, w[0] * to_p, set1(0));
    return (set1(0) - p) * fma(dentropy, (z - log_sum) + entropy, dlogprob) * over;
  }
};

void differentiate(float* x, int64_t n, int64_t target, bool target_kept, const Distribution& d, const Gradient& g,
                   float at_target, const RowScratch& s) {
  if (d.listed) {
    for (int64_t i = 0; i < d.kept; i += kLanes) store(s.weight + i, g(load_or(s.value + i, d.kept - i, 0)));
    memset(x, 0, size_t(n) * 4);
    for (int64_t i = 0; i < d.kept; ++i) x[s.index[i]] = s.weight[i];
  } else {
    int64_t i = 0;
    for (; i + kLanes <= n; i += kLanes) store(x + i, g(load(x + i)));
    if (i < n) store(x + i, g(load(x + i, first(n - i))), first(n - i));
  }
  if (target_kept) x[target] += at_target;
}

void one_row(const TokenLogprobsArgs& a, int64_t r, Team& team, const RowScratch& s) {
  float* x = a.logits + r * a.logits_stride;
  const int64_t n = a.vocab, target = a.target[r], kept = a.kept ? a.kept[r] : n;
  const Extremes all = extremes(x, n, {0, (n + kBlock - 1) / kBlock}, s.groups);
  const bool inside = target >= 0 && target < n && kept > 0;
  if (all.nan || !(all.max >= -kLargest) || !inside) {    // no distribution, or no such token
    a.logprob[r] = a.entropy[r] = __builtin_nanf("");
    if (a.dlogprob) memset(x, 0, size_t(n) * 4);
    return report(team, inside ? kNotANumber : kIndexOutOfRange);
  }
  const float temperature = float(a.temperature);
  const Distribution d = distribution(x, n, kept, all.max, temperature, s);
  bool target_kept = !d.listed;
  for (int64_t i = 0; i < d.kept && !target_kept; ++i) target_kept = s.index[i] == target;
  a.logprob[r] = target_kept ? log_probability(x[target], all.max, d.mass.sum, double(temperature)) : -__builtin_inff();
  a.entropy[r] = entropy(d.mass.sum, d.mass.moment);
  if (!a.dlogprob) return;
  const float over = float(1 / double(temperature));
  const Gradient g{set1(d.top), set1(d.scale), set1(float(0x1p20 / double(d.mass.sum))), set1(float(log_weight(d.mass.sum))),
                   set1(a.entropy[r]), set1(a.dlogprob[r]), set1(a.dentropy[r]), set1(over)};
  differentiate(x, n, target, target_kept, d, g, a.dlogprob[r] * over, s);
}

}  // namespace

namespace FASTLLM_TIER {

void token_logprobs(const TokenLogprobsArgs& a, Team& team) noexcept {
  const RowScratch scratch = row_scratch(team.scratch + team.rank * sample_scratch(a.vocab, 1), a.vocab, 1);
  const Range rows = share(team, a.rows);
  for (int64_t r = rows.begin; r < rows.end; ++r) one_row(a, r, team, scratch);
}

}  // namespace FASTLLM_TIER
}  // namespace fastllm
