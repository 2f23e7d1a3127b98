// paged_attention on a GPU for rows that see long texts: one new token a sequence, or a few. A pass over keys and values, each
// element multiplied by all query heads of its KV head; so what counts is to have many loads on their way.
//
// A cluster of blocks has one row and one KV head, and all its warps take turns at the pages, whichever of these there are: so
// their numbers are read beside the length, not after it. Keys and values go from memory to the registers of the lanes that
// multiply them, 16 bytes a load: a lane's eight elements are no eight that lie beside each other in the matrix unit's order,
// but any order of k will do, and of d the order of the sums is put right when they are written. Scores are keys x heads, so
// that a group of eight heads wastes nothing. Warps are put together in shared memory, blocks in that of their cluster; one
// launch, no memory beside.
#include "../records/attention.h"
#include "mma.cuh"

namespace fastllm {
namespace {

constexpr int kWarps = 8, kPage = 16, kTileHeads = 8, kMostHeads = 16;
constexpr float kLog2e = 1.4426950408889634f;

// What a row sees of its sequence, and where that is.
struct Row {
  int sequence, begin, end;    // keys [begin, end)
  bool good;                   // no length that the block table cannot hold
};

// The sequence that claims the row: cu_q[b] <= row < cu_q[b + 1], or -1. Mostly each sequence has one row, so it is row `row`.
__device__ __forceinline__ int sequence_of(const PagedAttentionArgs& a, int row) {
  if (row < a.batch && a.cu_q[row] <= row && row < a.cu_q[row + 1]) return row;
  int found = 0;
  for (int first = 0; first < a.batch; first += 32) {
    const int b = first + int(threadIdx.x % 32);
    const bool is = b < a.batch && a.cu_q[b] <= row && row < a.cu_q[b + 1];
    found += warp_sum(is ? b + 1 : 0);
  }
  return found - 1;
}

__device__ __forceinline__ Row row_of(const PagedAttentionArgs& a, int row) {
  const int b = sequence_of(a, row);
  if (b < 0) return {0, 0, 0, true};
  const int keys = a.context_len[b], last = a.cu_q[b + 1];
  if (keys < 0 || keys > a.max_pages * kPage) return {0, 0, 0, false};
  const int at = row + keys - (last < a.rows ? last : int(a.rows));    // its own position
  const int first = at - int(a.window) + 1, end = a.causal ? at + 1 : keys;
  return {b, a.window && first > 0 ? first : 0, end < keys ? end : keys, true};
}

template <int kDim, int kTiles> struct Parts {
  float acc[kWarps][kTiles * kTileHeads][kDim];    // sums of values; after the warps were put together the block's are the first
  float top[kWarps][kTiles * kTileHeads];          // the highest score, in powers of two
  float sum[kWarps][kTiles * kTileHeads];          // of the weights, over 2^top
};

// One warp's running sums.
template <int kDim, bool kHalf, int kTiles> struct Warp {
  static constexpr int kLoads = kDim / 32, kHalves = kDim / 64;
  uint32_t q[kTiles][kLoads][4];
  float acc[kTiles][kDim / 16][4];    // of d x heads
  float top[kTiles][2], sum[kTiles][2];

  __device__ __forceinline__ void begin(const PagedAttentionArgs& a, int row, int kv_head, int group) {
    const int t = int(threadIdx.x % 4), g = int(threadIdx.x % 32 / 4);
#pragma unroll
    for (int tile = 0; tile < kTiles; ++tile) {
      const int member = tile * kTileHeads + g;
      const uint16_t* from =
          static_cast<const uint16_t*>(a.q) + row * a.q_row + (int64_t(kv_head) * group + member) * a.q_head + t * 8;
#pragma unroll
      for (int c = 0; c < kLoads; ++c) {
        const uint4 v = member < group ? *reinterpret_cast<const uint4*>(from + c * 32) : uint4{0, 0, 0, 0};    // no __ldg: it may be moved up
        q[tile][c][0] = v.x, q[tile][c][1] = v.y, q[tile][c][2] = v.z, q[tile][c][3] = v.w;
      }
#pragma unroll
      for (int i = 0; i < kDim / 16; ++i)
#pragma unroll
        for (int j = 0; j < 4; ++j) acc[tile][i][j] = 0;
      top[tile][0] = top[tile][1] = -infinity(), sum[tile][0] = sum[tile][1] = 0;
    }
  }

  // A page of 16 keys, of which the row sees [from, to); known: it lies in the cache, else its scores are NaN.
  __device__ __forceinline__ void add(const uint16_t* keys, const uint16_t* values, int from, int to, bool known, float scale) {
    const int t = int(threadIdx.x % 4), g = int(threadIdx.x % 32 / 4);
    uint4 k[kLoads][2], v[kHalves][4];
#pragma unroll
    for (int c = 0; c < kLoads; ++c)
#pragma unroll
      for (int r = 0; r < 2; ++r)
        k[c][r] = known ? __ldcs(reinterpret_cast<const uint4*>(keys + (g + r * 8) * kDim + c * 32 + t * 8)) : uint4{0, 0, 0, 0};
#pragma unroll
    for (int h = 0; h < kHalves; ++h)
#pragma unroll
      for (int r = 0; r < 4; ++r) {
        const int key = 2 * t + r % 2 + r / 2 * 8;    // what lies beyond may be anything, and is multiplied by 0
        const bool there = known && key >= from && key < to;
        v[h][r] = there ? __ldcs(reinterpret_cast<const uint4*>(values + key * kDim + h * 64 + g * 8)) : uint4{0, 0, 0, 0};
      }
#pragma unroll
    for (int tile = 0; tile < kTiles; ++tile) {
      float s[4] = {0, 0, 0, 0};    // of key g heads 2t, 2t + 1; of key g + 8
#pragma unroll
      for (int c = 0; c < kLoads; ++c) {
        mma<kHalf>(s, {k[c][0].x, k[c][1].x, k[c][0].y, k[c][1].y}, {q[tile][c][0], q[tile][c][1]});
        mma<kHalf>(s, {k[c][0].z, k[c][1].z, k[c][0].w, k[c][1].w}, {q[tile][c][2], q[tile][c][3]});
      }
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        const bool seen = g + r * 8 >= from && g + r * 8 < to;
#pragma unroll
        for (int i = 0; i < 2; ++i) s[r * 2 + i] = !seen ? -infinity() : known ? s[r * 2 + i] * scale : not_a_number();
      }
      float fade[2];
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        float high = fmaxf(s[i], s[2 + i]);
#pragma unroll
        for (int with = 4; with < 32; with *= 2) high = fmaxf(high, __shfl_xor_sync(kWhole, high, with));
        high = fmaxf(high, top[tile][i]);
        const float base = high == -infinity() ? 0 : high;
        fade[i] = exp2_fast(top[tile][i] - base);
        s[i] = exp2_fast(s[i] - base), s[2 + i] = exp2_fast(s[2 + i] - base);
        sum[tile][i] = fmaf(sum[tile][i], fade[i], s[i] + s[2 + i]);
        top[tile][i] = high;
      }
      const uint32_t weights[2] = {transposed(pack<kHalf>(s[0], s[1])), transposed(pack<kHalf>(s[2], s[3]))};
#pragma unroll
      for (int h = 0; h < kHalves; ++h)
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          float(&d)[4] = acc[tile][h * 4 + i];
          d[0] *= fade[0], d[1] *= fade[1], d[2] *= fade[0], d[3] *= fade[1];
          const uint32_t w[4] = {word(v[h][0], i), word(v[h][1], i), word(v[h][2], i), word(v[h][3], i)};
          mma<kHalf>(d, {lower(w[0], w[1]), upper(w[0], w[1]), lower(w[2], w[3]), upper(w[2], w[3])}, weights);
        }
    }
  }

  __device__ __forceinline__ void end(Parts<kDim, kTiles>& to) {
    const int warp = int(threadIdx.x / 32), t = int(threadIdx.x % 4), g = int(threadIdx.x % 32 / 4);
#pragma unroll
    for (int tile = 0; tile < kTiles; ++tile)
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const int head = tile * kTileHeads + 2 * t + i;
        float all = sum[tile][i];
#pragma unroll
        for (int with = 4; with < 32; with *= 2) all += __shfl_xor_sync(kWhole, all, with);
        if (g == 0) to.top[warp][head] = top[tile][i], to.sum[warp][head] = all;
#pragma unroll
        for (int h = 0; h < kHalves; ++h)
#pragma unroll
          for (int m = 0; m < 4; ++m)
            *reinterpret_cast<float2*>(&to.acc[warp][head][h * 64 + g * 8 + m * 2]) =
                make_float2(acc[tile][h * 4 + m][i], acc[tile][h * 4 + m][2 + i]);
      }
  }

  static __device__ __forceinline__ uint32_t word(const uint4& v, int i) { return i == 0 ? v.x : i == 1 ? v.y : i == 2 ? v.z : v.w; }
};

