// sample on a GPU: the meaning and the bits of csrc/cpu/sample.cpp, one launch for [B, V].
//
// A cluster of up to eight blocks takes a row, which is read once: it stays in the blocks' shared memory (in global memory where it
// does not fit). A warp has a contiguous part of the row. First each of 256 groups of logits gives its maximum to every
// block: the k-th largest of them bounds the k-th largest logit from below. The next pass sums the weights and sends all
// logits above the bound, some k, to the first block. That block decides on this list, a logit a thread: a truncation is a cut
// in the order "larger first, lower index first", one 64-bit integer a logit, found by comparing all pairs. Where the list does
// not hold the answer (a wide nucleus, a large k, a flat row), the first block asks all of the cluster for passes over the row, which
// quarter the range of the order until what is left fits on the list. Sums are integers, so no answer depends on the way.
//
// Before sm_90 there are no clusters: a block has a row alone, in shared memory or, where it does not fit, in global memory.
#include "../philox.h"
#include "../records/sample.h"
#include "fixed.cuh"

namespace fastllm {
namespace {

constexpr int kThreads = 512, kWarps = kThreads / 32, kMostBlocks = 8;
constexpr int kGroups = 256;    // of a row's logits
constexpr int kList = kThreads;
constexpr int kWanted = 64;     // logits to look for where no top_k says how many
constexpr int kMostWanted = kGroups / 2;
constexpr int64_t kStep = 128, kTile = kStep * kWarps;    // logits that a warp and a block read at once
constexpr int64_t kShare = 16384;                         // logits of a block, so that three fit on a multiprocessor
constexpr int64_t kUncut = -(int64_t(0x7f7fffff) << 24) - 0x800000;    // below the order of every finite logit

enum What : int { kDone, kCount, kKeep, kCollect, kDraw };

// What the first block asks the others for.
struct Command {
  int64_t a, b, c;    // places in the order; kDraw: b is the warp, c what is left
  What what;
  int weighted;
  float least;
};

enum Sum : int { kSum, kMoment, kTempered, kFinite, kFirst, kSums = 6 };

struct Shared {
  uint64_t sum[kSums][kMostBlocks * kWarps];    // what each warp found, in the first block
  int64_t list[kList];                          // orders of candidates, in the first block
  uint64_t weight[kList];                       // of those that count
  Command command;
  float group[kGroups];
  int64_t cut;
  float bound, drawn_value;
  int32_t count, drawn;    // count: candidates, of which kList are on the list
};
static_assert(sizeof(Shared) % 16 == 0, "logits follow it");

// Logits of a row by their index in it; `last`: where they end.
struct Logits {
  const float* at;
  int64_t last;
  bool aligned;
  __device__ __forceinline__ float4 load(int64_t i) const {
    if (aligned && i + 4 <= last) return *reinterpret_cast<const float4*>(at + i);
    const float none = -__int_as_float(0x7f800000);
    return make_float4(i < last ? at[i] : none, i + 1 < last ? at[i + 1] : none, i + 2 < last ? at[i + 2] : none,
                       i + 3 < last ? at[i + 3] : none);
  }
};

// The part of a row that a warp has.
struct Part {
  int64_t begin, end;
  int lane, warp, rank, blocks;    // of the block, its rank in the cluster, how many there are
  __device__ __forceinline__ int64_t first() const { return begin + lane * 4; }
};

// f(logits[4], index of the first) for all that are this thread's.
template <class F> __device__ __forceinline__ void each(const Logits& x, const Part& p, F f) {
  for (int64_t i = p.first(); i < p.end; i += kStep) {
    const float4 v = x.load(i);
    const float four[4] = {v.x, v.y, v.z, v.w};
    f(four, i);
  }
}

__device__ __forceinline__ void publish(Shared& s, const Part& p, int which, uint64_t mine) {
  mine = warp_sum(mine);
  if (p.lane == 0) at_rank(&s, 0)->sum[which][p.rank * kWarps + p.warp] = mine;
}
// The sum over the row, in all threads of the first block.
__device__ __forceinline__ uint64_t whole(const Shared& s, const Part& p, int which) {
  uint64_t sum = 0;
  for (int i = p.lane; i < p.blocks * kWarps; i += 32) sum += s.sum[which][i];
  return warp_sum(sum);
}

__device__ __forceinline__ void collect(Shared& s, int64_t order) {
  Shared* first = at_rank(&s, 0);
  const int place = atomicAdd(&first->count, 1);
  if (place < kList) first->list[place] = order;
}

// ---------------------------------------------------------------------------------------------------- before the weights

// The largest logit; a NaN where there is one. Leaves the maxima of the groups in every block.
__device__ float maxima(Shared& s, const Part& p, float top, bool nan) {
  const int lanes = 2 * p.blocks;    // of a group
  if (nan) top = __int_as_float(0x7fc00000);
  for (int with = 1; with < lanes; with *= 2) {
    const float other = __shfl_xor_sync(kWhole, top, with);
    top = top != top || other != other ? __int_as_float(0x7fc00000) : fmaxf(top, other);
  }
  cluster_sync();    // all blocks have begun, and have read the maxima before these
  if (p.lane % lanes == 0)
    for (int r = 0; r < p.blocks; ++r)
      at_rank(&s, r)->group[p.rank * (kGroups / p.blocks) + p.warp * (32 / lanes) + p.lane / lanes] = top;
  cluster_sync();
  const float mine = s.group[threadIdx.x % kGroups];
  if (__syncthreads_or(mine != mine)) return mine != mine ? mine : __int_as_float(0x7fc00000);
  float most = s.group[p.lane];
  for (int i = p.lane + 32; i < kGroups; i += 32) most = fmaxf(most, s.group[i]);
  return warp_max(most);
}

// The k-th largest maximum; the least finite float where fewer are finite.
__device__ float bound_of_best(Shared& s, int k) {
  const int t = threadIdx.x;
  if (t < kGroups) {
    const float mine = s.group[t];
    int ahead = 0;
    for (int i = 0; i < kGroups; ++i) ahead += s.group[i] > mine || (s.group[i] == mine && i < t);
    if (ahead == k - 1) s.bound = mine;
  }
  __syncthreads();
  return fmaxf(s.bound, -kLargest);
}

__device__ __forceinline__ bool changes_logits(const SampleRow& r, int64_t suppressed) {
  return ((r.repetition != 1 || r.presence != 0 || r.frequency != 0) && r.history_len > 0) ||
         (suppressed > 0 && r.history_len - r.prompt_len < r.min_new);
}

// The block's logits x[begin, end) after penalties: csrc/cpu/sample.cpp: penalise. Who takes an id's count off applies it.
__device__ void penalise(const SampleArgs& a, const SampleRow& r, int64_t which, int64_t begin, int64_t end, float* x,
                         int32_t* counts) {
  const int32_t *history = a.history + which * a.history_stride, *suppress = a.suppress + which * a.suppressed;
  const int64_t length = r.history_len < a.history_stride ? r.history_len : a.history_stride;
  auto mine = [&](int64_t id) { return id >= begin && id < end; };
  __syncthreads();
  for (int64_t i = threadIdx.x; i < length; i += kThreads)
    if (mine(history[i])) counts[history[i]] = 0;
  __syncthreads();
  for (int64_t i = threadIdx.x; i < length; i += kThreads)
    if (i >= r.prompt_len && mine(history[i])) atomicAdd(counts + history[i], 1);
  __syncthreads();
  for (int64_t i = threadIdx.x; i < length; i += kThreads) {
    const int64_t id = history[i];
    const int32_t count = mine(id) ? atomicExch(counts + id, -1) : -1;
    if (count < 0) continue;
    float v = x[id];
    v = v < 0 ? v * r.repetition : v / r.repetition;
    if (count > 0) {
      v -= r.frequency * float(count);
      v -= r.presence;
    }
    x[id] = v;
  }
  __syncthreads();
  if (r.history_len - r.prompt_len < r.min_new)
    for (int64_t i = threadIdx.x; i < a.suppressed; i += kThreads)
      if (mine(suppress[i])) x[suppress[i]] = -__int_as_float(0x7f800000);
  __syncthreads();
}

// -------------------------------------------------------------------------------------------------- passes over the row

// How a logit of the row that is sampled from is weighed.
struct Scale {
  float top, scale;    // the largest, but finite; 1 / temperature
  __device__ __forceinline__ float of(float x) const { return exponential(exponent(x, top, scale)); }
};

// One pass over this warp's part of the row.
__device__ void answer(Shared& s, const Part& p, const Logits& x, const Scale& scale, const Command& c) {
  if (c.what == kCount) {    // how many logits stand before three places of the order, and what they weigh
    uint64_t weights[3] = {0, 0, 0}, counts[3] = {0, 0, 0};
    const int64_t places[3] = {c.a, c.b, c.c};
    each(x, p, [&](const float(&v)[4], int64_t i) {
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        const int64_t o = order(v[j], i + j);
        const uint64_t w = c.weighted ? weight(scale.of(v[j])) : 1;
#pragma unroll
        for (int n = 0; n < 3; ++n)
          if (o > places[n]) weights[n] += w, ++counts[n];
      }
    });
#pragma unroll
    for (int n = 0; n < 3; ++n) publish(s, p, n, weights[n]), publish(s, p, 3 + n, counts[n]);
  } else if (c.what == kKeep) {    // what the kept set weighs, and its size
    uint64_t sum = 0, count = 0;
    each(x, p, [&](const float(&v)[4], int64_t i) {
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        const float e = scale.of(v[j]);
        if (order(v[j], i + j) >= c.a && e >= c.least) sum += weight(e), ++count;
      }
    });
    publish(s, p, kTempered, sum), publish(s, p, kFinite, count);
  } else if (c.what == kCollect) {    // the logits between two places
    each(x, p, [&](const float(&v)[4], int64_t i) {
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        const int64_t o = order(v[j], i + j);
        if (o > c.a && o <= c.b) collect(s, o);
      }
    });
  } else if (p.rank * kWarps + p.warp == c.b) {    // kDraw: where the running sum of the kept set passes what is left
    int64_t left = c.c;
    for (int64_t start = p.begin; start < p.end; start += kStep) {
      const int64_t i = start + p.lane * 4;
      float v[4] = {};
      uint64_t w[4] = {}, mine = 0;
      if (i < p.end) {
        const float4 four = x.load(i);
        v[0] = four.x, v[1] = four.y, v[2] = four.z, v[3] = four.w;
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          const float e = scale.of(v[j]);
          w[j] = order(v[j], i + j) >= c.a && e >= c.least ? weight(e) : 0;
          mine += w[j];
        }
      }
      uint64_t running = mine;
#pragma unroll
      for (int by = 1; by < 32; by *= 2) {
        const uint64_t other = __shfl_up_sync(kWhole, running, by);
        if (p.lane >= by) running += other;
      }
      const int64_t all = int64_t(__shfl_sync(kWhole, running, 31));
      if (left < all) {
        int64_t here = left - int64_t(running - mine);
        if (here >= 0 && here < int64_t(mine)) {
          int j = 0;
          while (here >= int64_t(w[j])) here -= int64_t(w[j++]);
          at_rank(&s, 0)->drawn = int32_t(i + j), at_rank(&s, 0)->drawn_value = v[j];
        }
        return;
      }
      left -= all;
    }
  }
}

