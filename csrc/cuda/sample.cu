// sample on a GPU: the meaning and the bits of csrc/cpu/sample.cpp, one launch for [B, V].
//
// A cluster of up to eight blocks takes a row, which is read once: it stays in the blocks' shared memory (in global memory
// where it does not fit). A warp has a contiguous part of the row. First each of 192 groups of logits gives its maximum to
// every block: the k-th largest of them bounds the k-th largest logit from below. The next pass sends all logits above the
// bound, some k, to the first block, which decides on this list, a logit a thread: a truncation is a cut in the order "larger
// first, lower index first", one 64-bit integer a logit, found by comparing all pairs. Where the list does not hold the
// answer (a wide nucleus, a large k, a flat row), the first block asks all of the cluster for passes over the row, which
// quarter the range of the order until what is left fits on the list. Sums are integers, so no answer depends on the way.
//
// Before sm_90 there are no clusters: a block has a row alone, in shared memory or, where it does not fit, in global memory.
#include "../philox.h"
#include "row.cuh"

namespace fastllm {
namespace {

// ------------------------------------------------------------------------------------------------------- one block decides

struct Outcome {
  int64_t token;
  float value;    // of its logit
  int kept;
  uint64_t sum;
};

// Gives the list's members from the cut up their weight (or 1), the others 0; returns the total.
__device__ uint64_t weigh_list(Shared& s, const Scale& scale, int64_t cut, float least, bool weighted) {
  const int t = threadIdx.x, count = s.count < kList ? s.count : kList;
  __syncthreads();    // the weights before these have been read
  uint64_t w = 0;
  if (t < count && s.list[t] >= cut) {
    const float e = scale.of(value_of(s.list[t]));
    if (e >= least) w = weighted ? weight(e) : 1;
  }
  s.weight[t] = w;
  __syncthreads();
  uint64_t sum = 0;
  for (int i = lane(); i < count; i += 32) sum += s.weight[i];
  return warp_sum(sum);
}

// Sum of the weights on the list that stand before this thread's in an order: orders(i) > orders(t).
template <class F> __device__ __forceinline__ uint64_t sum_ahead(const Shared& s, F orders) {
  const int count = s.count < kList ? s.count : kList;
  const int64_t mine = orders(threadIdx.x);
  uint64_t sum = 0;
  for (int i = 0; i < count; ++i)
    if (orders(i) > mine) sum += s.weight[i];
  return sum;
}

__device__ __forceinline__ int64_t between(int64_t x, int64_t low, int64_t high) { return x < low ? low : x > high ? high : x; }

// A list of the logits around the place in the order where the running sum reaches the target; returns the sum before them.
// Keeps lo < place <= hi and cuts the range in four: by powers of four below the largest until the place is enclosed, then
// evenly in value, then (for scales that lie far apart, and for ties) evenly in the order itself, which must end.
__device__ uint64_t rebuild_list(Shared& s, const Part& p, const Logits& x, const Scale& scale, float most, bool weighted,
                                 uint64_t target, int64_t cut, int finite) {
  int64_t lo = cut - 1, hi = int64_t(key(most)) * (1 << 24);
  uint64_t before = 0;
  int above_lo = finite, above_hi = 0;    // how many logits stand before them
  bool enclosed = false;
  for (int step = 0; above_lo - above_hi > kList && hi - lo > 1; ++step) {
    int64_t a, b, c;
    if (step >= 8) {
      const int64_t quarter = (hi - lo) / 4;
      a = lo + quarter, b = lo + (hi - lo) / 2, c = hi - quarter;
    } else if (enclosed) {
      const float low = value_of(lo), width = (value_of(hi) - low) * 0.25f;
      a = order(low + width, 0), b = order(low + 2 * width, 0), c = order(low + 3 * width, 0);
    } else {
      const float width = __int_as_float((127 + 6 * step) << 23);    // 64^step
      a = order(scale.top - 16 * width, 0), b = order(scale.top - 4 * width, 0), c = order(scale.top - width, 0);
    }
    a = between(a, lo + 1, hi - 1), b = between(b, a, hi - 1), c = between(c, b, hi - 1);
    ask(s, p, x, scale, {a, b, c, kCount, weighted, 0});
    if (whole(s, p, 2) >= target) {    // the quarter that holds the place, from above
      lo = c, above_lo = int(whole(s, p, 5));
    } else if (whole(s, p, 1) >= target) {
      lo = b, above_lo = int(whole(s, p, 4)), hi = c, above_hi = int(whole(s, p, 5)), before = whole(s, p, 2);
    } else if (whole(s, p, 0) >= target) {
      lo = a, above_lo = int(whole(s, p, 3)), hi = b, above_hi = int(whole(s, p, 4)), before = whole(s, p, 1);
    } else {
      hi = a, above_hi = int(whole(s, p, 3)), before = whole(s, p, 0);
      continue;
    }
    enclosed = true;
  }
  ask(s, p, x, scale, {lo, hi, 0, kCollect, 0, 0});
  return before;
}

__device__ __forceinline__ uint64_t nucleus(float top_p, uint64_t sum) {
  const uint64_t part = uint64_t(double(top_p > 0 ? top_p : 0) * double(sum)), slack = sum >> 22;
  return part > slack + 1 ? part - slack : 1;
}

// What the two passes over the row have found.
struct Row {
  float most;
  int finite;
  uint64_t tempered;
  bool knows_tempered;    // else `tempered` means nothing
};

// Truncation and draw where the list holds the answer, as it nearly always does: a thread that knows how many logits stand before
// its own in the order, and what they weigh, knows whether a cut is there. False, and nothing is changed, where it does not.
__device__ bool decide_on_list(Shared& s, const Scale& scale, const SampleRow& r, const Row& row, Outcome& out) {
  const bool has_k = r.top_k > 0 && r.top_k < row.finite, has_p = r.top_p < 1;
  const int t = threadIdx.x, count = s.count;
  if (count > kList || r.min_p > 0 || !(has_k ? count >= r.top_k : has_p && row.knows_tempered)) return false;
  const bool listed = t < count, busy = t - lane() < count;    // the other warps have nothing to compare
  const int64_t mine = listed ? s.list[t] : 0;
  const uint64_t w = listed ? weight(scale.of(value_of(mine))) : 0;
  s.weight[t] = w;
  __syncthreads();
  int ahead = 0;
  uint64_t before = 0;
  if (busy)
    for (int i = 0; i < count; ++i)
      if (s.list[i] > mine) ++ahead, before += s.weight[i];
  Prefix kept = {kUncut, row.tempered, row.finite};
  if (has_k) {
    if (listed && ahead == r.top_k - 1) s.best = {mine, before + w, r.top_k};
    __syncthreads();
    kept = s.best;
  }
  if (has_p) {
    const uint64_t target = nucleus(r.top_p, kept.sum);
    const bool here = listed && before < target && before + w >= target;
    if (here) s.nucleus = {mine, before + w, ahead + 1};
    if (!__syncthreads_or(here)) return false;
    kept = s.nucleus;
  }
  const uint64_t left = __umul64hi(random_bits(r.seed, r.index, r.position), kept.sum);
  const int64_t index = index_of(mine);
  uint64_t running = 0;    // of the kept set in the order of the vocabulary
  if (busy)
    for (int i = 0; i < count; ++i)
      if (s.list[i] >= kept.cut && index_of(s.list[i]) < index) running += s.weight[i];
  if (listed && mine >= kept.cut && running <= left && left < running + w) s.drawn = int32_t(index), s.drawn_value = value_of(mine);
  __syncthreads();
  out = {s.drawn, s.drawn_value, kept.kept, kept.sum};
  return true;
}

// Truncation and draw, for a temperature above 0.
__device__ Outcome decide(Shared& s, const Part& p, const Logits& x, const Scale& scale, const SampleRow& r, const Row& row,
                          float bound) {
  const bool has_k = r.top_k > 0 && r.top_k < row.finite, has_p = r.top_p < 1, has_min = r.min_p > 0;
  const float least = has_min ? (r.min_p < 1 ? r.min_p : 1) * kUnit * (1 - 0x1p-22f) : 0;
  bool complete = s.count <= kList;                 // the list holds all that reach the bound
  bool listed = complete && bound == -kLargest;     // the kept set lies on the list
  int64_t cut = kUncut;
  uint64_t kept_sum = row.tempered;
  int kept = row.finite;
  for (int stage = 0; stage < 3; ++stage) {    // top-k, top-p, min-p
    const bool weighted = stage == 1;
    if ((stage == 0 && !has_k) || (stage == 1 && !has_p)) continue;
    const float floor = stage == 2 ? least : 0;
    if (stage == 2) listed = listed || (complete && has_min && cut == kUncut && scale.of(bound) < least);
    if (stage > 0) {
      if (listed) {
        kept = int(weigh_list(s, scale, cut, floor, false));
        kept_sum = weigh_list(s, scale, cut, floor, true);
      } else if (!row.knows_tempered || cut != kUncut || floor != 0) {
        ask(s, p, x, scale, {cut, 0, 0, kKeep, 1, floor});
        kept_sum = whole(s, p, kTempered), kept = int(whole(s, p, kFinite));
      }
    }
    if (stage == 2) break;
    const uint64_t target = weighted ? nucleus(r.top_p, kept_sum) : uint64_t(r.top_k);
    uint64_t before = 0;
    listed = complete && weigh_list(s, scale, cut, 0, weighted) >= target;
    if (!listed) {
      before = rebuild_list(s, p, x, scale, row.most, weighted, target, cut, row.finite);
      weigh_list(s, scale, cut, 0, weighted);
      complete = false;
    }
    const uint64_t ahead = before + sum_ahead(s, [&](int i) { return s.list[i]; }), mine = s.weight[threadIdx.x];
    if (mine && ahead < target && ahead + mine >= target) s.cut = s.list[threadIdx.x];
    __syncthreads();
    cut = s.cut;
  }

  uint64_t left = __umul64hi(random_bits(r.seed, r.index, r.position), kept_sum);
  if (listed) {    // its weights are those of the kept set
    const uint64_t running = sum_ahead(s, [&](int i) { return -index_of(s.list[i]); }), mine = s.weight[threadIdx.x];
    if (running <= left && left < running + mine)
      s.drawn = int32_t(index_of(s.list[threadIdx.x])), s.drawn_value = value_of(s.list[threadIdx.x]);
    __syncthreads();
  } else {
    if (threadIdx.x == 0) {    // the warp in whose part the token lies
      int warp = 0;
      while (left >= s.sum[kTempered][warp]) left -= s.sum[kTempered][warp++];
      s.cut = warp, s.weight[0] = left;
    }
    __syncthreads();
    ask(s, p, x, scale, {cut, s.cut, int64_t(s.weight[0]), kDraw, 1, least});
  }
  return {s.drawn, s.drawn_value, kept, kept_sum};
}

// A row without a token.
__device__ __forceinline__ void write_none(const SampleArgs& a, int64_t row, float value, int32_t kept) {
  a.token[row] = 0, a.logprob[row] = value, a.truncated_logprob[row] = value, a.kept[row] = kept;
  if (a.entropy) a.entropy[row] = value;
}

// The warp of the row that holds its first largest logit: they stand in the order of the vocabulary.
__device__ __forceinline__ int first_warp(const Shared& s, const Part& p) {
  int first = kMostBlocks * kWarps;
  for (int w = lane(); w < p.blocks * kWarps; w += 32)
    if (s.sum[kFirst][w] && w < first) first = w;
  for (int with = 16; with; with /= 2) {
    const int other = __shfl_xor_sync(kWhole, first, with);
    first = other < first ? other : first;
  }
  return first;
}

// ------------------------------------------------------------------------------------------------------------ the kernel

// Grid: `blocks` for each row, in clusters; `chunk` logits a block. kResident: they stay in shared memory. counts, adjusted:
// [count, vocab], for rows with penalties.
template <bool kResident>
__global__ void __launch_bounds__(kThreads, 2)
    sample_kernel(const SampleArgs a, int32_t* counts, float* adjusted, int chunk, int blocks) {
  Shared& s = shared_memory<Shared>();
  const int64_t row = blockIdx.x / blocks, which = a.rows ? a.rows[row] : row;
  if (which < 0 || which >= a.state_rows) {
    if (leads()) write_none(a, row, which < 0 ? 0 : not_a_number(), which < 0 ? 0 : -1);
    return;
  }
  cluster_arrive();
  constexpr int kWords = sizeof(SampleRow) / 4;
  const int word = threadIdx.x < kWords ? reinterpret_cast<const int*>(a.state + which)[threadIdx.x] : 0;
  const int vocab = int(a.vocab), begin = int(cluster_rank()) * chunk, share = chunk / kWarps;
  const int end = begin + chunk < vocab ? begin + chunk : vocab;
  Part p = {begin + warp() * share, begin + (warp() + 1) * share, blocks};
  if (p.end > end) p.end = end;
  const float* from = a.logits + row * a.logits_stride;
  const Logits raw = {from, vocab, reinterpret_cast<uintptr_t>(from) % 16 == 0};
  // Where the logits that are sampled from stand, by their index in the row.
  float* own = kResident ? reinterpret_cast<float*>(&s + 1) - begin : adjusted + row * a.vocab;
  if (leads()) s.count = 0;

  // 1. the row is read, and its largest logit found
  float top = -infinity();
  bool nan = false;
  auto take = [&](const float4& v, int i) {
    if (kResident) *reinterpret_cast<float4*>(own + i) = v;
    nan = nan || v.x != v.x || v.y != v.y || v.z != v.z || v.w != v.w;
    top = fmaxf(fmaxf(fmaxf(top, v.x), fmaxf(v.y, v.z)), v.w);
  };
  auto read = [&](auto load) {    // as many loads on their way in the last turn as in the others
    for (int i = p.begin + lane() * 4; i < p.end; i += kAhead * kStep) {
      float4 v[kAhead];
#pragma unroll
      for (int n = 0; n < kAhead; ++n)
        if (i + n * kStep < p.end) v[n] = load(i + n * kStep);
#pragma unroll
      for (int n = 0; n < kAhead; ++n)
        if (i + n * kStep < p.end) take(v[n], i + n * kStep);
    }
  };
  if (raw.aligned && p.end % 4 == 0)
    read([&](int i) { return __ldcs(reinterpret_cast<const float4*>(from + i)); });
  else
    read([&](int i) { return raw.load(i); });
  if (threadIdx.x < kWords) reinterpret_cast<int*>(&s.row)[threadIdx.x] = word;
  const float raw_most = maxima(s, p, top, nan), raw_top = fminf(raw_most, kLargest);
  float most = raw_most;
  const SampleRow& r = s.row;
  const bool changed = changes_logits(a, r);
  Logits x = kResident ? Logits{own, begin + chunk, true} : raw;    // what lies beyond the vocabulary is -inf

  // 2. penalties. What the weights of the logits as they came add up to at temperature 1 is found before, or else in the next pass
  const bool lost = raw_most != raw_most || !(raw_most >= -kLargest);
  uint64_t sum = 0, moment = 0;
  auto weigh = [&](const float(&v)[4]) {
    Fixed w, m;
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      const float z = exponent(v[j], raw_top, 1), e = exponential(z);
      w.add(e);
      if (a.entropy) m.add(e * (0 - z));
    }
    sum += w.total(), moment += m.total();
  };
  if (changed && !lost) {
    each(x, p, [&](const float(&v)[4], int) { weigh(v); });
    if (!kResident) {
      for (int i = p.begin + lane() * 4; i < p.end; i += kStep) {
        const float4 v = raw.load(i);
        const float four[4] = {v.x, v.y, v.z, v.w};
        for (int j = 0; j < 4 && i + j < p.end; ++j) own[i + j] = four[j];
      }
      x = {own, vocab, reinterpret_cast<uintptr_t>(own) % 16 == 0};
    }
    penalise(a, r, which, begin, end, own, counts + row * a.vocab);
    top = -infinity(), nan = false;
    each(x, p, [&](const float(&v)[4], int) {
#pragma unroll
      for (int j = 0; j < 4; ++j) nan = nan || v[j] != v[j], top = fmaxf(top, v[j]);
    });
    cluster_arrive();
    most = maxima(s, p, top, nan);
  }
  if (lost || most != most || !(most >= -kLargest)) {
    if (leads()) write_none(a, row, not_a_number(), 0);
    return;
  }
  const bool greedy = !(r.temperature > 0), some_k = r.top_k > 0 && r.top_k < vocab, has_p = r.top_p < 1;
  const bool all_on = !some_k && !has_p && !(r.min_p > 0);
  const Scale scale = {fminf(most, kLargest), greedy ? 1 : fminf(1 / r.temperature, kLargest)};
  const bool needed = !greedy && (all_on || (has_p && !some_k)), plain = !changed && scale.scale == 1;
  const bool wants_list = !greedy && !all_on;

