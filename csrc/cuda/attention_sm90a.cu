// attention forward on sm_90a: dense, 16-bit, heads of 64 and 128, causal or full, with a window or without.
//
// A block has 64 rows of a head for each of its consumer warpgroups, and one warpgroup more, whose first thread keeps the copy
// engine busy: rows of q, then keys and values in rings of tiles. A consumer multiplies q by a tile of keys while its products of
// the tile before with the values still run; consumers take turns at the matrix unit, so that one makes weights of its scores
// while another multiplies. Tiles are walked from the last to the first; those that some row does not see whole are masked.
// A weight is exp2 of the score less the highest so far, rounded to 16 bits before its product; its sum is not.
//
// Blocks stay: as many as multiprocessors. Each takes the next piece of work when it has room for it, by a counter that all
// share, longest rows first; its producer is ahead of its consumers by a piece. Heads whose keys and values fit the L2 cache
// together come together.
#include "attention.cuh"

namespace fastllm {
namespace {

struct Problem : Sight {
  void* out;     // [batch, queries, heads, dim]
  float* lse;    // [batch, heads, queries], or null
  int heads, group;
  Order order;     // of the blocks of rows
  int* taken;      // pieces of work, beyond the first of each block
  float scale;     // in base 2
};

// Rows of a head from `first` on, and the tiles [begin, end) of keys that they see; first -1: there is none left.
struct Work {
  int first, begin, end, head, batch;
};

template <int kHeadDim, int kGroups, int kTileKeys, int kSteps, bool kIsHalf> struct Shape {
  static constexpr int kDim = kHeadDim, kConsumers = kGroups, kKeys = kTileKeys, kStages = kSteps;
  static constexpr bool kHalf = kIsHalf;
  static constexpr int kRows = kConsumers * kGroupRows, kThreads = (kConsumers + 1) * kGroupThreads;
  static constexpr int kBlocks = kDim / 64;                    // of 64 columns: the copy engine's boxes
  static constexpr int kAtStart = 65536 / kThreads / 8 * 8;    // registers of a thread, and what it has in its role
  static constexpr int kProducer = kConsumers == 2 ? 40 : 32;
  static constexpr int kConsumer = (kAtStart * (kConsumers + 1) - kProducer) / kConsumers / 8 * 8;

  struct Shared {    // at a multiple of 1024 bytes
    uint16_t q[kBlocks][kRows][64];
    uint16_t k[kStages][kBlocks][kKeys][64], v[kStages][kBlocks][kKeys][64];
    uint64_t q_full, q_empty, k_full[kStages], k_empty[kStages], v_full[kStages], v_empty[kStages];
    uint64_t work_full, work_empty;
    Work work;    // the piece that the producer has taken
  };
  static_assert(kRows <= 256 && kKeys <= 256 && kKeys % 16 == 0, "boxes of the copy engine; whole products");

  static __device__ __forceinline__ Work piece(const Problem& p, int at) {
    Work w = {-1, 0, 0, 0, 0};
    if (at >= p.order.work) return w;
    const Place place = p.order.place(at);
    w.first = (p.order.blocks - 1 - place.block) * kRows, w.head = place.head % p.heads, w.batch = place.head / p.heads;
    const int last = (w.first + kRows < p.queries ? w.first + kRows : p.queries) - 1;
    w.begin = p.from(w.first) / kKeys, w.end = (p.to(last) + kKeys - 1) / kKeys;
    return w;
  }
};

// ------------------------------------------------------------------------------------------------------------- producer

template <class S>
__device__ __forceinline__ void produce(typename S::Shared& s, const Problem& p, const CUtensorMap& q_map,
                                        const CUtensorMap& k_map, const CUtensorMap& v_map) {
  Ring q, k, v, works;
  for (int at = int(blockIdx.x), next = 0;; at = next) {
    const Work w = S::piece(p, at);
    barrier_wait(shared_address(&s.work_empty), works.phase ^ 1);
    s.work = w;
    barrier_arrive(shared_address(&s.work_full));
    works.next<1>();
    if (w.first < 0) return;
    next = int(gridDim.x) + atomicAdd(p.taken, 1);
    if (w.end <= w.begin) continue;
    const int head = w.head / p.group;
    load(s.q, s.q_full, s.q_empty, q.phase, q_map, w.first, w.head, w.batch);
    q.next<1>();
    for (int n = w.end - 1; n >= w.begin - 1; --n) {    // values one tile behind the keys: the order of their use
      if (n >= w.begin) {
        load(s.k[k.stage], s.k_full[k.stage], s.k_empty[k.stage], k.phase, k_map, n * S::kKeys, head, w.batch);
        k.next<S::kStages>();
      }
      if (n < w.end - 1) {
        load(s.v[v.stage], s.v_full[v.stage], s.v_empty[v.stage], v.phase, v_map, (n + 1) * S::kKeys, head, w.batch);
        v.next<S::kStages>();
      }
    }
  }
}

// ------------------------------------------------------------------------------------------------------------- consumer

struct Running {
  float top[2] = {-infinity(), -infinity()};    // the highest score
  float sum[2] = {0, 0};                        // of the thread's own weights