// The other blocks of a row: passes until the first one is done.
__device__ void serve(Shared& s, const Part& p, const Logits& x, const Scale& scale) {
  for (;;) {
    cluster_sync();
    const Command c = s.command;
    if (c.what == kDone) return;
    answer(s, p, x, scale, c);
    cluster_sync();
  }
}

// The first block: has all blocks make a pass.
__device__ void ask(Shared& s, const Part& p, const Logits& x, const Scale& scale, const Command& c) {
  __syncthreads();    // what this overwrites has been read
  if (threadIdx.x < unsigned(p.blocks)) at_rank(&s, threadIdx.x)->command = c;
  if (threadIdx.x == 0 && c.what == kCollect) s.count = 0;
  cluster_sync();
  if (c.what == kDone) return;
  answer(s, p, x, scale, c);
  cluster_sync();
}

// ------------------------------------------------------------------------------------------------------- one block decides

struct Outcome {
  int64_t token;
  float value;    // of its logit
  uint64_t kept, sum;
};

// Gives the list's members from the cut up their weight (or 1), the others 0; returns the total.
__device__ uint64_t weigh_list(Shared& s, const Part& p, const Scale& scale, int64_t cut, float least, bool weighted) {
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
  for (int i = p.lane; i < count; i += 32) sum += s.weight[i];
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

// A list of the logits around the place in the order where the running sum reaches the target; returns the sum before them.
// Keeps lo < place <= hi and cuts the range in four: by powers of four below the largest until the place is enclosed, then evenly in
// value, then (for scales that lie far apart, and for ties) evenly in the order itself, which must end.
__device__ uint64_t rebuild_list(Shared& s, const Part& p, const Logits& x, const Scale& scale, float most, bool weighted,
                                 uint64_t target, int64_t cut, uint64_t finite) {
  int64_t lo = cut - 1, hi = int64_t(key(most)) * (1 << 24);
  uint64_t before = 0, above_lo = finite, above_hi = 0;
  bool enclosed = false;
  for (int step = 0; above_lo - above_hi > kList && hi - lo > 1; ++step) {
    int64_t c[3];
    if (step < 8) {
      const float low = value_of(lo), high = value_of(hi);
      float v[3];
      if (enclosed) {
        for (int n = 0; n < 3; ++n) v[n] = low + (high - low) * (0.25f * float(n + 1));
      } else {
        float width = 1;
        for (int n = 0; n < step; ++n) width *= 64;
        v[0] = scale.top - 16 * width, v[1] = scale.top - 4 * width, v[2] = scale.top - width;
      }
      for (int n = 0; n < 3; ++n) c[n] = int64_t(key(v[n])) * (1 << 24);
    } else {
      const int64_t quarter = (hi - lo) / 4;
      c[0] = lo + quarter, c[1] = lo + (hi - lo) / 2, c[2] = hi - quarter;
    }
    int64_t floor = lo + 1;
    for (int n = 0; n < 3; ++n) {
      c[n] = c[n] < floor ? floor : c[n];
      c[n] = c[n] > hi - 1 ? hi - 1 : c[n];
      floor = c[n];
    }
    ask(s, p, x, scale, {c[0], c[1], c[2], kCount, weighted, 0});
    for (int n = 0; n <= 3; ++n) {    // the quarter that holds the place, from above
      if (n == 3) {
        hi = c[0], above_hi = whole(s, p, 3), before = whole(s, p, 0);
        break;
      }
      const int q = 2 - n;
      if (whole(s, p, q) >= target) {
        lo = c[q], above_lo = whole(s, p, 3 + q), enclosed = true;
        if (n) hi = c[q + 1], above_hi = whole(s, p, 4 + q), before = whole(s, p, q + 1);
        break;
      }
    }
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
  int64_t vocab;
  uint64_t finite, tempered;
  bool knows_tempered;    // else `tempered` means nothing
};

// Truncation and draw, for a temperature above 0.
__device__ Outcome decide(Shared& s, const Part& p, const Logits& x, const Scale& scale, const SampleRow& r, const Row& row, float bound) {
  const bool has_k = r.top_k > 0 && uint64_t(r.top_k) < row.finite, has_p = r.top_p < 1, has_min = r.min_p > 0;
  const float least = has_min ? (r.min_p < 1 ? r.min_p : 1) * kUnit * (1 - 0x1p-22f) : 0;
  bool complete = s.count <= kList;                 // the list holds all that reach the bound
  bool listed = complete && bound == -kLargest;     // the kept set lies on the list
  int64_t cut = kUncut;
  uint64_t kept_sum = row.tempered, kept = row.finite;
  for (int stage = 0; stage < 3; ++stage) {    // top-k, top-p, min-p
    const bool weighted = stage == 1;
    if ((stage == 0 && !has_k) || (stage == 1 && !has_p)) continue;
    const float floor = stage == 2 ? least : 0;
    if (stage == 2) listed = listed || (complete && has_min && cut == kUncut && scale.of(bound) < least);
    if (stage > 0) {
      if (listed) {
        kept = weigh_list(s, p, scale, cut, floor, false);
        kept_sum = weigh_list(s, p, scale, cut, floor, true);
      } else if (!row.knows_tempered || cut != kUncut || floor != 0) {
        ask(s, p, x, scale, {cut, 0, 0, kKeep, 0, floor});
        kept_sum = whole(s, p, kTempered), kept = whole(s, p, kFinite);
      }
    }
    if (stage == 2) break;
    const uint64_t target = weighted ? nucleus(r.top_p, kept_sum) : uint64_t(r.top_k);
    uint64_t before = 0;
    listed = complete && weigh_list(s, p, scale, cut, 0, weighted) >= target;
    if (!listed) {
      before = rebuild_list(s, p, x, scale, row.most, weighted, target, cut, row.finite);
      weigh_list(s, p, scale, cut, 0, weighted);
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
    ask(s, p, x, scale, {cut, s.cut, int64_t(s.weight[0]), kDraw, 0, least});
  }
  return {s.drawn, s.drawn_value, kept, kept_sum};
}

__device__ __forceinline__ void write(const SampleArgs& a, int64_t row, int64_t token, float logprob, float truncated, int32_t kept,
                                      float nats) {
  a.token[row] = token, a.logprob[row] = logprob, a.truncated_logprob[row] = truncated, a.kept[row] = kept;
  if (a.entropy) a.entropy[row] = nats;
}

// ------------------------------------------------------------------------------------------------------------ the kernel

// Grid: `blocks` for each row, in clusters; `chunk` logits a block. kResident: they stay in shared memory. counts, adjusted: [count,
// vocab], for rows with penalties.
template <bool kResident>
__global__ void __launch_bounds__(kThreads)
    sample_kernel(const SampleArgs a, int32_t* counts, float* adjusted, int64_t chunk, int blocks) {
  Shared& s = shared_memory<Shared>();
  const int64_t row = blockIdx.x / blocks, which = a.rows ? a.rows[row] : row;
  const int rank = int(cluster_rank());
  if (which < 0 || which >= a.state_rows) {
    const float none = which < 0 ? 0 : __int_as_float(0x7fc00000);
    if (rank == 0 && threadIdx.x == 0) write(a, row, 0, none, none, which < 0 ? 0 : -1, none);
    return;
  }
  const SampleRow r = a.state[which];
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int64_t begin = rank * chunk, end = begin + chunk < a.vocab ? begin + chunk : a.vocab, share = chunk / kWarps;
  Part p = {begin + warp * share, begin + (warp + 1) * share, lane, warp, rank, blocks};
  if (p.end > end) p.end = end;
  const float* from = a.logits + row * a.logits_stride;
  const Logits raw = {from, a.vocab, reinterpret_cast<uintptr_t>(from) % 16 == 0};
  const bool changed = changes_logits(r, a.suppressed);
  // Where the logits that are sampled from stand, by their index in the row.
  float* own = kResident ? reinterpret_cast<float*>(&s + 1) - begin : changed ? adjusted + row * a.vocab : nullptr;
  if (rank == 0 && threadIdx.x == 0) s.count = 0;

  // 1. the row is read, and its largest logit found
  float top = -__int_as_float(0x7f800000);
  bool nan = false;
#pragma unroll 4
  for (int64_t i = p.first(); i < p.end; i += kStep) {
    const float4 v = raw.load(i);
    if (kResident) *reinterpret_cast<float4*>(own + i) = v;
    nan = nan || v.x != v.x || v.y != v.y || v.z != v.z || v.w != v.w;
    top = fmaxf(fmaxf(fmaxf(top, v.x), fmaxf(v.y, v.z)), v.w);
  }
  const float raw_most = maxima(s, p, top, nan), raw_top = fminf(raw_most, kLargest);
  float most = raw_most;
  Logits x = kResident ? Logits{own, begin + chunk, true} : raw;    // what lies beyond the vocabulary is -inf

  // 2. sums of weights, and the logits above a bound
  uint64_t sum = 0, moment = 0, tempered_sum = 0, finite = 0, first = 0;
  auto weigh_raw = [&](const float(&v)[4], int64_t) {
    Fixed w, m;
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      const float z = exponent(v[j], raw_top, 1), e = exponential(z);
      w.add(e);
      if (a.entropy) m.add(e * (0 - z));
    }
    sum += w.total(), moment += m.total();
  };
  const bool lost = raw_most != raw_most || !(raw_most >= -kLargest);
  if (changed && !lost) {
    each(x, p, weigh_raw);
    if (!kResident) {
      for (int64_t i = p.first(); i < p.end; i += kStep) {
        const float4 v = raw.load(i);
        const float four[4] = {v.x, v.y, v.z, v.w};
        for (int j = 0; j < 4 && i + j < p.end; ++j) own[i + j] = four[j];
      }
      x = {own, a.vocab, reinterpret_cast<uintptr_t>(own) % 16 == 0};
    }
    penalise(a, r, which, begin, end, own, counts + row * a.vocab);
    top = -__int_as_float(0x7f800000), nan = false;
    each(x, p, [&](const float(&v)[4], int64_t) {
#pragma unroll
      for (int j = 0; j < 4; ++j) nan = nan || v[j] != v[j], top = fmaxf(top, v[j]);
    });
    most = maxima(s, p, top, nan);
  }
  if (lost || most != most || !(most >= -kLargest)) {
    const float none = __int_as_float(0x7fc00000);
    if (rank == 0 && threadIdx.x == 0) write(a, row, 0, none, none, 0, none);
    return;
  }
  const bool greedy = !(r.temperature > 0), some_k = r.top_k > 0 && r.top_k < a.vocab, has_p = r.top_p < 1;
  const bool all_on = !some_k && !has_p && !(r.min_p > 0);
  const Scale scale = {fminf(most, kLargest), greedy ? 1 : fminf(1 / r.temperature, kLargest)};
  const bool needed = !greedy && (all_on || (has_p && !some_k)), plain = !changed && scale.scale == 1;
  const bool tempered = needed && !plain;
  const bool wants_list = !greedy && !all_on;
  float bound = __int_as_float(0x7f800000);    // of no list
  if (wants_list && r.top_k > 0 && r.top_k <= kMostWanted)
    bound = bound_of_best(s, r.top_k);
  else if (wants_list && !some_k)
    bound = bound_of_best(s, kWanted);
  each(x, p, [&](const float(&v)[4], int64_t i) {
    if (!changed) weigh_raw(v, i);
    Fixed w;
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      if (tempered) w.add(scale.of(v[j]));
      finite += v[j] >= -kLargest;
      if (wants_list && v[j] >= bound) collect(s, order(v[j], i + j));
      if (greedy && !first && v[j] == most) first = uint64_t(i + j + 1);
    }
    tempered_sum += w.total();
  });
  publish(s, p, kSum, sum), publish(s, p, kMoment, moment), publish(s, p, kFinite, finite);
  publish(s, p, kTempered, tempered ? tempered_sum : sum);
  if (greedy) {    // the lowest index in the warp: a thread has its own in ascending order
    for (int with = 16; with; with /= 2) {
      const uint64_t other = __shfl_xor_sync(kWhole, first, with);
      if (!first || (other && other < first)) first = other;
    }
    publish(s, p, kFirst, lane == 0 ? first : 0);
  }
  cluster_sync();
  if (rank) return serve(s, p, x, scale);

  // 3. the token
  const uint64_t mass = whole(s, p, kSum), spread = whole(s, p, kMoment);
  Outcome out = {0, most, 1, 0};
  if (greedy) {
    int w = 0;
    while (!s.sum[kFirst][w]) ++w;    // warps stand in the order of the vocabulary
    out.token = int64_t(s.sum[kFirst][w]) - 1;
  } else {
    const Row found = {most, a.vocab, whole(s, p, kFinite), whole(s, p, kTempered), needed || plain};
    out = decide(s, p, x, scale, r, found, bound);
  }
  ask(s, p, x, scale, {0, 0, 0, kDone, 0, 0});
  if (threadIdx.x) return;
  write(a, row, out.token, log_probability(from[out.token], raw_most, mass),
        greedy ? 0 : log_probability(out.value, most, out.sum, r.temperature), int32_t(out.kept), a.entropy ? entropy(mass, spread) : 0);
}

// Blocks of a row: enough that their logits stay small, and more where rows alone would not fill the device.
int blocks_of(int64_t count, int64_t vocab) {
  const int multiprocessors = attribute(cudaDevAttrMultiProcessorCount);
  int blocks = 1;
  if (attribute(cudaDevAttrComputeCapabilityMajor) >= 9)
    while (blocks < kMostBlocks && (vocab > blocks * kShare || (count * blocks < multiprocessors && vocab > blocks * kTile))) blocks *= 2;
  return blocks;
}

}  // namespace

int sample(const SampleArgs& a, char* scratch, void* stream) {
  const int blocks = blocks_of(a.count, a.vocab);
  const int64_t tiles = (a.vocab + kTile - 1) / kTile, chunk = (tiles + blocks - 1) / blocks * kTile;
  const int64_t bytes = int64_t(sizeof(Shared)) + chunk * 4;
  int32_t* counts = reinterpret_cast<int32_t*>(scratch);
  float* adjusted = reinterpret_cast<float*>(scratch) + a.count * a.vocab;
  if (bytes <= attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin))
    return launch(sample_kernel<true>, a.count * blocks, kThreads, bytes, blocks, stream, a, counts, adjusted, chunk, blocks);
  return launch(sample_kernel<false>, a.count * blocks, kThreads, int64_t(sizeof(Shared)), blocks, stream, a, counts, adjusted, chunk, blocks);
}

}  // namespace fastllm
