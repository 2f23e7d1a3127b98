// attention's gradients on sm_90a, of what attention_sm90a.cu computes.
//
// A block has 128 keys of a KV head, 64 for each of two consumer warpgroups, and walks the rows that see them, of all query heads
// of that KV head; one warpgroup more has the thread that keeps the copy engine busy. Of a tile of rows a consumer computes
//     p = exp2(scale k q^T - lse), ds = p (v dout^T - delta), dv += p dout, dk += ds q
// with keys down and rows across: p is a left side in its registers, ds goes to shared memory, where both consumers multiply that
// of all 128 keys by k: 64 x 64 of dq each, added to sums in memory. p and ds are rounded to 16 bits before their products. The
// next tile's k q^T runs under the end of a tile; no further, as ptxas lets no product run across the end of a loop.
//
// dq is the sum of what blocks add in the order in which they come: its last bits differ from run to run, those of dk and dv do
// not. Around it two small kernels: one gives each row its lse and delta = rowsum(dout out), one rounds the sums.
#include "attention.cuh"

namespace fastllm {
namespace {

constexpr int kPart = 64 * 64;    // numbers of dq that a warpgroup adds up: fragment g of thread t at (g * 128 + t) * 4

struct GradientProblem : Sight {
  void *dk, *dv;         // [batch, keys, kv_heads, dim]
  float* dq;             // [batch, heads, blocks of rows, 2, kPart]
  const float2* rows;    // [batch, heads, padded rows]: lse in base 2, infinite where a row sees no key or is none; delta
  int kv_heads, group, row_blocks;
  Order order;          // of the blocks of keys
  float scale, log2_scale;
};

template <int kHeadDim, bool kIsHalf> struct GradientShape {
  static constexpr int kDim = kHeadDim, kConsumers = 2, kKeys = kConsumers * kGroupRows, kStages = 2;
  static constexpr bool kHalf = kIsHalf;
  static constexpr int kRows = kDim == 64 ? 128 : 64;                 // of a tile
  static constexpr int kBlocks = kDim / 64, kSlices = kRows / 64;     // of 64 columns, of 64 rows
  static constexpr bool kEarly = kDim == 128;    // p dout runs under the arithmetic of ds, where there are the registers
  static constexpr int kThreads = (kConsumers + 1) * kGroupThreads;
  static constexpr int kProducer = 24, kConsumer = 240;    // registers of a thread

  struct Shared {    // at a multiple of 1024 bytes
    uint16_t k[kBlocks][kKeys][64], v[kBlocks][kKeys][64];
    uint16_t q[kStages][kBlocks][kRows][64], dout[kStages][kBlocks][kRows][64];
    uint16_t ds[2][kSlices][kKeys][64];    // one is written while products still read the other
    float2 rows[kStages][kRows];
    uint64_t kv_full, q_full[kStages], q_empty[kStages], dout_full[kStages], dout_empty[kStages];
  };
  static_assert(kBlocks * kSlices == kConsumers, "each consumer has a part of dq");
};

// Keys of a KV head from `first` on, and the tiles [begin, end) of rows that see them.
struct Keys {
  int first, begin, end, head, batch;