  // 3. the logits above a bound; sums of weights, also at the row's own temperature
  float bound = infinity();    // of no list
  if (wants_list && r.top_k > 0 && r.top_k <= kMostWanted)
    bound = bound_of_best(s, r.top_k);
  else if (wants_list && !some_k)
    bound = bound_of_best(s, kWanted);
  int finite = 0, first = 0;    // first: the lowest index of the largest logit, plus 1
  each(x, p, [&](const float(&v)[4], int i) {
    if (!changed) weigh(v);
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      finite += v[j] >= -kLargest;
      if (wants_list && v[j] >= bound) collect(s, order(v[j], i + j));
      if (greedy && !first && v[j] == most) first = i + j + 1;
    }
  });
  publish(s, kFinite, uint64_t(finite)), publish(s, kSum, sum);
  if (a.entropy) publish(s, kMoment, moment);
  if (needed && !plain) {
    sum = 0;
    each(x, p, [&](const float(&v)[4], int) {
      Fixed w;
#pragma unroll
      for (int j = 0; j < 4; ++j) w.add(scale.of(v[j]));
      sum += w.total();
    });
  }
  if (needed || plain) publish(s, kTempered, sum);
  if (greedy) {    // the lowest index in the warp: a thread has its own in ascending order
    for (int with = 16; with; with /= 2) {
      const int other = __shfl_xor_sync(kWhole, first, with);
      if (!first || (other && other < first)) first = other;
    }
    publish(s, kFirst, uint64_t(lane() == 0 ? first : 0));
  }
  cluster_sync();
  if (cluster_rank()) return serve(s, p, x, scale);

