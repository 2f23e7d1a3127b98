// sample: one token a row. Penalties, then greedy or temperature -> top-k -> top-p -> min-p -> draw; beside it the
// token's log-probability and the entropy of the row as given.
//
// The kept set is always a beginning of the order "larger logit first, lower index among equals". The draw is an
// inverse CDF on integers: with the weights w of the kept set (fixed.h), S their sum and u 64 random bits, r = floor(u
// S / 2^64), and the token is the first, in order of the vocabulary, whose running sum of w exceeds r. Only exp() has
// floating-point rounding in it, so the threads that share a row, and rows that share a call, cannot change a bit.
#include "../philox.h"
#include "row.h"

namespace fastllm {
namespace {

// A row's logits: as given (raw), and as sampled from (x, after penalties; the same memory without them).
struct Row {
  const float *raw, *x;
  float raw_max, max, raw_top, top;    // the largest, and the same but never +inf
  float scale;                         // 1 / temperature
  bool any_banned;                     // some x are -inf
};

struct Outcome {
  int64_t token, kept;
  float truncated_logprob;
};

bool changes_logits(const SampleRow& s, int64_t suppressed) {
  return ((s.repetition != 1 || s.presence != 0 || s.frequency != 0) && s.history_len > 0) ||
         (suppressed > 0 && s.history_len - s.prompt_len < s.min_new);
}

// Repetition looks at all of the history, as transformers does; frequency and presence at what was generated, as
// OpenAI's API does. Every distinct id once: `counts` is first cleared where the history will touch it. Ids outside the
// vocabulary have no logit to change.
void penalise(const SampleArgs& a, int64_t which, float* x, int32_t* counts) {
  const SampleRow& s = a.state[which];
  const int32_t *history = a.history + which * a.history_stride, *suppress = a.suppress + which * a.suppressed;
  const int64_t length = s.history_len < a.history_stride ? s.history_len : a.history_stride;
  auto known = [&](int64_t i) { return uint32_t(history[i]) < uint64_t(a.vocab); };
  for (int64_t i = 0; i < length; ++i)
    if (known(i)) counts[history[i]] = 0;
  for (int64_t i = s.prompt_len > 0 ? s.prompt_len : 0; i < length; ++i)
    if (known(i)) ++counts[history[i]];
  for (int64_t i = 0; i < length; ++i) {
    if (!known(i)) continue;
    const int32_t count = counts[history[i]];
    if (count < 0) continue;
    counts[history[i]] = -1;
    float v = x[history[i]];
    v = v < 0 ? v * s.repetition : v / s.repetition;
    if (count > 0) {
      v -= s.frequency * float(count);
      v -= s.presence;
    }
    x[history[i]] = v;
  }
  if (s.history_len - s.prompt_len < s.min_new)
    for (int64_t i = 0; i < a.suppressed; ++i)
      if (uint32_t(suppress[i]) < uint64_t(a.vocab)) x[suppress[i]] = -__builtin_inff();
}

uint64_t multiply_high(uint64_t a, uint64_t b) { return uint64_t(static_cast<unsigned __int128>(a) * b >> 64); }

// Lane of the vector of weights where the running sum passes r.
int64_t lane_of(vf e, uint64_t r) {
  uint64_t w[16];
  store(w, e);
  int64_t lane = 0;
  for (; lane < 15 && r >= w[lane]; ++lane) r -= w[lane];
  return lane;
}

// Draws from the whole row; `sums` holds every block's weight.
int64_t draw_from_blocks(const Row& row, int64_t vocab, const uint64_t* sums, uint64_t r) {
  int64_t b = 0;
  for (; r >= sums[b]; ++b) r -= sums[b];
  for (int64_t i = b * kBlock;; i += kLanes) {
    const vf e = weight(load_or(row.x + i, vocab - i, -__builtin_inff()), set1(row.top), set1(row.scale));
    const uint64_t sum = total(e);
    if (r < sum) return i + lane_of(e, r);
    r -= sum;
  }
}

uint64_t sum_of(const float* e, int64_t n) {
  return sum_weights(n, [&](int64_t i) { return load_or(e + i, n - i, 0); });
}

// The nucleus ends at the first sum that reaches p of the total, less 2^-22 of it: what p itself and a sum of
// probabilities lose to rounding must not let one more token in.
uint64_t nucleus(float p, uint64_t sum) {
  const uint64_t part = uint64_t(double(p > 0 ? p : 0) * double(sum)), slack = sum >> 22;
  return part > slack + 1 ? part - slack : 1;
}

// A logit below which no token of the nucleus lies: tokens that all weigh less than half of (1 - p) S / V cannot
// together weigh (1 - p) S. Weights of zero are outside for free.
float nucleus_bound(const Row& row, float p, uint64_t sum, int64_t vocab, float temperature) {
  const double least = 0.5 * (1 - double(p > 0 ? p : 0)) * double(sum) / double(vocab);
  const double z = least < 1 ? -29.0 : natural_log(least * 0x1p-40) - 0.01;
  const double bound = double(row.top) + double(temperature) * z;
  return bound > -double(kLargest) ? float(bound - __builtin_fabs(bound) * 0x1p-22) : -kLargest;
}

// The same for min-p: weights below min_p are outside.
float min_p_bound(const Row& row, float min_p, float temperature) {
  const double z = min_p >= 0x1p-126f ? natural_log(min_p) - 0.01 : -104.0;
  const double bound = double(row.top) + double(temperature) * z;
  return bound > -double(kLargest) ? float(bound - __builtin_fabs(bound) * 0x1p-22) : -kLargest;
}

struct Limits {
  int64_t top_k;    // 0: off
  float top_p, min_p;
  bool has_top_p, has_min_p;
};

// From the n candidates, in order of the vocabulary, to the token. sum: weight of all logits where top-p needs it.
Outcome choose(const SampleRow& s, const Limits& limits, const Row& row, const RowScratch& scratch, int64_t n,
               uint64_t sum) {
  if (limits.top_k && n > limits.top_k) {
    const Cut cut = find_cut<false>(scratch.value, nullptr, n, uint64_t(limits.top_k), scratch.work_x, scratch.work_e);
    n = apply_cut(cut, scratch.value, scratch.index, nullptr, n);
  }
  for (int64_t i = 0; i < n; i += kLanes)
    store(scratch.weight + i, weight(load(scratch.value + i), set1(row.top), set1(row.scale)));
  if (limits.has_top_p) {
    const uint64_t target = nucleus(limits.top_p, limits.top_k ? sum_of(scratch.weight, n) : sum);
    const Cut cut = find_cut<true>(scratch.value, scratch.weight, n, target, scratch.work_x, scratch.work_e);
    n = apply_cut(cut, scratch.value, scratch.index, scratch.weight, n);
  }
  if (limits.has_min_p) {
    const vf least = set1(limits.min_p * kUnit * (1 - 0x1p-22f));
    int64_t kept = 0;
    for (int64_t i = 0; i < n; i += kLanes) {
      const vf v = load(scratch.value + i), e = load(scratch.weight + i);
      const vi id = loadi(scratch.index + i);
      const uint32_t keep = reach(e, least) & exist(n - i);
      append(scratch.value + kept, v, keep);
      append(scratch.weight + kept, e, keep);
      append(scratch.index + kept, id, keep);
      kept += __builtin_popcount(keep);
    }
    n = kept;
  }
  const uint64_t kept_sum = sum_of(scratch.weight, n);
  uint64_t left = multiply_high(random_bits(s.seed, s.index, s.position), kept_sum);
  for (int64_t i = 0;; i += kLanes) {
    const vf e = load_or(scratch.weight + i, n - i, 0);
    const uint64_t here = total(e);
    if (left < here) {
      const int64_t j = i + lane_of(e, left);
      return {scratch.index[j], n, log_probability(scratch.value[j], row.max, kept_sum, s.temperature)};
    }
    left -= here;
  }
}

int64_t count_banned(const float* x, int64_t vocab) {
  int64_t count = 0;
  for (int64_t i = 0; i < vocab; i += kLanes)
    count += __builtin_popcount(~reach(load_or(x + i, vocab - i, 0), set1(-kLargest)) & exist(vocab - i));
  return count;
}

void write(const SampleArgs& a, int64_t r, int64_t token, float logprob, float truncated, int64_t kept, float entropy) {
  a.token[r] = token, a.logprob[r] = logprob, a.truncated_logprob[r] = truncated, a.kept[r] = int32_t(kept);
  if (a.entropy) a.entropy[r] = entropy;
}

// A row that has no distribution: token 0, so that a step that is under way stays in bounds, NaN and an empty kept set.
void fail(const SampleArgs& a, int64_t r, Team& team, Status status) {
  if (team.rank) return;
  write(a, r, 0, __builtin_nanf(""), __builtin_nanf(""), 0, __builtin_nanf(""));
  report(team, status);
}

void sample_row(const SampleArgs& a, int64_t r, Team& team, const RowScratch& scratch) {
  const int64_t which = a.rows ? a.rows[r] : r, n = a.vocab, blocks = (n + kBlock - 1) / kBlock;
  if (which < 0) {
    if (!team.rank) write(a, r, 0, 0, 0, 0, 0);
    return;
  }
  if (which >= a.state_rows) return fail(a, r, team, kIndexOutOfRange);
  const SampleRow& s = a.state[which];
  const Range mine = share(team, blocks);
  Part& part = scratch.part[team.rank];
  float* value = scratch.value + mine.begin * kBlock;    // this thread's candidates
  int32_t* index = scratch.index + mine.begin * kBlock;
  Row row{};
  row.raw = row.x = a.logits + r * a.logits_stride;
  const bool changed = changes_logits(s, a.suppressed);
  if (changed) {
    const int64_t begin = mine.begin * kBlock, end = mine.end * kBlock < n ? mine.end * kBlock : n;
    memcpy(scratch.adjusted + begin, row.raw + begin, size_t(end > begin ? end - begin : 0) * 4);
    sync(team);
    if (!team.rank) penalise(a, which, scratch.adjusted, scratch.counts);
    sync(team);
    row.x = scratch.adjusted;
  }

  // 1. the largest logit, and whether the row has a distribution at all
  const Extremes own = extremes(row.x, n, mine, scratch.groups);
  const Extremes raw = changed ? extremes(row.raw, n, mine, scratch.raw_groups) : own;
  const float* raw_groups = changed ? scratch.raw_groups : scratch.groups;
  part.max = own.max, part.min = own.min, part.raw_max = raw.max, part.nan = own.nan || raw.nan;
  sync(team);
  row.max = row.raw_max = -__builtin_inff();
  for (int t = 0; t < team.size; ++t) {
    const Part& p = scratch.part[t];
    if (p.nan) return fail(a, r, team, kNotANumber);
    row.max = p.max > row.max ? p.max : row.max;
    row.raw_max = p.raw_max > row.raw_max ? p.raw_max : row.raw_max;
    row.any_banned = row.any_banned || !(p.min >= -kLargest);
  }
  if (!(row.max >= -kLargest)) return fail(a, r, team, kNotANumber);
  row.top = row.max < kLargest ? row.max : kLargest;
  row.raw_top = row.raw_max < kLargest ? row.raw_max : kLargest;

  // 2. sums of weights, and the candidates where a bound is known already
  const bool greedy = !(s.temperature > 0);
  row.scale = greedy ? 1 : 1 / s.temperature;
  if (row.scale > kLargest) row.scale = kLargest;
  const int64_t top_k = s.top_k > 0 && s.top_k < n ? s.top_k : 0;
  const Limits limits{top_k, s.top_p, s.min_p < 1 ? s.min_p : 1, s.top_p < 1, s.min_p > 0};
  const bool all = !greedy && !limits.top_k && !limits.has_top_p && !limits.has_min_p;
  const bool total_first = !greedy && limits.has_top_p && !limits.top_k;    // the nucleus of the whole row
  const bool listed = !greedy && !all;
  const bool same = !changed && row.scale == 1;    // the tempered weights are those at temperature 1
  uint64_t* sums = all ? scratch.sums : nullptr;
  const Mass mass = a.entropy ? weigh<true>(row.raw, n, mine, raw_groups, row.raw_top, 1, same ? sums : nullptr)
                              : weigh<false>(row.raw, n, mine, raw_groups, row.raw_top, 1, same ? sums : nullptr);
  part.sum = mass.sum, part.moment = mass.moment, part.tempered = mass.sum;
  if ((all || total_first) && !same)
    part.tempered = weigh<false>(row.x, n, mine, scratch.groups, row.top, row.scale, sums).sum;
  part.first = greedy ? find_first(row.x, n, mine, scratch.groups, row.max) : 0;
  if (listed && !total_first) {
    float bound = -kLargest;
    if (limits.top_k && limits.top_k <= blocks * kLanes / 2)
      bound = bound_of_best(scratch.groups, blocks * kLanes, limits.top_k, row.max);
    if (limits.has_min_p && !limits.has_top_p) {
      const float other = min_p_bound(row, limits.min_p, s.temperature);
      bound = other > bound ? other : bound;
    }
    part.found = collect(row.x, n, mine, scratch.groups, bound, value, index);
  }
  sync(team);

  // 3. candidates of the nucleus
  uint64_t tempered = 0;
  for (int t = 0; t < team.size; ++t) tempered += scratch.part[t].tempered;
  if (total_first) {
    const float bound = nucleus_bound(row, limits.top_p, tempered, n, s.temperature);
    part.found = collect(row.x, n, mine, scratch.groups, bound, value, index);
    sync(team);
  }

  // 4. one thread decides
  if (team.rank) return;
  uint64_t sum = 0, moment = 0;
  for (int t = 0; t < team.size; ++t) sum += scratch.part[t].sum, moment += scratch.part[t].moment;
  Outcome out{0, 1, 0};
  if (greedy) {
    int t = 0;
    while (scratch.part[t].first < 0) ++t;
    out.token = scratch.part[t].first;
  } else if (all) {
    const uint64_t at = multiply_high(random_bits(s.seed, s.index, s.position), tempered);
    out.token = draw_from_blocks(row, n, scratch.sums, at);
    out.kept = n - (row.any_banned ? count_banned(row.x, n) : 0);
    out.truncated_logprob = log_probability(row.x[out.token], row.max, tempered, s.temperature);
  } else {
    out = choose(s, limits, row, scratch, join(scratch, team, blocks), tempered);
  }
  write(a, r, out.token, log_probability(row.raw[out.token], row.raw_max, sum), out.truncated_logprob, out.kept,
        a.entropy ? entropy(sum, moment) : 0);
}

}  // namespace

namespace FASTLLM_TIER {

void sample(const SampleArgs& a, Team& team) noexcept {
  for_rows(a.count, a.vocab, team, [&](int64_t r, Team& t, const RowScratch& s) { sample_row(a, r, t, s); });
}

}  // namespace FASTLLM_TIER
}  // namespace fastllm