  template <class S> static __device__ __forceinline__ Keys of(const GradientProblem& p) {
    const Place place = p.order.place(int(blockIdx.x));
    Keys w = {place.block * S::kKeys, 0, 0, place.head % p.kv_heads, place.head / p.kv_heads};
    const int last = (w.first + S::kKeys < p.keys ? w.first + S::kKeys : p.keys) - 1;
    w.begin = p.rows_from(w.first) / S::kRows, w.end = (p.rows_to(last) + S::kRows - 1) / S::kRows;
    return w;
  }
};

// ------------------------------------------------------------------------------------------------------------- producer

template <class S>
__device__ __forceinline__ void produce(typename S::Shared& s, const GradientProblem& p, const CUtensorMap& q_map,
                                        const CUtensorMap& dout_map, const CUtensorMap& k_map, const CUtensorMap& v_map) {
  const Keys w = Keys::of<S>(p);
  if (w.end <= w.begin) return;
  const uint32_t full = shared_address(&s.kv_full);
  barrier_expect(full, sizeof s.k + sizeof s.v);
#pragma unroll
  for (int i = 0; i < S::kBlocks; ++i) {
    tma_load(shared_address(s.k[i]), &k_map, full, i * 64, w.first, w.head, w.batch);
    tma_load(shared_address(s.v[i]), &v_map, full, i * 64, w.first, w.head, w.batch);
  }
  Ring ring;
  for (int h = w.head * p.group; h < (w.head + 1) * p.group; ++h) {
    const float2* rows = p.rows + (int64_t(w.batch) * p.kv_heads * p.group + h) * p.row_blocks * S::kRows;
    for (int m = w.begin; m < w.end; ++m, ring.next<S::kStages>()) {
      const int stage = ring.stage, first = m * S::kRows;
      load(s.q[stage], s.q_full[stage], s.q_empty[stage], ring.phase, q_map, first, h, w.batch, sizeof s.rows[0]);
      bulk_load(shared_address(s.rows[stage]), rows + first, sizeof s.rows[0], shared_address(&s.q_full[stage]));
      load(s.dout[stage], s.dout_full[stage], s.dout_empty[stage], ring.phase, dout_map, first, h, w.batch);
    }
  }
}

// ------------------------------------------------------------------------------------------------------------- consumer

template <class S> __device__ __forceinline__ void consume(typename S::Shared& s, const GradientProblem& p) {
  const int warp = __shfl_sync(kWhole, int(threadIdx.x / 32), 0) - 4;    // of the consumers; the same in all lanes, and known so
  const int group = warp / 4, lane = int(threadIdx.x % 32), thread = int(threadIdx.x % kGroupThreads);
  const Keys w = Keys::of<S>(p);
  const int group_first = w.first + group * kGroupRows, group_last = group_first + kGroupRows - 1;
  const int own = group * kGroupRows + warp % 4 * 16 + lane / 4;    // its first key, in the block
  float dk[S::kDim / 2], dv[S::kDim / 2];
#pragma unroll
  for (int i = 0; i < S::kDim / 2; ++i) dk[i] = dv[i] = 0;
  if (w.end > w.begin) {
    int from[2], to[2];    // the rows that see a thread's keys
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const int key = w.first + own + r * 8;
      from[r] = key < p.keys ? p.rows_from(key) : 1 << 30, to[r] = p.rows_to(key);
    }
    const int all_from = group_last < p.keys ? p.rows_from(group_last) : 1 << 30, all_to = p.rows_to(group_first);
    const uint32_t own_k = shared_address(s.k[0][group * kGroupRows]), own_v = shared_address(s.v[0][group * kGroupRows]);
    const uint64_t k_part = tile_descriptor(shared_address(s.k[S::kBlocks == 2 ? group : 0]));
    float* sums = p.dq + (int64_t(w.batch) * p.kv_heads + w.head) * p.group * p.row_blocks * 2 * kPart;
    sums += group * kPart + thread * 4;
    float weights[S::kRows / 2], gradients[S::kRows / 2], part[32];
    uint32_t p_left[S::kRows / 16][4];
    Ring ring;
    auto multiply_q = [&](uint32_t q_tile) {
      wgmma_fence();
      multiply_rows<S::kDim, S::kHalf>(weights, own_k, sizeof s.k[0], q_tile, sizeof s.q[0][0]);
      wgmma_commit();
    };
    const int tiles = (w.end - w.begin) * p.group;
    barrier_wait(shared_address(&s.kv_full), 0);
    barrier_wait(shared_address(&s.q_full[0]), 0);
    multiply_q(shared_address(s.q[0]));
    wgmma_wait<0>();
    settle(weights);
    for (int n = 0, m = w.begin; n < tiles; ++n) {
      const int stage = ring.stage, buffer = n % 2, at = m * S::kRows;
      const uint32_t phase = ring.phase, q_tile = shared_address(s.q[stage]), dout_tile = shared_address(s.dout[stage]);
      const float4* rows = reinterpret_cast<const float4*>(s.rows[stage]) + lane % 4;    // two rows: lse, delta, lse, delta
      ring.next<S::kStages>();

      barrier_wait(shared_address(&s.dout_full[stage]), phase);
      wgmma_fence();
      multiply_rows<S::kDim, S::kHalf>(gradients, own_v, sizeof s.v[0], dout_tile, sizeof s.dout[0][0]);
      wgmma_commit();
      if (at < all_from || at + S::kRows > all_to) {
        const int tile_from[2] = {from[0] - at, from[1] - at}, tile_to[2] = {to[0] - at, to[1] - at};
        mask(weights, tile_from, tile_to);
      }
#pragma unroll
      for (int i = 0; i < S::kRows / 2; i += 4) {
        const float4 two = rows[i];
#pragma unroll
        for (int r = 0; r < 4; r += 2) {
          weights[i + r] = exp2_fast(fmaf(weights[i + r], p.log2_scale, -two.x));
          weights[i + r + 1] = exp2_fast(fmaf(weights[i + r + 1], p.log2_scale, -two.z));
        }
      }
      auto add_dv = [&] {
        round_left<S::kHalf>(p_left, weights);
        wgmma_fence();
        add_product<S::kHalf>(dv, p_left, dout_tile);
        wgmma_commit();
      };
      auto end_dv = [&] {
        settle(dv), settle(p_left);
        if (lane == 0) barrier_arrive(shared_address(&s.dout_empty[stage]));
      };
      if constexpr (S::kEarly) add_dv();
      wgmma_wait<S::kEarly>();
      settle(gradients);
#pragma unroll
      for (int i = 0; i < S::kRows / 2; i += 4) {
        const float4 two = rows[i];
#pragma unroll
        for (int r = 0; r < 4; r += 2) {
          gradients[i + r] = weights[i + r] * (gradients[i + r] - two.y);
          gradients[i + r + 1] = weights[i + r + 1] * (gradients[i + r + 1] - two.w);
        }
      }
#pragma unroll
      for (int i = 0; i < S::kRows / 4; ++i) {    // column / 8 and the row of a pair
        const int g = i / 2, key = own + i % 2 * 8;
        uint32_t* line = reinterpret_cast<uint32_t*>(s.ds[buffer][g / 8][key]);
        line[(g % 8 ^ key % 8) * 4 + lane % 4] = pack<S::kHalf>(gradients[i * 2], gradients[i * 2 + 1]);    // swizzled
      }
      shared_written();
      if constexpr (S::kEarly) {
        wgmma_wait<0>();
        end_dv();
      } else {
        add_dv();
      }
      numbered_wait(1, S::kConsumers * kGroupThreads);
      const uint64_t own_ds = tile_descriptor(shared_address(s.ds[buffer][0][group * kGroupRows]));
      const uint64_t ds_part = tile_descriptor(shared_address(s.ds[buffer][S::kSlices == 2 ? group : 0]));
      const uint64_t q_across = tile_descriptor(q_tile, sizeof s.q[0][0]);
      wgmma_fence();
#pragma unroll
      for (int i = 0; i < S::kRows / 16; ++i)    // 16 rows: 32 bytes of a line of ds
        wgmma<S::kDim, S::kHalf, false, true>(dk, own_ds + (i / 4 * sizeof s.ds[0][0] + i % 4 * 32) / 16, q_across + i * 128,
                                              true);
      wgmma_commit();
#pragma unroll
      for (int i = 0; i < S::kKeys / 16; ++i)    // 16 keys: as many lines of 128 bytes
        wgmma<64, S::kHalf, true, true>(part, ds_part + i * 128, k_part + i * 128, i > 0);
      wgmma_commit();
      if (n + 1 < tiles) barrier_wait(shared_address(&s.q_full[ring.stage]), ring.phase);
      multiply_q(n + 1 < tiles ? shared_address(s.q[ring.stage]) : q_tile);    // the next tile's, or for nothing
      wgmma_wait<1>();
      settle(dk), settle(part);
      barrier_arrive(shared_address(&s.q_empty[stage]));    // each for itself: it has read lse and delta
      if constexpr (!S::kEarly) end_dv();
#pragma unroll
      for (int g = 0; g < 8; ++g)
        add_four(sums + m * int64_t(2 * kPart) + g * 128 * 4, part[g * 4], part[g * 4 + 1], part[g * 4 + 2], part[g * 4 + 3]);
      if (++m == w.end) m = w.begin, sums += p.row_blocks * int64_t(2 * kPart);    // the next head
      wgmma_wait<0>();
      settle(weights);
    }
  }
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    const int key = w.first + own + r * 8;
    const int64_t at = ((int64_t(w.batch) * p.keys + key) * p.kv_heads + w.head) * S::kDim;
    store_row<S::kHalf>(static_cast<uint16_t*>(p.dk) + at, key < p.keys, dk, r, p.scale);
    store_row<S::kHalf>(static_cast<uint16_t*>(p.dv) + at, key < p.keys, dv, r, 1);
  }
}