// Several parts of a head as one: the highest score and what each of them is multiplied by.
template <int kCount, class Top> __device__ __forceinline__ float common_top(int count, const Top& top, float (&factor)[kCount]) {
  float high = -infinity();
#pragma unroll
  for (int i = 0; i < kCount; ++i)
    if (i < count) high = fmaxf(high, factor[i] = top(i));
  const float base = high == -infinity() ? 0 : high;
#pragma unroll
  for (int i = 0; i < kCount; ++i) factor[i] = i < count ? exp2_fast(factor[i] - base) : 0;
  return high;
}

constexpr int kMostSplits = 16;

constexpr int at_once(int dim, int tiles) { return tiles == 1 || dim == 64 ? 2 : 1; }    // blocks, as registers allow

template <int kDim, bool kHalf, int kTiles>
__global__ void __launch_bounds__(kWarps * 32, at_once(kDim, kTiles)) decode_kernel(const PagedAttentionArgs a, int splits) {
  next_may_begin();
  auto& s = shared_memory<Parts<kDim, kTiles>>();
  const int group = int(a.heads / a.kv_heads), warp = int(threadIdx.x / 32), lane = int(threadIdx.x % 32);
  const int split = int(blockIdx.x) % splits, kv_head = int(blockIdx.x) / splits % int(a.kv_heads);
  const int row = int(blockIdx.x) / splits / int(a.kv_heads);

  // The warp's pages are `own` and every `turn`-th one behind it. `entries`: of 32 of them, from `known_from` on, one a lane.
  const int turn = splits * kWarps, own = warp * splits + split;
  const int32_t* table = a.block_table + row * a.table_row;
  int entries = row < a.batch && own + lane * turn < a.max_pages ? table[own + lane * turn] : 0, known_from = 0;
  const Row sees = row_of(a, row);
  if (sees.sequence != row) table = a.block_table + sees.sequence * a.table_row, known_from = -32;
  const int first = sees.begin / kPage, last = (sees.end + kPage - 1) / kPage;
  const auto *k_pages = static_cast<const uint16_t*>(a.k_pages) + int64_t(kv_head) * kPage * kDim;
  const auto *v_pages = static_cast<const uint16_t*>(a.v_pages) + int64_t(kv_head) * kPage * kDim;
  const float scale = float(a.scale) * kLog2e;

  wait_for_previous();    // q, and the last keys and values, may still be on their way; lengths and page numbers are not
  Warp<kDim, kHalf, kTiles> mine;
  mine.begin(a, row, kv_head, group);
  for (int n = first > own ? (first - own + turn - 1) / turn : 0, page; (page = own + n * turn) < last; ++n) {
    if (n >= known_from + 32) {
      known_from = n;
      entries = page + lane * turn < last ? table[page + lane * turn] : 0;
    }
    const int64_t entry = __shfl_sync(kWhole, entries, n - known_from);
    const bool known = entry >= 0 && entry < a.pages;
    mine.add(k_pages + entry * a.k_page, v_pages + entry * a.v_page, sees.begin - page * kPage, sees.end - page * kPage, known, scale);
  }
  mine.end(s);
  __syncthreads();

  // The block's warps as one, in the place of the first.
  constexpr int kPairs = kTiles * kTileHeads * kDim / 2 / (kWarps * 32);
  float2 both[kPairs];
  float top[kPairs], sum[kPairs];
#pragma unroll
  for (int i = 0; i < kPairs; ++i) {
    const int at = (i * kWarps * 32 + int(threadIdx.x)) * 2, head = at / kDim, d = at % kDim;
    float factor[kWarps];
    top[i] = common_top(kWarps, [&](int w) { return s.top[w][head]; }, factor);
    both[i] = make_float2(0, 0), sum[i] = 0;
#pragma unroll
    for (int w = 0; w < kWarps; ++w) {
      const float2 part = *reinterpret_cast<const float2*>(&s.acc[w][head][d]);
      both[i].x = fmaf(factor[w], part.x, both[i].x), both[i].y = fmaf(factor[w], part.y, both[i].y);
      sum[i] = fmaf(factor[w], s.sum[w][head], sum[i]);
    }
  }
  __syncthreads();
#pragma unroll
  for (int i = 0; i < kPairs; ++i) {
    const int at = (i * kWarps * 32 + int(threadIdx.x)) * 2, head = at / kDim, d = at % kDim;
    *reinterpret_cast<float2*>(&s.acc[0][head][d]) = both[i];
    if (d == 0) s.top[0][head] = top[i], s.sum[0][head] = sum[i];
  }

  // The cluster's blocks as one: each writes its share of the row.
  cluster_sync();
  for (int at = (split * kWarps * 32 + int(threadIdx.x)) * 2; at < group * kDim; at += splits * kWarps * 64) {
    const int head = at / kDim, d = at % kDim;
    float factor[kMostSplits];
    float high = common_top(splits, [&](int r) { return *at_rank(&s.top[0][head], unsigned(r)); }, factor);
    float x = 0, y = 0, total = 0;
#pragma unroll
    for (int r = 0; r < kMostSplits; ++r)
      if (r < splits) {
        const float2 part = *at_rank(reinterpret_cast<float2*>(&s.acc[0][head][d]), unsigned(r));
        x = fmaf(factor[r], part.x, x), y = fmaf(factor[r], part.y, y);
        total = fmaf(factor[r], *at_rank(&s.sum[0][head], unsigned(r)), total);
      }
    const float sink = a.sinks ? a.sinks[int64_t(kv_head) * group + head] * kLog2e : -infinity();
    if (sink != -infinity()) {    // that one is none
      const float base = fmaxf(high, sink), fade = exp2_fast(high - base);
      x *= fade, y *= fade, total = fmaf(total, fade, exp2_fast(sink - base));
    }
    const float part = !sees.good ? not_a_number() : total == 0 ? 0 : reciprocal_fast(total);
    uint16_t* out = static_cast<uint16_t*>(a.out) + (int64_t(row) * a.heads + int64_t(kv_head) * group + head) * kDim + d;
    *reinterpret_cast<uint32_t*>(out) = pack<kHalf>(x * part, y * part);
  }
  cluster_sync();    // none leaves while its sums are being read
}