  // 4. the token. Sums of the first passes are added up before others take their place: `ask` waits for all threads.
  if (warp() == 1) {
    const uint64_t mass = whole(s, p, kSum);
    if (lane() == 0) s.mass = mass;
  } else if (warp() == 2 && a.entropy) {
    const uint64_t spread = whole(s, p, kMoment);
    if (lane() == 0) s.spread = spread;
  }
  Outcome out = {0, most, 1, 0};
  if (greedy) {
    out.token = int64_t(s.sum[kFirst][first_warp(s, p)]) - 1;
  } else {
    const bool knows = needed || plain;
    const Row found = {most, int(whole(s, p, kFinite)), knows ? whole(s, p, kTempered) : 0, knows};
    if (!decide_on_list(s, scale, r, found, out)) out = decide(s, p, x, scale, r, found, bound);
  }
  __syncthreads();
  if (threadIdx.x < unsigned(p.blocks)) at_rank(&s, threadIdx.x)->command.what = kDone;
  cluster_arrive();
  // Logarithms are long chains: three threads have one each.
  if (threadIdx.x == 0) {
    a.token[row] = out.token, a.kept[row] = out.kept;
    a.truncated_logprob[row] = greedy ? 0 : log_probability(out.value, most, out.sum, r.temperature);
  } else if (threadIdx.x == 32) {
    a.logprob[row] = log_probability(changed ? from[out.token] : out.value, raw_most, s.mass);
  } else if (threadIdx.x == 64 && a.entropy) {
    a.entropy[row] = entropy(s.mass, s.spread);
  }
  cluster_wait();
}