// ----------------------------------------------------------------------------------------------------------- the kernels

template <class S>
__global__ void __launch_bounds__(S::kThreads, 1)
    gradient_kernel(const GradientProblem p, const __grid_constant__ CUtensorMap q_map,
                    const __grid_constant__ CUtensorMap dout_map, const __grid_constant__ CUtensorMap k_map,
                    const __grid_constant__ CUtensorMap v_map) {
#ifdef FASTLLM_SM90A
  char* memory = &shared_memory<char>();
  auto& s = *reinterpret_cast<typename S::Shared*>(memory + (-shared_address(memory) & 1023));
  if (threadIdx.x == 0) {
    barrier_init(shared_address(&s.kv_full), 1);
    for (int i = 0; i < S::kStages; ++i) {
      barrier_init(shared_address(&s.q_full[i]), 1), barrier_init(shared_address(&s.q_empty[i]), S::kConsumers * kGroupThreads);
      barrier_init(shared_address(&s.dout_full[i]), 1), barrier_init(shared_address(&s.dout_empty[i]), S::kConsumers * 4);
    }
    barriers_ready();
  }
  __syncthreads();
  if (threadIdx.x < kGroupThreads) {
    give_registers<S::kProducer>();
    if (threadIdx.x == 0) produce<S>(s, p, q_map, dout_map, k_map, v_map);
  } else {
    take_registers<S::kConsumer>();
    consume<S>(s, p);
  }
#endif
}