// Blocks that share a row's keys: as many as leave each warp a page, and all of them room at once.
inline int splits_of(const PagedAttentionArgs& a, int at_once) {
  if (attribute(cudaDevAttrComputeCapabilityMajor) < 9) return 1;
  const int64_t room = at_once * attribute(cudaDevAttrMultiProcessorCount), blocks = a.rows * a.kv_heads;
  const int64_t seen = a.window ? a.window / kPage + 1 : a.max_pages, pages = seen < a.max_pages ? seen : a.max_pages;
  int splits = 1;
  while (splits < kMostSplits && blocks * splits * 2 <= room && pages >= splits * 2 * kWarps) splits *= 2;
  return splits;
}

template <int kDim, bool kHalf, int kTiles> int launch_decode(const PagedAttentionArgs& a, void* stream) {
  constexpr int64_t shared = sizeof(Parts<kDim, kTiles>);
  const auto kernel = decode_kernel<kDim, kHalf, kTiles>;
  int splits = splits_of(a, at_once(kDim, kTiles));
  if (splits > 8 && !has_place(kernel, kWarps * 32, shared, splits)) splits = 8;
  return launch_with(weights_rest(), kernel, a.rows * a.kv_heads * splits, kWarps * 32, shared, splits, stream, a, splits);
}

template <int kDim, bool kHalf> int of_heads(const PagedAttentionArgs& a, void* stream) {
  const bool one = a.heads / a.kv_heads <= kTileHeads;
  return one ? launch_decode<kDim, kHalf, 1>(a, stream) : launch_decode<kDim, kHalf, 2>(a, stream);
}

template <int kDim> int of_type(const PagedAttentionArgs& a, void* stream) {
  return a.dtype == kFloat16 ? of_heads<kDim, true>(a, stream) : of_heads<kDim, false>(a, stream);
}

}  // namespace

// What it takes besides: fastllm/ops/attention/decode.py.
int paged_attention(const PagedAttentionArgs& a, char*, void* stream) {
  if (a.heads > a.kv_heads * kMostHeads || a.scales || a.alibi || a.softcap > 0 || (a.window && !a.causal) || a.dtype == kFloat32)
    return int(cudaErrorInvalidValue);
  if (a.dim == 64) return of_type<64>(a, stream);
  return a.dim == 128 ? of_type<128>(a, stream) : int(cudaErrorInvalidValue);
}

}  // namespace fastllm