// Blocks of a row: enough that their logits stay small, and more where rows alone would not fill the device.
int blocks_of(int64_t count, int64_t vocab) {
  const int multiprocessors = attribute(cudaDevAttrMultiProcessorCount);
  int blocks = 1;
  if (attribute(cudaDevAttrComputeCapabilityMajor) >= 9)
    while (blocks < kMostBlocks &&
           (vocab > blocks * kShare || (count * blocks < multiprocessors && vocab > blocks * kTile)))
      blocks *= 2;
  return blocks;
}

}  // namespace

int sample(const SampleArgs& a, char* scratch, void* stream) {
  const int blocks = blocks_of(a.count, a.vocab);
  const int tiles = int((a.vocab + kTile - 1) / kTile), chunk = (tiles + blocks - 1) / blocks * kTile;
  const int64_t bytes = int64_t(sizeof(Shared)) + int64_t(chunk) * 4;
  int32_t* counts = reinterpret_cast<int32_t*>(scratch);
  float* adjusted = reinterpret_cast<float*>(scratch) + a.count * a.vocab;
  const bool resident = bytes <= attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin);
  return launch(resident ? sample_kernel<true> : sample_kernel<false>, a.count * blocks, kThreads,
                resident ? bytes : int64_t(sizeof(Shared)), blocks, stream, a, counts, adjusted, chunk, blocks);
}

}  // namespace fastllm
