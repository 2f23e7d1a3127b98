// A row of logits in the blocks of a cluster, as sample.cu reads it: what they share, and the passes over the row.
#pragma once
#include "../records/sample.h"
#include "fixed.cuh"

namespace fastllm {
namespace {

constexpr int kThreads = 384, kWarps = kThreads / 32, kMostBlocks = 8;    // 80 registers a thread let two blocks run together
constexpr int kGroups = 16 * kWarps;                                      // of a row's logits
constexpr int kList = kThreads;
constexpr int kWanted = 64;     // logits to look for where no top_k says how many
constexpr int kMostWanted = kGroups / 2;
constexpr int kStep = 128, kTile = kStep * kWarps;    // logits that a warp and a block read at once
constexpr int kAhead = 4;                             // 16-byte loads of a thread on their way
constexpr int kShare = 16384;                         // logits of a block, so that three fit in a multiprocessor's memory
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

// A prefix of the row in the order: its last logit, what it weighs, how many it has.
struct Prefix {
  int64_t cut;
  uint64_t sum;
  int kept;
};

struct Shared {
  uint64_t sum[kSums][kMostBlocks * kWarps];    // what each warp found, in the first block
  int64_t list[kList];                          // orders of candidates, in the first block
  uint64_t weight[kList];                       // of those that count
  SampleRow row;
  Command command;
  Prefix best, nucleus;                         // by top_k, by top_p
  float group[kGroups];
  int64_t cut;
  uint64_t mass, spread;                        // at temperature 1: of the weights, and of weight * (max - x)
  float bound, drawn_value;
  int32_t count, drawn;    // count: candidates, of which kList are on the list
};
static_assert(sizeof(Shared) % 16 == 0, "logits follow it");

// Logits of a row by their index in it; `last`: where they end.
struct Logits {
  const float* at;
  int last;
  bool aligned;
  __device__ __forceinline__ float4 load(int i) const {
    if (aligned && i + 4 <= last) return *reinterpret_cast<const float4*>(at + i);
    const float none = -infinity();
    return make_float4(i < last ? at[i] : none, i + 1 < last ? at[i + 1] : none, i + 2 < last ? at[i + 2] : none,
                       i + 3 < last ? at[i + 3] : none);
  }
};

// The part of a row that a warp has, and how many blocks the row has.
struct Part {
  int begin, end, blocks;
};
__device__ __forceinline__ int lane() { return threadIdx.x % 32; }
__device__ __forceinline__ int warp() { return threadIdx.x / 32; }
__device__ __forceinline__ bool leads() { return threadIdx.x == 0 && cluster_rank() == 0; }    // of the row's threads
__device__ __forceinline__ int warp_of_row() { return int(cluster_rank()) * kWarps + warp(); }

// f(logits[4], index of the first) for all that are this thread's.
template <class F> __device__ __forceinline__ void each(const Logits& x, const Part& p, F f) {
#pragma unroll 1
  for (int i = p.begin + lane() * 4; i < p.end; i += kStep) {
    const float4 v = x.load(i);
    const float four[4] = {v.x, v.y, v.z, v.w};
    f(four, i);
  }
}

__device__ __forceinline__ void publish(Shared& s, int which, uint64_t mine) {
  mine = warp_sum(mine);
  if (lane() == 0) at_rank(&s, 0)->sum[which][warp_of_row()] = mine;
}
// The sum over the row, in all threads of the first block.
__device__ __forceinline__ uint64_t whole(const Shared& s, const Part& p, int which) {
  uint64_t sum = 0;
  for (int i = lane(); i < p.blocks * kWarps; i += 32) sum += s.sum[which][i];
  return warp_sum(sum);
}

__device__ __forceinline__ void collect(Shared& s, int64_t order) {
  Shared* first = at_rank(&s, 0);
  const int place = atomicAdd(&first->count, 1);
  if (place < kList) first->list[place] = order;
}

// ---------------------------------------------------------------------------------------------------- before the weights

// The largest logit; a NaN where there is one. Leaves the maxima of the groups in every block. All threads have called
// cluster_arrive since the block began, or since it last read the maxima.
__device__ float maxima(Shared& s, const Part& p, float top, bool nan) {
  const int lanes = 2 * p.blocks;    // of a group
  if (nan) top = not_a_number();
  for (int with = 1; with < lanes; with *= 2) {
    const float other = __shfl_xor_sync(kWhole, top, with);
    top = top != top || other != other ? not_a_number() : fmaxf(top, other);
  }
  cluster_wait();    // all blocks have begun, and have read the maxima before these
  if (lane() % lanes == 0)
    for (int r = 0; r < p.blocks; ++r)
      at_rank(&s, r)->group[int(cluster_rank()) * (kGroups / p.blocks) + warp() * (32 / lanes) + lane() / lanes] = top;
  cluster_sync();
  const float mine = s.group[threadIdx.x % kGroups];
  if (__syncthreads_or(mine != mine)) return mine != mine ? mine : not_a_number();
  float most = s.group[lane()];
  for (int i = lane() + 32; i < kGroups; i += 32) most = fmaxf(most, s.group[i]);
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

__device__ __forceinline__ bool changes_logits(const SampleArgs& a, const SampleRow& r) {
  const bool has_history = r.history_len > 0 && a.history_stride > 0;    // tokens are counted, too, where none are kept
  return ((r.repetition != 1 || r.presence != 0 || r.frequency != 0) && has_history) ||
         (a.suppressed > 0 && r.history_len - r.prompt_len < r.min_new);
}

// The block's logits x[begin, end) after penalties: csrc/cpu/sample.cpp: penalise. Who takes an id's count off applies it.
__device__ void penalise(const SampleArgs& a, const SampleRow& r, int64_t which, int begin, int end, float* x, int32_t* counts) {
  const int32_t *history = a.history + which * a.history_stride, *suppress = a.suppress + which * a.suppressed;
  const int length = r.history_len < a.history_stride ? r.history_len : int(a.history_stride);
  auto mine = [&](int id) { return id >= begin && id < end; };
  __syncthreads();
  for (int i = threadIdx.x; i < length; i += kThreads)
    if (mine(history[i])) counts[history[i]] = 0;
  __syncthreads();
  for (int i = threadIdx.x; i < length; i += kThreads)
    if (i >= r.prompt_len && mine(history[i])) atomicAdd(counts + history[i], 1);
  __syncthreads();
  for (int i = threadIdx.x; i < length; i += kThreads) {
    const int id = history[i];
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
    for (int i = threadIdx.x; i < a.suppressed; i += kThreads)
      if (mine(suppress[i])) x[suppress[i]] = -infinity();
  __syncthreads();
}

// -------------------------------------------------------------------------------------------------- passes over the row

// How a logit of the row that is sampled from is weighed.
struct Scale {
  float top, scale;    // the largest, but finite; 1 / temperature
  __device__ __forceinline__ float of(float x) const { return exponential(exponent(x, top, scale)); }
};

// One pass over this warp's part of the row, a logit a lane.
__device__ void answer(Shared& s, const Part& p, const Logits& x, const Scale& scale, const Command& c) {
  if (c.what == kDraw && warp_of_row() != c.b) return;
  uint64_t sums[3] = {0, 0, 0};
  int counts[3] = {0, 0, 0};
  int64_t left = c.c;
#pragma unroll 1
  for (int start = p.begin; start < p.end; start += 32) {
    const int i = start + lane();
    const float v = i < p.end ? x.at[i] : -infinity();
    const int64_t o = order(v, i);
    if (c.what == kCollect) {    // the logits between two places
      if (o > c.a && o <= c.b) collect(s, o);
      continue;
    }
    const float e = scale.of(v);
    const uint64_t w = c.weighted ? weight(e) : 1;
    if (c.what == kCount) {    // how many logits stand before three places of the order, and what they weigh
      if (o > c.a) sums[0] += w, ++counts[0];
      if (o > c.b) sums[1] += w, ++counts[1];
      if (o > c.c) sums[2] += w, ++counts[2];
      continue;
    }
    const bool kept = o >= c.a && e >= c.least;
    if (c.what == kKeep) {    // what the kept set weighs, and its size
      if (kept) sums[0] += w, ++counts[0];
      continue;
    }
    uint64_t running = kept ? w : 0;    // kDraw: where the running sum of the kept set passes what is left
    const uint64_t mine = running;
#pragma unroll
    for (int by = 1; by < 32; by *= 2) {
      const uint64_t other = __shfl_up_sync(kWhole, running, by);
      if (lane() >= by) running += other;
    }
    const int64_t all = int64_t(__shfl_sync(kWhole, running, 31)), here = left - int64_t(running - mine);
    if (here >= 0 && here < int64_t(mine)) at_rank(&s, 0)->drawn = i, at_rank(&s, 0)->drawn_value = v;
    if (left < all) return;
    left -= all;
  }
  if (c.what == kCount) {
#pragma unroll
    for (int n = 0; n < 3; ++n) publish(s, n, sums[n]), publish(s, 3 + n, uint64_t(counts[n]));
  } else if (c.what == kKeep) {
    publish(s, kTempered, sums[0]), publish(s, kFinite, uint64_t(counts[0]));
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

}  // namespace
}  // namespace fastllm