  // Scores to weights; fade: what is left of earlier ones.
  template <int kCount> __device__ __forceinline__ void weigh(float (&scores)[kCount], float scale, float (&fade)[2]) {
#pragma unroll
    for (int row = 0; row < 2; ++row) {
      float high = top[row];
#pragma unroll
      for (int i = row * 2; i < kCount; i += 4) high = fmaxf(high, fmaxf(scores[i], scores[i + 1]));
      high = fmaxf(high, __shfl_xor_sync(kWhole, high, 1));
      high = fmaxf(high, __shfl_xor_sync(kWhole, high, 2));
      const float base = high == -infinity() ? 0 : high * scale;
      fade[row] = exp2_fast(fmaf(top[row], scale, -base));
      top[row] = high;
      float part[2] = {0, 0};
#pragma unroll
      for (int i = row * 2; i < kCount; i += 4)
#pragma unroll
        for (int c = 0; c < 2; ++c) part[c] += scores[i + c] = exp2_fast(fmaf(scores[i + c], scale, -base));
      sum[row] = fmaf(sum[row], fade[row], part[0] + part[1]);
    }
  }
};

// The end of a row.
template <class S>
__device__ __forceinline__ void write(const Problem& p, const Work& w, const Running& running, const float (&out)[S::kDim / 2],
                                      int first) {
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    const int row = first + r * 8;
    float sum = running.sum[r];
    sum += __shfl_xor_sync(kWhole, sum, 1);
    sum += __shfl_xor_sync(kWhole, sum, 2);
    const float part = sum == 0 ? 0 : reciprocal_fast(sum);    // else at least 1
    const int64_t at = ((int64_t(w.batch) * p.queries + row) * p.heads + w.head) * S::kDim;
    store_row<S::kHalf>(static_cast<uint16_t*>(p.out) + at, row < p.queries, out, r, part);
    if (p.lse && row < p.queries && threadIdx.x % 4 == 0)
      p.lse[(int64_t(w.batch) * p.heads + w.head) * p.queries + row] =
          (running.top[r] * p.scale + log2_fast(sum)) * 0.6931471805599453f;
  }
}

template <class S> __device__ __forceinline__ void consume(typename S::Shared& s, const Problem& p) {
  const int warp = __shfl_sync(kWhole, int(threadIdx.x / 32), 0) - 4;    // of the consumers; the same in all lanes, and known so
  const int group = warp / 4, lane = int(threadIdx.x % 32);
  const uint32_t q_tile = shared_address(s.q[0][group * kGroupRows]);
  const int turn = 1 + group, next_turn = 1 + (group + 1) % S::kConsumers;
  auto release = [&](uint64_t& empty) {
    if (lane == 0) barrier_arrive(shared_address(&empty));
  };
  Ring q, k, v, works;
  if (group == S::kConsumers - 1) numbered_arrive(next_turn, 2 * kGroupThreads);    // the first group begins
  for (;;) {
    barrier_wait(shared_address(&s.work_full), works.phase);
    const Work w = s.work;
    barrier_arrive(shared_address(&s.work_empty));    // each for itself: what one has read, another does not vouch for
    __syncwarp();
    works.next<1>();
    if (w.first < 0) break;
    const int group_first = w.first + group * kGroupRows, group_last = group_first + kGroupRows - 1;
    const int first = group_first + warp % 4 * 16 + lane / 4;
    const int all_from = p.from(group_last), all_to = p.to(group_first);
    const int from[2] = {p.from(first), p.from(first + 8)}, to[2] = {p.to(first), p.to(first + 8)};
    Running running;
    float out[S::kDim / 2], scores[S::kKeys / 2], fade[2];
    uint32_t weights[S::kKeys / 16][4];
#pragma unroll
    for (int i = 0; i < S::kDim / 2; ++i) out[i] = 0;
    auto scores_of = [&](int stage) {
      multiply_rows<S::kDim, S::kHalf>(scores, q_tile, sizeof s.q[0], shared_address(s.k[stage]), sizeof s.k[0][0]);
    };
    auto weigh = [&](int n) {
      const int at = n * S::kKeys;
      if (at < all_from || at + S::kKeys > all_to) {
        const int tile_from[2] = {from[0] - at, from[1] - at}, tile_to[2] = {to[0] - at, to[1] - at};
        mask(scores, tile_from, tile_to);
      }
      running.weigh(scores, p.scale, fade);
    };
    if (w.end > w.begin) {
      barrier_wait(shared_address(&s.q_full), q.phase);
      q.next<1>();
      barrier_wait(shared_address(&s.k_full[k.stage]), k.phase);
      wgmma_fence();
      scores_of(k.stage);
      wgmma_commit();
      wgmma_wait<0>();
      settle(scores);
      release(s.k_empty[k.stage]);
      k.next<S::kStages>();
      if (w.end - 1 == w.begin) release(s.q_empty);
      weigh(w.end - 1);
      round_left<S::kHalf>(weights, scores);
      for (int n = w.end - 2; n >= w.begin; --n) {
        barrier_wait(shared_address(&s.k_full[k.stage]), k.phase);
        numbered_wait(turn, 2 * kGroupThreads);
        wgmma_fence();
        scores_of(k.stage);
        wgmma_commit();
        barrier_wait(shared_address(&s.v_full[v.stage]), v.phase);
        wgmma_fence();
        add_product<S::kHalf>(out, weights, shared_address(s.v[v.stage]));
        wgmma_commit();
        numbered_arrive(next_turn, 2 * kGroupThreads);
        wgmma_wait<1>();
        settle(scores);
        release(s.k_empty[k.stage]);
        k.next<S::kStages>();
        if (n == w.begin) release(s.q_empty);
        weigh(n);
        wgmma_wait<0>();
        settle(out), settle(weights);
        release(s.v_empty[v.stage]);
        v.next<S::kStages>();
#pragma unroll
        for (int i = 0; i < S::kDim / 2; ++i) out[i] *= fade[i / 2 % 2];
        round_left<S::kHalf>(weights, scores);
      }
      barrier_wait(shared_address(&s.v_full[v.stage]), v.phase);
      wgmma_fence();
      add_product<S::kHalf>(out, weights, shared_address(s.v[v.stage]));
      wgmma_commit();
      wgmma_wait<0>();
      settle(out), settle(weights);
      release(s.v_empty[v.stage]);
      v.next<S::kStages>();
    }
    write<S>(p, w, running, out, first);
  }
  if (group == 0) numbered_wait(turn, 2 * kGroupThreads);    // for the arrival that nobody has taken
}

// ------------------------------------------------------------------------------------------------------------ the kernel

template <class S>
__global__ void __launch_bounds__(S::kThreads, 1)
    attention_kernel(const Problem p, const __grid_constant__ CUtensorMap q_map, const __grid_constant__ CUtensorMap k_map,
                     const __grid_constant__ CUtensorMap v_map) {
#ifdef FASTLLM_SM90A
  char* memory = &shared_memory<char>();
  auto& s = *reinterpret_cast<typename S::Shared*>(memory + (-shared_address(memory) & 1023));
  if (threadIdx.x == 0) {
    barrier_init(shared_address(&s.q_full), 1), barrier_init(shared_address(&s.q_empty), S::kConsumers * 4);
    for (int i = 0; i < S::kStages; ++i) {
      barrier_init(shared_address(&s.k_full[i]), 1), barrier_init(shared_address(&s.k_empty[i]), S::kConsumers * 4);
      barrier_init(shared_address(&s.v_full[i]), 1), barrier_init(shared_address(&s.v_empty[i]), S::kConsumers * 4);
    }
    barrier_init(shared_address(&s.work_full), 1), barrier_init(shared_address(&s.work_empty), S::kConsumers * kGroupThreads);
    barriers_ready();
  }
  __syncthreads();
  if (threadIdx.x < kGroupThreads) {
    give_registers<S::kProducer>();
    if (threadIdx.x == 0) produce<S>(s, p, q_map, k_map, v_map);
  } else {
    take_registers<S::kConsumer>();
    consume<S>(s, p);
  }
#endif
}

template <class S> int launch_shape(const AttentionArgs& a, int* taken, void* stream) {
  CUtensorMap q, k, v;
  const int64_t queries[4] = {a.dim, a.queries, a.heads, a.batch}, keys[4] = {a.dim, a.keys, a.kv_heads, a.batch};
  const int64_t q_strides[3] = {a.q_row, a.q_head, a.q_batch};
  const int64_t k_strides[3] = {a.k_row, a.k_head, a.k_batch}, v_strides[3] = {a.v_row, a.v_head, a.v_batch};
  if (const int e = tensor_map(&q, a.q, S::kHalf, queries, q_strides, S::kRows)) return e;
  if (const int e = tensor_map(&k, a.k, S::kHalf, keys, k_strides, S::kKeys)) return e;
  if (const int e = tensor_map(&v, a.v, S::kHalf, keys, v_strides, S::kKeys)) return e;
  Problem p = {sight(a.queries, a.keys, a.causal, a.window)};
  const int64_t blocks = (a.queries + S::kRows - 1) / S::kRows, group = a.heads / a.kv_heads;
  if (!order(&p.order, blocks, a.heads * a.batch, kCache / (a.keys * a.dim * 4) * group)) return int(cudaErrorInvalidValue);
  p.out = a.out, p.lse = a.lse, p.taken = taken, p.heads = int(a.heads), p.group = int(group);
  p.scale = float(a.scale * 1.4426950408889634);
  if (const cudaError_t e = cudaMemsetAsync(taken, 0, sizeof *taken, static_cast<cudaStream_t>(stream)); e != cudaSuccess) return int(e);
  const int64_t multiprocessors = attribute(cudaDevAttrMultiProcessorCount);
  return launch(attention_kernel<S>, p.order.work < multiprocessors ? p.order.work : multiprocessors, S::kThreads,
                sizeof(typename S::Shared) + 1024, 1, stream, p, q, k, v);
}

template <bool kHalf> int launch_dim(const AttentionArgs& a, int* taken, void* stream) {
  if (a.dim == 64) return launch_shape<Shape<64, 3, 128, 4, kHalf>>(a, taken, stream);
  return launch_shape<Shape<128, 2, 128, 2, kHalf>>(a, taken, stream);
}

}  // namespace

// What it takes, ops/attention/hopper.py says. scratch: four bytes.
int attention(const AttentionArgs& a, char* scratch, void* stream) {
  const bool plain = !a.cu_q && !a.bias && !a.alibi && !a.sinks && a.softcap == 0 && a.p == 0 && a.scale > 0;
  const bool fits = (a.dim == 64 || a.dim == 128) && a.dtype != kFloat32 && a.queries < 1 << 30 && a.keys < 1 << 30;
  if (!plain || !fits || !a.batch || !a.queries || !a.keys || !a.heads) return int(cudaErrorInvalidValue);
  if (attribute(cudaDevAttrComputeCapabilityMajor) != 9) return int(cudaErrorNoKernelImageForDevice);
  auto* taken = reinterpret_cast<int*>(scratch);
  return a.dtype == kFloat16 ? launch_dim<true>(a, taken, stream) : launch_dim<false>(a, taken, stream);
}

}  // namespace fastllm