template <bool kHalf> __device__ __forceinline__ float product_of_pairs(uint32_t a, uint32_t b) {
  return fmaf(wide<kHalf>(a & 0xffff), wide<kHalf>(b & 0xffff), wide<kHalf>(a >> 16) * wide<kHalf>(b >> 16));
}

// dim / 8 lanes a row.
template <int kDim, bool kHalf>
__global__ void __launch_bounds__(128)
    row_kernel(float2* rows, const uint16_t* out, const uint16_t* dout, const float* lse, int64_t count, int queries, int padded,
               int heads, int64_t dout_batch, int64_t dout_row, int64_t dout_head) {
  constexpr int kLanes = kDim / 8;
  const int64_t thread = int64_t(blockIdx.x) * 128 + threadIdx.x, at = thread / kLanes, column = thread % kLanes * 8;
  const int head = int(at % heads), row = int(at / heads % padded);
  const int64_t batch = at / heads / padded;
  const bool inside = at < count && row < queries;
  float delta = 0;
  if (inside) {
    const uint4 x = *reinterpret_cast<const uint4*>(out + ((batch * queries + row) * heads + head) * kDim + column);
    const uint4 y = *reinterpret_cast<const uint4*>(dout + batch * dout_batch + row * dout_row + head * dout_head + column);
    delta = product_of_pairs<kHalf>(x.x, y.x) + product_of_pairs<kHalf>(x.y, y.y);
    delta += product_of_pairs<kHalf>(x.z, y.z) + product_of_pairs<kHalf>(x.w, y.w);
  }
#pragma unroll
  for (int with = kLanes / 2; with; with /= 2) delta += __shfl_xor_sync(kWhole, delta, with);
  if (at >= count || column) return;
  float log = inside ? lse[(batch * heads + head) * queries + row] * 1.4426950408889634f : infinity();
  if (log == -infinity()) log = infinity();
  rows[(batch * heads + head) * padded + row] = make_float2(log, delta);
}

// A block: a part of dq.
template <class S>
__global__ void __launch_bounds__(kGroupThreads)
    round_kernel(uint16_t* dq, const float* sums, int queries, int heads, int row_blocks, float scale) {
  const int64_t head_block = blockIdx.x / 2;
  const int part = int(blockIdx.x % 2), m = int(head_block % row_blocks), head = int(head_block / row_blocks % heads);
  const int64_t batch = head_block / row_blocks / heads;
  const float4* from = reinterpret_cast<const float4*>(sums + int64_t(blockIdx.x) * kPart) + threadIdx.x;
  float d[32];
#pragma unroll
  for (int g = 0; g < 8; ++g) {
    const float4 x = from[g * 128];
    d[g * 4] = x.x, d[g * 4 + 1] = x.y, d[g * 4 + 2] = x.z, d[g * 4 + 3] = x.w;
  }
  const int first = m * S::kRows + (S::kSlices == 2 ? part * 64 : 0) + int(threadIdx.x / 32 * 16 + threadIdx.x % 32 / 4);
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    const int row = first + r * 8;
    uint16_t* to = dq + ((batch * queries + row) * heads + head) * S::kDim + (S::kBlocks == 2 ? part * 64 : 0);
    store_row<S::kHalf>(to, row < queries, d, r, scale);
  }
}

template <class S> int launch_shape(const AttentionBackwardArgs& a, char* scratch, void* stream) {
  CUtensorMap q, dout, k, v;
  const int64_t queries[4] = {a.dim, a.queries, a.heads, a.batch}, keys[4] = {a.dim, a.keys, a.kv_heads, a.batch};
  const int64_t q_strides[3] = {a.q_row, a.q_head, a.q_batch}, dout_strides[3] = {a.dout_row, a.dout_head, a.dout_batch};
  const int64_t k_strides[3] = {a.k_row, a.k_head, a.k_batch}, v_strides[3] = {a.v_row, a.v_head, a.v_batch};
  if (const int e = tensor_map(&q, a.q, S::kHalf, queries, q_strides, S::kRows)) return e;
  if (const int e = tensor_map(&dout, a.dout, S::kHalf, queries, dout_strides, S::kRows)) return e;
  if (const int e = tensor_map(&k, a.k, S::kHalf, keys, k_strides, S::kKeys)) return e;
  if (const int e = tensor_map(&v, a.v, S::kHalf, keys, v_strides, S::kKeys)) return e;
  GradientProblem p = {sight(a.queries, a.keys, a.causal, a.window)};
  const int64_t group = a.heads / a.kv_heads, row_blocks = (a.queries + S::kRows - 1) / S::kRows;
  const int64_t fit = kCache / (a.queries * a.dim * 4 * group), all_heads = a.batch * a.heads, padded = row_blocks * S::kRows;
  if (!order(&p.order, (a.keys + S::kKeys - 1) / S::kKeys, a.batch * a.kv_heads, fit)) return int(cudaErrorInvalidValue);
  auto* rows = reinterpret_cast<float2*>(scratch);
  p.rows = rows, p.dq = reinterpret_cast<float*>(scratch + all_heads * padded * int64_t(sizeof(float2)));
  p.dk = a.dk, p.dv = a.dv, p.kv_heads = int(a.kv_heads), p.group = int(group), p.row_blocks = int(row_blocks);
  p.scale = float(a.scale), p.log2_scale = float(a.scale * 1.4426950408889634);
  const size_t sums = size_t(all_heads * padded * a.dim) * sizeof(float);
  if (const cudaError_t e = cudaMemsetAsync(p.dq, 0, sums, static_cast<cudaStream_t>(stream)); e != cudaSuccess) return int(e);
  const int64_t count = all_heads * padded;
  int e = launch(row_kernel<S::kDim, S::kHalf>, (count * S::kDim / 8 + 127) / 128, 128, 0, 1, stream, rows,
                 static_cast<const uint16_t*>(a.out), static_cast<const uint16_t*>(a.dout), a.lse, count, int(a.queries),
                 int(padded), int(a.heads), a.dout_batch, a.dout_row, a.dout_head);
  if (e) return e;
  e = launch(gradient_kernel<S>, p.order.work, S::kThreads, sizeof(typename S::Shared) + 1024, 1, stream, p, q, dout, k, v);
  if (e) return e;
  return launch(round_kernel<S>, all_heads * row_blocks * 2, kGroupThreads, 0, 1, stream, static_cast<uint16_t*>(a.dq), p.dq,
                int(a.queries), int(a.heads), int(row_blocks), p.scale);
}

template <bool kHalf> int launch_dim(const AttentionBackwardArgs& a, char* scratch, void* stream) {
  if (a.dim == 64) return launch_shape<GradientShape<64, kHalf>>(a, scratch, stream);
  return launch_shape<GradientShape<128, kHalf>>(a, scratch, stream);
}

}  // namespace

// What it takes, ops/attention/hopper.py says, and how many bytes of scratch.
int attention_backward(const AttentionBackwardArgs& a, char* scratch, void* stream) {
  const bool plain = !a.cu_q && !a.bias && !a.alibi && !a.sinks && a.softcap == 0 && a.p == 0 && a.scale > 0;
  const bool fits = (a.dim == 64 || a.dim == 128) && a.dtype != kFloat32 && a.queries < 1 << 30 && a.keys < 1 << 30;
  if (!plain || !fits || !a.batch || !a.queries || !a.keys || !a.heads) return int(cudaErrorInvalidValue);
  if (attribute(cudaDevAttrComputeCapabilityMajor) != 9) return int(cudaErrorNoKernelImageForDevice);
  return a.dtype == kFloat16 ? launch_dim<true>(a, scratch, stream) : launch_dim<false>(a, scratch, stream);
}

}  // namespace fastllm
